/*
 * svm.c - the shared virtual memory part of a GPU driver, written as drivers for today's kernels are (5.5 and later).
 * For readers who know such a driver, its parts are here:
 *
 *   here                   amdgpu (kfd_svm.c, kfd_migrate.c)      xe (xe_svm.c, drm_gpusvm.c, drm_pagemap.c)
 *   svm_map()              svm_range_set_attr()                   drm_gpusvm_range_find_or_insert()
 *   svm_invalidate()       svm_range_cpu_invalidate_pagetables()  drm_gpusvm_notifier_invalidate()
 *   svm_device_fault()     svm_range_restore_pages()              xe_svm_handle_pagefault()
 *   svm_get_pages()        svm_range_validate_and_map()           drm_gpusvm_get_pages()
 *   svm_migrate_to_vram()  svm_migrate_vma_to_vram()              drm_pagemap_migrate_to_devmem()
 *   svm_evict()            svm_range_evict_svm_bo_worker()        drm_pagemap_evict_to_ram()
 *   svm_migrate_to_ram()   the function of the same name          drm_pagemap_migrate_to_ram()
 *   svm_page_free()        svm_migrate_page_free()                drm_pagemap_page_free()
 *
 * In nouveau they are nouveau_svm_range_invalidate(), nouveau_svm_fault(), nouveau_range_fault(), and in nouveau_dmem.c
 * nouveau_dmem_migrate_vma(), nouveau_dmem_evict_chunk() and nouveau_dmem_migrate_to_ram().
 * The GPU is simulated: memory that the CPU never touches, a page table of its own, and one kernel, y += a * x, on arrays
 * from malloc() and calloc() that are larger than its memory. Every element is checked at the end.
 *
 * What differs from a kernel module: callbacks touch pinned memory only, and never the heap (driver.c tells why); system
 * pages are reached by hmm_mm_peek() and hmm_mm_poke(), which is this GPU's DMA; pages that come home are asked for by
 * hmm_migrate_alloc_page(); destinations need no lock_page().
 */
#define HMM_API_7_3
#include <hmm.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK_PAGES 32		/* pages of a range, and of a block of device memory: 128 KiB */
#define BLOCKS 6		/* the device's memory: 768 KiB */
#define MOST_RANGES 32
#define MANY_ROUNDS 1000	/* a page that goes away so often is not ours to have */
#define COUNT (256 * 1024UL)	/* elements of x, and of y: 1 MiB each */

/* A part of the address space that the device uses, with its own notifier. */
struct svm_range {
	struct mmu_interval_notifier notifier;
	struct driver *driver;
	unsigned long start, end;
	unsigned long table[BLOCK_PAGES];	/* the device's page table, in entries of hmm_range_fault() */
};

/* Everything that callbacks touch. It is pinned while the driver is open. */
struct driver {
	struct mm_struct *mm;
	struct dev_pagemap pgmap;
	unsigned long first_pfn;

	/* Device faults come one after another. No callback takes this lock, least of all svm_migrate_to_ram(). */
	pthread_mutex_t service;
	unsigned long src[BLOCK_PAGES], dst[BLOCK_PAGES], pfns[BLOCK_PAGES];

	/* The lock of the notifiers. It guards the page table: to hold it is to use the table's translations. */
	pthread_mutex_t update;
	unsigned int range_count;
	struct svm_range ranges[MOST_RANGES];

	/* Blocks are given out in turn, so the next one is always the oldest. A bit of used is a page that holds something. */
	unsigned int next_block;
	atomic_uint used[BLOCKS];

	/* What happened, for the report. */
	atomic_ulong device_faults, cpu_faults, in, out, evictions, invalidations, freed;

	/* The device's memory: nobody but the device and its copies looks at it. */
	unsigned char memory[BLOCKS * BLOCK_PAGES][PAGE_SIZE];
};

/* ---- The device: its memory, its page table, its kernel ------------------------------------------------------ */

