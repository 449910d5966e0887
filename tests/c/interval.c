/* Interval notifiers: who is called, for what, how a look is validated, and what removing promises. */
#include "device_7_3.h"

#include <limits.h>
#include <unistd.h>

#define PAGES 8

static struct mm_struct *mm;
static struct test_device device;

/* A driver that writes down what it is told. Callbacks touch nothing else; it is pinned with its notifier. */
struct listener {
	struct mmu_interval_notifier notifier;
	struct mmu_notifier_range range;	/* the last one */
	unsigned long seq;
	atomic_int calls, releases, inside;
	atomic_bool slow, removes, looks;
	atomic_int remove_errno, begin_errno, look_errno, range_errno;
	unsigned long pfn, src;
	_Atomic(unsigned long) begun;
};

static bool on_invalidate(struct mmu_interval_notifier *notifier, const struct mmu_notifier_range *range,
			  unsigned long cur_seq)
{
	struct listener *listener = container_of(notifier, struct listener, notifier);

	listener->inside++;
	mmu_interval_set_seq(notifier, cur_seq);
	listener->range = *range;
	listener->seq = cur_seq;
	if (listener->slow)
		usleep(200 * 1000);
	if (listener->looks) {
		struct hmm_range_7_3 look = {
			.notifier = notifier,
			.start = range->start,
			.end = range->start + PAGE,
			.hmm_pfns = &listener->pfn,
		};

		listener->look_errno = hmm_range_fault_unlocked_timeout(&look, 1);
		listener->range_errno = migrate_device_range(&listener->src, HMM_DEVICE_PFN, 1);
	}
	if (listener->removes) {
		listener->begun = mmu_interval_read_begin(notifier);
		listener->begin_errno = hmm_last_errno();
		mmu_interval_notifier_remove(notifier);
		listener->remove_errno = hmm_last_errno();
	}
	listener->releases += range->event == MMU_NOTIFY_RELEASE;
	listener->calls++;
	listener->inside--;
	return true;
}

static const struct mmu_interval_notifier_ops ops = { on_invalidate };

/* Listens to pages of memory. */
static void listen(struct listener *listener, const void *memory, size_t pages)
{
	/* An unmapping of what was here before may still be on its way. */
	CHECK_EQ(hmm_mm_sync(mm), 0);
	memset(listener, 0, sizeof(*listener));
	CHECK_EQ(mmu_interval_notifier_insert(&listener->notifier, mm, address(memory), pages * PAGE, &ops), 0);
}

static void unlisten(struct listener *listener)
{
	mmu_interval_notifier_remove(&listener->notifier);
	CHECK_EQ(hmm_last_errno(), 0);
}

static void inserting_fills_in_the_structure(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	listen(&listener, memory, PAGES);
	CHECK_EQ(listener.notifier.interval_tree.start, address(memory));
	CHECK_EQ(listener.notifier.interval_tree.last, address(memory) + PAGES * PAGE - 1);
	CHECK(listener.notifier.mm == mm && listener.notifier.ops == &ops);
	unlisten(&listener);
	memory_unmap(memory, PAGES);
}

