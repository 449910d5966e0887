/* Mirrors: who is called, for what, and what unregistering promises. */
#include "device.h"

#include <unistd.h>

#define PAGES 8

static struct mm_struct *mm;
static struct test_device device;

/* A driver that writes down what it is told. Callbacks touch nothing else; it is pinned with its mirror. */
struct listener {
	struct hmm_mirror mirror;
	unsigned long watch_start, watch_end;	/* counts only updates that touch this */
	atomic_int calls, releases, inside;
	atomic_ulong start, end;
	atomic_bool slow, unregisters;
	atomic_int unregister_errno, put_errno, open_errno;
};

static void on_update(struct hmm_mirror *mirror, enum hmm_update_type type, unsigned long start, unsigned long end)
{
	struct listener *listener = container_of(mirror, struct listener, mirror);

	if (type != HMM_UPDATE_INVALIDATE || end <= listener->watch_start || listener->watch_end <= start)
		return;
	listener->inside++;
	listener->start = start;
	listener->end = end;
	if (listener->slow)
		usleep(200 * 1000);
	if (listener->unregisters) {
		hmm_mirror_unregister(mirror);
		listener->unregister_errno = hmm_last_errno();
	}
	listener->calls++;
	listener->inside--;
}

static void on_release(struct hmm_mirror *mirror)
{
	struct listener *listener = container_of(mirror, struct listener, mirror);

	listener->releases++;
	/* Either would wait for the closing that this is a part of. */
	listener->put_errno = hmm_mm_put(mm);
	listener->open_errno = (int)PTR_ERR(hmm_mm_current());
}

static const struct hmm_mirror_ops ops = { .release = on_release, .sync_cpu_device_pagetables = on_update };

/* Listens to a range, which is looked at so that the library watches it. */
static void listen(struct listener *listener, const unsigned char *memory)
{
	static hmm_pfn_t pfns[PAGES];
	struct hmm_range range;
	unsigned long start = address(memory), end = start + PAGES * PAGE;

	/* An unmapping of what was here before may still be on its way. */
	CHECK_EQ(hmm_mm_sync(mm), 0);
	memset(listener, 0, sizeof(*listener));
	listener->mirror.ops = &ops;
	listener->watch_start = start;
	listener->watch_end = end;
	CHECK_EQ(hmm_mirror_register(&listener->mirror, mm), 0);
	hmm_mm_read_lock(mm);
	CHECK_EQ(hmm_vma_get_pfns(find_vma(mm, start), &range, start, end, pfns), 0);
	hmm_vma_range_done(NULL, &range);
	hmm_mm_read_unlock(mm);
}

/* The last update covers a range of pages of the memory. */
static void check_covers(struct listener *listener, const unsigned char *memory, size_t first, size_t pages)
{
	CHECK(listener->start <= address(memory) + first * PAGE);
	CHECK(address(memory) + (first + pages) * PAGE <= listener->end);
}

static void layout_changes_are_told(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE), *moved;
	int before;

	NEEDS(mm, EVENTS);
	memory_fill(memory, PAGES);
	listen(&listener, memory);
	madvise(memory + PAGE, PAGE, MADV_DONTNEED);
	hmm_mm_sync(mm);
	CHECK(listener.calls > 0);
	check_covers(&listener, memory, 1, 1);

	before = listener.calls;
	munmap(memory + 2 * PAGE, 2 * PAGE);
	hmm_mm_sync(mm);
	CHECK(listener.calls > before);
	check_covers(&listener, memory, 2, 2);

	before = listener.calls;
	moved = mremap(memory + 4 * PAGE, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, memory + 2 * PAGE);
	CHECK(moved == memory + 2 * PAGE && moved[0] == memory_pattern(4));
	hmm_mm_sync(mm);
	CHECK(listener.calls > before);
	CHECK_EQ(listener.inside, 0);
	hmm_mirror_unregister(&listener.mirror);
	memory_unmap(memory, PAGES);
}

/* Of pages that are on a device, every engine finds out. */
static void layout_changes_of_device_pages_are_told(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	int before;

	memory_fill(memory, PAGES);
	listen(&listener, memory);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	before = listener.calls;
	madvise(memory + PAGE, PAGE, MADV_DONTNEED);
	hmm_mm_sync(mm);
	CHECK(listener.calls > before);
	check_covers(&listener, memory, 1, 1);
	before = listener.calls;
	munmap(memory + 4 * PAGE, 2 * PAGE);
	hmm_mm_sync(mm);
	CHECK(listener.calls > before);
	check_covers(&listener, memory, 4, 2);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), PAGES - 3);
	hmm_mirror_unregister(&listener.mirror);
	memory_unmap(memory, PAGES);
	hmm_mm_sync(mm);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), 0);
}

static void other_ranges_are_not_told(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	unsigned char *elsewhere = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	listen(&listener, memory);
	madvise(elsewhere, PAGE, MADV_DONTNEED);
	memory_unmap(elsewhere, PAGES);
	hmm_mm_sync(mm);
	CHECK_EQ(listener.calls, 0);
	hmm_mirror_unregister(&listener.mirror);
	memory_unmap(memory, PAGES);
}

static void migration_is_told_to_every_mirror(void)
{
	static struct listener first, second;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	int before;

	memory_fill(memory, PAGES);
	listen(&first, memory);
	listen(&second, memory);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK(first.calls > 0 && second.calls > 0);
	check_covers(&first, memory, 0, PAGES);
	check_covers(&second, memory, 0, PAGES);
	before = second.calls;
	hmm_mirror_unregister(&first.mirror);
	first.calls = 0;
	CHECK_EQ(memory[3 * PAGE], memory_pattern(3));
	hmm_mm_sync(mm);
	CHECK_EQ(first.calls, 0);
	CHECK(second.calls > before);
	check_covers(&second, memory, 3, 1);
	hmm_mirror_unregister(&second.mirror);
	memory_unmap(memory, PAGES);
}

