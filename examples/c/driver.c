/*
 * driver.c - a complete driver for a small device, in the shape that Documentation/vm/hmm.txt sketches.
 *
 * The device is made of software, but it is a real device to the library: it has memory that the CPU never touches, a page
 * table of its own, and it works on the addresses of the process. What happens here:
 *
 *   1. the driver mirrors the address space, and adds device memory to it;
 *   2. the device adds one to every word of a malloc'ed buffer, where it is: in system memory;
 *   3. the buffer's pages migrate to the device, which adds one more: in its own memory;
 *   4. the CPU reads half of the buffer; each touch of a migrated page faults, and the driver brings the page home;
 *   5. the device adds one again, to a buffer that is now half here and half there;
 *   6. the CPU checks every word, and everything is taken down.
 *
 * Read it from top to bottom: the driver's data, the device, the mirror, migration, device memory, and then main(). To make a
 * driver of your own, keep the structure and replace the device: driver_page_address() becomes your DMA.
 *
 *   cc -O2 -I include examples/c/driver.c -L target/capi -lhmm -pthread -o driver
 *
 * Three rules govern a driver's callbacks, because they run on threads that answer page faults:
 *
 *   - they touch only memory that cannot migrate: here, all of it is in struct driver, which is pinned;
 *   - they do not call malloc(), printf() or anything else that might touch other memory;
 *   - the update lock is never held over a call that can wait for a page (hmm_vma_fault, migrate_vma, a plain touch).
 */
#include <hmm.h>

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEVICE_PAGES 192	/* the device's memory: 768 KiB */
#define TABLE_SIZE 1024		/* entries of the device's page table */
#define WINDOW 64		/* pages that one call of the library handles */
#define FAULT_AROUND 8		/* pages that come home when the CPU touches one of them */
#define MANY_ROUNDS 1000	/* a range that changes so often is not ours to have */

/* ------------------------------------------------------------------------------------------------------------------------
 * The driver's data
 * --------------------------------------------------------------------------------------------------------------------- */

/*
 * One entry of the device's page table. The table is direct mapped: an address has one place, and a newer entry replaces an
 * older one. What is forgotten is found again by a device fault, so the table may forget, but it must never be wrong.
 */
struct device_pte {
	unsigned long vpn;	/* virtual page number, 0: empty */
	unsigned long pfn;	/* where the page is */
	bool write;		/* may the device write it? */
};

/* Everything that callbacks touch is in here, and here is pinned. */
struct driver {
	struct mm_struct *mm;
	struct hmm_mirror mirror;
	struct hmm_device *device;
	struct hmm_devmem *devmem;

	/* The update lock: guards the device's page table, and stands for the device using it. */
	pthread_mutex_t update;
	struct device_pte table[TABLE_SIZE];

	/* Free pages of device memory: a stack of page numbers. */
	pthread_mutex_t free_lock;
	unsigned int free_count;
	unsigned int free_pages[DEVICE_PAGES];

	/* Device faults are handled one after another, so one set of arrays is enough. */
	pthread_mutex_t fault_lock;
	hmm_pfn_t pfns[WINDOW];
	unsigned long src[WINDOW], dst[WINDOW];

	/* What happened, for the report. */
	atomic_ulong device_faults, cpu_faults, invalidations, to_device, to_system, freed;

	/* The device's memory. The CPU side of the process never gets an address of it. */
	unsigned char memory[DEVICE_PAGES][PAGE_SIZE];
};

/* ------------------------------------------------------------------------------------------------------------------------
 * The device: its memory, its page table, its one skill
 * --------------------------------------------------------------------------------------------------------------------- */

/* The bytes of a page of the device's own memory. */
static unsigned char *device_page_bytes(struct driver *driver, unsigned long pfn)
{
	return driver->memory[pfn - driver->devmem->pfn_first];
}

/* Looks an address up in the device's page table. Called with the update lock. */
static struct device_pte *device_translate(struct driver *driver, unsigned long addr, bool write)
{
	unsigned long vpn = addr >> PAGE_SHIFT;
	struct device_pte *pte = &driver->table[vpn % TABLE_SIZE];