static void migrations_are_told_with_their_owner(void)
{
	static struct listener inside, outside;
	unsigned char *memory = memory_map(PAGES * 2, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	listen(&inside, memory + PAGE, 1);
	listen(&outside, memory + PAGES * PAGE, PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	CHECK_EQ(inside.calls, 1);
	CHECK_EQ(outside.calls, 0);
	CHECK_EQ(inside.range.event, MMU_NOTIFY_MIGRATE);
	CHECK(inside.range.owner == &device && inside.range.mm == mm);
	CHECK(mmu_notifier_range_blockable(&inside.range));
	CHECK(inside.range.start <= address(memory) + PAGE && address(memory) + 2 * PAGE <= inside.range.end);
	CHECK_EQ(inside.notifier.invalidate_seq, inside.seq);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK(inside.calls > 1);
	unlisten(&inside);
	unlisten(&outside);
	test_device_close(&device);
	memory_unmap(memory, PAGES * 2);
}

static void layout_changes_are_told(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_migrate(&device, memory, PAGES, true), PAGES);
	listen(&listener, memory, PAGES);
	CHECK_EQ(madvise(memory, PAGE, MADV_DONTNEED), 0);
	hmm_mm_sync(mm);
	CHECK(listener.calls > 0);
	CHECK(listener.range.event == MMU_NOTIFY_CLEAR || listener.range.event == MMU_NOTIFY_UNMAP);
	CHECK(!listener.range.owner);
	listener.calls = 0;
	CHECK_EQ(munmap(memory + PAGE, PAGE), 0);
	hmm_mm_sync(mm);
	CHECK(listener.calls > 0);
	unlisten(&listener);
	memory_unmap(memory, PAGES);
	hmm_mm_sync(mm);
	test_device_close(&device);
}

static void numbers_validate_a_look(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	unsigned long seq;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, PAGES);
	listen(&listener, memory, 1);
	seq = mmu_interval_read_begin(&listener.notifier);
	CHECK(!mmu_interval_read_retry(&listener.notifier, seq));
	CHECK(!mmu_interval_check_retry(&listener.notifier, seq));
	CHECK_EQ(test_migrate(&device, memory + PAGE, 1, true), 1);
	CHECK(!mmu_interval_read_retry(&listener.notifier, seq));
	CHECK_EQ(test_migrate(&device, memory, 1, true), 1);
	CHECK(mmu_interval_read_retry(&listener.notifier, seq));
	CHECK(mmu_interval_check_retry(&listener.notifier, seq));
	CHECK_EQ(mmu_interval_read_begin(&listener.notifier), listener.seq);
	CHECK(!mmu_interval_read_retry(&listener.notifier, listener.seq));
	unlisten(&listener);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

static void *migrate_in_thread(void *memory)
{
	return test_migrate(&device, memory, 1, true) == 1 ? memory : NULL;
}

/* Whoever begins a look, or removes, waits for the callback. */
static void waiting_is_for_running_callbacks(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(2, PROT_READ | PROT_WRITE);
	pthread_t thread;
	void *done;

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, 2);
	listen(&listener, memory, 2);
	listener.slow = true;
	CHECK_EQ(pthread_create(&thread, NULL, migrate_in_thread, memory), 0);
	while (!listener.inside)
		usleep(1000);
	CHECK(!mmu_interval_read_retry(&listener.notifier, mmu_interval_read_begin(&listener.notifier)));
	CHECK_EQ(listener.calls, 1);
	CHECK_EQ(pthread_join(thread, &done), 0);
	CHECK(done);
	CHECK_EQ(pthread_create(&thread, NULL, migrate_in_thread, memory + PAGE), 0);
	while (!listener.inside)
		usleep(1000);
	unlisten(&listener);
	CHECK_EQ(listener.calls, 2);
	CHECK_EQ(listener.inside, 0);
	CHECK_EQ(pthread_join(thread, &done), 0);
	CHECK(done);
	CHECK_EQ(test_migrate(&device, memory, 2, false), 2);
	CHECK_EQ(listener.calls, 2);
	test_device_close(&device);
	memory_unmap(memory, 2);
}

static void a_callback_cannot_wait_for_itself(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(2, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, 2);
	listen(&listener, memory, 2);
	listener.removes = true;
	CHECK_EQ(test_migrate(&device, memory, 1, true), 1);
	CHECK_EQ(listener.begin_errno, -EDEADLK);
	CHECK_EQ(listener.remove_errno, -EDEADLK);
	CHECK(mmu_interval_read_retry(&listener.notifier, listener.begun));
	/* It was switched off at once, and is still to be removed. */
	CHECK_EQ(test_migrate(&device, memory + PAGE, 1, true), 1);
	CHECK_EQ(listener.calls, 1);
	unlisten(&listener);
	test_device_close(&device);
	memory_unmap(memory, 2);
}

/* The CPU page table is about to change: there is nothing to look at, and nothing to migrate. */
static void a_callback_cannot_look_nor_migrate(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(1, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, 1);
	listen(&listener, memory, 1);
	listener.looks = true;
	CHECK_EQ(test_migrate(&device, memory, 1, true), 1);
	CHECK_EQ(listener.look_errno, -EDEADLK);
	CHECK_EQ(listener.range_errno, test_first_pfn(&device) == HMM_DEVICE_PFN ? -EDEADLK : -EINVAL);
	unlisten(&listener);
	CHECK_EQ(memory_wrong(memory, 1), 0);
	test_device_close(&device);
	memory_unmap(memory, 1);
}

static void lengths_are_checked(void)
{
	static struct mmu_interval_notifier notifier;

	REFUSED(mmu_interval_notifier_insert(&notifier, mm, 0, 0, &ops), EOVERFLOW);
	REFUSED(mmu_interval_notifier_insert(&notifier, mm, PAGE, ULONG_MAX - PAGE + 2, &ops), EOVERFLOW);
	REFUSED(mmu_interval_notifier_insert(&notifier, mm, ULONG_MAX, 2, &ops), EOVERFLOW);
	REFUSED(mmu_interval_notifier_insert(&notifier, mm, 1UL << 47, PAGE, &ops), EINVAL);
	REFUSED(mmu_interval_notifier_insert(&notifier, mm, ULONG_MAX, 1, &ops), EINVAL);
	/* Any part of a page is good, and so is what begins below the end of the address space. */
	CHECK_EQ(mmu_interval_notifier_insert(&notifier, mm, 5000, 1, &ops), 0);
	CHECK_EQ(notifier.interval_tree.last, 5000);
	mmu_interval_notifier_remove(&notifier);
	CHECK_EQ(mmu_interval_notifier_insert(&notifier, mm, PAGE, ULONG_MAX - PAGE + 1, &ops), 0);
	CHECK_EQ(notifier.interval_tree.last, ULONG_MAX);
	mmu_interval_notifier_remove(&notifier);
	CHECK_EQ(hmm_last_errno(), 0);
}

