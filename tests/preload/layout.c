/* With the real libhmm, in ordered mode: mirrors hear of every change of the layout before it is made, and memory that is
 * on a device goes where the program's change says, on every engine. */
#include "layout.h"

#include <sys/ipc.h>
#include <sys/shm.h>
#include <sys/syscall.h>

#define PAGES 16UL
#define BYTES (PAGES * PAGE)

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

/* What a mirror saw when it was called for a page. */
static struct {
	struct hmm_mirror mirror;
	unsigned long page;	/* 0: it does not look */
	int calls;
	int was_there;		/* at the first call: resident */
	char access[5];		/* at the first call, as in /proc/self/maps */
} witness;

/* The access of the mapping at an address, with system calls alone. */
static void access_at(unsigned long address, char access[5])
{
	static char text[1 << 16];
	size_t length = 0;
	ssize_t got;
	int fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);

	while (length < sizeof(text) - 1 && (got = read(fd, text + length, sizeof(text) - 1 - length)) > 0)
		length += (size_t)got;
	close(fd);
	text[length] = 0;
	strcpy(access, "none");
	for (char *line = text; line && *line; line = strchr(line, '\n') ? strchr(line, '\n') + 1 : NULL) {
		unsigned long start = strtoul(line, &line, 16), end = strtoul(line + 1, &line, 16);

		if (start <= address && address < end)
			memcpy(access, line + 1, 4);
	}
}

static void on_update(struct hmm_mirror *mirror, enum hmm_update_type type, unsigned long start, unsigned long end)
{
	unsigned char resident = 0;

	(void)mirror;
	if (type != HMM_UPDATE_INVALIDATE || witness.page < start || end <= witness.page)
		return;
	if (witness.calls++)
		return;
	/* Nobody waits for a change that is made in a callback. */
	munmap(map_pages(NULL, 1, 0), PAGE);
	witness.was_there = mincore((void *)witness.page, PAGE, &resident) == 0 && resident & 1;
	access_at(witness.page, witness.access);
}

static const struct hmm_mirror_ops witness_ops = { .sync_cpu_device_pagetables = on_update };

static void watch(const unsigned char *page)
{
	witness.calls = witness.was_there = 0;
	strcpy(witness.access, "?");
	witness.page = (unsigned long)page;
}

/* The mirror was called for a change that has just been made, and everything was as before. */
#define CHECK_CALLED_BEFORE()                                                                  \
	do {                                                                                   \
		witness.page = 0;                                                              \
		CHECK(witness.calls > 0);                                                      \
		CHECK_EQ(witness.was_there, 1);                                                \
		CHECK_EQ(strncmp(witness.access, "rw-", 3), 0);                                \
	} while (0)

static unsigned char *away(uint64_t seed)
{
	unsigned char *memory = map_pages(NULL, PAGES, 0);

	fill(memory, PAGES, seed);
	CHECK_EQ(hmm_soft_migrate(device, memory, BYTES), PAGES);
	return memory;
}

static void the_mode_can_be_asked_for(void)
{
	CHECK(can(HMM_CAPABILITY_ORDERED));
}

static void mirrors_are_called_before_every_change(void)
{
	unsigned char *memory = map_pages(NULL, PAGES, 0), *other = map_pages(NULL, PAGES, 0), *segment;
	int id = shmget(IPC_PRIVATE, 4 * PAGE, IPC_CREAT | 0600);

	fill(memory, PAGES, 1);
	watch(memory + PAGE);
	CHECK_EQ(madvise(memory, 4 * PAGE, MADV_DONTNEED), 0);
	CHECK_CALLED_BEFORE();
	fill(memory, PAGES, 2);
	watch(memory + PAGE);
	CHECK_EQ(mprotect(memory, 4 * PAGE, PROT_READ), 0);
	CHECK_CALLED_BEFORE();
	watch(memory + 5 * PAGE);
	CHECK_EQ(pkey_mprotect(memory + 4 * PAGE, 4 * PAGE, PROT_READ, -1), 0);
	CHECK_CALLED_BEFORE();
	CHECK_EQ(wrong(memory, 8, 2), 0);
	CHECK_EQ(mprotect(memory, BYTES, PROT_READ | PROT_WRITE), 0);
	watch(memory + 3 * PAGE);
	CHECK(map_pages(memory + 2 * PAGE, 2, MAP_FIXED) == memory + 2 * PAGE);
	CHECK_CALLED_BEFORE();
	fill(other, PAGES, 3);
	watch(other + 3 * PAGE);
	/* The new place is in use; the old one is told of, too. */
	CHECK(mremap(memory, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, other + 2 * PAGE) == other + 2 * PAGE);
	CHECK_CALLED_BEFORE();
	fill(memory + 6 * PAGE, 2, 3);
	watch(memory + 6 * PAGE);
	CHECK(mremap(memory + 6 * PAGE, 2 * PAGE, 4 * PAGE, MREMAP_MAYMOVE) != MAP_FAILED);
	CHECK_CALLED_BEFORE();
	watch(other + 5 * PAGE);
	CHECK_EQ(munmap(other + 4 * PAGE, 2 * PAGE), 0);
	CHECK_CALLED_BEFORE();
	segment = shmat(id, NULL, 0);
	shmctl(id, IPC_RMID, NULL);
	CHECK(segment != (void *)-1);
	memset(segment, 1, 4 * PAGE);
	watch(segment + 3 * PAGE);
	CHECK_EQ(shmdt(segment), 0);
	CHECK_CALLED_BEFORE();
	munmap(memory, BYTES);
	munmap(other, BYTES);
}