static void ops_are_copied(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_mirror_ops on_stack = ops;

	memory_fill(memory, PAGES);
	memset(&listener, 0xff, sizeof(listener));
	listen(&listener, memory);
	hmm_mirror_unregister(&listener.mirror);
	listener.mirror.ops = &on_stack;
	CHECK_EQ(hmm_mirror_register(&listener.mirror, mm), 0);
	memset(&on_stack, 0, sizeof(on_stack));
	listener.mirror.ops = NULL;
	test_device_change(&device, memory);
	hmm_mm_sync(mm);
	CHECK(listener.calls > 0);
	hmm_mirror_unregister(&listener.mirror);
	CHECK_EQ(hmm_last_errno(), 0);
	memory_unmap(memory, PAGES);
}

static void *change_a_page(void *memory)
{
	test_device_change(&device, memory);
	hmm_mm_sync(mm);
	return NULL;
}

static void unregister_waits_for_a_running_callback(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	pthread_t thread;

	memory_fill(memory, PAGES);
	listen(&listener, memory);
	listener.slow = true;
	pthread_create(&thread, NULL, change_a_page, memory);
	for (int i = 0; i < 5000 && !listener.inside; i++)
		usleep(1000);
	CHECK_EQ(listener.inside, 1);
	hmm_mirror_unregister(&listener.mirror);
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK_EQ(listener.inside, 0);
	CHECK_EQ(listener.calls, 1);
	memset(&listener, 0xee, sizeof(listener));
	pthread_join(thread, NULL);
	test_device_change(&device, memory + PAGE);
	hmm_mm_sync(mm);
	CHECK_EQ(listener.calls, (int)0xeeeeeeee);
	memory_unmap(memory, PAGES);
}

static void unregister_from_its_own_callback_does_not_hang(void)
{
	static struct listener listener;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	listen(&listener, memory);
	listener.unregisters = true;
	test_device_change(&device, memory);
	hmm_mm_sync(mm);
	CHECK_EQ(listener.calls, 1);
	CHECK_EQ(listener.unregister_errno, -EDEADLK);
	test_device_change(&device, memory + PAGE);
	hmm_mm_sync(mm);
	CHECK_EQ(listener.calls, 1);
	hmm_mirror_unregister(&listener.mirror);
	CHECK_EQ(hmm_last_errno(), 0);
	listener.mirror.ops = &ops;
	CHECK_EQ(hmm_mirror_register(&listener.mirror, mm), 0);
	hmm_mirror_unregister(&listener.mirror);
	memory_unmap(memory, PAGES);
}

static atomic_bool stop;

static void *change_all_the_time(void *memory)
{
	for (unsigned int i = 0; !stop; i++) {
		((volatile unsigned char *)memory)[i % PAGES * PAGE] = (unsigned char)i;
		test_device_change(&device, (unsigned char *)memory + i % PAGES * PAGE);
	}
	return NULL;
}

static void register_and_unregister_while_callbacks_run(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct listener *listener = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	pthread_t thread;
	int calls = 0;

	stop = false;
	pthread_create(&thread, NULL, change_all_the_time, memory);
	for (int i = 0; i < 200; i++) {
		listen(listener, memory);
		usleep(i % 4 * 200);
		hmm_mirror_unregister(&listener->mirror);
		CHECK_EQ(hmm_last_errno(), 0);
		CHECK_EQ(listener->inside, 0);
		calls += listener->calls;
		/* A callback that came now would touch memory that is not there. */
		mprotect(listener, PAGE, PROT_NONE);
		usleep(200);
		mprotect(listener, PAGE, PROT_READ | PROT_WRITE);
	}
	stop = true;
	pthread_join(thread, NULL);
	CHECK(calls > 0);
	munmap(listener, PAGE);
	memory_unmap(memory, PAGES);
}

static void closing_releases_each_mirror_once(void)
{
	static struct listener first, second;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct mm_struct *again = hmm_mm_current();

	CHECK(again == mm);
	test_device_close(&device);
	memory_fill(memory, PAGES);
	listen(&first, memory);
	listen(&second, memory);
	CHECK_EQ(hmm_mm_put(mm), 0);
	CHECK_EQ(first.releases, 0);
	CHECK_EQ(hmm_mm_put(mm), 0);
	CHECK_EQ(first.releases, 1);
	CHECK_EQ(second.releases, 1);
	CHECK_EQ(first.put_errno, -EDEADLK);
	CHECK_EQ(first.open_errno, -EDEADLK);
	REFUSED(hmm_mm_sync(mm), EINVAL);
	hmm_mirror_unregister(&first.mirror);
	CHECK_EQ(hmm_last_errno(), 0);
	hmm_mirror_unregister(&second.mirror);
	CHECK_EQ(first.releases, 1);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
	mm = hmm_mm_current();
	CHECK(!IS_ERR(mm));
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(layout_changes_are_told),
		TEST(layout_changes_of_device_pages_are_told),
		TEST(other_ranges_are_not_told),
		TEST(migration_is_told_to_every_mirror),
		TEST(ops_are_copied),
		TEST(unregister_waits_for_a_running_callback),
		TEST(unregister_from_its_own_callback_does_not_hang),
		TEST(register_and_unregister_while_callbacks_run),
		TEST(closing_releases_each_mirror_once),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	/* The last test, which closes the address space, closes it. */
	test_device_open(&device, mm);
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
