/* Migration to a device and back, through the C face: contents, counts, order, and each device page freed once. */
#include "device.h"

#include <setjmp.h>
#include <signal.h>

#define PAGES 24

static struct mm_struct *mm;
static struct test_device device, other;

static int to_device(void *memory, size_t pages)
{
	return test_device_migrate(&device, &test_to_device, memory, pages);
}

static void pages_go_and_come_back_with_their_contents(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(device.copies, 1);
	CHECK_EQ(device.finals, 1);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), PAGES);
	for (size_t i = 0; i < PAGES; i++) {
		struct page *page = migrate_pfn_to_page(device.dst[i]);

		CHECK(device.src[i] & MIGRATE_PFN_MIGRATE && device.src[i] & MIGRATE_PFN_WRITE);
		CHECK(hmm_devmem_has_page(device.devmem, page));
		CHECK_EQ(hmm_devmem_page_get_drvdata(page), address(memory + i * PAGE));
		CHECK_EQ(device.memory[test_device_index(&device, page)][PAGE - 1], memory_pattern(i));
	}
	CHECK_EQ(device.faults, 0);
	CHECK_EQ(memory[5 * PAGE + 17], memory_pattern(5));
	CHECK_EQ(device.faults, 1);
	CHECK_EQ(device.fault_addr & PAGE_MASK, address(memory + 5 * PAGE));
	CHECK(device.fault_devmem == device.devmem);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES - 1);
	memory[6 * PAGE] = 0xff;
	CHECK_EQ(device.fault_flags & FAULT_FLAG_WRITE, FAULT_FLAG_WRITE);
	memory[6 * PAGE] = memory_pattern(6);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.faults, PAGES);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void pages_come_home_on_request(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_system, memory, PAGES / 2), 0);
	CHECK_EQ(device.faults, 0);
	CHECK_EQ(memory_count(mm, memory, PAGES / 2, HMM_RESIDENCY_SYSTEM), PAGES / 2);
	CHECK_EQ(hmm_make_present(mm, memory, PAGES * PAGE, false), PAGES - PAGES / 2);
	CHECK_EQ(device.fault_flags & FAULT_FLAG_REMOTE, FAULT_FLAG_REMOTE);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void a_pinned_range_comes_home_and_stays(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(hmm_pin_range(mm, memory + PAGE, 2 * PAGE), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES - 2);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES - 2);
	CHECK_EQ(device.src[1] & MIGRATE_PFN_MIGRATE, 0);
	CHECK_EQ(hmm_migrate_reason(device.src[1]), HMM_STAY_PINNED);
	CHECK(strstr(hmm_stay_text(hmm_migrate_reason(device.src[1])), "unpin"));
	CHECK(strstr(hmm_stay_text(63), "not a reason"));
	CHECK_EQ(hmm_unpin_range(mm, memory + PAGE, 2 * PAGE), 0);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void what_the_driver_leaves_out_stays(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	device.leave_odd = true;
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES / 2);
	for (size_t i = 0; i < PAGES; i++) {
		CHECK_EQ(!(device.src[i] & MIGRATE_PFN_MIGRATE), i & 1);
		CHECK_EQ(!device.dst[i], i & 1);
		CHECK_EQ(hmm_migrate_reason(device.src[i]), i & 1 ? HMM_STAY_LEFT_OUT : HMM_STAY_NONE);
		CHECK(i & 1 ? !hmm_page_is_device(migrate_pfn_to_page(device.src[i])) : 1);
	}
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.faults, PAGES / 2);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void a_full_device_takes_what_fits(void)
{
	size_t pages = TEST_DEVICE_PAGES + 10;
	unsigned char *memory = memory_map(pages, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	memory_fill(memory, pages);
	CHECK_EQ(to_device(memory, pages), 0);
	CHECK_EQ(memory_count(mm, memory, pages, HMM_RESIDENCY_DEVICE), TEST_DEVICE_PAGES);
	CHECK_EQ(memory_wrong(memory, pages), 0);
	test_device_close(&device);
	memory_unmap(memory, pages);
}

static void holes_migrate_as_zeros(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(device.src[0] & (MIGRATE_PFN_MIGRATE | MIGRATE_PFN_VALID), MIGRATE_PFN_MIGRATE);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	for (size_t i = 0; i < PAGES; i++)
		CHECK_EQ(memory[i * PAGE + 9], 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void unmapping_frees_device_pages_once(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(madvise(memory, 4 * PAGE, MADV_DONTNEED), 0);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	CHECK_EQ(device.frees, 4);
	CHECK_EQ(memory[PAGE], 0);
	CHECK_EQ(munmap(memory + 8 * PAGE, 4 * PAGE), 0);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	CHECK_EQ(device.frees, 8);
	CHECK_EQ(device.faults, 0);
	CHECK_EQ(memory[4 * PAGE], memory_pattern(4));
	memory_unmap(memory, PAGES);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	CHECK_EQ(device.frees, PAGES);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), 0);
	test_device_close(&device);
}

static void removing_device_memory_brings_all_home(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_devmem *devmem;

	test_device_open(&device, mm);
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES), 0);
	devmem = device.devmem;
	test_device_close(&device);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	REFUSED(hmm_devmem_in_use(devmem), EINVAL);
	memory_unmap(memory, PAGES);
}

