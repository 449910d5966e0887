/* What the preloaded library announces of changes of the layout, to a pretended libhmm: which calls, which ranges, in
 * which order, and what it makes of the answers. */
#include "tap.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <unistd.h>

#define PAGE 4096UL

enum { UNMAP = 1, DROP, PROTECT, MOVE, DETACH };

struct hmm_preload_change {
	int kind;
	const void *address;
	size_t length;
	const void *target;
	size_t target_length;
	uint64_t kept[64];
};

struct hmm_preload_layout {
	size_t size;
	int (*begin)(struct hmm_preload_change *change);
	void (*end)(struct hmm_preload_change *change, int made);
};

typedef void attach_function(const struct hmm_preload_layout *);

static attach_function *attach;
static struct hmm_preload_change last;
static int begun, ended, made_last, answer;

static int pretend_begin(struct hmm_preload_change *change)
{
	begun++;
	last = *change;
	change->kept[0] = 77;
	change->kept[63] = 88;
	/* Calls from inside are not announced. */
	munmap(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), PAGE);
	errno = EDOM;
	return answer;
}

static void pretend_end(struct hmm_preload_change *change, int made)
{
	CHECK_EQ(change->kept[0], 77);
	CHECK_EQ(change->kept[63], 88);
	ended++;
	made_last = made;
	mprotect(NULL, PAGE, PROT_READ);
	errno = EDOM;
}

static const struct hmm_preload_layout hooks = { sizeof(hooks), pretend_begin, pretend_end };

static void expect_nothing(void)
{
	begun = ended = answer = 0;
	memset(&last, 0, sizeof(last));
	errno = ENOTTY;
}

/* The last call was announced once, as such, and its end as well. */
#define CHECK_ANNOUNCED(what, start, bytes)                                                    \
	do {                                                                                   \
		CHECK_EQ(begun, 1);                                                            \
		CHECK_EQ(ended, 1);                                                            \
		CHECK_EQ(last.kind, what);                                                     \
		CHECK(last.address == (const void *)(start));                                  \
		CHECK_EQ(last.length, bytes);                                                  \
		CHECK_EQ(made_last, 1);                                                        \
		CHECK_EQ(errno, ENOTTY);                                                       \
		expect_nothing();                                                              \
	} while (0)

