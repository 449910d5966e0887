/*
 * device.c - the four devices, their memory, and the pages of it.
 *
 * A device belongs to a process: the memory of a parent is not its child's, so a child that opens a unit gets a device
 * of its own. All devices of a process live until it ends, as the kernel's live until the module is unloaded.
 *
 * Memory comes in chunks of 256 MiB. The first is made when a unit is opened, a private unit gets more as it needs
 * them, up to DEVICE_CHUNKS. The pages of a private unit are numbers, and what they hold is in the chunk's memory,
 * which nobody but the device and its copies looks at. The pages of a coherent unit hold what they hold where they are
 * mapped in the process: there is nothing behind them.
 */
#include "driver.h"

#include <errno.h>

#define EVICT_PAGES 1024	/* pages that one call brings home: it looks at all page tables */
#define EVICT_MS 10000		/* a page that does not come home for so long does not come */

static pthread_mutex_t opening = PTHREAD_MUTEX_INITIALIZER;
static pthread_once_t once = PTHREAD_ONCE_INIT;
/* The devices of this process; NULL before the first is opened. Guarded by opening. */
static struct device_unit *devices;

/* ---- Pages ----------------------------------------------------------------------------------------------------- */

static void page_free(struct page *page);

static const struct dev_pagemap_ops chunk_ops = {
	.page_free = page_free,
	.migrate_to_ram = migrate_to_ram,
};

static struct chunk *chunk_of_page(const struct page *page)
{
	struct dev_pagemap *pagemap = page_pgmap(page);

	/* Pages of other drivers have other operations. */
	return pagemap && pagemap->ops == &chunk_ops ? container_of(pagemap, struct chunk, pagemap) : NULL;
}

struct device_unit *device_of_page(const struct page *page)
{
	const struct chunk *chunk = chunk_of_page(page);

	return chunk ? chunk->device : NULL;
}

void *device_page_memory(const struct page *page)
{
	const struct chunk *chunk = chunk_of_page(page);

	return chunk && chunk->memory ? chunk->memory + (page_to_pfn(page) - chunk->first_pfn) * PAGE_SIZE : NULL;
}

/* The last user of a page is gone. A callback: it may come from any thread, at any time. */
static void page_free(struct page *page)
{
	struct chunk *chunk = chunk_of_page(page);

	if (chunk)
		device_return_pages(chunk->device, &page, 1);
}

void device_return_pages(struct device_unit *device, struct page **pages, unsigned int count)
{
	pthread_mutex_lock(&device->pages);
	while (count--) {
		struct chunk *chunk = chunk_of_page(pages[count]);

		chunk->free[chunk->free_count++] = (unsigned int)(page_to_pfn(pages[count]) - chunk->first_pfn);
	}
	pthread_mutex_unlock(&device->pages);
}

/* Takes free pages of one chunk: the page that was freed last comes first. */
static unsigned int chunk_take(struct chunk *chunk, struct page **pages, unsigned int wanted)
{
	unsigned int taken = 0;

	while (chunk->in_service && taken < wanted && chunk->free_count) {
		unsigned int number = chunk->free[--chunk->free_count];

		if (number >= chunk->used_to)
			chunk->used_to = number + 1;
		pages[taken++] = pfn_to_page(chunk->first_pfn + number);
	}
	return taken;
}

/* ---- Chunks ---------------------------------------------------------------------------------------------------- */

static void chunk_free_memory(struct chunk *chunk)
{
	driver_unmap(chunk->memory, CHUNK_BYTES);
	driver_unmap(chunk->free, CHUNK_PAGES * sizeof(*chunk->free));
	*chunk = (struct chunk){ .device = NULL };
}

static struct chunk *chunk_slot(struct device_unit *device)
{
	unsigned int slots = device->is_coherent ? 1 : DEVICE_CHUNKS;

	for (unsigned int i = 0; i < slots; i++)
		if (!device->chunks[i].device)
			return &device->chunks[i];
	return NULL;
}

/* Adds a chunk. Called with resize, or before anybody knows the device. 0 or a negative errno. */
static int device_add_chunk(struct device_unit *device)
{
	struct chunk *chunk = chunk_slot(device);
	int ret = -ENOMEM;
	void *where;

	if (!chunk)
		return -ENOMEM;
	chunk->free = driver_map(CHUNK_PAGES * sizeof(*chunk->free), MEMORY_PLAIN);
	if (!device->is_coherent)
		chunk->memory = driver_map(CHUNK_BYTES, MEMORY_SPARSE);
	if (!chunk->free || !(chunk->memory || device->is_coherent))
		goto failed;
	while (chunk->free_count < CHUNK_PAGES) {
		chunk->free[chunk->free_count] = (unsigned int)CHUNK_PAGES - 1 - chunk->free_count;
		chunk->free_count++;
	}

	chunk->pagemap.type = device->is_coherent ? MEMORY_DEVICE_COHERENT : MEMORY_DEVICE_PRIVATE;
	chunk->pagemap.ops = &chunk_ops;
	chunk->pagemap.owner = device;
	chunk->pagemap.nr_range = 1;
	chunk->pagemap.range.start = 0;
	chunk->pagemap.range.end = CHUNK_BYTES - 1;
	where = memremap_pages(&chunk->pagemap, -1);
	if (IS_ERR(where)) {
		ret = (int)PTR_ERR(where);
		goto failed;
	}
	pthread_mutex_lock(&device->pages);
	chunk->first_pfn = chunk->pagemap.range.start >> PAGE_SHIFT;
	chunk->device = device;
	chunk->in_service = true;
	pthread_mutex_unlock(&device->pages);
	return 0;

failed:
	chunk_free_memory(chunk);
	return ret;
}