static void parts_of_pages_are_told_as_pages(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(3, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm, MEMORY_DEVICE_PRIVATE);
	memory_fill(memory, 3);
	CHECK_EQ(mmu_interval_notifier_insert(&listener.notifier, mm, address(memory) + PAGE + 100, PAGE, &ops), 0);
	CHECK_EQ(test_migrate(&device, memory, 1, true), 1);
	CHECK_EQ(listener.calls, 0);
	CHECK_EQ(test_migrate(&device, memory + PAGE, 1, true), 1);
	CHECK_EQ(listener.calls, 1);
	CHECK_EQ(test_migrate(&device, memory + 2 * PAGE, 1, true), 1);
	CHECK_EQ(listener.calls, 2);
	unlisten(&listener);
	test_device_close(&device);
	memory_unmap(memory, 3);
}

static void misuse_is_refused(void)
{
	static struct listener listener;
	static struct mmu_interval_notifier notifier, copy;
	static const struct mmu_interval_notifier_ops empty;
	struct mmu_interval_notifier *odd = (void *)((char *)&notifier + 1);

	REFUSED(mmu_interval_notifier_insert(NULL, mm, PAGE, PAGE, &ops), EINVAL);
	REFUSED(mmu_interval_notifier_insert(odd, mm, PAGE, PAGE, &ops), EINVAL);
	REFUSED(mmu_interval_notifier_insert(&notifier, NULL, PAGE, PAGE, &ops), EINVAL);
	REFUSED(mmu_interval_notifier_insert(&notifier, (void *)&notifier, PAGE, PAGE, &ops), EINVAL);
	REFUSED(mmu_interval_notifier_insert(&notifier, mm, PAGE, PAGE, NULL), EINVAL);
	REFUSED(mmu_interval_notifier_insert(&notifier, mm, PAGE, PAGE, &empty), EINVAL);
	REFUSED(mmu_interval_notifier_insert_locked(&notifier, mm, PAGE, PAGE, &ops), EINVAL);
	/* Not inserted: nothing to remove, and nothing that still stands. */
	mmu_interval_notifier_remove(&notifier);
	CHECK_EQ(hmm_last_errno(), 0);
	mmu_interval_notifier_remove(NULL);
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK(mmu_interval_read_retry(&notifier, 0) && hmm_last_errno() == -EINVAL);
	CHECK(mmu_interval_check_retry(NULL, 0) && hmm_last_errno() == -EINVAL);
	CHECK_EQ(mmu_interval_read_begin(odd), ULONG_MAX);
	CHECK_EQ(hmm_last_errno(), -EINVAL);
	REFUSED_VOID(mmu_interval_set_seq(&notifier, 1), EINVAL);
	CHECK_EQ(notifier.invalidate_seq, 0);

	CHECK_EQ(mmu_interval_notifier_insert(&listener.notifier, mm, PAGE, PAGE, &ops), 0);
	REFUSED(mmu_interval_notifier_insert(&listener.notifier, mm, PAGE, PAGE, &ops), EBUSY);
	copy = listener.notifier;
	CHECK(mmu_interval_read_retry(&copy, mmu_interval_read_begin(&listener.notifier)));
	unlisten(&listener);
	unlisten(&listener);
	CHECK(mmu_interval_read_retry(&listener.notifier, mmu_interval_read_begin(&listener.notifier)));

	hmm_mm_write_lock(mm);
	CHECK_EQ(mmu_interval_notifier_insert_locked(&listener.notifier, mm, PAGE, PAGE, &ops), 0);
	hmm_mm_write_unlock(mm);
	hmm_mm_read_lock(mm);
	REFUSED(mmu_interval_notifier_insert_locked(&notifier, mm, PAGE, PAGE, &ops), EINVAL);
	hmm_mm_read_unlock(mm);
	unlisten(&listener);
}

/* The last test: it closes the address space. */
static void closing_is_told_once(void)
{
	static struct listener all, some;
	unsigned char *memory = memory_map(1, PROT_READ | PROT_WRITE);

	memset(&all, 0, sizeof(all));
	listen(&some, memory, 1);
	CHECK_EQ(mmu_interval_notifier_insert(&all.notifier, mm, 0, ULONG_MAX & PAGE_MASK, &ops), 0);
	CHECK_EQ(hmm_mm_put(mm), 0);
	CHECK(all.releases == 1 && some.releases == 1);
	CHECK_EQ(all.range.event, MMU_NOTIFY_RELEASE);
	CHECK(all.range.start == 0 && all.range.end == ULONG_MAX && !all.range.owner);
	CHECK(some.range.start == 0 && some.range.end == ULONG_MAX);
	unlisten(&all);
	unlisten(&some);
	mm = hmm_mm_current();
	CHECK(!IS_ERR(mm));
	memory_unmap(memory, 1);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(inserting_fills_in_the_structure),
		TEST(migrations_are_told_with_their_owner),
		TEST(layout_changes_are_told),
		TEST(numbers_validate_a_look),
		TEST(waiting_is_for_running_callbacks),
		TEST(a_callback_cannot_wait_for_itself),
		TEST(a_callback_cannot_look_nor_migrate),
		TEST(lengths_are_checked),
		TEST(parts_of_pages_are_told_as_pages),
		TEST(misuse_is_refused),
		TEST(closing_is_told_once),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
