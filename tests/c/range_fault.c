/* hmm_range_fault(): what entries ask for and what they say, over any mappings, and how it is validated. */
#define HMM_API_7_3
#include "device_7_3.h"

#include <limits.h>
#include <unistd.h>

#define PAGES 16
#define FAULT HMM_PFN_REQ_FAULT
#define WRITE (HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE)

static struct mm_struct *mm;
static struct test_device device, other;
static struct mmu_interval_notifier notifier;
static unsigned long pfns[PAGES];
static atomic_int invalidations;

static bool on_invalidate(struct mmu_interval_notifier *one, const struct mmu_notifier_range *range, unsigned long seq)
{
	(void)range;
	mmu_interval_set_seq(one, seq);
	invalidations++;
	return true;
}

static const struct mmu_interval_notifier_ops ops = { on_invalidate };

static struct hmm_range range_of(const void *memory, size_t pages, unsigned long wanted)
{
	return (struct hmm_range){
		.notifier = &notifier,
		.start = address(memory),
		.end = address(memory) + pages * PAGE,
		.hmm_pfns = pfns,
		.default_flags = wanted,
		.dev_private_owner = device.pagemap.owner,
	};
}

/* The kernel's loop around the call. */
static int fault(struct hmm_range *range)
{
	int ret;

	do {
		range->notifier_seq = mmu_interval_read_begin(range->notifier);
		hmm_mm_read_lock(mm);
		ret = hmm_range_fault(range);
		hmm_mm_read_unlock(mm);
	} while (ret == -EBUSY || (!ret && mmu_interval_read_retry(range->notifier, range->notifier_seq)));
	return ret;
}

static int fault_pages(const void *memory, size_t pages, unsigned long wanted)
{
	struct hmm_range range = range_of(memory, pages, wanted);

	return fault(&range);
}

static void holes_are_reported_or_faulted(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory[PAGE] = 7;
	memset(pfns, 0, sizeof(pfns));
	CHECK_EQ(fault_pages(memory, 2, 0), 0);
	CHECK_EQ(pfns[0], 0);
	CHECK_EQ(pfns[1] & (HMM_PFN_VALID | HMM_PFN_WRITE | HMM_PFN_ERROR), HMM_PFN_VALID | HMM_PFN_WRITE);
	CHECK(hmm_page_to_virt(hmm_pfn_to_page(pfns[1])) == memory + PAGE);
	CHECK_EQ(hmm_pfn_to_phys(pfns[1]), address(memory) + PAGE);
	CHECK_EQ(hmm_pfn_to_map_order(pfns[1]), 0);
	CHECK_EQ(memory_count(mm, memory, 1, HMM_RESIDENCY_NONE), 1);
	CHECK_EQ(fault_pages(memory, PAGES, FAULT), 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(pfns[i] & HMM_PFN_VALID);
	CHECK_EQ(fault_pages(memory, PAGES, WRITE), 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(pfns[i] & WRITE, WRITE);
	CHECK_EQ(memory[PAGE], 7);
	memory_unmap(memory, PAGES);
}

static void each_entry_has_its_own_wish(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range = range_of(memory, 4, 0);

	pfns[0] = 0;
	pfns[1] = WRITE | HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA;
	pfns[2] = HMM_PFN_P2PDMA_BUS;
	pfns[3] = WRITE;
	range.pfn_flags_mask = WRITE;
	CHECK_EQ(fault(&range), 0);
	CHECK_EQ(pfns[1] & WRITE, WRITE);
	CHECK_EQ(pfns[1] & (HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA), HMM_PFN_DMA_MAPPED | HMM_PFN_P2PDMA);
	CHECK(hmm_page_to_virt(hmm_pfn_to_page(pfns[1])) == memory + PAGE);
	CHECK_EQ(pfns[2] & HMM_PFN_P2PDMA_BUS, HMM_PFN_P2PDMA_BUS);
	CHECK_EQ(pfns[3] & WRITE, WRITE);
	/* What the mask leaves out is no wish. */
	memory_unmap(memory, PAGES);
	memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	hmm_mm_sync(mm);
	range = range_of(memory, 1, 0);
	pfns[0] = WRITE;
	CHECK_EQ(fault(&range), 0);
	CHECK_EQ(pfns[0] & HMM_PFN_VALID, 0);
	memory_unmap(memory, PAGES);
}

static void a_range_spans_mappings(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	CHECK_EQ(mprotect(memory + PAGE, PAGE, PROT_NONE), 0);
	CHECK_EQ(mprotect(memory + 2 * PAGE, PAGE, PROT_READ), 0);
	CHECK_EQ(munmap(memory + 3 * PAGE, PAGE), 0);
	hmm_mm_sync(mm);
	CHECK_EQ(fault_pages(memory, 5, 0), 0);
	CHECK_EQ(pfns[0] & (WRITE | HMM_PFN_ERROR), WRITE);
	CHECK_EQ(pfns[1] & (WRITE | HMM_PFN_ERROR), HMM_PFN_ERROR);
	CHECK_EQ(pfns[2] & (WRITE | HMM_PFN_ERROR), HMM_PFN_VALID);
	CHECK_EQ(pfns[3] & (WRITE | HMM_PFN_ERROR), HMM_PFN_ERROR);
	CHECK_EQ(pfns[4] & (WRITE | HMM_PFN_ERROR), WRITE);
	CHECK_EQ(fault_pages(memory, 2, FAULT), -EFAULT);
	CHECK_EQ(fault_pages(memory + 3 * PAGE, 2, FAULT), -EFAULT);
	CHECK_EQ(fault_pages(memory + 2 * PAGE, 1, FAULT), 0);
	pfns[0] = 0x55;
	CHECK_EQ(fault_pages(memory + 2 * PAGE, 1, WRITE), -EPERM);
	CHECK_EQ(pfns[0], 0x55);
	memory_unmap(memory, PAGES);
}

static void own_pages_stay_and_others_come_home(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	test_device_open(&other, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&device, memory, 2, true), 2);
	CHECK_EQ(test_migrate(&other, memory + 2 * PAGE, 2, true), 2);
	memset(pfns, 0, sizeof(pfns));
	CHECK_EQ(fault_pages(memory, 4, 0), 0);
	CHECK_EQ(pfns[0] & WRITE, WRITE);
	CHECK(page_pgmap(hmm_pfn_to_page(pfns[1])) == &device.pagemap);
	CHECK_EQ(pfns[2], 0);
	CHECK_EQ(device.faults + other.faults, 0);
	CHECK_EQ(fault_pages(memory, 4, WRITE), 0);
	CHECK_EQ(device.faults, 0);
	CHECK_EQ(other.faults, 2);
	CHECK(hmm_page_to_virt(hmm_pfn_to_page(pfns[3])) == memory + 3 * PAGE);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&other);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void coherent_pages_are_everybodys(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&other, mm, MEMORY_DEVICE_COHERENT);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&other, memory, PAGES, true), PAGES);
	CHECK_EQ(fault_pages(memory, PAGES, WRITE), 0);
	for (size_t i = 0; i < PAGES; i++)
		CHECK(page_pgmap(hmm_pfn_to_page(pfns[i])) == &other.pagemap);
	CHECK_EQ(other.frees, 0);
	test_device_close(&other);
	memory_unmap(memory, PAGES);
}