	return pte->vpn == vpn && (pte->write || !write) ? pte : NULL;
}

/* Writes an entry of the device's page table. Called with the update lock. */
static void device_map(struct driver *driver, unsigned long addr, unsigned long pfn, bool write)
{
	unsigned long vpn = addr >> PAGE_SHIFT;

	driver->table[vpn % TABLE_SIZE] = (struct device_pte){ .vpn = vpn, .pfn = pfn, .write = write };
}

/*
 * The device adds one to words of one page, through its own page table. False is a device page fault: there is no entry, or
 * the page went away under it. Holding the update lock means that the device is using its translations; who takes the lock
 * waits until it does not.
 *
 * Device memory is the device's to touch. A page of system memory is reached as a real device reaches it, without the help
 * of the CPU's page table: by hmm_mm_peek() and hmm_mm_poke(), which never fault.
 */
static bool device_add_one(struct driver *driver, unsigned long addr, size_t words)
{
	uint64_t line[PAGE_SIZE / sizeof(uint64_t)];
	size_t bytes = words * sizeof(uint64_t);
	struct device_pte *pte;
	bool done = false;

	pthread_mutex_lock(&driver->update);
	pte = device_translate(driver, addr, true);
	if (pte && hmm_pfn_is_device(pte->pfn)) {
		uint64_t *word = (uint64_t *)(void *)(device_page_bytes(driver, pte->pfn) + (addr & ~PAGE_MASK));

		for (size_t i = 0; i < words; i++)
			word[i]++;
		done = true;
	} else if (pte && hmm_mm_peek(driver->mm, (void *)addr, line, bytes)) {
		for (size_t i = 0; i < words; i++)
			line[i]++;
		done = hmm_mm_poke(driver->mm, (void *)addr, line, bytes);
	}
	pthread_mutex_unlock(&driver->update);
	return done;
}

/* ------------------------------------------------------------------------------------------------------------------------
 * Mirroring: the device's page table follows the CPU's
 * --------------------------------------------------------------------------------------------------------------------- */

/*
 * The CPU page table changes: forget what the device knows of the range. Once the lock is ours the device uses none of its
 * translations, and when we return it has none of the range any more. A real driver also flushes the device's TLB here.
 */
static void driver_sync_cpu_device_pagetables(struct hmm_mirror *mirror, enum hmm_update action,
					      unsigned long start, unsigned long end)
{
	struct driver *driver = container_of(mirror, struct driver, mirror);

	(void)action;		/* there is only one: forget */
	pthread_mutex_lock(&driver->update);
	for (unsigned int i = 0; i < TABLE_SIZE; i++) {
		unsigned long addr = driver->table[i].vpn << PAGE_SHIFT;

		if (start <= addr && addr < end)
			driver->table[i].vpn = 0;
	}
	pthread_mutex_unlock(&driver->update);
	atomic_fetch_add(&driver->invalidations, 1);
}

static const struct hmm_mirror_ops driver_mirror_ops = {
	.sync_cpu_device_pagetables = driver_sync_cpu_device_pagetables,
};

/*
 * Copies what the CPU page table says of a range into the device's page table: the loop of hmm.txt.
 *
 * hmm_vma_fault() looks, and faults in what is missing. Between its look and our lock anything may have happened; under the
 * lock hmm_vma_range_done() knows. If it says true, then a change that comes now waits in the callback above for our lock,
 * and removes afterwards what we write.
 */
static int driver_populate_range(struct driver *driver, struct vm_area_struct *vma, unsigned long start,
				 unsigned long end, bool write)
{
	hmm_pfn_t *pfns = driver->pfns;
	struct hmm_range range;
	int rounds = 0;
	int ret;

again:
	if (rounds++ == MANY_ROUNDS)
		return -EBUSY;
	ret = hmm_vma_fault(vma, &range, start, end, pfns, write, true);
	if (ret)
		return ret;

	pthread_mutex_lock(&driver->update);
	if (!hmm_vma_range_done(vma, &range)) {
		pthread_mutex_unlock(&driver->update);
		goto again;
	}

	for (unsigned long addr = start; addr < end; addr += PAGE_SIZE) {
		hmm_pfn_t entry = pfns[(addr - start) >> PAGE_SHIFT];
		struct page *page = hmm_pfn_t_to_page(entry);

		/* Not there after all, or on some other device: the device will fault again if it insists. */
		if (!page || (is_device_private_page(page) && !hmm_devmem_has_page(driver->devmem, page)))
			continue;
		device_map(driver, addr, page_to_pfn(page), entry & HMM_PFN_WRITE);
	}
	pthread_mutex_unlock(&driver->update);
	return 0;
}

