/* Migration in three calls, by address and by device page: contents, counts, order, and each device page freed once. */
#include "device_7_3.h"

#define PAGES 24

static struct mm_struct *mm;
static struct test_device device, other;

static void pages_go_and_come_back_with_their_contents(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	for (size_t i = 0; i < PAGES; i++) {
		struct page *page = migrate_pfn_to_page(device.dst[i]);

		CHECK(device.src[i] & MIGRATE_PFN_WRITE);
		CHECK_EQ(test_memory(&device, page)[PAGE - 1], memory_pattern(i));
	}
	CHECK_EQ(test_migrate(&device, memory, PAGES / 2, false), PAGES / 2);
	CHECK_EQ(memory_count(mm, memory, PAGES / 2, HMM_RESIDENCY_SYSTEM), PAGES / 2);
	CHECK_EQ(device.faults, 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.faults, PAGES - PAGES / 2);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void holes_migrate_as_zeros(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	CHECK_EQ(device.src[0] & (MIGRATE_PFN_MIGRATE | MIGRATE_PFN_VALID), MIGRATE_PFN_MIGRATE);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(memory[i * PAGE + 9], 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void what_the_driver_leaves_out_stays(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct migrate_vma args;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	device.leave_odd = true;
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES / 2);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(hmm_migrate_reason(device.src[i]), i & 1 ? HMM_STAY_LEFT_OUT : HMM_STAY_NONE);
	device.leave_odd = false;
	/* A driver may also take the mark out of src: the destination that it named goes back to it. */
	hmm_mm_read_lock(mm);
	args = test_args(&device, memory, PAGES, MIGRATE_VMA_SELECT_SYSTEM);
	CHECK_EQ(migrate_vma_setup(&args), 0);
	CHECK_EQ(args.cpages, PAGES / 2);
	CHECK_EQ(args.npages, PAGES);
	for (size_t i = 0; i < PAGES; i++)
		args.src[i] = 0;
	test_copy_out(&device, args.src, args.dst, PAGES);
	migrate_vma_pages(&args);
	CHECK_EQ(hmm_last_errno(), 0);
	migrate_vma_finalize(&args);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES / 2);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

/* Entries that the library never wrote are a wish, and no more. */
static void a_driver_cannot_add_pages(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct migrate_vma args;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	CHECK_EQ(hmm_pin_range(mm, memory, PAGE), 0);
	hmm_mm_read_lock(mm);
	args = test_args(&device, memory, PAGES, MIGRATE_VMA_SELECT_SYSTEM);
	CHECK_EQ(migrate_vma_setup(&args), 0);
	CHECK_EQ(args.cpages, PAGES - 1);
	CHECK_EQ(hmm_migrate_reason(args.src[0]), HMM_STAY_PINNED);
	args.dst[0] = migrate_pfn(test_first_pfn(&device));
	args.src[0] = MIGRATE_PFN_MIGRATE | migrate_pfn(5);
	for (size_t i = 1; i < PAGES; i++)
		args.dst[i] = 0;
	migrate_vma_pages(&args);
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK_EQ(args.src[0] & MIGRATE_PFN_MIGRATE, 0);
	migrate_vma_finalize(&args);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.frees, 0);
	CHECK_EQ(hmm_unpin_range(mm, memory, PAGE), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void without_the_second_call_all_is_put_back(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct migrate_vma args;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	hmm_mm_read_lock(mm);
	args = test_args(&device, memory, PAGES, MIGRATE_VMA_SELECT_SYSTEM);
	CHECK_EQ(migrate_vma_setup(&args), 0);
	CHECK_EQ(args.cpages, PAGES);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_MIGRATING), PAGES);
	migrate_vma_finalize(&args);
	CHECK_EQ(hmm_last_errno(), 0);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void the_order_of_calls_is_checked(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct migrate_vma args, second, blank = { 0 };

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	hmm_mm_read_lock(mm);
	args = test_args(&device, memory, PAGES / 2, MIGRATE_VMA_SELECT_SYSTEM);
	REFUSED_VOID(migrate_vma_pages(&args), EINVAL);
	REFUSED_VOID(migrate_vma_finalize(&args), EINVAL);
	REFUSED_VOID(migrate_vma_pages(&blank), EINVAL);
	REFUSED_VOID(migrate_vma_pages(NULL), EINVAL);
	REFUSED_VOID(migrate_vma_finalize(NULL), EINVAL);
	CHECK_EQ(migrate_vma_setup(&args), 0);
	/* The same array for two at once. */
	second = test_args(&device, memory + PAGES / 2 * PAGE, PAGES / 2, MIGRATE_VMA_SELECT_SYSTEM);
	REFUSED(migrate_vma_setup(&second), EBUSY);
	test_copy_out(&device, args.src, args.dst, PAGES / 2);
	migrate_vma_pages(&args);
	CHECK_EQ(hmm_last_errno(), 0);
	REFUSED_VOID(migrate_vma_pages(&args), EINVAL);
	CHECK(!hmm_migrate_alloc_page(args.src));
	migrate_vma_finalize(&args);
	CHECK_EQ(hmm_last_errno(), 0);
	REFUSED_VOID(migrate_vma_finalize(&args), EINVAL);
	REFUSED_VOID(migrate_vma_pages(&args), EINVAL);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES / 2);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void what_collected_nothing_needs_no_further_calls(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct migrate_vma args;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	hmm_mm_read_lock(mm);
	for (int i = 0; i < 100; i++) {
		args = test_args(&device, memory, PAGES, MIGRATE_VMA_SELECT_DEVICE_PRIVATE);
		CHECK_EQ(migrate_vma_setup(&args), 0);
		CHECK_EQ(args.cpages, 0);
		CHECK_EQ(hmm_migrate_reason(args.src[0]), HMM_STAY_NOT_SELECTED);
	}
	/* They may be made all the same, once. */
	migrate_vma_pages(&args);
	CHECK_EQ(hmm_last_errno(), 0);
	migrate_vma_finalize(&args);
	CHECK_EQ(hmm_last_errno(), 0);
	REFUSED_VOID(migrate_vma_finalize(&args), EINVAL);
	hmm_mm_read_unlock(mm);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void devices_leave_each_other_alone(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	test_device_open(&other, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES / 2, true), PAGES / 2);
	CHECK_EQ(test_migrate(&other, memory, PAGES, true), PAGES - PAGES / 2);
	CHECK_EQ(test_migrate(&other, memory, PAGES, false), PAGES - PAGES / 2);
	CHECK_EQ(hmm_migrate_reason(other.src[0]), HMM_STAY_FOREIGN);
	CHECK_EQ(test_migrate(&device, memory, PAGES, false), PAGES / 2);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.faults + other.faults, 0);
	test_device_close(&other);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void arguments_are_checked(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct migrate_vma good, bad;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memset(device.src, 0x77, sizeof(device.src));
	memory_fill(memory, PAGES);
	hmm_mm_read_lock(mm);
	good = test_args(&device, memory, PAGES, MIGRATE_VMA_SELECT_SYSTEM);
#define BAD(change)                                                                            \
	do {                                                                                   \
		bad = good;                                                                    \
		bad.change;                                                                    \
		REFUSED(migrate_vma_setup(&bad), EINVAL);                                      \
	} while (0)
	REFUSED(migrate_vma_setup(NULL), EINVAL);
	REFUSED(migrate_vma_setup((struct migrate_vma *)(void *)((char *)&good + 1)), EINVAL);
	BAD(vma = NULL);
	BAD(vma = (struct vm_area_struct *)(void *)mm);
	BAD(src = NULL);
	BAD(dst = NULL);
	BAD(src = (unsigned long *)(void *)((char *)device.src + 1));
	BAD(dst = (unsigned long *)(void *)((char *)device.dst + 1));
	BAD(end = good.start);
	BAD(end = good.start - PAGE);
	BAD(start = good.start - PAGE);
	BAD(end = good.end + PAGE);
	BAD(end = ~0UL);
	BAD(flags = 1 << 20);
	BAD(fault_page = pfn_to_page(address(memory) >> PAGE_SHIFT));
	BAD(fault_page = (struct page *)(void *)memory);
	hmm_mm_read_unlock(mm);
	/* The handle died with its lock. */
	REFUSED(migrate_vma_setup(&good), EINVAL);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(device.src[i], 0x7777777777777777);
	CHECK(!hmm_migrate_alloc_page(NULL) && hmm_last_errno() == -EINVAL);
	CHECK(!hmm_migrate_alloc_page(device.src) && hmm_last_errno() == -EINVAL);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void system_pages_are_for_pages_that_come_home(void)
{
	unsigned char *memory = memory_map(2, PROT_READ | PROT_WRITE);
	struct migrate_vma args;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, 2);
	CHECK_EQ(test_migrate(&device, memory, 1, true), 1);
	hmm_mm_read_lock(mm);
	args = test_args(&device, memory, 2, MIGRATE_VMA_SELECT_SYSTEM | MIGRATE_VMA_SELECT_DEVICE_PRIVATE);
	CHECK_EQ(migrate_vma_setup(&args), 0);
	CHECK_EQ(args.cpages, 2);
	CHECK(hmm_migrate_alloc_page(&args.src[0]));
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK(!hmm_migrate_alloc_page(&args.src[1]) && hmm_last_errno() == -EINVAL);
	CHECK(!hmm_migrate_alloc_page(&args.src[2]) && hmm_last_errno() == -EINVAL);
	CHECK(!hmm_migrate_alloc_page((unsigned long *)(void *)((char *)args.src + 1)));
	args.dst[0] = args.dst[1] = 0;
	migrate_vma_pages(&args);
	migrate_vma_finalize(&args);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(memory_count(mm, memory, 2, HMM_RESIDENCY_DEVICE), 1);
	CHECK_EQ(memory_wrong(memory, 2), 0);
	test_device_close(&device);
	memory_unmap(memory, 2);
}

static void a_device_is_emptied_by_page(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	size_t found = 0;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	CHECK_EQ(migrate_device_range(device.src, test_first_pfn(&device), TEST_PAGES), 0);
	for (size_t i = 0; i < TEST_PAGES; i++) {
		found += (device.src[i] & MIGRATE_PFN_MIGRATE) != 0;
		CHECK(!device.src[i] || migrate_pfn_to_page(device.src[i]) == pfn_to_page(test_first_pfn(&device) + i));
	}
	CHECK_EQ(found, PAGES);
	REFUSED(migrate_device_range(device.src, test_first_pfn(&device), 1), EBUSY);
	test_copy_home(&device, device.src, device.dst, TEST_PAGES);
	REFUSED_VOID(migrate_device_pages(device.src, device.dst, TEST_PAGES - 1), EINVAL);
	migrate_device_pages(device.src, device.dst, TEST_PAGES);
	CHECK_EQ(hmm_last_errno(), 0);
	REFUSED_VOID(migrate_device_pages(device.src, device.dst, TEST_PAGES), EINVAL);
	migrate_device_finalize(device.src, device.dst, TEST_PAGES);
	CHECK_EQ(hmm_last_errno(), 0);
	REFUSED_VOID(migrate_device_finalize(device.src, device.dst, TEST_PAGES), EINVAL);
	CHECK_EQ(device.frees, PAGES);
	CHECK_EQ(device.faults, 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	/* An empty device: nothing is found, and the calls are made all the same. */
	CHECK_EQ(migrate_device_range(device.src, test_first_pfn(&device), TEST_PAGES), 0);
	CHECK_EQ(device.src[0], 0);
	migrate_device_pages(device.src, device.dst, TEST_PAGES);
	CHECK_EQ(hmm_last_errno(), 0);
	migrate_device_finalize(device.src, device.dst, TEST_PAGES);
	CHECK_EQ(hmm_last_errno(), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void pages_of_a_device_are_checked(void)
{
	unsigned long first, src[2];

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	first = test_first_pfn(&device);
	REFUSED(migrate_device_range(NULL, first, 1), EINVAL);
	REFUSED(migrate_device_range((unsigned long *)(void *)((char *)src + 1), first, 1), EINVAL);
	REFUSED(migrate_device_range(src, 0, 1), EINVAL);
	REFUSED(migrate_device_range(src, first - 1, 2), EINVAL);
	REFUSED(migrate_device_range(src, first, 0), EINVAL);
	REFUSED(migrate_device_range(src, first, TEST_PAGES + 1), EINVAL);
	REFUSED(migrate_device_range(src, first, ~0UL), EINVAL);
	REFUSED_VOID(migrate_device_pages(src, src, 1), EINVAL);
	REFUSED_VOID(migrate_device_pages(src, NULL, 1), EINVAL);
	REFUSED_VOID(migrate_device_finalize(NULL, NULL, 1), EINVAL);
	test_device_close(&device);
	REFUSED(migrate_device_range(src, first, 1), EINVAL);
}

/* The last test: it closes the address space. */
static void what_nobody_finalized_is_put_back_at_the_end(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	static struct migrate_vma args;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	hmm_mm_read_lock(mm);
	args = test_args(&device, memory, PAGES, MIGRATE_VMA_SELECT_SYSTEM);
	CHECK_EQ(migrate_vma_setup(&args), 0);
	test_copy_out(&device, args.src, args.dst, PAGES);
	hmm_mm_read_unlock(mm);
	CHECK_EQ(hmm_mm_put(mm), 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	REFUSED_VOID(migrate_vma_pages(&args), EINVAL);
	REFUSED_VOID(migrate_vma_finalize(&args), EINVAL);
	memunmap_pages(&device.pagemap);
	CHECK_EQ(hmm_last_errno(), 0);
	memory_unmap(memory, PAGES);
	mm = hmm_mm_current();
	CHECK(!IS_ERR(mm));
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(pages_go_and_come_back_with_their_contents),
		TEST(holes_migrate_as_zeros),
		TEST(what_the_driver_leaves_out_stays),
		TEST(a_driver_cannot_add_pages),
		TEST(without_the_second_call_all_is_put_back),
		TEST(the_order_of_calls_is_checked),
		TEST(what_collected_nothing_needs_no_further_calls),
		TEST(devices_leave_each_other_alone),
		TEST(arguments_are_checked),
		TEST(system_pages_are_for_pages_that_come_home),
		TEST(a_device_is_emptied_by_page),
		TEST(pages_of_a_device_are_checked),
		TEST(what_nobody_finalized_is_put_back_at_the_end),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
