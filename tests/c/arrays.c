/* migrate_vma()'s arrays and bounds: large ranges, rounding, arrays that lie in the memory that migrates. */
#include "device.h"

static struct mm_struct *mm;
static struct test_device device;

/* What the callbacks of one migration saw. */
static struct {
	struct mm_struct *mm;
	unsigned long start, *src, *dst;
	int batches, wrong_pointers;
	unsigned long next;
} seen;

static void count_batch(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst, unsigned long start,
			unsigned long end, void *data)
{
	unsigned long first = (start - seen.start) / PAGE;

	seen.batches++;
	seen.wrong_pointers += src != seen.src + first || dst != seen.dst + first || start < seen.next || end <= start;
	seen.wrong_pointers += hmm_vma_mm(vma) != seen.mm || data != &seen;
	seen.next = end;
	for (unsigned long i = 0; i < (end - start) / PAGE; i++)
		seen.wrong_pointers += dst[i] != 0 || !(src[i] & MIGRATE_PFN_MIGRATE);
}

static void check_batch(struct vm_area_struct *vma, const unsigned long *src, const unsigned long *dst,
			unsigned long start, unsigned long end, void *data)
{
	(void)vma, (void)data;
	for (unsigned long i = 0; i < (end - start) / PAGE; i++)
		seen.wrong_pointers += dst[i] != 0 || src[i] & MIGRATE_PFN_MIGRATE;
}

static void large_ranges_come_in_batches(void)
{
	static const struct migrate_vma_ops ops = { count_batch, check_batch };
	size_t pages = 48 * 256, wrong = 0;
	unsigned char *memory = memory_map(pages, PROT_READ | PROT_WRITE);
	unsigned long *src = malloc(pages * sizeof(*src)), *dst = malloc(pages * sizeof(*dst));

	memory_fill(memory, pages);
	memset(src, 0x77, pages * sizeof(*src));
	memset(dst, 0x77, pages * sizeof(*dst));
	seen.mm = mm;
	seen.start = address(memory);
	seen.src = src;
	seen.dst = dst;
	hmm_mm_read_lock(mm);
	CHECK_EQ(migrate_vma(&ops, find_vma(mm, seen.start), pages, seen.start, seen.start + pages * PAGE, src, dst, &seen), 0);
	hmm_mm_read_unlock(mm);
	CHECK(seen.batches >= 2);
	CHECK_EQ(seen.wrong_pointers, 0);
	for (size_t i = 0; i < pages; i++)
		wrong += dst[i] != 0 || src[i] & MIGRATE_PFN_MIGRATE;
	CHECK_EQ(wrong, 0);
	CHECK_EQ(memory_wrong(memory, pages), 0);
	free(src);
	free(dst);
	memory_unmap(memory, pages);
}

static void bounds_are_rounded_down_to_pages(void)
{
	unsigned char *memory = memory_map(4, PROT_READ | PROT_WRITE);
	unsigned long start = address(memory);
	struct vm_area_struct *vma;

	memory_fill(memory, 4);
	hmm_mm_read_lock(mm);
	vma = find_vma(mm, start);
	CHECK_EQ(migrate_vma(&test_to_device, vma, 2, start + PAGE + 5, start + 3 * PAGE + 4095, device.src, device.dst, &device),
		 0);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, 4, HMM_RESIDENCY_DEVICE), 2);
	CHECK_EQ(memory_count(mm, memory + PAGE, 2, HMM_RESIDENCY_DEVICE), 2);
	CHECK_EQ(memory_wrong(memory, 4), 0);
	memory_unmap(memory, 4);
}

/* The heap that holds the arrays may be the heap that migrates: then the arrays stay. */
static void arrays_may_lie_in_the_range_itself(void)
{
	unsigned char *memory = memory_map(8, PROT_READ | PROT_WRITE);
	unsigned long *src = (void *)(memory + 2 * PAGE), *dst = (void *)(memory + 5 * PAGE), start = address(memory);

	memory_fill(memory, 8);
	hmm_mm_read_lock(mm);
	CHECK_EQ(migrate_vma(&test_to_device, find_vma(mm, start), 8, start, start + 8 * PAGE, src, dst, &device), 0);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, 8, HMM_RESIDENCY_DEVICE), 6);
	CHECK_EQ(memory_count(mm, src, 1, HMM_RESIDENCY_SYSTEM), 1);
	CHECK_EQ(memory_count(mm, dst, 1, HMM_RESIDENCY_SYSTEM), 1);
	for (int i = 0; i < 8; i++)
		CHECK_EQ(!(src[i] & MIGRATE_PFN_MIGRATE), i == 2 || i == 5);
	CHECK_EQ(memory[7 * PAGE], memory_pattern(7));
	memory_unmap(memory, 8);
}

/* Arrays that are on the device themselves come home first. */
static void arrays_may_be_on_the_device(void)
{
	unsigned char *memory = memory_map(4, PROT_READ | PROT_WRITE), *arrays = memory_map(2, PROT_READ | PROT_WRITE);
	unsigned long *src = (void *)arrays, *dst = (void *)(arrays + PAGE), start = address(memory);

	memory_fill(memory, 4);
	memory_fill(arrays, 2);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, arrays, 2), 0);
	CHECK_EQ(memory_count(mm, arrays, 2, HMM_RESIDENCY_DEVICE), 2);
	hmm_mm_read_lock(mm);
	CHECK_EQ(migrate_vma(&test_to_device, find_vma(mm, start), 4, start, start + 4 * PAGE, src, dst, &device), 0);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, 4, HMM_RESIDENCY_DEVICE), 4);
	CHECK_EQ(memory_wrong(memory, 4), 0);
	memory_unmap(arrays, 2);
	memory_unmap(memory, 4);
}

static atomic_bool stop;

/* Plain increments of one's own word in each page. */
static void *increment(void *word)
{
	unsigned long rounds = 0;

	while (!stop) {
		for (size_t page = 0; page < 32; page++)
			((volatile unsigned long *)word)[page * PAGE / sizeof(long)]++;
		rounds++;
	}
	return (void *)rounds;
}

static void no_store_is_lost(void)
{
	unsigned char *memory = memory_map(32, PROT_READ | PROT_WRITE);
	unsigned long *words = (void *)memory, rounds[2];
	pthread_t threads[2];
	void *result;

	memset(memory, 0, 32 * PAGE);
	for (int i = 0; i < 2; i++)
		pthread_create(&threads[i], NULL, increment, &words[i * 16]);
	for (int i = 0; i < 300; i++) {
		CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, 32), 0);
		if (i % 3 == 0)
			CHECK_EQ(test_device_migrate(&device, &test_to_system, memory, 32), 0);
	}
	stop = true;
	for (int i = 0; i < 2; i++) {
		pthread_join(threads[i], &result);
		rounds[i] = (unsigned long)result;
		for (size_t page = 0; page < 32; page++)
			CHECK_EQ(words[page * PAGE / sizeof(long) + i * 16], rounds[i]);
	}
	printf("# %lu and %lu rounds, %d CPU faults, %d migrations\n", rounds[0], rounds[1], device.faults, device.copies);
	CHECK(device.faults > 0);
	memory_unmap(memory, 32);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(large_ranges_come_in_batches),
		TEST(bounds_are_rounded_down_to_pages),
		TEST(arrays_may_lie_in_the_range_itself),
		TEST(arrays_may_be_on_the_device),
		TEST(no_store_is_lost),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	test_device_open(&device, mm);
	failed = tap_run(tests, count);
	test_device_close(&device);
	return hmm_mm_put(mm) ? 1 : failed;
}