static unsigned char *device_bytes(struct driver *driver, const struct page *page)
{
	return driver->memory[page_to_pfn(page) - driver->first_pfn];
}

static struct svm_range *svm_range_find(struct driver *driver, unsigned long addr)
{
	for (struct svm_range *range = driver->ranges; range < driver->ranges + driver->range_count; range++)
		if (range->start <= addr && addr < range->end)
			return range;
	return NULL;
}

/* Removes translations. A real driver flushes the TLB here, and waits. Called with the update lock. */
static void device_unmap(struct svm_range *range, unsigned long start, unsigned long end)
{
	unsigned long addr = start > range->start ? start & PAGE_MASK : range->start;

	for (; addr < end && addr < range->end; addr += PAGE_SIZE)
		range->table[(addr - range->start) >> PAGE_SHIFT] = 0;
}

/* The device reads or writes a number, by its own page table. False is a page fault. Called with the update lock. */
static bool device_access(struct driver *driver, const float *at, bool write, float *value)
{
	unsigned long addr = (unsigned long)at;
	struct svm_range *range = svm_range_find(driver, addr);
	unsigned long pte = range ? range->table[(addr - range->start) >> PAGE_SHIFT] : 0;
	unsigned char *place;

	if (!(pte & HMM_PFN_VALID) || (write && !(pte & HMM_PFN_WRITE)))
		return false;
	if (!is_device_private_page(hmm_pfn_to_page(pte)))
		return write ? hmm_mm_poke(driver->mm, (void *)addr, value, sizeof(*value))
			     : hmm_mm_peek(driver->mm, at, value, sizeof(*value));
	place = device_bytes(driver, hmm_pfn_to_page(pte)) + (addr & ~PAGE_MASK);
	memcpy(write ? (void *)place : value, write ? (void *)value : place, sizeof(*value));
	return true;
}

/* One thread of the kernel: y += a * x. Returns NULL, or where it had a page fault. */
static const float *device_saxpy(struct driver *driver, float a, const float *x, float *y)
{
	const float *fault = NULL;
	float from, to;

	pthread_mutex_lock(&driver->update);
	if (!device_access(driver, x, false, &from))
		fault = x;
	else if (!device_access(driver, y, false, &to) || !device_access(driver, y, true, &(float){ to + a * from }))
		fault = y;
	pthread_mutex_unlock(&driver->update);
	return fault;
}

/* ---- Ranges and their notifiers ------------------------------------------------------------------------------ */

/*
 * The CPU's page table changes. A device fault that looked before must look again, so the sequence number is set in any
 * case. Of the driver's own migrations it need not be told: they drop the entries of the pages that really leave.
 */
static bool svm_invalidate(struct mmu_interval_notifier *notifier, const struct mmu_notifier_range *change,
			   unsigned long cur_seq)
{
	struct svm_range *range = container_of(notifier, struct svm_range, notifier);
	struct driver *driver = range->driver;

	if (!mmu_notifier_range_blockable(change))
		return false;
	pthread_mutex_lock(&driver->update);
	mmu_interval_set_seq(notifier, cur_seq);
	if (change->event != MMU_NOTIFY_MIGRATE || change->owner != driver)
		device_unmap(range, change->start, change->end);
	pthread_mutex_unlock(&driver->update);
	driver->invalidations++;
	return true;
}

static const struct mmu_interval_notifier_ops svm_notifier_ops = { .invalidate = svm_invalidate };

/* Lets the device use memory, from its next job on: cuts it into ranges, and watches each. */
static int svm_map(struct driver *driver, const void *memory, size_t bytes)
{
	unsigned long start = (unsigned long)memory & PAGE_MASK;
	unsigned long end = ((unsigned long)memory + bytes + PAGE_SIZE - 1) & PAGE_MASK;
	int ret = 0;

	for (unsigned long next; !ret && start < end; start = next) {
		struct svm_range *range = &driver->ranges[driver->range_count];

		if (driver->range_count == MOST_RANGES)
			return -ENOSPC;
		next = start + BLOCK_PAGES * PAGE_SIZE < end ? start + BLOCK_PAGES * PAGE_SIZE : end;
		*range = (struct svm_range){ .driver = driver, .start = start, .end = next };
		ret = mmu_interval_notifier_insert(&range->notifier, driver->mm, start, next - start, &svm_notifier_ops);
		driver->range_count += !ret;
	}
	return ret;
}