static void mirrors_are_called_before_the_break_moves_down(void)
{
	unsigned char *top = (unsigned char *)(((uintptr_t)sbrk(8 * PAGE) + PAGE - 1) & -PAGE);

	memset(top, 1, 7 * PAGE);
	watch(top + 6 * PAGE);
	CHECK(sbrk(-2 * (intptr_t)PAGE) != (void *)-1);
	CHECK_CALLED_BEFORE();
	watch(top + 3 * PAGE);
	CHECK_EQ(brk(top + 2 * PAGE), 0);
	CHECK_CALLED_BEFORE();
	CHECK_EQ(brk(top), 0);
}

/* Nothing that the kernel does not do to a range is told. */
static void other_advice_is_no_change(void)
{
	unsigned char *memory = map_pages(NULL, PAGES, 0);

	fill(memory, PAGES, 1);
	watch(memory);
	CHECK_EQ(madvise(memory, BYTES, MADV_WILLNEED), 0);
	CHECK_EQ(witness.calls, 0);
	CHECK_EQ(wrong(memory, PAGES, 1), 0);
	munmap(memory, BYTES);
}

static void unmapped_device_pages_are_free_at_once(void)
{
	for (uint64_t round = 0; round < 20; round++) {
		unsigned char *memory = away(round);
		long before = device_pages();

		CHECK_EQ(munmap(memory + 4 * PAGE, 8 * PAGE), 0);
		CHECK_EQ(device_pages(), before - 8);
		CHECK(map_pages(memory + 4 * PAGE, 8, MAP_FIXED) == memory + 4 * PAGE);
		CHECK_EQ(not_zero(memory + 4 * PAGE, 8), 0);
		CHECK_EQ(wrong(memory, 4, round), 0);
		CHECK_EQ(wrong(memory + 12 * PAGE, 4, round + 12), 0);
		CHECK_EQ(munmap(memory, BYTES), 0);
	}
	CHECK_EQ(device_pages(), 0);
}

static void what_is_mapped_over_is_new(void)
{
	unsigned char *memory = away(5);

	CHECK(map_pages(memory, 8, MAP_FIXED) == memory);
	CHECK_EQ(device_pages(), 8);
	CHECK_EQ(not_zero(memory, 8), 0);
	CHECK_EQ(wrong(memory + 8 * PAGE, 8, 13), 0);
	CHECK(map_pages(memory, 8, MAP_FIXED_NOREPLACE) == MAP_FAILED);
	munmap(memory, BYTES);
}

static void dropped_memory_reads_as_zeros(void)
{
	static const int advice[] = { MADV_DONTNEED, MADV_FREE, MADV_DONTNEED_LOCKED };
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	for (size_t i = 0; i < COUNT(advice); i++) {
		unsigned char *memory = away(7);

		if (madvise(memory + 4 * PAGE, 4 * PAGE, advice[i]) && errno == EINVAL) {
			printf("# this kernel does not know advice %d\n", advice[i]);
			munmap(memory, BYTES);
			continue;
		}
		CHECK_EQ(device_pages(), 12);
		/* To a system call as well, where no hold is in its way. */
		if (can(HMM_CAPABILITY_EVENTS) == can(HMM_CAPABILITY_KERNEL_FAULTS))
			CHECK_EQ(syscall(SYS_write, ends[1], memory + 4 * PAGE, 100), 100);
		CHECK_EQ(not_zero(memory + 4 * PAGE, 4), 0);
		CHECK_EQ(wrong(memory, 4, 7), 0);
		fill(memory, PAGES, 8);
		CHECK_EQ(wrong(memory, PAGES, 8), 0);
		munmap(memory, BYTES);
	}
	close(ends[0]);
	close(ends[1]);
	CHECK_EQ(device_pages(), 0);
}

