/* libhmm in twenty lines: plain malloc memory goes to a device and comes home by itself. */
#include <hmm.h>
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
	size_t count = 1 << 20;
	uint64_t *numbers = malloc(count * sizeof(*numbers)), sum = 0, again = 0;
	struct mm_struct *mm = hmm_mm_current();
	struct hmm_soft_device *device = IS_ERR(mm) ? NULL : hmm_soft_create(mm, NULL);

	if (!numbers || IS_ERR(mm) || IS_ERR(device))
		return fprintf(stderr, "no device: %s\n", hmm_last_error()), 1;
	for (size_t i = 0; i < count; i++)
		numbers[i] = 1;

	printf("engine %s: %ld pages moved to the device\n", hmm_mm_engine(mm),
	       hmm_soft_migrate(device, numbers, count * sizeof(*numbers)));
	hmm_soft_sum_u64(device, numbers, count, &sum); /* by the CPU's own pointer */

	numbers[1000] = 7; /* an ordinary store: the page comes home first */
	hmm_soft_sum_u64(device, numbers, count, &again);
	printf("the device's sums: %ju, then %ju\n", (uintmax_t)sum, (uintmax_t)again);

	if (hmm_soft_destroy(device) || hmm_mm_put(mm))
		return fprintf(stderr, "not closed: %s\n", hmm_last_error()), 1;
	free(numbers);
	return sum != count || again != count + 6;
}