/* A device page fault: make the page at an address, and some behind it, known to the device. */
static int driver_device_fault(struct driver *driver, unsigned long addr, unsigned long end)
{
	struct vm_area_struct *vma;
	int ret = -EFAULT;

	pthread_mutex_lock(&driver->fault_lock);
	atomic_fetch_add(&driver->device_faults, 1);
	hmm_mm_read_lock(driver->mm);
	vma = find_vma(driver->mm, addr);
	if (vma && hmm_vma_start(vma) <= addr) {
		if (end > hmm_vma_end(vma))
			end = hmm_vma_end(vma);
		if (end > addr + WINDOW * PAGE_SIZE)
			end = addr + WINDOW * PAGE_SIZE;
		ret = driver_populate_range(driver, vma, addr, end, true);
	}
	hmm_mm_read_unlock(driver->mm);
	pthread_mutex_unlock(&driver->fault_lock);
	return ret;
}

/* A job for the device: add one to every word of an array, wherever its pages are. */
static int driver_run(struct driver *driver, uint64_t *array, size_t count)
{
	unsigned long addr = (unsigned long)array;
	unsigned long end = addr + count * sizeof(*array);

	while (addr < end) {
		unsigned long next = (addr & PAGE_MASK) + PAGE_SIZE;
		size_t words = ((next < end ? next : end) - addr) / sizeof(*array);
		int rounds = 0;

		while (!device_add_one(driver, addr, words)) {
			int ret = driver_device_fault(driver, addr & PAGE_MASK, (end + PAGE_SIZE - 1) & PAGE_MASK);

			if (ret)
				return ret;
			if (rounds++ == MANY_ROUNDS)
				return -EBUSY;
		}
		addr += words * sizeof(*array);
	}
	return 0;
}

/* ------------------------------------------------------------------------------------------------------------------------
 * Migration to the device
 * --------------------------------------------------------------------------------------------------------------------- */

/* Takes a free page of device memory; NULL when the device is full. */
static struct page *driver_alloc_page(struct driver *driver)
{
	struct page *page = NULL;

	pthread_mutex_lock(&driver->free_lock);
	if (driver->free_count)
		page = pfn_to_page(driver->devmem->pfn_first + driver->free_pages[--driver->free_count]);
	pthread_mutex_unlock(&driver->free_lock);
	return page;
}

/*
 * The pages with MIGRATE are ours to move now: no CPU can reach them. Find each a place on the device, and copy. Where the
 * device is full, leave dst alone: that page stays where it is.
 */
static void driver_alloc_and_copy(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst,
				  unsigned long start, unsigned long end, void *private)
{
	struct driver *driver = private;

	(void)vma;
	for (unsigned long i = 0; i < (end - start) >> PAGE_SHIFT; i++) {
		struct page *spage = migrate_pfn_to_page(src[i]);
		struct page *dpage;
		void *bytes;

		/* Pages on a device are left there, whether it is ours or another. */
		if (!(src[i] & MIGRATE_PFN_MIGRATE) || (src[i] & MIGRATE_PFN_DEVICE))
			continue;
		dpage = driver_alloc_page(driver);
		if (!dpage)
			continue;
		bytes = device_page_bytes(driver, page_to_pfn(dpage));
		if (spage)
			memcpy(bytes, hmm_page_to_virt(spage), PAGE_SIZE);
		else
			memset(bytes, 0, PAGE_SIZE);	/* a hole: nothing was ever there */
		dst[i] = migrate_pfn(page_to_pfn(dpage)) | MIGRATE_PFN_LOCKED | MIGRATE_PFN_DEVICE;
	}
}