static void moved_memory_keeps_its_contents(void)
{
	unsigned char *memory = away(9), *place = map_pages(NULL, 4 * PAGES, 0), *old;

	fill(place, 4 * PAGES, 77);
	CHECK_EQ(hmm_soft_migrate(device, place, 4 * BYTES), 4 * PAGES);
	/* To a place of which pages are away. */
	CHECK(mremap(memory, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
	CHECK_EQ(wrong(place, PAGES, 9), 0);
	CHECK_EQ(wrong(place + BYTES, 3 * PAGES, 77 + PAGES), 0);
	CHECK(map_pages(memory, PAGES, MAP_FIXED_NOREPLACE) == memory);
	CHECK_EQ(not_zero(memory, PAGES), 0);
	munmap(memory, BYTES);
	munmap(place, 4 * BYTES);
	/* Grown, and shrunk. */
	memory = away(10);
	old = memory;
	memory = mremap(memory, BYTES, 2 * BYTES, MREMAP_MAYMOVE);
	CHECK(memory != MAP_FAILED);
	CHECK_EQ(wrong(memory, PAGES, 10), 0);
	CHECK_EQ(not_zero(memory + BYTES, PAGES), 0);
	fill(memory, 2 * PAGES, 11);
	CHECK_EQ(hmm_soft_migrate(device, memory, 2 * BYTES), 2 * PAGES);
	CHECK(mremap(memory, 2 * BYTES, PAGE, 0) == memory);
	CHECK_EQ(device_pages(), can(HMM_CAPABILITY_MOVE) || memory != old ? 1 : device_pages());
	CHECK_EQ(wrong(memory, 1, 11), 0);
	munmap(memory, PAGE);
	CHECK_EQ(device_pages(), 0);
}

static void protected_memory_keeps_its_contents(void)
{
	unsigned char *memory = away(13);

	CHECK_EQ(mprotect(memory, 8 * PAGE, PROT_READ), 0);
	CHECK_EQ(wrong(memory, PAGES, 13), 0);
	CHECK_EQ(mprotect(memory, BYTES, PROT_READ | PROT_WRITE), 0);
	fill(memory, PAGES, 14);
	CHECK_EQ(hmm_soft_migrate(device, memory, BYTES), PAGES);
	CHECK_EQ(mprotect(memory + 4 * PAGE, 4 * PAGE, PROT_NONE), 0);
	CHECK_EQ(mprotect(memory + 4 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE), 0);
	CHECK_EQ(wrong(memory, PAGES, 14), 0);
	munmap(memory, BYTES);
}

/* Calls that fail, at once or half-way: what they did not do has not happened. */
static void failing_calls_lose_nothing(void)
{
	unsigned char *memory = away(20), *hole;

	CHECK_FAILS(munmap(memory + 1, PAGE), EINVAL);
	CHECK_FAILS(munmap(memory, 0), EINVAL);
	CHECK_FAILS(munmap(memory, (size_t)-1), EINVAL);
	CHECK_FAILS(madvise(memory + 1, PAGE, MADV_DONTNEED), EINVAL);
	CHECK_FAILS(madvise(memory, BYTES, 12345), EINVAL);
	CHECK_FAILS(madvise(memory, BYTES, MADV_REMOVE), EINVAL);
	CHECK_FAILS(mprotect(memory + 1, PAGE, PROT_NONE), EINVAL);
	CHECK_FAILS(pkey_mprotect(memory, BYTES, PROT_READ, 4000), EINVAL);
	CHECK_EQ(mremap(memory, BYTES, BYTES, 64) == MAP_FAILED, 1);
	CHECK_EQ(mremap(memory, BYTES, BYTES, MREMAP_MAYMOVE | MREMAP_FIXED, memory + PAGE) == MAP_FAILED, 1);
	CHECK_EQ(mmap(memory, BYTES, PROT_READ, MAP_PRIVATE | MAP_FIXED, -1, 0) == MAP_FAILED, 1);
	CHECK_EQ(wrong(memory, PAGES, 20), 0);
	/* Without the last pages. */
	CHECK_EQ(hmm_soft_migrate(device, memory, BYTES), PAGES);
	hole = memory + 12 * PAGE;
	CHECK_EQ(munmap(hole, 4 * PAGE), 0);
	CHECK_FAILS(mprotect(memory + 8 * PAGE, 8 * PAGE, PROT_READ), ENOMEM);
	CHECK_EQ(wrong(memory, 12, 20), 0);
	CHECK_EQ(mprotect(memory, 12 * PAGE, PROT_READ | PROT_WRITE), 0);
	CHECK_EQ(hmm_soft_migrate(device, memory, 12 * PAGE), 12);
	CHECK_FAILS(madvise(memory + 8 * PAGE, 8 * PAGE, MADV_DONTNEED), ENOMEM);
	CHECK_EQ(wrong(memory, 8, 20), 0);
	CHECK_EQ(not_zero(memory + 8 * PAGE, 4), 0);
	CHECK_EQ(hmm_soft_migrate(device, memory, 12 * PAGE), 12);
	CHECK_EQ(mremap(memory, BYTES, 2 * BYTES, MREMAP_MAYMOVE) == MAP_FAILED, 1);
	CHECK_EQ(wrong(memory, 8, 20), 0);
	munmap(memory, BYTES);
}

/* The kernel drops what comes before the locked page, and then refuses. */
static void a_drop_that_fails_half_way_is_half_a_drop(void)
{
	unsigned char *memory = map_pages(NULL, PAGES, 0);

	fill(memory, PAGES, 30);
	if (mlock(memory + 8 * PAGE, PAGE)) {
		printf("# no memory may be locked here: %s\n", strerror(errno));
		munmap(memory, BYTES);
		return;
	}
	CHECK_EQ(hmm_soft_migrate(device, memory, 8 * PAGE), 8);
	CHECK_FAILS(madvise(memory + 4 * PAGE, 5 * PAGE, MADV_DONTNEED), EINVAL);
	CHECK_EQ(wrong(memory, 4, 30), 0);
	CHECK_EQ(not_zero(memory + 4 * PAGE, 4), 0);
	CHECK_EQ(wrong(memory + 8 * PAGE, 8, 38), 0);
	munmap(memory, BYTES);
	CHECK_EQ(device_pages(), 0);
}

/* free() unmaps inside libc, where nobody stands between: it is found out as without the library. */
static void what_libc_unmaps_by_itself_is_no_danger(void)
{
	for (int round = 0; round < 20; round++) {
		size_t bytes = 16UL << 20;
		unsigned char *memory = malloc(bytes), *first, *again;

		first = (unsigned char *)(((uintptr_t)memory + PAGE - 1) & -PAGE);
		fill(first, PAGES, 40);
		CHECK_EQ(hmm_soft_migrate(device, first, BYTES), PAGES);
		watch(first);
		free(memory);
		witness.page = 0;
		again = calloc(1, bytes);
		CHECK_EQ(not_zero((unsigned char *)(((uintptr_t)again + PAGE - 1) & -PAGE), PAGES), 0);
		free(again);
	}
	CHECK_EQ(hmm_mm_sync(mm), 0);
	CHECK_EQ(device_pages(), 0);
}

static void *drop_below(void *argument)
{
	unsigned char here[64];
	unsigned char *below = (unsigned char *)(((uintptr_t)here & -PAGE) - 4 * PAGE);

	memset(here, 3, sizeof(here));
	CHECK_EQ(madvise(below - 64 * PAGE, 64 * PAGE, MADV_DONTNEED), 0);
	for (size_t i = 0; i < sizeof(here); i++)
		CHECK_EQ(here[i], 3);
	return argument;
}

/* A thread that gives back what lies below its own frames finds them whole afterwards. */
static void a_thread_drops_what_is_below_its_frames(void)
{
	pthread_t thread;

	CHECK_EQ(pthread_create(&thread, NULL, drop_below, NULL), 0);
	pthread_join(thread, NULL);
}

int main(int argc, char **argv)
{
	static const struct tap_test tests[] = {
		TEST(the_mode_can_be_asked_for),
		TEST(mirrors_are_called_before_every_change),
		TEST(mirrors_are_called_before_the_break_moves_down),
		TEST(other_advice_is_no_change),
		TEST(unmapped_device_pages_are_free_at_once),
		TEST(what_is_mapped_over_is_new),
		TEST(dropped_memory_reads_as_zeros),
		TEST(moved_memory_keeps_its_contents),
		TEST(protected_memory_keeps_its_contents),
		TEST(failing_calls_lose_nothing),
		TEST(a_drop_that_fails_half_way_is_half_a_drop),
		TEST(what_libc_unmaps_by_itself_is_no_danger),
		TEST(a_thread_drops_what_is_below_its_frames),
	};

	layout_start();
	if (argc > 1) {
		/* For who wants to know. */
		printf("%s\n", can(HMM_CAPABILITY_ORDERED) ? "ordered" : "observed");
		return 0;
	}
	(void)argv;
	witness.mirror.ops = &witness_ops;
	if (hmm_mirror_register(&witness.mirror, mm)) {
		printf("Bail out! %s\n", hmm_last_error());
		return 2;
	}
	return tap_run(tests, COUNT(tests));
}
