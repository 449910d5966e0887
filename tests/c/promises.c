/* The promises of hmm.txt that are about the C interface, by number. */
#include "device.h"

#include <fcntl.h>
#include <unistd.h>

#define PAGES 8

static struct mm_struct *mm;
static struct test_device device;
static hmm_pfn_t pfns[PAGES];

/* A mirror that counts. */
static struct listener {
	struct hmm_mirror mirror;
	unsigned long start, end;	/* what it counts */
	atomic_int calls, inside;
	atomic_bool slow;
} one;

static void on_update(struct hmm_mirror *mirror, enum hmm_update_type type, unsigned long start, unsigned long end)
{
	struct listener *listener = container_of(mirror, struct listener, mirror);

	if (type != HMM_UPDATE_INVALIDATE || end <= listener->start || listener->end <= start)
		return;
	listener->inside++;
	if (listener->slow)
		usleep(100 * 1000);
	listener->calls++;
	listener->inside--;
}

static const struct hmm_mirror_ops ops = { .sync_cpu_device_pagetables = on_update };

static void prepare(struct listener *listener, const unsigned char *memory)
{
	CHECK_EQ(hmm_mm_sync(mm), 0);
	memset(listener, 0, sizeof(*listener));
	listener->mirror.ops = &ops;
	listener->start = address(memory);
	listener->end = address(memory) + PAGES * PAGE;
}

static unsigned char *begin(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	prepare(&one, memory);
	CHECK_EQ(hmm_mirror_register(&one.mirror, mm), 0);
	memset(pfns, 0x5a, sizeof(pfns));
	return memory;
}

static void finish(unsigned char *memory)
{
	hmm_mirror_unregister(&one.mirror);
	CHECK_EQ(hmm_last_errno(), 0);
	memory_unmap(memory, PAGES);
	CHECK_EQ(hmm_mm_sync(mm), 0);
}

static int look(const void *memory, size_t pages, struct hmm_range *range)
{
	unsigned long start = address(memory);
	int ret;

	hmm_mm_read_lock(mm);
	ret = hmm_vma_get_pfns(find_vma(mm, start), range, start, start + pages * PAGE, pfns);
	hmm_mm_read_unlock(mm);
	return ret;
}

static int fault(const void *memory, size_t pages, bool write, struct hmm_range *range)
{
	unsigned long start = address(memory);
	int ret;

	hmm_mm_read_lock(mm);
	ret = hmm_vma_fault(find_vma(mm, start), range, start, start + pages * PAGE, pfns, write, true);
	hmm_mm_read_unlock(mm);
	return ret;
}