/*
 * Fills the device's page table from the CPU's: begin, look without the driver's lock, take it, and ask whether what was
 * seen still stands. Then a change that comes now waits for the lock in svm_invalidate(), and removes what is written
 * here. Own device pages are taken as they are; those of other devices come home first.
 */
static int svm_get_pages(struct driver *driver, struct svm_range *range, bool write)
{
	struct hmm_range look = {
		.notifier = &range->notifier, .start = range->start, .end = range->end, .hmm_pfns = driver->pfns,
		.default_flags = HMM_PFN_REQ_FAULT | (write ? HMM_PFN_REQ_WRITE : 0), .dev_private_owner = driver,
	};
	int ret = -EBUSY;

	for (int round = 0; ret == -EBUSY && round < MANY_ROUNDS; round++) {
		look.notifier_seq = mmu_interval_read_begin(&range->notifier);
		hmm_mm_read_lock(driver->mm);
		ret = hmm_range_fault(&look);
		hmm_mm_read_unlock(driver->mm);
		if (ret)
			continue;
		pthread_mutex_lock(&driver->update);
		if (mmu_interval_read_retry(&range->notifier, look.notifier_seq))
			ret = -EBUSY;
		else
			memcpy(range->table, driver->pfns, sizeof(range->table));
		pthread_mutex_unlock(&driver->update);
	}
	return ret;
}

/* ---- Migration ----------------------------------------------------------------------------------------------- */

/* Gives each device page that leaves a page of system memory, and copies. Without one it stays where it is. */
static void svm_copy_to_ram(struct driver *driver, const unsigned long *src, unsigned long *dst, size_t count)
{
	for (size_t i = 0; i < count; i++) {
		struct page *spage = src[i] & MIGRATE_PFN_MIGRATE ? hmm_migrate_alloc_page(&src[i]) : NULL;

		if (!spage)
			continue;
		memcpy(hmm_page_to_virt(spage), device_bytes(driver, migrate_pfn_to_page(src[i])), PAGE_SIZE);
		dst[i] = migrate_pfn(page_to_pfn(spage));
		driver->out++;
	}
}

/* Empties a block, wherever its pages are mapped. The notifiers hear of it as CLEAR, before anything is copied. */
static void svm_evict(struct driver *driver, unsigned int block)
{
	memset(driver->dst, 0, sizeof(driver->dst));
	if (migrate_device_range(driver->src, driver->first_pfn + block * BLOCK_PAGES, BLOCK_PAGES))
		return;
	svm_copy_to_ram(driver, driver->src, driver->dst, BLOCK_PAGES);
	migrate_device_pages(driver->src, driver->dst, BLOCK_PAGES);
	migrate_device_finalize(driver->src, driver->dst, BLOCK_PAGES);
	driver->evictions++;
}

/* The pages with MIGRATE are held for us. The device lets go of them, each gets a device page, and is copied. */
static void svm_copy_to_vram(struct driver *driver, struct svm_range *range, unsigned int block)
{
	unsigned long *src = driver->src, *dst = driver->dst;

	pthread_mutex_lock(&driver->update);
	device_unmap(range, range->start, range->end);
	pthread_mutex_unlock(&driver->update);
	for (unsigned int i = 0; i < BLOCK_PAGES; i++) {
		struct page *spage = migrate_pfn_to_page(src[i]);
		struct page *dpage = pfn_to_page(driver->first_pfn + block * BLOCK_PAGES + i);

		/* A page that would not be evicted is left where it is, and so is the one that would have its place. */
		if (!(src[i] & MIGRATE_PFN_MIGRATE) || (driver->used[block] & 1u << i))
			continue;
		driver->used[block] |= 1u << i;
		driver->in++;
		zone_device_page_init(dpage);
		if (spage)
			memcpy(device_bytes(driver, dpage), hmm_page_to_virt(spage), PAGE_SIZE);
		else	/* nothing was ever there: zeros */
			memset(device_bytes(driver, dpage), 0, PAGE_SIZE);
		dst[i] = migrate_pfn(page_to_pfn(dpage));
	}
}

