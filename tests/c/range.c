/* Ranges in hmm.txt's form: what a look reports, and that hmm_vma_range_done() is false exactly when it must be. */
#include "device.h"

#include <time.h>
#include <unistd.h>

#define PAGES 8
#define UNTOUCHED 0x5a5a5a5a5a5a5a5aUL

static struct mm_struct *mm;
static struct test_device device;
static hmm_pfn_t pfns[PAGES];

/* The driver's side: its update lock, taken by the callback. Pinned with the mirror. */
static struct driver {
	struct hmm_mirror mirror;
	pthread_mutex_t update;
	atomic_bool wants_lock;
	atomic_int calls;
} driver = { .update = PTHREAD_MUTEX_INITIALIZER };

static void on_update(struct hmm_mirror *mirror, enum hmm_update_type type, unsigned long start, unsigned long end)
{
	(void)mirror, (void)type, (void)start, (void)end;
	driver.wants_lock = true;
	pthread_mutex_lock(&driver.update);
	driver.calls++;
	pthread_mutex_unlock(&driver.update);
	driver.wants_lock = false;
}

static const struct hmm_mirror_ops ops = { .sync_cpu_device_pagetables = on_update };

static unsigned char *fresh(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	memset(pfns, 0x5a, sizeof(pfns));
	/* An unmapping of what was here before may still be on its way. */
	CHECK_EQ(hmm_mm_sync(mm), 0);
	return memory;
}

static int look(unsigned char *memory, size_t first, size_t pages, struct hmm_range *range)
{
	unsigned long start = address(memory) + first * PAGE;
	int ret;

	hmm_mm_read_lock(mm);
	ret = hmm_vma_get_pfns(find_vma(mm, start), range, start, start + pages * PAGE, pfns);
	hmm_mm_read_unlock(mm);
	return ret;
}

static int fault(unsigned char *memory, size_t pages, bool write, struct hmm_range *range)
{
	unsigned long start = address(memory);
	int ret;

	hmm_mm_read_lock(mm);
	ret = hmm_vma_fault(find_vma(mm, start), range, start, start + pages * PAGE, pfns, write, true);
	hmm_mm_read_unlock(mm);
	return ret;
}

static void a_look_reports_what_is_there(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range;

	CHECK_EQ(hmm_mm_sync(mm), 0);
	memory[0] = 1;
	memory[2 * PAGE] = 1;
	CHECK_EQ(look(memory, 0, 4, &range), 0);
	CHECK_EQ(range.start, address(memory));
	CHECK_EQ(range.end, address(memory) + 4 * PAGE);
	CHECK(range.pfns == pfns && range.valid);
	CHECK_EQ(pfns[0] & 0x7f, HMM_PFN_VALID | HMM_PFN_READ | HMM_PFN_WRITE);
	CHECK_EQ(hmm_pfn_t_to_pfn(pfns[0]), address(memory) >> PAGE_SHIFT);
	CHECK(pfn_to_virt(hmm_pfn_t_to_pfn(pfns[2])) == memory + 2 * PAGE);
	CHECK_EQ(pfns[1], HMM_PFN_EMPTY);
	CHECK_EQ(pfns[3], HMM_PFN_EMPTY);
	CHECK(hmm_vma_range_done(NULL, &range) && range.valid);
	CHECK_EQ(memory_count(mm, memory, 4, HMM_RESIDENCY_NONE), 2);
	memory_unmap(memory, PAGES);
}