static void two_devices_leave_each_other_alone(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	test_device_open(&other, mm);
	CHECK(device.devmem->pfn_last <= other.devmem->pfn_first || other.devmem->pfn_last <= device.devmem->pfn_first);
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES / 2), 0);
	CHECK_EQ(test_device_migrate(&other, &test_to_device, memory, PAGES), 0);
	/* Gen A shows the other's pages, marked, and the test device leaves them. */
	CHECK_EQ(other.src[0] & MIGRATE_PFN_DEVICE, MIGRATE_PFN_DEVICE);
	CHECK(hmm_devmem_has_page(device.devmem, migrate_pfn_to_page(other.src[0])));
	CHECK_EQ(hmm_devmem_in_use(device.devmem), PAGES / 2);
	CHECK_EQ(hmm_devmem_in_use(other.devmem), PAGES - PAGES / 2);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.faults, PAGES / 2);
	CHECK_EQ(other.faults, PAGES - PAGES / 2);
	test_device_close(&other);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static sigjmp_buf bus_error;
static volatile sig_atomic_t awaits_bus_error;

static void on_bus_error(int number)
{
	if (awaits_bus_error)
		siglongjmp(bus_error, 1);
	signal(number, SIG_DFL);
}

static void lost_data_is_a_bus_error_and_never_zeros(void)
{
	unsigned char *memory = memory_map(2, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	memory_fill(memory, 2);
	CHECK_EQ(to_device(memory, 2), 0);
	device.lose = true;
	awaits_bus_error = true;
	if (!sigsetjmp(bus_error, 1)) {
		volatile unsigned char byte = memory[0];

		(void)byte;
		CHECK(!"the touch of a lost page returned");
	}
	awaits_bus_error = false;
	device.lose = false;
	CHECK_EQ(memory_count(mm, memory, 1, HMM_RESIDENCY_POISONED), 1);
	CHECK_EQ(memory[PAGE], memory_pattern(1));
	memory_unmap(memory, 2);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	test_device_close(&device);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(pages_go_and_come_back_with_their_contents),
		TEST(pages_come_home_on_request),
		TEST(a_pinned_range_comes_home_and_stays),
		TEST(what_the_driver_leaves_out_stays),
		TEST(a_full_device_takes_what_fits),
		TEST(holes_migrate_as_zeros),
		TEST(unmapping_frees_device_pages_once),
		TEST(removing_device_memory_brings_all_home),
		TEST(two_devices_leave_each_other_alone),
		TEST(lost_data_is_a_bus_error_and_never_zeros),
	};
	struct sigaction action = { .sa_handler = on_bus_error };
	int count = sizeof(tests) / sizeof(*tests), failed;

	/* Before the library is opened: some engines put a handler of their own in front. */
	sigaction(SIGBUS, &action, NULL);
	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