/*
 * It is decided: what still has MIGRATE has moved. The pages are locked yet, so the device's page table can be written
 * without the loop above. Device pages of entries that did not move come back by themselves, through driver_free().
 */
static void driver_finalize_and_map(struct vm_area_struct *vma, const unsigned long *src,
				    const unsigned long *dst, unsigned long start, unsigned long end, void *private)
{
	struct driver *driver = private;

	(void)vma;
	pthread_mutex_lock(&driver->update);
	for (unsigned long i = 0; i < (end - start) >> PAGE_SHIFT; i++) {
		if (!(src[i] & MIGRATE_PFN_MIGRATE) || !(dst[i] & MIGRATE_PFN_DEVICE))
			continue;
		device_map(driver, start + (i << PAGE_SHIFT), dst[i] >> MIGRATE_PFN_SHIFT,
			   src[i] & MIGRATE_PFN_WRITE);
		atomic_fetch_add(&driver->to_device, 1);
	}
	pthread_mutex_unlock(&driver->update);
}

static const struct migrate_vma_ops driver_to_device_ops = {
	.alloc_and_copy = driver_alloc_and_copy,
	.finalize_and_map = driver_finalize_and_map,
};

/* Moves the pages of a range to the device, as many as it has room for. */
static int driver_migrate(struct driver *driver, unsigned long start, unsigned long end)
{
	int ret = 0;

	pthread_mutex_lock(&driver->fault_lock);
	hmm_mm_read_lock(driver->mm);
	while (!ret && start < end) {
		struct vm_area_struct *vma = find_vma(driver->mm, start);
		unsigned long next = start + WINDOW * PAGE_SIZE;

		if (!vma || hmm_vma_start(vma) > start) {
			ret = -EFAULT;
			break;
		}
		if (next > end)
			next = end;
		if (next > hmm_vma_end(vma))
			next = hmm_vma_end(vma);
		ret = migrate_vma(&driver_to_device_ops, vma, WINDOW, start, next, driver->src, driver->dst, driver);
		start = next;
	}
	hmm_mm_read_unlock(driver->mm);
	pthread_mutex_unlock(&driver->fault_lock);
	return ret;
}

/* ------------------------------------------------------------------------------------------------------------------------
 * Device memory: CPU faults bring pages home, and freed pages come back
 * --------------------------------------------------------------------------------------------------------------------- */

/* The way home: a page of system memory for each of our device pages, and copy. */
static void driver_alloc_and_copy_home(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst,
				       unsigned long start, unsigned long end, void *private)
{
	struct driver *driver = private;

	for (unsigned long addr = start; addr < end; addr += PAGE_SIZE, src++, dst++) {
		struct page *dpage = migrate_pfn_to_page(*src);
		struct page *spage;

		if (!(*src & MIGRATE_PFN_MIGRATE) || !dpage || !hmm_devmem_has_page(driver->devmem, dpage))
			continue;
		spage = hmm_vma_alloc_locked_page(vma, addr);
		if (!spage)
			continue;
		memcpy(hmm_page_to_virt(spage), device_page_bytes(driver, page_to_pfn(dpage)), PAGE_SIZE);
		*dst = migrate_pfn(page_to_pfn(spage)) | MIGRATE_PFN_LOCKED;
	}
}

/* The device's entries of these pages are gone already: migrate_vma() called the mirror before it took the pages. */
static void driver_finalize_home(struct vm_area_struct *vma, const unsigned long *src, const unsigned long *dst,
				 unsigned long start, unsigned long end, void *private)
{
	struct driver *driver = private;

	(void)vma;
	for (unsigned long i = 0; i < (end - start) >> PAGE_SHIFT; i++)
		if ((src[i] & MIGRATE_PFN_MIGRATE) && dst[i])
			atomic_fetch_add(&driver->to_system, 1);
}

static const struct migrate_vma_ops driver_to_system_ops = {
	.alloc_and_copy = driver_alloc_and_copy_home,
	.finalize_and_map = driver_finalize_home,
};

/*
 * The CPU touches a page that we have. The page must come home; some neighbours may, which saves their faults.
 */