static unsigned char *map_pages(void *at, size_t pages, int flags)
{
	return mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

static void changes_are_announced_with_their_ranges(void)
{
	unsigned char *memory = map_pages(NULL, 8, 0), *other = map_pages(NULL, 8, 0), *segment;
	int id = shmget(IPC_PRIVATE, 2 * PAGE, IPC_CREAT | 0600);

	expect_nothing();
	CHECK(map_pages(memory, 2, MAP_FIXED) == memory);
	CHECK_ANNOUNCED(UNMAP, memory, 2 * PAGE);
	CHECK(mmap64(memory, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == memory);
	CHECK_ANNOUNCED(UNMAP, memory, PAGE);
	CHECK_EQ(mprotect(memory, 3 * PAGE, PROT_READ), 0);
	CHECK_ANNOUNCED(PROTECT, memory, 3 * PAGE);
	CHECK_EQ(pkey_mprotect(memory, 2 * PAGE, PROT_READ | PROT_WRITE, -1), 0);
	CHECK_ANNOUNCED(PROTECT, memory, 2 * PAGE);
	CHECK_EQ(madvise(memory, 2 * PAGE, MADV_DONTNEED), 0);
	CHECK_ANNOUNCED(DROP, memory, 2 * PAGE);
	CHECK_EQ(madvise(memory, 2 * PAGE, MADV_FREE), 0);
	CHECK_ANNOUNCED(DROP, memory, 2 * PAGE);
	CHECK(mremap(memory, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, other) == other);
	CHECK(last.target == other && last.target_length == PAGE);
	CHECK_ANNOUNCED(MOVE, memory, PAGE);
	CHECK(mremap(other + 4 * PAGE, 4 * PAGE, PAGE + 1, MREMAP_MAYMOVE) == other + 4 * PAGE);
	CHECK_ANNOUNCED(UNMAP, other + 6 * PAGE, 2 * PAGE);
	CHECK(mremap(other + 4 * PAGE, 2 * PAGE, 3 * PAGE, MREMAP_MAYMOVE) != MAP_FAILED);
	CHECK(last.target == NULL);
	CHECK_ANNOUNCED(MOVE, other + 4 * PAGE, 2 * PAGE);
	CHECK_EQ(munmap(other, 4 * PAGE), 0);
	CHECK_ANNOUNCED(UNMAP, other, 4 * PAGE);
	segment = shmat(id, NULL, 0);
	shmctl(id, IPC_RMID, NULL);
	CHECK_EQ(shmdt(segment), 0);
	CHECK_EQ(last.kind, DETACH);
	CHECK(last.address == segment && begun == 1 && ended == 1);
	munmap(memory, 8 * PAGE);
}

static void a_lower_break_is_announced(void)
{
	unsigned char *top = sbrk(0), *page = (unsigned char *)(((uintptr_t)top + PAGE - 1) & -PAGE);

	expect_nothing();
	CHECK_EQ(brk(page + 4 * PAGE), 0);
	CHECK(sbrk(PAGE) == page + 4 * PAGE && sbrk(0) == page + 5 * PAGE);
	CHECK_EQ(begun, 0);
	CHECK(sbrk(-(intptr_t)PAGE - 10) == page + 5 * PAGE);
	CHECK_ANNOUNCED(UNMAP, page + 4 * PAGE, PAGE);
	CHECK_EQ(brk(page + PAGE + 1), 0);
	CHECK_ANNOUNCED(UNMAP, page + 2 * PAGE, 2 * PAGE);
	CHECK_EQ(brk(page), 0);
	CHECK_ANNOUNCED(UNMAP, page, 2 * PAGE);
}

static void what_replaces_nothing_is_not_announced(void)
{
	unsigned char *memory, *moved;

	expect_nothing();
	memory = map_pages(NULL, 2, 0);
	CHECK(map_pages(memory, 1, MAP_FIXED_NOREPLACE) == MAP_FAILED);
	CHECK(map_pages(memory, 1, MAP_FIXED | MAP_FIXED_NOREPLACE) == MAP_FAILED);
	moved = map_pages(memory, 1, 0);
	CHECK(moved != memory);
	CHECK_EQ(madvise(memory, PAGE, MADV_WILLNEED), 0);
	CHECK_EQ(begun, 0);
	munmap(memory, 2 * PAGE);
	munmap(moved, PAGE);
}

static void a_refused_call_is_not_made(void)
{
	unsigned char *memory = map_pages(NULL, 2, 0);

	memory[0] = 7;
	expect_nothing();
	answer = -EACCES;
	CHECK_FAILS(mprotect(memory, PAGE, PROT_NONE), EACCES);
	answer = -ENOMEM;
	CHECK_FAILS(munmap(memory, PAGE), ENOMEM);
	CHECK_FAILS(madvise(memory, PAGE, MADV_DONTNEED), ENOMEM);
	CHECK(map_pages(memory, 1, MAP_FIXED) == MAP_FAILED && errno == ENOMEM);
	answer = -EFAULT;
	CHECK(mremap(memory, PAGE, 9 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EFAULT);
	CHECK_EQ(begun, 5);
	CHECK_EQ(ended, 0);
	CHECK_EQ(memory[0], 7);
	/* It is made, but nothing of it is to be told. */
	answer = 1;
	errno = ENOTTY;
	CHECK_EQ(munmap(memory, 2 * PAGE), 0);
	CHECK_EQ(errno, ENOTTY);
	CHECK_EQ(ended, 0);
}

static void failures_are_told_and_keep_their_errno(void)
{
	unsigned char *memory = map_pages(NULL, 1, 0);

	expect_nothing();
	CHECK_FAILS(munmap(memory + 1, PAGE), EINVAL);
	CHECK_EQ(made_last, 0);
	CHECK_FAILS(mprotect(memory + 1, PAGE, PROT_READ), EINVAL);
	CHECK(mremap(memory, PAGE, PAGE, 64) == MAP_FAILED && errno == EINVAL);
	CHECK_EQ(made_last, 0);
	CHECK_EQ(begun, 3);
	CHECK_EQ(ended, 3);
	/* Lengths that are none are the kernel's business. */
	CHECK(mremap(memory, (size_t)-1, PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EINVAL);
	CHECK_EQ(begun, 3);
	munmap(memory, PAGE);
}

static void *use_memory(void *argument)
{
	unsigned char stack[100000];

	memset(stack, 1, sizeof(stack));
	for (int i = 0; i < 100; i++)
		free(malloc(3000));
	return stack[5] ? argument : NULL;
}

/* libc's own changes go to the kernel by functions that cannot be replaced. If this ever fails, they can be announced,
 * and libhmm need not watch for them any more. */
static void what_libc_does_by_itself_is_not_seen(void)
{
	unsigned char *volatile block;
	pthread_attr_t large;
	pthread_t thread;

	expect_nothing();
	block = malloc(8 << 20);
	memset(block, 1, 8 << 20);
	block = realloc(block, 32 << 20);
	block = realloc(block, 1 << 20);
	free(block);
	pthread_attr_init(&large);
	pthread_attr_setstacksize(&large, 64 << 20);
	for (int i = 0; i < 4; i++) {
		CHECK_EQ(pthread_create(&thread, &large, use_memory, NULL), 0);
		pthread_join(thread, NULL);
	}
	fclose(fopen("/proc/self/maps", "r"));
	CHECK_EQ(begun, 0);
}

static void nothing_is_announced_to_nobody(void)
{
	expect_nothing();
	attach(NULL);
	munmap(map_pages(NULL, 1, 0), PAGE);
	attach(&hooks);
	CHECK_EQ(begun, 0);
	munmap(map_pages(NULL, 1, 0), PAGE);
	CHECK_EQ(begun, 1);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(changes_are_announced_with_their_ranges),
		TEST(a_lower_break_is_announced),
		TEST(what_replaces_nothing_is_not_announced),
		TEST(a_refused_call_is_not_made),
		TEST(failures_are_told_and_keep_their_errno),
		TEST(what_libc_does_by_itself_is_not_seen),
		TEST(nothing_is_announced_to_nobody),
	};

	/* The cast through an integer keeps -Wpedantic quiet. */
	attach = (attach_function *)(uintptr_t)dlsym(RTLD_DEFAULT, "hmm_preload_attach_layout");
	if (!attach) {
		printf("Bail out! libhmm_preload.so is not loaded\n");
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 1 << 12);
	printf("# the heap is set up\n");
	attach(&hooks);
	return tap_run(tests, COUNT(tests));
}
