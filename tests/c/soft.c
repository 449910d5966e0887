/* The soft device: what its kernels compute, wherever the pages are, and bad input to each of its functions. */
#include "memory.h"
#include "tap.h"

#include <stddef.h>

#define WORDS ((size_t)4096)
#define BYTES (WORDS * 8)

struct node {
	struct node *next;
	uint64_t value;
};

static struct mm_struct *mm;
static struct hmm_soft_device *device;

static struct hmm_soft_counters counters(void)
{
	struct hmm_soft_counters now = { .size = sizeof(now) };

	CHECK_EQ(hmm_soft_counters(device, &now), 0);
	return now;
}

/* Two arrays of doubles; every second run of pages is on the device. */
static void arithmetic_is_right(void)
{
	double *x = (void *)memory_map(BYTES / PAGE, PROT_READ | PROT_WRITE);
	double *y = (void *)memory_map(BYTES / PAGE, PROT_READ | PROT_WRITE), sum = 0;
	size_t wrong = 0;

	for (size_t i = 0; i < WORDS; i++)
		x[i] = (double)i, y[i] = 1;
	CHECK_EQ(hmm_soft_migrate(device, x, BYTES / 2), BYTES / 2 / PAGE);
	CHECK_EQ(hmm_soft_migrate(device, (char *)y + BYTES / 4, BYTES / 2), BYTES / 2 / PAGE);
	CHECK_EQ(hmm_soft_axpy_f64(device, 2, x, y, WORDS), 0);
	CHECK_EQ(hmm_soft_sum_f64(device, y, WORDS, &sum), 0);
	CHECK(sum == (double)(WORDS * (WORDS - 1) + WORDS));
	for (size_t i = 0; i < WORDS; i++)
		wrong += y[i] != 2 * (double)i + 1;
	CHECK_EQ(wrong, 0);
	CHECK(counters().cpu_faults > 0 && counters().pages_to_device >= BYTES / PAGE);
	memory_unmap((void *)x, BYTES / PAGE);
	memory_unmap((void *)y, BYTES / PAGE);
}

static void words_and_bytes_are_right(void)
{
	uint64_t *a = (void *)memory_map(BYTES / PAGE, PROT_READ | PROT_WRITE), sum = 0, old = 0;
	uint64_t *b = (void *)memory_map(BYTES / PAGE, PROT_READ | PROT_WRITE);
	uint64_t *index = (void *)memory_map(BYTES / PAGE, PROT_READ | PROT_WRITE);

	for (size_t i = 0; i < WORDS; i++)
		a[i] = i, index[i] = WORDS - 1 - i;
	CHECK_EQ(hmm_soft_migrate(device, a, BYTES), BYTES / PAGE);
	CHECK_EQ(hmm_soft_sum_u64(device, a, WORDS, &sum), 0);
	CHECK_EQ(sum, WORDS * (WORDS - 1) / 2);
	CHECK_EQ(hmm_soft_gather_u64(device, b, a, index, WORDS), 0);
	CHECK(b[0] == WORDS - 1 && b[WORDS - 1] == 0);
	CHECK_EQ(hmm_soft_add_u64(device, a, WORDS / 2, 16, 5), 0);
	CHECK(a[0] == 5 && a[1] == 1 && a[2] == 7);
	CHECK_EQ(hmm_soft_atomic_add_u64(device, &a[1], 10, &old), 0);
	CHECK_EQ(old, 1);
	CHECK_EQ(hmm_soft_atomic_add_u64(device, &a[1], 10, NULL), 0);
	CHECK_EQ(a[1], 21);
	CHECK_EQ(hmm_soft_copy(device, b, a, BYTES), 0);
	CHECK(!memcmp(a, b, BYTES));
	CHECK_EQ(hmm_soft_fill(device, (char *)b + 1, BYTES - 2, 0xab), 0);
	CHECK(((unsigned char *)b)[0] == 5 && ((unsigned char *)b)[1] == 0xab);
	CHECK_EQ(hmm_soft_migrate(device, b, BYTES), BYTES / PAGE);
	CHECK_EQ(hmm_soft_bring_home(device, b, BYTES), BYTES / PAGE);
	CHECK_EQ(memory_count(mm, b, BYTES / PAGE, HMM_RESIDENCY_SYSTEM), BYTES / PAGE);
	memory_unmap((void *)a, BYTES / PAGE);
	memory_unmap((void *)b, BYTES / PAGE);
	memory_unmap((void *)index, BYTES / PAGE);
}