/* Moves what it can of a range to device memory. What stays, or is unmapped, is no error: it is used where it is. */
static void svm_migrate_to_vram(struct driver *driver, struct svm_range *range)
{
	struct migrate_vma migrate = {
		.src = driver->src, .dst = driver->dst, .start = range->start, .end = range->end,
		.pgmap_owner = driver, .flags = MIGRATE_VMA_SELECT_SYSTEM,
	};
	unsigned int block = driver->next_block++ % BLOCKS;

	if (driver->used[block])	/* before the range is held: who holds pages must not wait for others */
		svm_evict(driver, block);
	memset(driver->src, 0, sizeof(driver->src));
	memset(driver->dst, 0, sizeof(driver->dst));
	hmm_mm_read_lock(driver->mm);
	migrate.vma = find_vma(driver->mm, range->start);
	if (migrate.vma && !migrate_vma_setup(&migrate)) {
		svm_copy_to_vram(driver, range, block);
		migrate_vma_pages(&migrate);
		migrate_vma_finalize(&migrate);
	}
	hmm_mm_read_unlock(driver->mm);
}

/* The device met a page that its table does not know, or may not write. */
static int svm_device_fault(struct driver *driver, const float *at, bool write)
{
	struct svm_range *range = svm_range_find(driver, (unsigned long)at);
	int ret;

	if (!range)
		return -EFAULT;
	driver->device_faults++;
	pthread_mutex_lock(&driver->service);
	svm_migrate_to_vram(driver, range);
	ret = svm_get_pages(driver, range, write);
	pthread_mutex_unlock(&driver->service);
	return ret;
}

/* The CPU touched a page that is on the device. A driver may bring neighbours along, and saves their faults. */
static vm_fault_t svm_migrate_to_ram(struct vm_fault *vmf)
{
	struct driver *driver = container_of(page_pgmap(vmf->page), struct driver, pgmap);
	struct svm_range *range = svm_range_find(driver, vmf->address);
	unsigned long src = 0, dst = 0;
	struct migrate_vma migrate = {
		.vma = vmf->vma, .src = &src, .dst = &dst, .start = vmf->address, .end = vmf->address + PAGE_SIZE,
		.pgmap_owner = driver, .flags = MIGRATE_VMA_SELECT_DEVICE_PRIVATE, .fault_page = vmf->page,
	};

	driver->cpu_faults++;
	/* Where kernel drivers say SIGBUS: a call that fails has lost nothing, and the access is made again. */
	if (migrate_vma_setup(&migrate))
		return VM_FAULT_OOM;
	pthread_mutex_lock(&driver->update);
	if (range)
		device_unmap(range, migrate.start, migrate.end);
	pthread_mutex_unlock(&driver->update);
	svm_copy_to_ram(driver, &src, &dst, 1);
	migrate_vma_pages(&migrate);
	migrate_vma_finalize(&migrate);
	return (src & MIGRATE_PFN_MIGRATE) && !dst ? VM_FAULT_OOM : 0;
}

/* The last user of a device page is gone. */
static void svm_page_free(struct page *page)
{
	struct driver *driver = container_of(page_pgmap(page), struct driver, pgmap);
	unsigned long number = page_to_pfn(page) - driver->first_pfn;

	driver->used[number / BLOCK_PAGES] &= ~(1u << number % BLOCK_PAGES);
	driver->freed++;
}

