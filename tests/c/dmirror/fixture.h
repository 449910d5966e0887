/*
 * The cases that the kernel tests its HMM with, as tests of ours on examples/dmirror, without its shim. Each case has the
 * kernel's name for it and runs twice: on private device memory (units 0 and 1) and on coherent one (units 2 and 3).
 */
#ifndef FIXTURE_H
#define FIXTURE_H

#include "dmirror.h"
#include "memory.h"
#include "tap.h"

#include <stdbool.h>
#include <string.h>
#include <unistd.h>

/* What most cases work on: 4 MiB. */
#define PAGES 1024UL
#define HUGE_SIZE (2UL << 20)

static struct mm_struct *mm;
/* The units of the case that runs; the second one only in cases of two. */
static struct dmirror *device, *other_device;
static unsigned int first_unit;
/* What the last command said. */
static struct hmm_dmirror_cmd said;

static inline bool is_coherent(void)
{
	return first_unit >= 2;
}

/* One command on memory; what it reads or writes is in the buffer. */
static inline long command(struct dmirror *mirror, unsigned long request, const void *memory, const void *buffer,
			   size_t pages)
{
	said = (struct hmm_dmirror_cmd){ .addr = address(memory), .ptr = address(buffer), .npages = pages };
	return dmirror_command(mirror, request, &said);
}

/* A command that does all of its pages. */
#define DOES(mirror, request, memory, buffer, pages)                                           \
	do {                                                                                   \
		CHECK_EQ(command(mirror, HMM_DMIRROR_##request, memory, buffer, pages), 0);    \
		CHECK_EQ(said.cpages, pages);                                                  \
	} while (0)

/* And which takes exactly one device page fault for it. */
#define DOES_WITH_ONE_FAULT(mirror, request, memory, buffer, pages)                            \
	do {                                                                                   \
		DOES(mirror, request, memory, buffer, pages);                                  \
		CHECK_EQ(said.faults, 1);                                                      \
	} while (0)

/* Memory whose int number i is i * times + plus. */
static inline void numbers_fill(void *memory, size_t pages, int times, int plus)
{
	int *numbers = memory;

	for (size_t i = 0; i < pages * PAGE / sizeof(int); i++)
		numbers[i] = (int)i * times + plus;
}

/* How many numbers of memory are not as numbers_fill() made them, from page `first` on. */
static inline size_t numbers_wrong_from(const void *memory, size_t first, size_t pages, int times, int plus)
{
	const int *numbers = memory;
	size_t wrong = 0;

	for (size_t i = first * PAGE / sizeof(int); i < pages * PAGE / sizeof(int); i++)
		wrong += numbers[i] != (int)i * times + plus;
	return wrong;
}

static inline size_t numbers_wrong(const void *memory, size_t pages, int times, int plus)
{
	return numbers_wrong_from(memory, 0, pages, times, plus);
}

/* How many bytes are not `value`. */
static inline size_t bytes_wrong(const void *memory, size_t length, unsigned char value)
{
	const unsigned char *bytes = memory;
	size_t wrong = 0;

	for (size_t i = 0; i < length; i++)
		wrong += bytes[i] != value;
	return wrong;
}

/* Fresh memory that holds the numbers. */
static inline unsigned char *numbers_map(size_t pages)
{
	unsigned char *memory = memory_map(pages, PROT_READ | PROT_WRITE);

	numbers_fill(memory, pages, 1, 0);
	return memory;
}

/* A buffer for what a device reads, which says of each byte that it was not written. */
#define UNWRITTEN 0xa5
static inline unsigned char *buffer_map(size_t pages)
{
	unsigned char *buffer = memory_map(pages, PROT_READ | PROT_WRITE);

	memset(buffer, UNWRITTEN, pages * PAGE);
	return buffer;
}

/* Unmaps memory with a hole, in which somebody else's memory may be by now. */
static inline void memory_unmap_around(unsigned char *memory, size_t pages, size_t hole, size_t hole_pages)
{
	munmap(memory - PAGE, (hole + 1) * PAGE);
	munmap(memory + (hole + hole_pages) * PAGE, (pages - hole - hole_pages + 1) * PAGE);
}

/* A unit; NULL, and the reason is reported, when it cannot be opened. */
static inline struct dmirror *unit_open(unsigned int unit)
{
	struct dmirror *mirror = dmirror_open(unit);

	if (!mirror) {
		tap_failures++;
		printf("# unit %u cannot be opened: %s (last error: %s)\n", unit, strerror(errno), hmm_last_error());
	}
	return mirror;
}

/* Runs a case on units that are opened for it. */
static inline void on_units(unsigned int first, unsigned int count, void (*run)(void))
{
	first_unit = first;
	device = unit_open(first);
	other_device = count > 1 ? unit_open(first + 1) : NULL;
	if (device && (count == 1 || other_device))
		run();
	if (other_device)
		dmirror_close(other_device);
	if (device)
		dmirror_close(device);
}

/* Makes tests of a case, one for each kind of memory. */
#define CASE_ON(name, count)                                                                   \
	static void name##_on_private(void)                                                    \
	{                                                                                      \
		on_units(0, count, name);                                                      \
	}                                                                                      \
	static void name##_on_coherent(void)                                                   \
	{                                                                                      \
		on_units(2, count, name);                                                      \
	}
#define CASE(name) CASE_ON(name, 1)
#define CASE_OF_TWO(name) CASE_ON(name, 2)
#define BOTH(name) TEST(name##_on_private), TEST(name##_on_coherent)

/* The driver keeps translations, and has to hear when memory is unmapped. */
static inline void cases_skip(const struct tap_test *tests, int count)
{
	printf("1..%d\n", count);
	for (int i = 0; i < count; i++)
		printf("ok %d - %s # SKIP the engine hears of layout changes only under libhmm_preload.so\n", i + 1,
		       tests[i].name);
}

/* Runs the tests; returns what main() returns. */
static inline int cases_run(const struct tap_test *tests, int count)
{
	int failed = 0;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	if (hmm_mm_capabilities(mm) & (HMM_CAPABILITY_EVENTS | HMM_CAPABILITY_ORDERED))
		failed = tap_run(tests, count);
	else
		cases_skip(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}

#define CASES_RUN(tests) cases_run(tests, sizeof(tests) / sizeof(*(tests)))

#endif
