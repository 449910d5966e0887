/* The forms of kernel v4.17, in one program with the forms of hmm.txt (the other unit). */
#define HMM_API_4_17
#include "device.h"

#define PAGES 8

int text_form_works(struct mm_struct *mm, unsigned char *memory, size_t pages);

/* This driver's own encoding, unlike any of the library's. */
static const uint64_t flags[HMM_PFN_FLAG_MAX] = { 1UL << 63, 1UL << 62, 1UL << 61 };
static const uint64_t values[HMM_PFN_VALUE_MAX] = { 0xe, 0, 0x5 };

static struct mm_struct *mm;
static struct test_device device;
static struct hmm_mirror mirror;
static atomic_int updates;
static uint64_t pfns[PAGES];

static void on_update(struct hmm_mirror *one, enum hmm_update_type type, unsigned long start, unsigned long end)
{
	(void)one, (void)type, (void)start, (void)end;
	updates++;
}

static const struct hmm_mirror_ops mirror_ops = { .sync_cpu_device_pagetables = on_update };

/* A range with all its arguments; the caller holds the lock. */
static struct hmm_range range_of(const unsigned char *memory)
{
	/* An unmapping of what was here before may still be on its way. */
	int synchronised = hmm_mm_sync(mm);
	struct hmm_range range = {
		.vma = find_vma(mm, address(memory)),
		.start = address(memory),
		.end = address(memory) + PAGES * PAGE,
		.pfns = pfns,
		.flags = flags,
		.values = values,
		.pfn_shift = 3,
	};

	CHECK_EQ(synchronised, 0);
	return range;
}

static void registration_wants_the_lock_held(void)
{
	static struct hmm_mirror second = { .ops = &mirror_ops };

	REFUSED(hmm_mirror_register(&second, mm), EINVAL);
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	REFUSED(hmm_mirror_register(&second, mm), EINVAL);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	CHECK_EQ(hmm_mm_write_lock(mm), 0);
	CHECK_EQ(hmm_mirror_register(&second, mm), 0);
	CHECK_EQ(hmm_mm_write_unlock(mm), 0);
	hmm_mirror_unregister(&second);
	CHECK_EQ(hmm_last_errno(), 0);
}

static void looks_use_the_drivers_encoding(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range;

	memory[0] = 1;
	hmm_mm_read_lock(mm);
	range = range_of(memory);
	CHECK_EQ(hmm_vma_get_pfns(&range), 0);
	CHECK_EQ(pfns[0], (address(memory) >> PAGE_SHIFT) << 3 | flags[HMM_PFN_VALID] | flags[HMM_PFN_WRITE]);
	CHECK_EQ(pfns[1], values[HMM_PFN_NONE]);
	CHECK_EQ(hmm_pfn_to_pfn(&range, pfns[0]) & ~(7UL << 58), address(memory) >> PAGE_SHIFT);
	CHECK_EQ(hmm_pfn_to_pfn(&range, pfns[1]), -1);
	CHECK(!hmm_pfn_to_page(&range, values[HMM_PFN_ERROR]));
	CHECK(hmm_vma_range_done(&range) && range.valid);
	CHECK(!hmm_vma_range_done(&range));
	hmm_mm_read_unlock(mm);
	memory_unmap(memory, PAGES);
}

static void faults_do_what_each_entry_asks(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range;

	hmm_mm_read_lock(mm);
	range = range_of(memory);
	memset(pfns, 0, sizeof(pfns));
	pfns[1] = flags[HMM_PFN_VALID] | flags[HMM_PFN_WRITE];
	pfns[3] = flags[HMM_PFN_VALID] | flags[HMM_PFN_WRITE];
	pfns[5] = flags[HMM_PFN_VALID];
	CHECK_EQ(hmm_vma_fault(&range, true), 0);
	CHECK_EQ(pfns[0], values[HMM_PFN_NONE]);
	CHECK(pfns[1] & flags[HMM_PFN_WRITE] && pfns[3] & flags[HMM_PFN_WRITE]);
	CHECK_EQ(pfns[2], values[HMM_PFN_NONE]);
	CHECK(pfns[5] & flags[HMM_PFN_VALID]);
	hmm_vma_range_done(&range);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), 3);
	hmm_mm_read_unlock(mm);
	memory_unmap(memory, PAGES);
}

