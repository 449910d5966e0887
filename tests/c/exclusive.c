/* Exclusive access: a page is the device's alone until it is unlocked and the CPU touches it. */
#include "device_7_3.h"

#include <unistd.h>

#define PAGES 8

static struct mm_struct *mm;
static int self;	/* its address is this driver's identity */

/* Pinned with its notifier. */
static struct listener {
	struct mmu_interval_notifier notifier;
	atomic_int exclusives, foreign, clears;
} listener;

static bool on_invalidate(struct mmu_interval_notifier *notifier, const struct mmu_notifier_range *range,
			  unsigned long cur_seq)
{
	mmu_interval_set_seq(notifier, cur_seq);
	if (range->event == MMU_NOTIFY_EXCLUSIVE) {
		listener.exclusives++;
		listener.foreign += range->owner != &self;
	}
	listener.clears += range->event == MMU_NOTIFY_CLEAR;
	return true;
}

static const struct mmu_interval_notifier_ops ops = { on_invalidate };

static unsigned char *listened_pages(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	memset(&listener, 0, sizeof(listener));
	CHECK_EQ(hmm_mm_sync(mm), 0);
	CHECK_EQ(mmu_interval_notifier_insert(&listener.notifier, mm, address(memory), PAGES * PAGE, &ops), 0);
	return memory;
}

static void forget_pages(unsigned char *memory)
{
	mmu_interval_notifier_remove(&listener.notifier);
	memory_unmap(memory, PAGES);
	CHECK_EQ(hmm_mm_check_accounts(mm), 0);
}

static struct page *make(const void *at, struct folio **folio)
{
	struct page *page;

	hmm_mm_read_lock(mm);
	page = make_device_exclusive(mm, address(at), &self, folio);
	hmm_mm_read_unlock(mm);
	return page;
}

static void the_device_works_on_it_until_the_cpu_touches_it(void)
{
	unsigned char *memory = listened_pages(), *contents;
	struct folio *folio = NULL;
	struct page *page = make(memory + PAGE + 100, &folio);

	CHECK(!IS_ERR(page));
	CHECK(folio == (struct folio *)(void *)page);
	CHECK_EQ(listener.exclusives, 1);
	CHECK_EQ(listener.foreign, 0);
	contents = hmm_page_to_virt(page);
	CHECK(contents && contents[PAGE - 1] == memory_pattern(1));
	contents[5]++;
	folio_unlock(folio);
	CHECK_EQ(hmm_last_errno(), 0);
	folio_put(folio);
	contents[5]++;
	CHECK_EQ(listener.clears, 0);
	CHECK_EQ(memory[PAGE + 5], (unsigned char)(memory_pattern(1) + 2));
	CHECK(listener.clears > 0);
	memory[PAGE + 5] = memory_pattern(1);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	forget_pages(memory);
}

struct toucher {
	unsigned char *at;
	atomic_bool is_done;
	unsigned char found;
};

static void *touch(void *data)
{
	struct toucher *toucher = data;

	toucher->found = *(volatile unsigned char *)toucher->at;
	toucher->is_done = true;
	return NULL;
}

static void a_touch_waits_for_the_unlock(void)
{
	unsigned char *memory = listened_pages();
	static struct toucher toucher;
	struct folio *folio;
	struct page *page = make(memory, &folio);
	pthread_t thread;

	CHECK(!IS_ERR(page));
	toucher.at = memory;
	CHECK_EQ(pthread_create(&thread, NULL, touch, &toucher), 0);
	usleep(50 * 1000);
	CHECK(!toucher.is_done);
	*(unsigned char *)hmm_page_to_virt(page) = 99;
	unlock_page(page);
	put_page(page);
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK_EQ(toucher.found, 99);
	forget_pages(memory);
}