static void a_fault_makes_it_present(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range;

	CHECK_EQ(hmm_mm_sync(mm), 0);
	CHECK_EQ(fault(memory, PAGES, false, &range), 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(pfns[i] & (HMM_PFN_VALID | HMM_PFN_READ), HMM_PFN_VALID | HMM_PFN_READ);
	hmm_vma_range_done(NULL, &range);
	CHECK_EQ(fault(memory, PAGES, true, &range), 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(pfns[i] & HMM_PFN_WRITE);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	CHECK(hmm_vma_range_done(NULL, &range));
	memory_unmap(memory, PAGES);
}

static void protection_is_respected(void)
{
	unsigned char *memory = fresh();
	struct hmm_range range;

	mprotect(memory, PAGES * PAGE, PROT_READ);
	CHECK_EQ(fault(memory, PAGES, false, &range), 0);
	CHECK_EQ(pfns[0] & HMM_PFN_WRITE, 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	REFUSED(fault(memory, PAGES, true, &range), EPERM);
	CHECK(!hmm_vma_range_done(NULL, &range));
	mprotect(memory, PAGES * PAGE, PROT_NONE);
	REFUSED(look(memory, 0, PAGES, &range), EPERM);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(pfns[i], 0);
	mprotect(memory, PAGES * PAGE, PROT_READ);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

static void done_is_true_when_nothing_changed_inside(void)
{
	unsigned char *memory = fresh();
	struct hmm_range range;

	/* Before the look, and far outside the range: neither counts. */
	madvise(memory, PAGE, MADV_DONTNEED);
	hmm_mm_sync(mm);
	CHECK_EQ(look(memory, 2, 2, &range), 0);
	madvise(memory + 6 * PAGE, PAGE, MADV_DONTNEED);
	hmm_mm_sync(mm);
	CHECK(hmm_vma_range_done(NULL, &range));
	CHECK(pfns[0] & HMM_PFN_VALID && pfns[1] & HMM_PFN_VALID);
	memory_unmap(memory, PAGES);
}

static void done_is_false_and_zeroes_what_changed(void)
{
	unsigned char *memory = fresh();
	struct hmm_range range;

	NEEDS(mm, EVENTS);
	CHECK_EQ(look(memory, 0, PAGES, &range), 0);
	madvise(memory + 2 * PAGE, 2 * PAGE, MADV_DONTNEED);
	hmm_mm_sync(mm);
	CHECK(!hmm_vma_range_done(NULL, &range) && !range.valid);
	CHECK_EQ(pfns[2], 0);
	CHECK_EQ(pfns[3], 0);
	CHECK(pfns[0] & HMM_PFN_VALID && pfns[1] & HMM_PFN_VALID && pfns[4] & HMM_PFN_VALID && pfns[7] & HMM_PFN_VALID);

	CHECK_EQ(look(memory, 0, PAGES, &range), 0);
	munmap(memory + 7 * PAGE, PAGE);
	hmm_mm_sync(mm);
	CHECK(!hmm_vma_range_done(NULL, &range));
	CHECK_EQ(pfns[7], 0);
	memory_unmap(memory, PAGES);
}

static void migration_is_a_change(void)
{
	unsigned char *memory = fresh();
	struct hmm_range range;

	CHECK_EQ(look(memory, 0, PAGES, &range), 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory + 2 * PAGE, 2), 0);
	CHECK(!hmm_vma_range_done(NULL, &range) && !range.valid);
	CHECK_EQ(pfns[2], 0);
	CHECK_EQ(pfns[3], 0);
	CHECK(pfns[0] & HMM_PFN_VALID && pfns[1] & HMM_PFN_VALID && pfns[4] & HMM_PFN_VALID && pfns[7] & HMM_PFN_VALID);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

static void done_is_called_once(void)
{
	unsigned char *memory = fresh();
	struct hmm_range range, garbage;

	CHECK_EQ(look(memory, 0, PAGES, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	memset(pfns, 0x5a, sizeof(pfns));
	CHECK(!hmm_vma_range_done(NULL, &range));
	CHECK_EQ(hmm_last_errno(), -EINVAL);
	CHECK(range.valid);
	CHECK_EQ(pfns[0], UNTOUCHED);

	/* A range that never was one, whatever its memory holds; also a copy of an active one. */
	memset(&garbage, 0xa5, sizeof(garbage));
	CHECK(!hmm_vma_range_done(NULL, &garbage));
	CHECK_EQ(look(memory, 0, PAGES, &range), 0);
	garbage = range;
	CHECK(!hmm_vma_range_done(NULL, &garbage));
	CHECK(hmm_vma_range_done(NULL, &range));

	/* A range that is looked at again starts anew; the first look is forgotten. */
	for (int i = 0; i < 5000; i++)
		CHECK_EQ(look(memory, 0, 1, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	memory_unmap(memory, PAGES);
}

static void device_pages_are_reported_as_such(void)
{
	unsigned char *memory = fresh();
	struct hmm_range range;
	int faults = device.faults;

	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, 4), 0);
	CHECK_EQ(look(memory, 0, PAGES, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	for (size_t i = 0; i < 4; i++) {
		CHECK_EQ(pfns[i] & (HMM_PFN_VALID | HMM_PFN_WRITE | HMM_PFN_DEVICE_UNADDRESSABLE),
			 HMM_PFN_VALID | HMM_PFN_WRITE | HMM_PFN_DEVICE_UNADDRESSABLE);
		CHECK(hmm_pfn_t_to_page(pfns[i]) == migrate_pfn_to_page(device.dst[i]));
	}
	CHECK_EQ(pfns[4] & HMM_PFN_DEVICE_UNADDRESSABLE, 0);
	/* A plain fault takes them as they are; nothing comes home. */
	CHECK_EQ(fault(memory, PAGES, true, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	CHECK(pfns[0] & HMM_PFN_DEVICE_UNADDRESSABLE);
	CHECK_EQ(device.faults, faults);
	/* A touch by the CPU is a change. */
	CHECK_EQ(look(memory, 0, PAGES, &range), 0);
	CHECK_EQ(memory[PAGE], memory_pattern(1));
	CHECK(!hmm_vma_range_done(NULL, &range));
	CHECK_EQ(pfns[1], 0);
	memory_unmap(memory, PAGES);
}

static void *change_a_page(void *memory)
{
	test_device_change(&device, memory);
	hmm_mm_sync(mm);
	return NULL;
}

/* The other half of the protocol: the change came first, its callback waits for our lock, and done must not wait for it. */
static void done_under_the_lock_does_not_wait_for_callbacks(void)
{
	unsigned char *memory = fresh();
	struct timespec before, after;
	struct hmm_range range;
	pthread_t thread;
	int calls = driver.calls;

	CHECK_EQ(look(memory, 0, PAGES, &range), 0);
	pthread_mutex_lock(&driver.update);
	pthread_create(&thread, NULL, change_a_page, memory);
	for (int i = 0; i < 5000 && !driver.wants_lock; i++)
		usleep(1000);
	CHECK(driver.wants_lock);
	clock_gettime(CLOCK_MONOTONIC, &before);
	CHECK(!hmm_vma_range_done(NULL, &range));
	clock_gettime(CLOCK_MONOTONIC, &after);
	CHECK(after.tv_sec - before.tv_sec < 3);
	CHECK_EQ(driver.calls, calls);
	pthread_mutex_unlock(&driver.update);
	pthread_join(thread, NULL);
	CHECK_EQ(driver.calls, calls + 1);
	memory_unmap(memory, PAGES);
}

static atomic_bool stop;

static void *replace_all_the_time(void *memory)
{
	while (!stop)
		madvise(memory, PAGES * PAGE, MADV_DONTNEED);
	return NULL;
}

/* Whatever is written under the lock after a true was true at that moment, or is removed by a callback that comes later. */
static void populating_while_everything_changes(void)
{
	unsigned char *memory = fresh();
	int good = 0, again = 0;
	struct hmm_range range;
	pthread_t thread;

	stop = false;
	pthread_create(&thread, NULL, replace_all_the_time, memory);
	for (int i = 0; i < 20000 && good < 200; i++) {
		int ret = fault(memory, PAGES, true, &range);

		CHECK(!ret || ret == -EBUSY);
		if (ret)
			continue;
		pthread_mutex_lock(&driver.update);
		if (hmm_vma_range_done(NULL, &range)) {
			good++;
			for (size_t page = 0; page < PAGES; page++)
				CHECK(pfns[page] & HMM_PFN_WRITE);
		} else {
			again++;
		}
		pthread_mutex_unlock(&driver.update);
	}
	stop = true;
	pthread_join(thread, NULL);
	printf("# %d populated, %d times again\n", good, again);
	CHECK(good > 0);
	memory_unmap(memory, PAGES);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(a_look_reports_what_is_there),
		TEST(a_fault_makes_it_present),
		TEST(protection_is_respected),
		TEST(done_is_true_when_nothing_changed_inside),
		TEST(done_is_false_and_zeroes_what_changed),
		TEST(migration_is_a_change),
		TEST(done_is_called_once),
		TEST(device_pages_are_reported_as_such),
		TEST(done_under_the_lock_does_not_wait_for_callbacks),
		TEST(populating_while_everything_changes),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	driver.mirror.ops = &ops;
	if (hmm_mirror_register(&driver.mirror, mm) || hmm_pin_range(mm, &driver, sizeof(driver)))
		return 2;
	test_device_open(&device, mm);
	failed = tap_run(tests, count);
	test_device_close(&device);
	hmm_mirror_unregister(&driver.mirror);
	return hmm_mm_put(mm) ? 1 : failed;
}