static const struct dev_pagemap_ops ops = { .page_free = svm_page_free, .migrate_to_ram = svm_migrate_to_ram };

/* ---- A program that uses it ---------------------------------------------------------------------------------- */

static void must(const char *what, long ret)
{
	if (!ret)
		return;
	fprintf(stderr, "svm: %s: %s\n", what, *hmm_last_error() ? hmm_last_error() : strerror((int)-ret));
	exit(EXIT_FAILURE);
}

/* A job for the device; what it cannot reach the driver is asked for, as by an interrupt. */
static void svm_run(struct driver *driver, const char *what, float a, const float *x, float *y)
{
	const float *fault;

	for (size_t i = 0; i < COUNT; i++)
		for (int rounds = 0; (fault = device_saxpy(driver, a, &x[i], &y[i])); rounds++) {
			must("the device", rounds < MANY_ROUNDS ? 0 : -EBUSY);
			must("device fault", svm_device_fault(driver, fault, fault == &y[i]));
		}
	printf("%s\n  faults: device %lu, CPU %lu; pages: in %lu, out %lu; evictions %lu; invalidations %lu\n", what,
	       driver->device_faults, driver->cpu_faults, driver->in, driver->out, driver->evictions, driver->invalidations);
}

int main(void)
{
	static _Alignas(4096) struct driver driver;
	float *x = malloc(COUNT * sizeof(*x)), *y = calloc(COUNT, sizeof(*y));
	size_t wrong = 0;

	must("memory", x && y ? 0 : -ENOMEM);
	pthread_mutex_init(&driver.service, NULL);
	pthread_mutex_init(&driver.update, NULL);
	driver.mm = hmm_mm_current();
	must("open", IS_ERR(driver.mm) ? PTR_ERR(driver.mm) : 0);
	must("pin", hmm_pin_range(driver.mm, &driver, sizeof(driver)));
	driver.pgmap = (struct dev_pagemap){ .type = MEMORY_DEVICE_PRIVATE, .ops = &ops, .owner = &driver, .nr_range = 1,
					     .range = { 0, sizeof(driver.memory) - 1 } };
	must("device memory", IS_ERR(memremap_pages(&driver.pgmap, 0)) ? -ENOMEM : 0);
	driver.first_pfn = driver.pgmap.range.start >> PAGE_SHIFT;
	printf("libhmm %s, engine %s; device memory: %d pages, arrays: %lu pages\n", hmm_version_string(),
	       hmm_mm_engine(driver.mm), BLOCKS * BLOCK_PAGES, 2 * COUNT * sizeof(*x) / PAGE_SIZE);
	for (size_t i = 0; i < COUNT; i++)
		x[i] = (float)(i % 1000);
	must("map", svm_map(&driver, x, COUNT * sizeof(*x)));
	must("map", svm_map(&driver, y, COUNT * sizeof(*y)));

	svm_run(&driver, "The device computed y += 2 x, where y was never touched before.", 2, x, y);
	for (size_t i = COUNT / 2; i < COUNT; i++)
		y[i] += 1;
	svm_run(&driver, "The CPU added one to the second half of y, and the device computed y += 3 x.", 3, x, y);
	for (size_t i = 0; i < COUNT; i++)
		wrong += y[i] != (float)(5 * (i % 1000) + (i >= COUNT / 2));

	/* The rest comes home; then nobody calls us any more. */
	memunmap_pages(&driver.pgmap);
	for (unsigned int i = 0; i < driver.range_count; i++)
		mmu_interval_notifier_remove(&driver.ranges[i].notifier);
	must("unpin", hmm_unpin_range(driver.mm, &driver, sizeof(driver)));
	must("close", hmm_mm_put(driver.mm));
	printf("%lu elements, %zu wrong; %lu device pages used, %lu freed\n", COUNT, wrong, driver.in, driver.freed);
	return wrong || driver.freed != driver.in ? EXIT_FAILURE : EXIT_SUCCESS;
}