static void ranges_are_made_page_by_page(void)
{
	unsigned char *memory = listened_pages();
	struct page *pages[PAGES] = { NULL };
	unsigned long start = address(memory);

	CHECK_EQ(hmm_pin_range(mm, memory + PAGE, PAGE), 0);
	hmm_mm_read_lock(mm);
	CHECK_EQ(make_device_exclusive_range(mm, start, start + PAGES * PAGE, pages, &self), PAGES);
	hmm_mm_read_unlock(mm);
	for (size_t i = 0; i < PAGES; i++) {
		CHECK_EQ(!pages[i], i == 1);
		if (!pages[i])
			continue;
		CHECK_EQ(*(unsigned char *)hmm_page_to_virt(pages[i]), memory_pattern(i));
		unlock_page(pages[i]);
	}
	CHECK_EQ(listener.foreign, 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(hmm_unpin_range(mm, memory + PAGE, PAGE), 0);
	/* It ends at what cannot be had at all. */
	CHECK_EQ(munmap(memory + 3 * PAGE, PAGE), 0);
	hmm_mm_sync(mm);
	hmm_mm_read_lock(mm);
	CHECK_EQ(make_device_exclusive_range(mm, start, start + PAGES * PAGE, pages, &self), 3);
	hmm_mm_read_unlock(mm);
	for (size_t i = 0; i < 3; i++)
		unlock_page(pages[i]);
	hmm_mm_read_lock(mm);
	REFUSED(make_device_exclusive_range(mm, start + 3 * PAGE, start + 4 * PAGE, pages, &self), EFAULT);
	hmm_mm_read_unlock(mm);
	forget_pages(memory);
}

static void a_page_comes_from_a_device(void)
{
	static struct test_device device;
	unsigned char *memory = listened_pages();
	struct folio *folio;
	struct page *page;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	CHECK_EQ(test_migrate(&device, memory, 1, true), 1);
	page = make(memory, &folio);
	CHECK(!IS_ERR(page));
	CHECK_EQ(device.faults, 1);
	CHECK_EQ(*(unsigned char *)hmm_page_to_virt(page), memory_pattern(0));
	folio_unlock(folio);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	forget_pages(memory);
}

static void other_memory_is_refused(void)
{
	unsigned char *memory = listened_pages();
	unsigned char *shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	struct folio *folio = (struct folio *)(void *)memory;

	CHECK_EQ(mprotect(memory, PAGE, PROT_READ), 0);
	REFUSED_POINTER(make(memory, &folio), EFAULT);
	REFUSED_POINTER(make(memory - PAGE, &folio), EFAULT);
	REFUSED_POINTER(make(shared, &folio), EOPNOTSUPP);
	CHECK(folio == (struct folio *)(void *)memory);
	CHECK_EQ(listener.exclusives, 0);
	munmap(shared, PAGE);
	forget_pages(memory);
}

static void arguments_are_checked(void)
{
	unsigned char *memory = listened_pages();
	unsigned long start = address(memory);
	struct page *pages[PAGES];
	struct folio *folio;

	REFUSED_POINTER(make_device_exclusive(mm, start, &self, &folio), EINVAL);
	REFUSED(make_device_exclusive_range(mm, start, start + PAGE, pages, &self), EINVAL);
	hmm_mm_read_lock(mm);
	REFUSED_POINTER(make_device_exclusive(NULL, start, &self, &folio), EINVAL);
	REFUSED_POINTER(make_device_exclusive((struct mm_struct *)(void *)memory, start, &self, &folio), EINVAL);
	REFUSED_POINTER(make_device_exclusive(mm, start, &self, NULL), EINVAL);
	REFUSED_POINTER(make_device_exclusive(mm, start, &self, (struct folio **)(void *)((char *)&folio + 1)), EINVAL);
	REFUSED(make_device_exclusive_range(mm, start, start + PAGE, NULL, &self), EINVAL);
	REFUSED(make_device_exclusive_range(mm, start + 1, start + PAGE, pages, &self), EINVAL);
	REFUSED(make_device_exclusive_range(mm, start, start, pages, &self), EINVAL);
	REFUSED(make_device_exclusive_range(mm, start + PAGE, start, pages, &self), EINVAL);
	hmm_mm_read_unlock(mm);
	/* Pages that are not locked need no unlocking; what is no page is told. */
	unlock_page(pfn_to_page(start >> PAGE_SHIFT));
	CHECK_EQ(hmm_last_errno(), 0);
	REFUSED_VOID(unlock_page((struct page *)(void *)memory), EINVAL);
	REFUSED_VOID(hmm_page_unlock(NULL), EINVAL);
	CHECK_EQ(listener.exclusives, 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	forget_pages(memory);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(the_device_works_on_it_until_the_cpu_touches_it),
		TEST(a_touch_waits_for_the_unlock),
		TEST(ranges_are_made_page_by_page),
		TEST(a_page_comes_from_a_device),
		TEST(other_memory_is_refused),
		TEST(arguments_are_checked),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
