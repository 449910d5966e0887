/* Memory for tests: fresh anonymous mappings with guard pages around, filled with a pattern. */
#ifndef MEMORY_H
#define MEMORY_H

#include <hmm.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#define PAGE 4096UL

/* `pages` fresh pages with inaccessible pages around them, so that they are a mapping of their own. */
static inline unsigned char *memory_map(size_t pages, int protection)
{
	unsigned char *all = mmap(NULL, (pages + 2) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (all == MAP_FAILED || mprotect(all + PAGE, pages * PAGE, protection)) {
		perror("mmap");
		exit(1);
	}
	return all + PAGE;
}

static inline void memory_unmap(unsigned char *memory, size_t pages)
{
	munmap(memory - PAGE, (pages + 2) * PAGE);
}

/* The byte that a page is filled with. */
static inline unsigned char memory_pattern(size_t page)
{
	return (unsigned char)(page * 7 + 3);
}

static inline void memory_fill(unsigned char *memory, size_t pages)
{
	for (size_t i = 0; i < pages * PAGE; i++)
		memory[i] = memory_pattern(i / PAGE);
}

/* Number of bytes that are not the pattern's. */
static inline size_t memory_wrong(const unsigned char *memory, size_t pages)
{
	size_t wrong = 0;

	for (size_t i = 0; i < pages * PAGE; i++)
		wrong += memory[i] != memory_pattern(i / PAGE);
	return wrong;
}

/* The kernel's shape of an address. */
static inline unsigned long address(const void *pointer)
{
	return (unsigned long)pointer;
}

/* How many pages of a range are where `place` says. */
static inline size_t memory_count(struct mm_struct *mm, const void *memory, size_t pages, int place)
{
	unsigned char *places = calloc(pages, 1);
	size_t count = 0;

	if (hmm_residency(mm, memory, pages * PAGE, places, pages)) {
		fprintf(stderr, "hmm_residency: %s\n", hmm_last_error());
		exit(1);
	}
	for (size_t i = 0; i < pages; i++)
		count += places[i] == place;
	free(places);
	return count;
}

#endif