static void an_old_number_is_refused(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, 1);
	range = range_of(memory, 2, WRITE);
	range.notifier_seq = mmu_interval_read_begin(&notifier);
	CHECK_EQ(test_migrate(&device, memory, 1, true), 1);
	hmm_mm_read_lock(mm);
	REFUSED(hmm_range_fault(&range), EBUSY);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(fault(&range), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void the_unlocked_form_does_it_all(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range range = range_of(memory, PAGES, WRITE);

	range.notifier_seq = ULONG_MAX;
	CHECK_EQ(hmm_range_fault_unlocked_timeout(&range, HMM_RANGE_DEFAULT_TIMEOUT), 0);
	CHECK(!mmu_interval_read_retry(&notifier, range.notifier_seq));
	CHECK_EQ(pfns[PAGES - 1] & WRITE, WRITE);
	CHECK_EQ(hmm_range_fault_unlocked_timeout(&range, 0), 0);
	/* It left no lock behind. */
	CHECK_EQ(hmm_mm_write_lock(mm), 0);
	REFUSED(hmm_range_fault_unlocked_timeout(&range, 1), EDEADLK);
	CHECK_EQ(hmm_mm_write_unlock(mm), 0);
	range.end = range.start;
	REFUSED(hmm_range_fault_unlocked_timeout(&range, 0), EINVAL);
	REFUSED(hmm_range_fault_unlocked_timeout(NULL, 0), EINVAL);
	CHECK_EQ(mprotect(memory, PAGE, PROT_READ), 0);
	range = range_of(memory, 1, WRITE);
	REFUSED(hmm_range_fault_unlocked_timeout(&range, 0), EPERM);
	CHECK_EQ(hmm_mm_write_lock(mm), 0);
	CHECK_EQ(hmm_mm_write_unlock(mm), 0);
	memory_unmap(memory, PAGES);
}

static void arguments_are_checked(void)
{
	static struct mmu_interval_notifier foreign;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_range good = range_of(memory, 1, FAULT), bad;

	pfns[0] = 0x77;
	good.notifier_seq = mmu_interval_read_begin(&notifier);
	REFUSED(hmm_range_fault(&good), EINVAL);
	hmm_mm_read_lock(mm);
#define BAD(change)                                                                            \
	do {                                                                                   \
		bad = good;                                                                    \
		bad.change;                                                                    \
		REFUSED(hmm_range_fault(&bad), EINVAL);                                        \
	} while (0)
	REFUSED(hmm_range_fault(NULL), EINVAL);
	REFUSED(hmm_range_fault((struct hmm_range *)(void *)((char *)&good + 1)), EINVAL);
	BAD(notifier = NULL);
	BAD(notifier = &foreign);
	BAD(hmm_pfns = NULL);
	BAD(hmm_pfns = (unsigned long *)(void *)((char *)pfns + 1));
	BAD(start++);
	BAD(end++);
	BAD(end = good.start);
	BAD(end = good.start - PAGE);
	BAD(end = ULONG_MAX & PAGE_MASK);
	CHECK_EQ(pfns[0], 0x77);
	CHECK_EQ(hmm_range_fault(&good), 0);
	hmm_mm_read_unlock(mm);
	memory_unmap(memory, PAGES);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(holes_are_reported_or_faulted),
		TEST(each_entry_has_its_own_wish),
		TEST(a_range_spans_mappings),
		TEST(own_pages_stay_and_others_come_home),
		TEST(coherent_pages_are_everybodys),
		TEST(an_old_number_is_refused),
		TEST(the_unlocked_form_does_it_all),
		TEST(arguments_are_checked),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	if (mmu_interval_notifier_insert(&notifier, mm, 0, ULONG_MAX & PAGE_MASK, &ops))
		return 2;
	failed = tap_run(tests, count);
	mmu_interval_notifier_remove(&notifier);
	return hmm_mm_put(mm) ? 1 : failed;
}