static void lists_are_walked_by_the_process_own_pointers(void)
{
	struct node *first = NULL;
	uint64_t visited = 0, sum = 0;

	for (uint64_t i = 1; i <= 1000; i++) {
		struct node *node = malloc(i % 7 ? sizeof(*node) : 3000);

		*node = (struct node){ first, i };
		first = node;
	}
	CHECK(hmm_soft_migrate(device, first, 1) >= 0);
	CHECK_EQ(hmm_soft_chase(device, first, offsetof(struct node, next), 5000, &visited), 0);
	CHECK_EQ(visited, 1000);
	CHECK_EQ(hmm_soft_chase(device, first, offsetof(struct node, next), 10, &visited), 0);
	CHECK_EQ(visited, 10);
	CHECK_EQ(hmm_soft_chase_sum_u64(device, first, offsetof(struct node, next), offsetof(struct node, value), 5000, &sum),
		 0);
	CHECK_EQ(sum, 500500);
	while (first) {
		struct node *next = first->next;

		free(first);
		first = next;
	}
}

static void bad_configurations_are_refused(void)
{
	struct {
		struct hmm_soft_config config;
		uint64_t tail;
	} longer = { { .size = sizeof(longer) }, 1 };
	struct hmm_soft_config config = { .size = sizeof(config) };
	struct hmm_soft_device *other;

#define BAD(member, value)                                                                     \
	do {                                                                                   \
		struct hmm_soft_config bad = config;                                           \
		bad.member = value;                                                            \
		REFUSED_POINTER(hmm_soft_create(mm, &bad), EINVAL);                            \
	} while (0)
	BAD(size, 0);
	BAD(size, 3);
	BAD(policy, 3);
	BAD(memory_bytes, PAGE + 1);
	BAD(memory_bytes, (256UL << 30) + PAGE);
	BAD(fault_around, 513);
	BAD(threads, 65);
	REFUSED_POINTER(hmm_soft_create(mm, &longer.config), EINVAL);
	REFUSED_POINTER(hmm_soft_create(NULL, &config), EINVAL);
	REFUSED_POINTER(hmm_soft_create(mm, (void *)((char *)&config + 1)), EINVAL);

	longer.tail = 0;
	other = hmm_soft_create(mm, &longer.config);
	CHECK(!IS_ERR(other));
	CHECK_EQ(hmm_soft_destroy(other), 0);
	REFUSED(hmm_soft_destroy(other), EINVAL);
	config = (struct hmm_soft_config){ .size = 8, .policy = HMM_SOFT_NEVER, .threads = 9999 };
	other = hmm_soft_create(mm, &config);
	CHECK(!IS_ERR(other));
	REFUSED(hmm_soft_migrate(other, &config, 1), EOPNOTSUPP);
	CHECK_EQ(hmm_soft_set_policy(other, HMM_SOFT_ON_TOUCH), 0);
	REFUSED(hmm_soft_set_policy(other, 3), EINVAL);
	CHECK_EQ(hmm_soft_set_speed(other, 1000, 1 << 30), 0);
	CHECK_EQ(hmm_soft_destroy(other), 0);
}

static void foreign_devices_are_refused(void)
{
	struct hmm_soft_counters now = { .size = sizeof(now) };
	void *const foreign[] = { NULL, (void *)1, (void *)0x1000, (void *)mm, (void *)&now, (char *)device + 8 };
	uint64_t word[2] = { 7, 7 }, result = 7;
	double number = 7;

	for (size_t i = 0; i < sizeof(foreign) / sizeof(*foreign); i++) {
		struct hmm_soft_device *bad = foreign[i];

		REFUSED(hmm_soft_destroy(bad), EINVAL);
		REFUSED(hmm_soft_migrate(bad, word, 8), EINVAL);
		REFUSED(hmm_soft_bring_home(bad, word, 8), EINVAL);
		REFUSED(hmm_soft_counters(bad, &now), EINVAL);
		REFUSED(hmm_soft_set_policy(bad, 0), EINVAL);
		REFUSED(hmm_soft_set_speed(bad, 0, 0), EINVAL);
		REFUSED(hmm_soft_fill(bad, word, 8, 0), EINVAL);
		REFUSED(hmm_soft_copy(bad, &word[0], &word[1], 8), EINVAL);
		REFUSED(hmm_soft_axpy_f64(bad, 1, &number, &number, 1), EINVAL);
		REFUSED(hmm_soft_sum_f64(bad, &number, 1, &number), EINVAL);
		REFUSED(hmm_soft_sum_u64(bad, word, 1, &result), EINVAL);
		REFUSED(hmm_soft_gather_u64(bad, &word[0], word, &word[1], 1), EINVAL);
		REFUSED(hmm_soft_chase(bad, word, 0, 1, &result), EINVAL);
		REFUSED(hmm_soft_chase_sum_u64(bad, word, 0, 8, 1, &result), EINVAL);
		REFUSED(hmm_soft_atomic_add_u64(bad, word, 1, &result), EINVAL);
		REFUSED(hmm_soft_add_u64(bad, word, 1, 8, 1), EINVAL);
	}
	CHECK(word[0] == 7 && word[1] == 7 && result == 7 && number == 7);
}

