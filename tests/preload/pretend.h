/* A pretended libhmm: memory is "away" when it has no access rights, and hold() gives them back. It counts what the
 * preloaded library asks for. Touches from user mode are answered by a SIGSEGV handler, as the signal engine does. */
#ifndef PRETEND_H
#define PRETEND_H

#include "tap.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096UL
#define AREA_PAGES 64UL

struct hmm_preload_hooks {
	size_t size;
	int (*hold)(const void *address, size_t length, int write);
	void (*release)(const void *address, size_t length);
	int (*signal_action)(int signal, const struct sigaction *action, struct sigaction *old);
};

typedef void attach_function(const struct hmm_preload_hooks *);

/* The one area whose pages can be away. Its bookkeeping is under `lock`, which the handler takes too. */
static struct {
	unsigned char *memory;
	int away[AREA_PAGES];
	int held[AREA_PAGES];
	atomic_flag lock;
} area = { .lock = ATOMIC_FLAG_INIT };

/* What the hooks were called for. */
static struct {
	atomic_long holds, writes, releases, refused, touches;
} counted;

/* What the hooks shall do beside their duty. */
static struct {
	int nothing_to_do;       /* hold() returns 1 */
	int lies;                /* so many holds say 0 and bring nothing home */
	void (*inside)(void);    /* called in every hold */
} pretend;

static inline unsigned long address(const void *pointer)
{
	return (unsigned long)pointer;
}

static inline void area_lock(sigset_t *old)
{
	unsigned long all = ~(1UL << (SIGSEGV - 1)), was;

	/* The system call itself: what is tested must not be needed for the test. */
	syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, &was, sizeof(was));
	memcpy(old, &was, sizeof(was));
	while (atomic_flag_test_and_set_explicit(&area.lock, memory_order_acquire))
		;
}

static inline void area_unlock(const sigset_t *old)
{
	atomic_flag_clear_explicit(&area.lock, memory_order_release);
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, old, NULL, sizeof(unsigned long));
}

/* The pages of the area that some bytes touch, as numbers: `first` up to, not including, `end`. */
static inline void area_pages(const void *start, size_t length, size_t *first, size_t *end)
{
	unsigned long base = address(area.memory), from = address(start), to = from + length;

	from = from < base ? base : from;
	to = to > base + AREA_PAGES * PAGE ? base + AREA_PAGES * PAGE : to;
	*first = from < to ? (from - base) / PAGE : 0;
	*end = from < to ? (to - base + PAGE - 1) / PAGE : 0;
}

static inline void area_page_home(size_t page)
{
	if (area.away[page] && mprotect(area.memory + page * PAGE, PAGE, PROT_READ | PROT_WRITE))
		abort();
	area.away[page] = 0;
}

static int pretend_hold(const void *start, size_t length, int write)
{
	size_t first, end;
	sigset_t mask;

	errno = EDOM;
	if (pretend.inside)
		pretend.inside();
	if (pretend.nothing_to_do)
		return 1;
	for (unsigned long page = address(start) & -PAGE; page < address(start) + length; page += PAGE)
		if (msync((void *)page, PAGE, MS_ASYNC)) {
			counted.refused++;
			return -EFAULT;
		}
	counted.holds++;
	counted.writes += write;
	if (pretend.lies) {
		pretend.lies--;
		return 0;
	}
	area_pages(start, length, &first, &end);
	area_lock(&mask);
	for (size_t page = first; page < end; page++) {
		area_page_home(page);
		area.held[page]++;
	}
	area_unlock(&mask);
	return 0;
}

static void pretend_release(const void *start, size_t length)
{
	size_t first, end;
	sigset_t mask;

	errno = EDOM;
	counted.releases++;
	area_pages(start, length, &first, &end);
	area_lock(&mask);
	for (size_t page = first; page < end; page++)
		area.held[page]--;
	area_unlock(&mask);
}

/* Sends pages away that nobody holds. */
static inline void away(const void *start, size_t length)
{
	size_t first, end;
	sigset_t mask;

	area_pages(start, length, &first, &end);
	area_lock(&mask);
	for (size_t page = first; page < end; page++)
		if (area.held[page] <= 0 && !area.away[page]) {
			area.away[page] = 1;
			if (mprotect(area.memory + page * PAGE, PAGE, PROT_NONE))
				abort();
		}
	area_unlock(&mask);
}

static inline int pages_away(void)
{
	int count = 0;

	for (size_t page = 0; page < AREA_PAGES; page++)
		count += area.away[page];
	return count;
}

/* Every hold has its release. */
static inline int balanced(void)
{
	for (size_t page = 0; page < AREA_PAGES; page++)
		if (area.held[page])
			return 0;
	return counted.holds == counted.releases;
}

static void touched(int signal, siginfo_t *info, void *context)
{
	unsigned long offset = address(info->si_addr) - address(area.memory);
	sigset_t mask;

	(void)context;
	if (offset >= AREA_PAGES * PAGE) {
		/* A real crash. */
		syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), signal);
		_exit(99);
	}
	counted.touches++;
	area_lock(&mask);
	area_page_home(offset / PAGE);
	area_unlock(&mask);
}

static attach_function *attach_found;

static inline attach_function *find_attach(void)
{
	/* The cast through an integer keeps -Wpedantic quiet. */
	return (attach_function *)(uintptr_t)dlsym(RTLD_DEFAULT, "hmm_preload_attach");
}

static const struct hmm_preload_hooks plain_hooks = { sizeof(plain_hooks), pretend_hold, pretend_release, NULL };

/* Attaches, with all memory at home and nothing counted. */
static inline void attach(const struct hmm_preload_hooks *hooks)
{
	for (size_t page = 0; page < AREA_PAGES; page++)
		area_page_home(page);
	memset(&counted, 0, sizeof(counted));
	attach_found(hooks);
}

static inline void detach(void)
{
	attach_found(NULL);
}

/* Values that the compiler does not warn of. */
static void *volatile null;
static void *volatile low = (void *)8;
static volatile int minus_one = -1;

/* Bytes that tell their place. */
static inline unsigned char pattern(size_t index)
{
	return (unsigned char)(index * 31 + index / PAGE + 5);
}

static inline void fill(unsigned char *bytes, size_t count)
{
	for (size_t i = 0; i < count; i++)
		bytes[i] = pattern(i);
}

static inline size_t wrong(const unsigned char *bytes, size_t count)
{
	size_t found = 0;

	for (size_t i = 0; i < count; i++)
		found += bytes[i] != pattern(i);
	return found;
}

/* Sets the stage; ends the program when the library is not there. */
static inline void pretend_start(void)
{
	struct sigaction action = { .sa_sigaction = touched, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK };

	attach_found = find_attach();
	if (!attach_found) {
		printf("Bail out! libhmm_preload.so is not loaded\n");
		exit(2);
	}
	area.memory = mmap(NULL, AREA_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (area.memory == MAP_FAILED || sigaction(SIGSEGV, &action, NULL)) {
		perror("setting the stage");
		exit(2);
	}
}

#endif