static void promise_18_without_a_mirror_ranges_are_refused(void)
{
	unsigned char *memory = begin();
	struct hmm_range range;

	CHECK_EQ(look(memory, PAGES, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	hmm_mirror_unregister(&one.mirror);
	REFUSED(look(memory, PAGES, &range), EINVAL);
	REFUSED(fault(memory, PAGES, false, &range), EINVAL);
	CHECK_EQ(hmm_mirror_register(&one.mirror, mm), 0);
	CHECK_EQ(fault(memory, PAGES, false, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	finish(memory);
}

static void promise_19_a_mirror_is_registered_with_the_lock_or_without(void)
{
	static struct listener other;
	unsigned char *memory = begin();

	prepare(&other, memory);
	REFUSED(hmm_mirror_register_locked(&other.mirror, mm), EINVAL);
	hmm_mm_read_lock(mm);
	REFUSED(hmm_mirror_register_locked(&other.mirror, mm), EINVAL);
	hmm_mm_read_unlock(mm);
	hmm_mm_write_lock(mm);
	REFUSED(hmm_mirror_register(&other.mirror, mm), EDEADLK);
	CHECK_EQ(hmm_mirror_register_locked(&other.mirror, mm), 0);
	hmm_mm_write_unlock(mm);
	/* Both kinds hear the same. */
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK(one.calls > 0 && other.calls > 0);
	hmm_mirror_unregister(&other.mirror);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	finish(memory);
}

static void promise_30_without_permission_to_read_nothing_is_told(void)
{
	unsigned char *memory = begin();
	struct hmm_range range;

	mprotect(memory, PAGES * PAGE, PROT_NONE);
	REFUSED(look(memory, PAGES, &range), EPERM);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(pfns[i], 0);
	memset(pfns, 0x5a, sizeof(pfns));
	REFUSED(fault(memory, PAGES, false, &range), EPERM);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(pfns[i], 0);
	finish(memory);
}

static void promise_31_entry_i_is_page_i(void)
{
	unsigned char *memory = begin();
	struct hmm_range range;

	for (size_t first = 0; first < PAGES; first++)
		for (size_t pages = 1; first + pages < PAGES; pages++) {
			memset(pfns, 0x5a, sizeof(pfns));
			CHECK_EQ(fault(memory + first * PAGE, pages, true, &range), 0);
			for (size_t i = 0; i < pages; i++)
				CHECK_EQ(hmm_pfn_t_to_pfn(pfns[i]), address(memory) / PAGE + first + i);
			/* And not one entry more. */
			CHECK_EQ(pfns[pages], 0x5a5a5a5a5a5a5a5aUL);
			CHECK(hmm_vma_range_done(NULL, &range));
		}
	finish(memory);
}

static void promise_32_special_entries_are_known_by_their_flags(void)
{
	unsigned char *memory = begin(), *fresh = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range;

	CHECK_EQ(hmm_mm_sync(mm), 0);
	CHECK_EQ(look(fresh, PAGES, &range), 0);
	CHECK_EQ(pfns[0], HMM_PFN_EMPTY);
	CHECK(hmm_vma_range_done(NULL, &range));
	memory_unmap(fresh, PAGES);

	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, 2), 0);
	CHECK_EQ(look(memory, PAGES, &range), 0);
	CHECK_EQ(pfns[0] & 0x7f, HMM_PFN_VALID | HMM_PFN_READ | HMM_PFN_WRITE | HMM_PFN_DEVICE_UNADDRESSABLE);
	CHECK_EQ(pfns[2] & 0x7f, HMM_PFN_VALID | HMM_PFN_READ | HMM_PFN_WRITE);
	CHECK(hmm_vma_range_done(NULL, &range));

	/* The device loses page 0. */
	device.lose = true;
	CHECK_EQ(hmm_make_present(mm, memory, PAGE, false), -EIO);
	device.lose = false;
	CHECK_EQ(look(memory, PAGES, &range), 0);
	CHECK_EQ(pfns[0], HMM_PFN_ERROR);
	CHECK(hmm_pfn_t_to_page(pfns[0]) == NULL);
	CHECK(hmm_vma_range_done(NULL, &range));
	finish(memory);
}

/* The kernel's own page of variables: driver memory, readable, never mirrored. 0: there is none. */
static unsigned long special_mapping(void)
{
	FILE *maps = fopen("/proc/self/maps", "r");
	unsigned long start, end, found = 0;
	char line[512], permissions[8];

	while (maps && fgets(line, sizeof(line), maps))
		if (strstr(line, "[vvar]") && sscanf(line, "%lx-%lx %4s", &start, &end, permissions) == 3)
			found = start;
	if (maps)
		fclose(maps);
	return found;
}

static void refuses_to_mirror(const void *memory)
{
	struct hmm_range range;

	memset(pfns, 0x5a, sizeof(pfns));
	REFUSED(look(memory, 1, &range), EINVAL);
	CHECK_EQ(pfns[0], HMM_PFN_SPECIAL);
	memset(pfns, 0x5a, sizeof(pfns));
	REFUSED(fault(memory, 1, false, &range), EINVAL);
	CHECK_EQ(pfns[0], HMM_PFN_SPECIAL);
}

static void promise_33_special_mappings_are_never_mirrored(void)
{
	unsigned char *memory = begin();
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_NORESERVE;
	/* Not touched, so that the machine need not have any huge pages. */
	void *huge = mmap(NULL, 2UL << 20, PROT_READ | PROT_WRITE, flags, -1, 0);
	unsigned long special = special_mapping();

	if (special)
		refuses_to_mirror((void *)special);
	if (huge != MAP_FAILED)
		refuses_to_mirror(huge);
	if (!special || huge == MAP_FAILED)
		tap_skip_reason = "this kernel has no [vvar] mapping, or no huge pages";
	if (huge != MAP_FAILED)
		munmap(huge, 2UL << 20);
	finish(memory);
}

static void promise_38_done_is_called_once_for_each_success(void)
{
	unsigned char *memory = begin();
	struct hmm_range range;

	CHECK_EQ(look(memory, PAGES, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	/* A second call is told, and does nothing. */
	CHECK(!hmm_vma_range_done(NULL, &range));
	CHECK_EQ(hmm_last_errno(), -EINVAL);
	/* So is one after an error; a range that is never ended harms nobody. */
	mprotect(memory, PAGES * PAGE, PROT_NONE);
	REFUSED(look(memory, PAGES, &range), EPERM);
	CHECK(!hmm_vma_range_done(NULL, &range));
	CHECK_EQ(hmm_last_errno(), -EINVAL);
	mprotect(memory, PAGES * PAGE, PROT_READ | PROT_WRITE);
	for (int i = 0; i < 5000; i++)
		CHECK_EQ(look(memory, 1, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	finish(memory);
}

static void promise_40_what_was_invalidated_is_cleared_in_the_array(void)
{
	unsigned char *memory = begin();
	struct hmm_range range;

	CHECK_EQ(look(memory, PAGES, &range), 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory + 2 * PAGE, 2), 0);
	/* A driver that does not look at the result finds nothing that it could map. */
	hmm_vma_range_done(NULL, &range);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(!pfns[i], i == 2 || i == 3);
	/* Half of it came home, which is a change of those two alone. */
	CHECK_EQ(look(memory, PAGES, &range), 0);
	CHECK_EQ(memory[3 * PAGE], memory_pattern(3));
	hmm_vma_range_done(NULL, &range);
	CHECK_EQ(pfns[3], 0);
	CHECK(pfns[0] & HMM_PFN_VALID && pfns[7] & HMM_PFN_VALID);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	finish(memory);
}

static void *migrate_a_page(void *memory)
{
	test_device_migrate(&device, &test_to_device, memory, 1);
	return NULL;
}

static void promise_42_after_unregister_no_callback_runs(void)
{
	unsigned char *memory = begin();
	pthread_t thread;

	one.slow = true;
	pthread_create(&thread, NULL, migrate_a_page, memory);
	for (int i = 0; i < 50000 && !one.inside; i++)
		usleep(100);
	CHECK_EQ(one.inside, 1);
	hmm_mirror_unregister(&one.mirror);
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK_EQ(one.inside, 0);
	/* The memory may be used for something else now. */
	memset(&one, 0xee, sizeof(one));
	pthread_join(thread, NULL);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory + PAGE, 4), 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(one.calls, (int)0xeeeeeeee);
	CHECK_EQ(one.inside, (int)0xeeeeeeee);
	prepare(&one, memory);
	CHECK_EQ(hmm_mirror_register(&one.mirror, mm), 0);
	finish(memory);
}

static atomic_bool holds, lets_go;

static void hold_still(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst, unsigned long start,
		       unsigned long end, void *data)
{
	(void)vma, (void)src, (void)dst, (void)start, (void)end, (void)data;
	holds = true;
	for (int i = 0; i < 60000 && !lets_go; i++)
		usleep(100);
}

static void *hold_a_page(void *memory)
{
	static const struct migrate_vma_ops holding = { hold_still, test_finalize };
	unsigned long src, dst, start = address(memory);

	hmm_mm_read_lock(mm);
	migrate_vma(&holding, find_vma(mm, start), 1, start, start + PAGE, &src, &dst, &device);
	hmm_mm_read_unlock(mm);
	return NULL;
}

/* A page that another migration holds for long: the fault gives up after a second. */
static void promise_44_a_fault_says_whether_it_dropped_the_lock(void)
{
	unsigned char *memory = begin();
	unsigned long start = address(memory);
	struct vm_area_struct *vma;
	struct hmm_range range;
	pthread_t thread;

	holds = lets_go = false;
	pthread_create(&thread, NULL, hold_a_page, memory);
	for (int i = 0; i < 50000 && !holds; i++)
		usleep(100);
	hmm_mm_read_lock(mm);
	vma = find_vma(mm, start);
	REFUSED(hmm_vma_fault(vma, &range, start, start + PAGE, pfns, false, false), EAGAIN);
	/* It is released, and the vma with it. */
	CHECK_EQ(hmm_vma_start(vma), 0);
	REFUSED(hmm_mm_read_unlock(mm), EINVAL);
	hmm_mm_read_lock(mm);
	vma = find_vma(mm, start);
	REFUSED(hmm_vma_fault(vma, &range, start, start + PAGE, pfns, false, true), EBUSY);
	/* It is still held. */
	CHECK_EQ(hmm_vma_start(vma), start);
	lets_go = true;
	pthread_join(thread, NULL);
	CHECK_EQ(hmm_vma_fault(vma, &range, start, start + PAGE, pfns, false, false), 0);
	CHECK_EQ(hmm_vma_start(vma), start);
	CHECK(hmm_vma_range_done(vma, &range));
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	finish(memory);
}

static void promise_45_success_does_not_mean_that_every_entry_is_valid(void)
{
	/* In the form of v4.17 each entry says what is wanted: here page 0 alone. */
	const uint64_t flags[3] = { 1, 2, 4 }, values[3] = { 16, 0, 32 };
	unsigned char *memory = begin(), *fresh = memory_map(PAGES, PROT_READ | PROT_WRITE);
	uint64_t entries[PAGES] = { 1 };
	struct hmm_range_4_17 range = { .start = address(fresh), .end = address(fresh) + PAGES * PAGE, .pfns = entries,
					.flags = flags, .values = values, .pfn_shift = 8 };

	hmm_mm_read_lock(mm);
	range.vma = find_vma(mm, range.start);
	CHECK_EQ(hmm_vma_fault_4_17(&range, true), 0);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(entries[0] & 1, 1);
	for (size_t i = 1; i < PAGES; i++)
		CHECK_EQ(entries[i], values[1]);
	CHECK(hmm_vma_range_done_4_17(&range));
	memory_unmap(fresh, PAGES);
	finish(memory);
}

static void promise_46_a_failed_fault_marks_its_entry(void)
{
	unsigned char *memory = begin();
	struct hmm_range range;

	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory + PAGE, 1), 0);
	device.lose = true;
	CHECK_EQ(hmm_make_present(mm, memory + PAGE, PAGE, false), -EIO);
	device.lose = false;
	REFUSED(fault(memory, PAGES, false, &range), EFAULT);
	CHECK(pfns[1] & HMM_PFN_ERROR);
	CHECK_EQ(pfns[1] & HMM_PFN_VALID, 0);
	CHECK(!hmm_vma_range_done(NULL, &range));
	/* The others can be had. */
	CHECK_EQ(fault(memory + 2 * PAGE, PAGES - 2, true, &range), 0);
	CHECK(hmm_vma_range_done(NULL, &range));
	finish(memory);
}

static void promise_59_only_bad_arguments_fail_a_migration(void)
{
	unsigned char *memory = begin();
	static const struct migrate_vma_ops half = { test_copy_out, NULL };
	unsigned long start = address(memory), end = start + PAGES * PAGE, src[PAGES], dst[PAGES];
	struct vm_area_struct *vma;

	hmm_mm_read_lock(mm);
	vma = find_vma(mm, start);
	REFUSED(migrate_vma(NULL, vma, PAGES, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(&half, vma, PAGES, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(&test_to_device, NULL, PAGES, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(&test_to_device, vma, PAGES, start, end, NULL, dst, &device), EINVAL);
	REFUSED(migrate_vma(&test_to_device, vma, PAGES, start, end, src, NULL, &device), EINVAL);
	REFUSED(migrate_vma(&test_to_device, vma, PAGES - 1, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(&test_to_device, vma, PAGES, end, start, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(&test_to_device, vma, PAGES + 1, start, end + PAGE, src, dst, &device), EINVAL);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	/* Pages that cannot move are no failure. */
	CHECK_EQ(hmm_pin_range(mm, memory, PAGES * PAGE), 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	CHECK_EQ(hmm_unpin_range(mm, memory, PAGES * PAGE), 0);
	finish(memory);
}

static unsigned long copied_src[PAGES], copied_dst[PAGES];

static void copy_and_note(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst, unsigned long start,
			  unsigned long end, void *data)
{
	test_copy_out(vma, src, dst, start, end, data);
	memcpy(copied_src, src, sizeof(copied_src));
	memcpy(copied_dst, dst, sizeof(copied_dst));
}

static void note_at_the_end(struct vm_area_struct *vma, const unsigned long *src, const unsigned long *dst,
			    unsigned long start, unsigned long end, void *data)
{
	(void)vma, (void)start, (void)end, (void)data;
	for (size_t i = 0; i < PAGES; i++) {
		CHECK_EQ(src[i] | MIGRATE_PFN_MIGRATE, copied_src[i] | MIGRATE_PFN_MIGRATE);
		CHECK_EQ(dst[i], copied_dst[i]);
	}
}

/* The arrays are the library's in src and the driver's in dst; nobody changes the other's. */
static void promise_64_the_arrays_stay_as_they_were_written(void)
{
	static const struct migrate_vma_ops noting = { copy_and_note, note_at_the_end };
	unsigned char *memory = begin();

	device.leave_odd = true;
	CHECK_EQ(test_device_migrate(&device, &noting, memory, PAGES), 0);
	device.leave_odd = false;
	for (size_t i = 0; i < PAGES; i++) {
		CHECK_EQ(device.dst[i], copied_dst[i]);
		CHECK_EQ(device.src[i], i & 1 ? copied_src[i] & ~MIGRATE_PFN_MIGRATE : copied_src[i]);
	}
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES / 2);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	finish(memory);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(promise_18_without_a_mirror_ranges_are_refused),
		TEST(promise_19_a_mirror_is_registered_with_the_lock_or_without),
		TEST(promise_30_without_permission_to_read_nothing_is_told),
		TEST(promise_31_entry_i_is_page_i),
		TEST(promise_32_special_entries_are_known_by_their_flags),
		TEST(promise_33_special_mappings_are_never_mirrored),
		TEST(promise_38_done_is_called_once_for_each_success),
		TEST(promise_40_what_was_invalidated_is_cleared_in_the_array),
		TEST(promise_42_after_unregister_no_callback_runs),
		TEST(promise_44_a_fault_says_whether_it_dropped_the_lock),
		TEST(promise_45_success_does_not_mean_that_every_entry_is_valid),
		TEST(promise_46_a_failed_fault_marks_its_entry),
		TEST(promise_59_only_bad_arguments_fail_a_migration),
		TEST(promise_64_the_arrays_stay_as_they_were_written),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	if (hmm_pin_range(mm, &one, sizeof(one)) || hmm_pin_range(mm, pfns, sizeof(pfns)))
		return 2;
	test_device_open(&device, mm);
	failed = tap_run(tests, count);
	test_device_close(&device);
	return hmm_mm_put(mm) ? 1 : failed;
}