static void bad_arguments_of_kernels_are_refused(void)
{
	uint64_t *word = (void *)memory_map(1, PROT_READ | PROT_WRITE), result = 7;
	void *odd = (char *)word + 4, *high = (void *)(1UL << 47);
	double number = 7;

	word[0] = word[1] = word[2] = 7;
	REFUSED(hmm_soft_migrate(device, NULL, 8), EINVAL);
	REFUSED(hmm_soft_migrate(device, word, 0), EINVAL);
	REFUSED(hmm_soft_migrate(device, word, ~0UL), EINVAL);
	REFUSED(hmm_soft_bring_home(device, high, 8), EINVAL);
	REFUSED(hmm_soft_fill(device, NULL, 8, 0), EINVAL);
	REFUSED(hmm_soft_fill(device, word, 0, 0), EINVAL);
	REFUSED(hmm_soft_fill(device, word, ~0UL, 0), EINVAL);
	REFUSED(hmm_soft_copy(device, word, (char *)word + 1, 8), EINVAL);
	REFUSED(hmm_soft_copy(device, NULL, word, 8), EINVAL);
	REFUSED(hmm_soft_axpy_f64(device, 1, odd, &number, 1), EINVAL);
	REFUSED(hmm_soft_axpy_f64(device, 1, (double *)word, (double *)word + 1, 2), EINVAL);
	REFUSED(hmm_soft_sum_f64(device, (double *)word, 0, &number), EINVAL);
	REFUSED(hmm_soft_sum_f64(device, (double *)word, 1, NULL), EINVAL);
	REFUSED(hmm_soft_sum_f64(device, (double *)word, ~0UL, &number), EINVAL);
	REFUSED(hmm_soft_sum_u64(device, odd, 1, &result), EINVAL);
	REFUSED(hmm_soft_sum_u64(device, word, 1, odd), EINVAL);
	REFUSED(hmm_soft_gather_u64(device, word, word, word, 1), EINVAL);
	REFUSED(hmm_soft_gather_u64(device, word, NULL, &word[1], 1), EINVAL);
	REFUSED(hmm_soft_chase(device, word, 4, 1, &result), EINVAL);
	REFUSED(hmm_soft_chase(device, word, 0, 0, &result), EINVAL);
	REFUSED(hmm_soft_chase(device, word, 0, 1, NULL), EINVAL);
	REFUSED(hmm_soft_chase_sum_u64(device, word, 0, 4, 1, &result), EINVAL);
	REFUSED(hmm_soft_atomic_add_u64(device, odd, 1, &result), EINVAL);
	REFUSED(hmm_soft_atomic_add_u64(device, word, 1, odd), EINVAL);
	REFUSED(hmm_soft_add_u64(device, word, 2, 4, 1), EINVAL);
	REFUSED(hmm_soft_add_u64(device, word, 0, 8, 1), EINVAL);
	REFUSED(hmm_soft_add_u64(device, word, 1UL << 62, 1UL << 62, 1), EINVAL);
	REFUSED(hmm_soft_counters(device, NULL), EINVAL);
	CHECK(word[0] == 7 && word[1] == 7 && word[2] == 7 && result == 7 && number == 7);

	/* What only the device can find out. */
	mprotect(word, PAGE, PROT_READ);
	REFUSED(hmm_soft_fill(device, word, 8, 0), EPERM);
	CHECK_EQ(word[0], 7);
	mprotect(word, PAGE, PROT_READ | PROT_WRITE);
	memory_unmap((void *)word, 1);
	REFUSED(hmm_soft_sum_u64(device, word, 1, &result), EFAULT);
	REFUSED(hmm_soft_migrate(device, word, 8), EFAULT);
	CHECK_EQ(result, 7);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(arithmetic_is_right),
		TEST(words_and_bytes_are_right),
		TEST(lists_are_walked_by_the_process_own_pointers),
		TEST(bad_configurations_are_refused),
		TEST(foreign_devices_are_refused),
		TEST(bad_arguments_of_kernels_are_refused),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	device = hmm_soft_create(mm, NULL);
	if (IS_ERR(device))
		return 2;
	failed = tap_run(tests, count);
	failed |= hmm_soft_destroy(device) != 0;
	return hmm_mm_put(mm) ? 1 : failed;
}