static void device_pages_come_home_when_asked_for(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range;

	test_device_open(&device, mm);
	memory_fill(memory, PAGES);
	hmm_mm_read_lock(mm);
	range = range_of(memory);
	CHECK_EQ(migrate_vma(&test_to_device, range.vma, range.start, range.end, device.src, device.dst, &device), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	for (size_t i = 0; i < PAGES; i++)
		pfns[i] = flags[HMM_PFN_VALID] | (i < 2 ? flags[HMM_PFN_DEVICE_PRIVATE] : 0);
	CHECK_EQ(hmm_vma_fault(&range, true), 0);
	hmm_vma_range_done(&range);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES - 2);
	CHECK_EQ(hmm_vma_get_pfns(&range), 0);
	CHECK(!(pfns[0] & flags[HMM_PFN_DEVICE_PRIVATE]) && pfns[2] & flags[HMM_PFN_DEVICE_PRIVATE]);
	CHECK(hmm_vma_range_done(&range));
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void a_change_makes_done_false(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range;

	test_device_open(&device, mm);
	memory_fill(memory, PAGES);
	hmm_mm_read_lock(mm);
	range = range_of(memory);
	CHECK_EQ(hmm_vma_get_pfns(&range), 0);
	hmm_mm_read_unlock(mm);
	test_device_change(&device, memory + PAGE);
	hmm_mm_sync(mm);
	CHECK(!hmm_vma_range_done(&range) && !range.valid);
	CHECK(pfns[0] && !pfns[1] && pfns[2]);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void bad_ranges_are_refused(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range good, bad;

	hmm_mm_read_lock(mm);
	good = range_of(memory);
	memset(pfns, 0x77, sizeof(pfns));
#define BAD(member, value)                                                                     \
	do {                                                                                   \
		bad = good;                                                                    \
		bad.member = value;                                                            \
		REFUSED(hmm_vma_get_pfns(&bad), EINVAL);                                       \
		REFUSED(hmm_vma_fault(&bad, true), EINVAL);                                    \
		CHECK(!hmm_vma_range_done(&bad));                                              \
	} while (0)
	BAD(vma, NULL);
	BAD(vma, (struct vm_area_struct *)(void *)memory);
	BAD(start, good.start + 1);
	BAD(start, good.end);
	BAD(end, good.end + PAGE);
	BAD(pfns, NULL);
	BAD(pfns, (uint64_t *)(void *)((char *)pfns + 1));
	BAD(flags, NULL);
	BAD(values, NULL);
	BAD(pfn_shift, 13);
	REFUSED(hmm_vma_get_pfns(NULL), EINVAL);
	REFUSED(hmm_vma_fault(NULL, false), EINVAL);
	CHECK(!hmm_vma_range_done(NULL));
	REFUSED(migrate_vma(NULL, good.vma, good.start, good.end, device.src, device.dst, NULL), EINVAL);
	REFUSED(migrate_vma(&test_to_device, good.vma, good.end, good.start, device.src, device.dst, NULL), EINVAL);
	hmm_mm_read_unlock(mm);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(pfns[i], 0x7777777777777777);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_NONE), PAGES);
	memory_unmap(memory, PAGES);
}

static void both_forms_live_in_one_program(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	CHECK(text_form_works(mm, memory, PAGES));
	memory_unmap(memory, PAGES);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(registration_wants_the_lock_held),
		TEST(looks_use_the_drivers_encoding),
		TEST(faults_do_what_each_entry_asks),
		TEST(device_pages_come_home_when_asked_for),
		TEST(a_change_makes_done_false),
		TEST(bad_ranges_are_refused),
		TEST(both_forms_live_in_one_program),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	mirror.ops = &mirror_ops;
	hmm_mm_write_lock(mm);
	if (hmm_mirror_register(&mirror, mm) || hmm_pin_range(mm, &updates, sizeof(updates)))
		return 2;
	hmm_mm_write_unlock(mm);
	failed = tap_run(tests, count);
	hmm_mirror_unregister(&mirror);
	return hmm_mm_put(mm) ? 1 : failed;
}