unsigned int device_take_pages(struct device_unit *device, struct page **pages, unsigned int wanted)
{
	unsigned int taken = 0;

	do {
		pthread_mutex_lock(&device->pages);
		for (int i = 0; i < DEVICE_CHUNKS; i++)
			taken += chunk_take(&device->chunks[i], pages + taken, wanted - taken);
		pthread_mutex_unlock(&device->pages);
	} while (taken < wanted && !device_add_chunk(device));
	return taken;
}

bool device_fails_once(struct device_unit *device)
{
	return atomic_fetch_and(&device->flags, ~(unsigned int)HMM_DMIRROR_FLAG_FAIL_ALLOC) &
	       HMM_DMIRROR_FLAG_FAIL_ALLOC;
}

/* ---- Getting pages home ---------------------------------------------------------------------------------------- */

static unsigned long device_used(struct device_unit *device)
{
	unsigned long used = 0;

	pthread_mutex_lock(&device->pages);
	for (int i = 0; i < DEVICE_CHUNKS; i++)
		if (device->chunks[i].device)
			used += CHUNK_PAGES - device->chunks[i].free_count;
	pthread_mutex_unlock(&device->pages);
	return used;
}

static void evict_once(struct device_unit *device, unsigned long *entries)
{
	for (int i = 0; i < DEVICE_CHUNKS; i++) {
		struct chunk *chunk = &device->chunks[i];

		/* Nobody takes pages while we have resize, so used_to stays what it is. */
		for (unsigned int first = 0; chunk->device && first < chunk->used_to; first += EVICT_PAGES) {
			unsigned int count = chunk->used_to - first;

			migrate_chunk_home(chunk, first, count < EVICT_PAGES ? count : EVICT_PAGES, entries,
					   entries + EVICT_PAGES);
		}
	}
}

bool device_evict(struct device_unit *device)
{
	const struct timespec pause = { .tv_nsec = 1000000 };
	size_t bytes = 2 * EVICT_PAGES * sizeof(unsigned long);
	unsigned long used = device_used(device);
	struct timespec begin;
	unsigned long *entries;

	if (!used)
		return true;
	entries = driver_map(bytes, MEMORY_PLAIN);
	if (!entries)
		return false;
	/* A page that somebody else holds stays in this round: a migration or a fault has it for a moment. */
	clock_gettime(CLOCK_MONOTONIC, &begin);
	while (used && !deadline_passed(&begin, EVICT_MS)) {
		unsigned long before = used;

		evict_once(device, entries);
		used = device_used(device);
		if (used == before)
			nanosleep(&pause, NULL);
	}
	driver_unmap(entries, bytes);
	return !used;
}

void device_release(struct device_unit *device)
{
	pthread_mutex_lock(&device->resize);
	pthread_mutex_lock(&device->pages);
	for (int i = 0; i < DEVICE_CHUNKS; i++)
		device->chunks[i].in_service = false;
	pthread_mutex_unlock(&device->pages);

	device_evict(device);
	for (int i = 0; i < DEVICE_CHUNKS; i++) {
		if (!device->chunks[i].device)
			continue;
		memunmap_pages(&device->chunks[i].pagemap);
		/* What did not come home keeps its chunk, out of service; the next RELEASE tries again. */
		if (!hmm_last_errno())
			chunk_free_memory(&device->chunks[i]);
	}
	pthread_mutex_unlock(&device->resize);
}

/* ---- The devices of a process ---------------------------------------------------------------------------------- */

/* In a child of fork(): what there was is its parent's, a lock that another thread held included. */
static void forget_parent(void)
{
	devices = NULL;
	pthread_mutex_init(&opening, NULL);
}

static void watch_forks(void)
{
	pthread_atfork(NULL, NULL, forget_parent);
}

/* Makes the devices of this process, without memory yet. 0 or a negative errno. */
static int devices_make(void)
{
	struct mm_struct *mm = hmm_mm_current();
	struct device_unit *made;

	if (IS_ERR(mm))
		return (int)PTR_ERR(mm);
	made = driver_map(DMIRROR_UNITS * sizeof(*made), MEMORY_INHERITED);
	if (!made) {
		hmm_mm_put(mm);
		return -ENOMEM;
	}
	for (unsigned int unit = 0; unit < DMIRROR_UNITS; unit++) {
		made[unit].mm = mm;
		made[unit].unit = unit;
		made[unit].is_coherent = unit >= 2;
		pthread_mutex_init(&made[unit].resize, NULL);
		pthread_mutex_init(&made[unit].pages, NULL);
		pthread_mutex_init(&made[unit].mirrors_lock, NULL);
	}
	devices = made;
	return 0;
}

struct device_unit *device_get(unsigned int unit)
{
	struct device_unit *device = NULL;
	int ret = -ENXIO;

	pthread_once(&once, watch_forks);
	pthread_mutex_lock(&opening);
	if (unit < DMIRROR_UNITS)
		ret = devices ? 0 : devices_make();
	if (!ret) {
		device = &devices[unit];
		pthread_mutex_lock(&device->resize);
		/* After RELEASE there is none either, and the first migration makes one; here it may fail loudly. */
		if (!device->chunks[0].device)
			ret = device_add_chunk(device);
		pthread_mutex_unlock(&device->resize);
	}
	pthread_mutex_unlock(&opening);
	if (!ret)
		return device;
	errno = -ret;
	return NULL;
}
