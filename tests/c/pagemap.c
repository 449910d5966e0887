/* Device memory by dev_pagemap, private and coherent: registration, faults, removal, and whose a page is. */
#include "device_7_3.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGES 16

static struct mm_struct *mm;
static struct test_device device, other;

static void registration_tells_where_it_lies(void)
{
	struct page *page;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	test_device_open(&other, mm, MEMORY_DEVICE_COHERENT);
	CHECK_EQ(device.pagemap.range.end - device.pagemap.range.start + 1, sizeof(device.memory));
	CHECK(test_first_pfn(&device) >= HMM_DEVICE_PFN);
	page = pfn_to_page(test_first_pfn(&device) + TEST_PAGES - 1);
	CHECK(page_pgmap(page) == &device.pagemap);
	CHECK(is_device_private_page(page) && !is_device_coherent_page(page));
	zone_device_page_init(page);
	CHECK_EQ(hmm_last_errno(), 0);
	hmm_devmem_page_set_drvdata(page, 0x1234);
	CHECK_EQ(hmm_devmem_page_get_drvdata(page), 0x1234);
	page = pfn_to_page(test_first_pfn(&other));
	CHECK(page_pgmap(page) == &other.pagemap);
	CHECK(!is_device_private_page(page) && is_device_coherent_page(page));
	REFUSED_POINTER(memremap_pages(&other.pagemap, 0), EBUSY);
	test_device_close(&other);
	test_device_close(&device);
	CHECK(!page_pgmap(page) && !is_device_coherent_page(page) && !is_device_private_page(page));
	REFUSED_VOID(zone_device_page_init(page), EINVAL);
}

static void a_touch_brings_a_private_page_home(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	CHECK_EQ(memory[5 * PAGE + 17], memory_pattern(5));
	CHECK_EQ(device.faults, 1);
	CHECK_EQ(device.fault_address, address(memory + 5 * PAGE));
	memory[6 * PAGE] = 0xff;
	CHECK_EQ(device.fault_flags & FAULT_FLAG_WRITE, FAULT_FLAG_WRITE);
	memory[6 * PAGE] = memory_pattern(6);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.faults, PAGES);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void a_coherent_page_is_used_where_it_is(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_COHERENT);
	memory_fill(memory, PAGES / 2);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES / 2), 0);
	for (size_t i = PAGES / 2; i < PAGES; i++)
		CHECK_EQ(memory[i * PAGE], 0);
	memory_fill(memory, PAGES);
	CHECK_EQ(device.faults, 0);
	CHECK_EQ(device.free_count, TEST_PAGES - PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES / 2, false), PAGES / 2);
	CHECK_EQ(device.frees, PAGES / 2);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	/* Evicted by page. */
	CHECK_EQ(migrate_device_range(device.src, test_first_pfn(&device), TEST_PAGES), 0);
	test_copy_home(&device, device.src, device.dst, TEST_PAGES);
	migrate_device_pages(device.src, device.dst, TEST_PAGES);
	migrate_device_finalize(device.src, device.dst, TEST_PAGES);
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK_EQ(device.frees, PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void removal_brings_everything_home(void)
{
	static const enum memory_type types[] = { MEMORY_DEVICE_PRIVATE, MEMORY_DEVICE_COHERENT };
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	for (int i = 0; i < 2; i++) {
		test_device_open(&device, mm, types[i]);
		CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
		test_device_close(&device);
		CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
		CHECK_EQ(memory_wrong(memory, PAGES), 0);
	}
	memory_unmap(memory, PAGES);
}

static void unmapping_frees_device_pages_once(void)
{
	static const enum memory_type types[] = { MEMORY_DEVICE_PRIVATE, MEMORY_DEVICE_COHERENT };

	for (int i = 0; i < 2; i++) {
		unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

		test_device_open(&device, mm, types[i]);
		memory_fill(memory, PAGES);
		CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
		memory_unmap(memory, PAGES);
		CHECK_EQ(hmm_mm_sync(mm), 0);
		/* Of mapped pages that go, an engine without events hears at the end only. */
		if (types[i] == MEMORY_DEVICE_PRIVATE || hmm_mm_capabilities(mm) & HMM_CAPABILITY_EVENTS)
			CHECK_EQ(device.frees, PAGES);
		test_device_close(&device);
	}
}

static void descriptions_are_checked(void)
{
	static struct dev_pagemap good, bad;
	static struct dev_pagemap_ops half;

	good = (struct dev_pagemap){ .type = MEMORY_DEVICE_PRIVATE, .ops = &test_pagemap_ops, .owner = &good };
	good.range.end = PAGE - 1;
#define BAD(error, change)                                                                     \
	do {                                                                                   \
		bad = good;                                                                    \
		change;                                                                        \
		REFUSED_POINTER(memremap_pages(&bad, 0), error);                               \
	} while (0)
	REFUSED_POINTER(memremap_pages(NULL, 0), EINVAL);
	REFUSED_POINTER(memremap_pages((struct dev_pagemap *)(void *)((char *)&good + 1), 0), EINVAL);
	BAD(EINVAL, bad.type = (enum memory_type)0);
	BAD(EINVAL, bad.type = (enum memory_type)77);
	BAD(EOPNOTSUPP, bad.type = MEMORY_DEVICE_FS_DAX);
	BAD(EOPNOTSUPP, bad.type = MEMORY_DEVICE_GENERIC);
	BAD(EOPNOTSUPP, bad.type = MEMORY_DEVICE_PCI_P2PDMA);
	BAD(EINVAL, bad.ops = NULL);
	BAD(EINVAL, bad.owner = NULL);
	BAD(EINVAL, bad.nr_range = 2);
	BAD(EINVAL, bad.nr_range = -1);
	BAD(EINVAL, bad.range.end = ~0UL);
	BAD(EINVAL, bad.range.start = PAGE);
	BAD(EINVAL, bad.range.end = (256UL << 30));
	half = (struct dev_pagemap_ops){ .page_free = test_page_free };
	BAD(EINVAL, bad.ops = &half);
	bad.type = MEMORY_DEVICE_COHERENT;
	CHECK(!IS_ERR(memremap_pages(&bad, 0)));
	memunmap_pages(&bad);
	CHECK_EQ(hmm_last_errno(), 0);
	half = (struct dev_pagemap_ops){ .migrate_to_ram = test_migrate_to_ram };
	BAD(EINVAL, bad.ops = &half);
	BAD(EINVAL, (bad.ops = &half, bad.type = MEMORY_DEVICE_COHERENT));
	/* What was removed can be registered again as it is. */
	CHECK(!IS_ERR(memremap_pages(&good, 0)));
	memunmap_pages(&good);
	CHECK(!IS_ERR(memremap_pages(&good, -1)));
	CHECK_EQ(good.range.end - good.range.start, PAGE - 1);
	memunmap_pages(&good);
	CHECK_EQ(hmm_last_errno(), 0);
	REFUSED_VOID(memunmap_pages(&good), EINVAL);
	memunmap_pages(NULL);
	CHECK_EQ(hmm_last_errno(), 0);
}

static void pages_of_others_have_no_pagemap(void)
{
	unsigned char byte = 0;
	struct page *const bad[] = { NULL, (struct page *)(void *)&byte, pfn_to_page(address(&byte) >> PAGE_SHIFT),
				     pfn_to_page((1UL << 48) - 1) };

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		CHECK(!page_pgmap(bad[i]) && !is_device_private_page(bad[i]) && !is_device_coherent_page(bad[i]));
		REFUSED_VOID(zone_device_page_init(bad[i]), EINVAL);
	}
}