static int driver_fault(struct hmm_devmem *devmem, struct vm_area_struct *vma, unsigned long addr, struct page *page,
			unsigned flags, pmd_t *pmdp)
{
	struct driver *driver = dev_get_drvdata(devmem->device);
	unsigned long src[FAULT_AROUND], dst[FAULT_AROUND];
	unsigned long start = addr & PAGE_MASK;
	unsigned long end = start + FAULT_AROUND * PAGE_SIZE;

	(void)page, (void)flags, (void)pmdp;
	atomic_fetch_add(&driver->cpu_faults, 1);
	if (end > hmm_vma_end(vma))
		end = hmm_vma_end(vma);
	if (migrate_vma(&driver_to_system_ops, vma, FAULT_AROUND, start, end, src, dst, driver))
		return VM_FAULT_SIGBUS;
	/* If somebody else brought it home meanwhile, there was nothing to do, and that is as good. */
	return 0;
}

/* The last user of a device page is gone: it may hold something else from now on. */
static void driver_free(struct hmm_devmem *devmem, struct page *page)
{
	struct driver *driver = dev_get_drvdata(devmem->device);

	pthread_mutex_lock(&driver->free_lock);
	driver->free_pages[driver->free_count++] = (unsigned int)(page_to_pfn(page) - devmem->pfn_first);
	pthread_mutex_unlock(&driver->free_lock);
	atomic_fetch_add(&driver->freed, 1);
}

static const struct hmm_devmem_ops driver_devmem_ops = {
	.free = driver_free,
	.fault = driver_fault,
};

/* ------------------------------------------------------------------------------------------------------------------------
 * Opening and closing the driver
 * --------------------------------------------------------------------------------------------------------------------- */

static void driver_close(struct driver *driver)
{
	/* First the pages come home, then the mirror ends, and nobody calls us any more. */
	if (!IS_ERR_OR_NULL(driver->devmem))
		hmm_devmem_remove(driver->devmem);
	if (driver->mirror.ops)
		hmm_mirror_unregister(&driver->mirror);
	if (!IS_ERR_OR_NULL(driver->device))
		hmm_device_put(driver->device);
	if (!IS_ERR_OR_NULL(driver->mm)) {
		hmm_unpin_range(driver->mm, driver, sizeof(*driver));
		hmm_mm_put(driver->mm);
	}
	free(driver);
}

static struct driver *driver_open(void)
{
	struct driver *driver = aligned_alloc(PAGE_SIZE, (sizeof(*driver) + PAGE_SIZE - 1) & PAGE_MASK);
	int ret = -ENOMEM;

	if (!driver)
		return ERR_PTR(ret);
	memset(driver, 0, sizeof(*driver));
	pthread_mutex_init(&driver->update, NULL);
	pthread_mutex_init(&driver->free_lock, NULL);
	pthread_mutex_init(&driver->fault_lock, NULL);
	while (driver->free_count < DEVICE_PAGES) {
		driver->free_pages[driver->free_count] = driver->free_count;
		driver->free_count++;
	}

	driver->mm = hmm_mm_current();
	ret = (int)(IS_ERR(driver->mm) ? PTR_ERR(driver->mm) : 0);
	if (ret)
		goto fail;

	/* Callbacks touch this structure: it must never migrate. */
	ret = hmm_pin_range(driver->mm, driver, sizeof(*driver));
	if (ret)
		goto fail;

	driver->device = hmm_device_new(driver);
	ret = (int)(IS_ERR(driver->device) ? PTR_ERR(driver->device) : 0);
	if (ret)
		goto fail;

	driver->devmem = hmm_devmem_add(&driver_devmem_ops, &driver->device->device, DEVICE_PAGES * PAGE_SIZE);
	ret = (int)(IS_ERR(driver->devmem) ? PTR_ERR(driver->devmem) : 0);
	if (ret)
		goto fail;

	driver->mirror.ops = &driver_mirror_ops;
	ret = hmm_mirror_register(&driver->mirror, driver->mm);
	if (!ret)
		return driver;
	driver->mirror.ops = NULL;
fail:
	driver_close(driver);
	return ERR_PTR(ret);
}
