/* What the tests of layout changes share: memory with a pattern, sent to a device, and a mirror that looks around when it
 * is called. */
#ifndef LAYOUT_H
#define LAYOUT_H

#include "tap.h"

#include <hmm.h>

#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096UL

static struct mm_struct *mm;
static struct hmm_soft_device *device;

static inline unsigned char *map_pages(void *at, size_t pages, int flags)
{
	return mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
}

/* Words that tell their page, three in each. */
static const size_t places[] = { 0, 100, PAGE / 8 - 1 };

static inline void fill(unsigned char *memory, size_t pages, uint64_t seed)
{
	for (size_t page = 0; page < pages; page++)
		for (size_t i = 0; i < COUNT(places); i++)
			((volatile uint64_t *)(memory + page * PAGE))[places[i]] = seed + page + places[i];
}

/* Pages that do not have what they should. */
static inline size_t wrong(const unsigned char *memory, size_t pages, uint64_t seed)
{
	size_t found = 0;

	for (size_t page = 0; page < pages; page++)
		for (size_t i = 0; i < COUNT(places); i++)
			found += ((const volatile uint64_t *)(memory + page * PAGE))[places[i]] != seed + page + places[i];
	return found;
}

static inline size_t not_zero(const unsigned char *memory, size_t pages)
{
	size_t found = 0;

	for (size_t word = 0; word < pages * PAGE / 8; word++)
		found += ((const volatile uint64_t *)memory)[word] != 0;
	return found;
}

static inline long device_pages(void)
{
	struct hmm_mm_counters counters = { .size = sizeof(counters) };

	CHECK_EQ(hmm_mm_counters(mm, &counters), 0);
	return (long)counters.device_pages;
}

static inline int can(int capability)
{
	return (hmm_mm_capabilities(mm) & capability) == capability;
}

/* Opens the address space and a device; ends the program where there is none. */
static inline void layout_start(void)
{
	mm = hmm_mm_current();
	if (IS_ERR(mm)) {
		printf("1..0 # SKIP %s\n", hmm_last_error());
		exit(hmm_ptr_err(mm) != -EOPNOTSUPP);
	}
	device = hmm_soft_create(mm, NULL);
	if (IS_ERR(device)) {
		printf("Bail out! %s\n", hmm_last_error());
		exit(2);
	}
}

#endif