static bool on_invalidate(struct mmu_interval_notifier *notifier, const struct mmu_notifier_range *range,
			  unsigned long cur_seq)
{
	(void)range;
	mmu_interval_set_seq(notifier, cur_seq);
	return true;
}

static const struct mmu_interval_notifier_ops interval_ops = { on_invalidate };
static struct mmu_interval_notifier notifier;

/* The child's part: what it has of its parent is nothing, and the same structures are good for its own. */
static void use_the_same_structures(unsigned char *memory)
{
	unsigned long seq = mmu_interval_read_begin(&notifier);

	CHECK_EQ(hmm_last_errno(), -ENODEV);
	CHECK(mmu_interval_read_retry(&notifier, seq));
	mmu_interval_notifier_remove(&notifier);
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK(!page_pgmap(pfn_to_page(test_first_pfn(&device))));
	REFUSED_VOID(memunmap_pages(&device.pagemap), EINVAL);
	mm = hmm_mm_current();
	CHECK(!IS_ERR(mm));
	memset(&device, 0, sizeof(device));
	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	CHECK_EQ(mmu_interval_notifier_insert(&notifier, mm, address(memory), PAGES * PAGE, &interval_ops), 0);
	seq = mmu_interval_read_begin(&notifier);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	CHECK(mmu_interval_read_retry(&notifier, seq));
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.faults, PAGES);
	mmu_interval_notifier_remove(&notifier);
	test_device_close(&device);
	CHECK_EQ(hmm_mm_put(mm), 0);
}

static void a_child_begins_anew(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	int status = -1;
	pid_t pid;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	CHECK_EQ(mmu_interval_notifier_insert(&notifier, mm, address(memory), PAGES * PAGE, &interval_ops), 0);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	pid = fork();
	if (!pid) {
		use_the_same_structures(memory);
		_exit(tap_failures > 0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	mmu_interval_notifier_remove(&notifier);
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

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, 2);
	CHECK_EQ(test_migrate(&device, memory, 2, true), 2);
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
		TEST(registration_tells_where_it_lies),
		TEST(a_touch_brings_a_private_page_home),
		TEST(a_coherent_page_is_used_where_it_is),
		TEST(removal_brings_everything_home),
		TEST(unmapping_frees_device_pages_once),
		TEST(descriptions_are_checked),
		TEST(pages_of_others_have_no_pagemap),
		TEST(a_child_begins_anew),
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
