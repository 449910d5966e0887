/*
 * driver.c - a complete driver for a small device, in the shape that Documentation/vm/hmm.txt sketches.
 *
 * The device is made of software, but to the library it is a device: it has memory that the CPU never touches, a
 * page table of its own, and it works on the addresses of the process. What happens here:
 *
 *   1. the driver mirrors the address space and adds device memory to it;
 *   2. the device adds one to every word of a malloc'ed buffer where it lies, in system memory;
 *   3. the buffer's pages migrate to the device until it is full, and the device adds one more;
 *   4. the CPU reads a part of the buffer: each touch of a migrated page faults, and the driver brings the page home;
 *   5. the device adds one again, to a buffer that is now half here and half there;
 *   6. the CPU checks every word, and everything is taken down.
 *
 * To make a driver of your own, keep the structure and replace the device: device_add_one() becomes your hardware,
 * and the two memcpy() become its DMA.
 *
 * Callbacks run on threads that answer page faults. So three rules:
 *
 *   - they touch only memory that cannot migrate: here all of it is in struct driver, which is pinned;
 *   - they do not call malloc(), printf() or anything else that might touch other memory;
 *   - the update lock is never held over what can wait for a page (hmm_vma_fault, migrate_vma, a plain touch).
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
#define WINDOW 64		/* most pages that one device fault looks at */
#define FAULT_AROUND 8		/* most pages that come home for one touch of the CPU */
#define MANY_ROUNDS 1000	/* a range that changes so often is not ours to have */

/*
 * One entry of the device's page table. The table is direct mapped: an address has one place, and a newer entry
 * replaces an older one. What it forgets a device fault finds again: it may forget, but it must never be wrong.
 */
struct device_pte {
	unsigned long vpn;	/* virtual page number; 0: empty */
	unsigned long pfn;	/* where the page is */
	bool write;		/* may the device write it? */
};

/* Everything that callbacks touch. It is pinned while the driver is open. */
struct driver {
	struct mm_struct *mm;
	struct hmm_mirror mirror;
	struct hmm_device *device;
	struct hmm_devmem *devmem;

	/* The update lock guards the device's page table. To hold it is to use the table's translations. */
	pthread_mutex_t update;
	struct device_pte table[TABLE_SIZE];

	/* Free pages of device memory: a stack of page numbers. */
	pthread_mutex_t free_lock;
	unsigned int free_count;
	unsigned int free_pages[DEVICE_PAGES];

	/* Device faults come one after another, so one array is enough. */
	pthread_mutex_t fault_lock;
	hmm_pfn_t pfns[WINDOW];

	/* What happened, for the report. */
	atomic_ulong device_faults, cpu_faults, invalidations, to_device, to_system, freed;

	/* The device's memory. Nobody but the device and its DMA looks at it. */
	unsigned char memory[DEVICE_PAGES][PAGE_SIZE];
};

/* ---- The device: its memory, its page table, its one skill --------------------------------------------------- */

static void *device_bytes(struct driver *driver, unsigned long pfn)
{
	return driver->memory[pfn - driver->devmem->pfn_first];
}

/* Writes an entry of the device's page table. Called with the update lock. */
static void device_map(struct driver *driver, unsigned long addr, unsigned long pfn, bool write)
{
	unsigned long vpn = addr >> PAGE_SHIFT;

	driver->table[vpn % TABLE_SIZE] = (struct device_pte){ vpn, pfn, write };
}

/*
 * The device adds one to some words of one page, through its own page table. False is a device page fault: there is
 * no entry, or the page went away from under it.
 *
 * The device reads and writes its own memory as it likes. Pages of system memory it reaches as a real device does,
 * without the CPU's page table: hmm_mm_peek() and hmm_mm_poke() never fault.
 */
static bool device_add_one(struct driver *driver, unsigned long addr, size_t words)
{
	uint64_t line[PAGE_SIZE / sizeof(uint64_t)], *word = NULL;
	unsigned long vpn = addr >> PAGE_SHIFT;
	size_t bytes = words * sizeof(*word);
	const struct device_pte *pte;

	pthread_mutex_lock(&driver->update);
	pte = &driver->table[vpn % TABLE_SIZE];
	if (pte->vpn == vpn && pte->write) {
		if (hmm_pfn_is_device(pte->pfn))
			word = (void *)((char *)device_bytes(driver, pte->pfn) + (addr & ~PAGE_MASK));
		else if (hmm_mm_peek(driver->mm, (void *)addr, line, bytes))
			word = line;
	}
	for (size_t i = 0; word && i < words; i++)
		word[i]++;
	if (word == line && !hmm_mm_poke(driver->mm, (void *)addr, line, bytes))
		word = NULL;
	pthread_mutex_unlock(&driver->update);
	return word;
}

/* ---- Mirroring: the device's page table follows the CPU's ---------------------------------------------------- */

/*
 * The CPU page table changes: forget what the device knows of the range. Once the lock is ours, the device uses none
 * of its translations; when we return, it has none of this range any more. A real driver also flushes a TLB here.
 */
static void driver_sync_cpu_device_pagetables(struct hmm_mirror *mirror, enum hmm_update action,
					      unsigned long start, unsigned long end)
{
	struct driver *driver = container_of(mirror, struct driver, mirror);

	(void)action;
	pthread_mutex_lock(&driver->update);
	for (int i = 0; i < TABLE_SIZE; i++) {
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
 * Copies what the CPU page table says of a range into the device's: the loop of hmm.txt.
 *
 * hmm_vma_fault() faults in what is missing, and looks. Between its look and our lock anything may happen; under the
 * lock hmm_vma_range_done() knows. If it says true, then a change that comes now waits for our lock in the callback
 * above, and removes afterwards what we write.
 */
static int driver_populate_range(struct driver *driver, struct vm_area_struct *vma, unsigned long start,
				 unsigned long end)
{
	hmm_pfn_t *pfns = driver->pfns;
	struct hmm_range range;
	int rounds = 0, ret;

again:
	if (rounds++ == MANY_ROUNDS)
		return -EBUSY;
	ret = hmm_vma_fault(vma, &range, start, end, pfns, true, true);
	if (ret)
		return ret;

	pthread_mutex_lock(&driver->update);
	if (!hmm_vma_range_done(vma, &range)) {
		pthread_mutex_unlock(&driver->update);
		goto again;
	}
	for (unsigned long addr = start; addr < end; addr += PAGE_SIZE, pfns++) {
		struct page *page = hmm_pfn_t_to_page(*pfns);

		/* A page that some other device has is not ours to use. */
		if (page && (!is_device_private_page(page) || hmm_devmem_has_page(driver->devmem, page)))
			device_map(driver, addr, page_to_pfn(page), *pfns & HMM_PFN_WRITE);
	}
	pthread_mutex_unlock(&driver->update);
	return 0;
}

/* A device page fault: make the page at addr, and some up to end, known to the device. */
static int driver_device_fault(struct driver *driver, unsigned long addr, unsigned long end)
{
	struct vm_area_struct *vma;
	int ret = -EFAULT;

	if (end > addr + WINDOW * PAGE_SIZE)
		end = addr + WINDOW * PAGE_SIZE;
	atomic_fetch_add(&driver->device_faults, 1);
	pthread_mutex_lock(&driver->fault_lock);
	hmm_mm_read_lock(driver->mm);
	vma = find_vma(driver->mm, addr);
	if (vma && hmm_vma_start(vma) <= addr)
		ret = driver_populate_range(driver, vma, addr, end < hmm_vma_end(vma) ? end : hmm_vma_end(vma));
	hmm_mm_read_unlock(driver->mm);
	pthread_mutex_unlock(&driver->fault_lock);
	return ret;
}

/* A job for the device: add one to every word of an array, wherever its pages are. */
static int driver_run(struct driver *driver, uint64_t *array, size_t count)
{
	unsigned long addr = (unsigned long)array;
	unsigned long end = addr + count * sizeof(*array);
	unsigned long last = (end + PAGE_SIZE - 1) & PAGE_MASK;

	for (unsigned long next; addr < end; addr = next) {
		int rounds = 0, ret = 0;

		next = (addr & PAGE_MASK) + PAGE_SIZE;
		if (next > end)
			next = end;
		while (!ret && !device_add_one(driver, addr, (next - addr) / sizeof(*array)))
			ret = rounds++ < MANY_ROUNDS ? driver_device_fault(driver, addr & PAGE_MASK, last) : -EBUSY;
		if (ret)
			return ret;
	}
	return 0;
}

/* ---- Migration to the device --------------------------------------------------------------------------------- */

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
 * The pages with MIGRATE are ours to move: no CPU can reach them now. Find each a place on the device, and copy.
 * When the device is full leave dst alone, and the page stays where it is.
 */
static void driver_alloc_and_copy(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst,
				  unsigned long start, unsigned long end, void *private)
{
	struct driver *driver = private;

	(void)vma;
	for (; start < end; start += PAGE_SIZE, src++, dst++) {
		struct page *spage = migrate_pfn_to_page(*src);
		struct page *dpage;

		/* Pages that are on a device already, ours or another, are left there. */
		if (!(*src & MIGRATE_PFN_MIGRATE) || (*src & MIGRATE_PFN_DEVICE))
			continue;
		dpage = driver_alloc_page(driver);
		if (!dpage)
			break;
		if (spage)
			memcpy(device_bytes(driver, page_to_pfn(dpage)), hmm_page_to_virt(spage), PAGE_SIZE);
		else	/* nothing was ever there: zeros */
			memset(device_bytes(driver, page_to_pfn(dpage)), 0, PAGE_SIZE);
		*dst = migrate_pfn(page_to_pfn(dpage)) | MIGRATE_PFN_LOCKED | MIGRATE_PFN_DEVICE;
	}
}

/*
 * Now it is decided: what still has MIGRATE has moved. The pages are locked, so the device's page table may be
 * written here without the loop above. Device pages of entries that did not move come back through driver_free().
 */
static void driver_finalize_and_map(struct vm_area_struct *vma, const unsigned long *src,
				    const unsigned long *dst, unsigned long start, unsigned long end,
				    void *private)
{
	struct driver *driver = private;

	(void)vma;
	pthread_mutex_lock(&driver->update);
	for (; start < end; start += PAGE_SIZE, src++, dst++) {
		if (!(*src & MIGRATE_PFN_MIGRATE) || !(*dst & MIGRATE_PFN_DEVICE))
			continue;
		device_map(driver, start, *dst >> MIGRATE_PFN_SHIFT, *src & MIGRATE_PFN_WRITE);
		atomic_fetch_add(&driver->to_device, 1);
	}
	pthread_mutex_unlock(&driver->update);
}

static const struct migrate_vma_ops driver_to_device = {
	.alloc_and_copy = driver_alloc_and_copy,
	.finalize_and_map = driver_finalize_and_map,
};

/* Moves the pages of a range, which lies in one mapping, to the device: as many as it has room for. */
static int driver_migrate(struct driver *driver, unsigned long start, unsigned long end)
{
	unsigned long pages = (end - start) >> PAGE_SHIFT;
	unsigned long *src = calloc(2 * pages, sizeof(*src));
	struct vm_area_struct *vma;
	int ret = -EFAULT;

	if (!src)
		return -ENOMEM;
	hmm_mm_read_lock(driver->mm);
	vma = find_vma(driver->mm, start);
	if (vma)
		ret = migrate_vma(&driver_to_device, vma, pages, start, end, src, src + pages, driver);
	hmm_mm_read_unlock(driver->mm);
	free(src);
	return ret;
}

/* ---- Device memory: CPU faults bring pages home, freed pages come back --------------------------------------- */

/* The way home: for each of our pages one of system memory, and copy. */
static void driver_alloc_and_copy_home(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst,
				       unsigned long start, unsigned long end, void *private)
{
	struct driver *driver = private;

	for (; start < end; start += PAGE_SIZE, src++, dst++) {
		struct page *dpage = migrate_pfn_to_page(*src);
		struct page *spage;

		if (!(*src & MIGRATE_PFN_MIGRATE) || !hmm_devmem_has_page(driver->devmem, dpage))
			continue;
		spage = hmm_vma_alloc_locked_page(vma, start);
		if (!spage)
			continue;
		memcpy(hmm_page_to_virt(spage), device_bytes(driver, page_to_pfn(dpage)), PAGE_SIZE);
		*dst = migrate_pfn(page_to_pfn(spage)) | MIGRATE_PFN_LOCKED;
	}
}

/* The device's entries are gone already: migrate_vma() called the mirror before it took the pages. */
static void driver_finalize_home(struct vm_area_struct *vma, const unsigned long *src, const unsigned long *dst,
				 unsigned long start, unsigned long end, void *private)
{
	struct driver *driver = private;

	(void)vma;
	for (; start < end; start += PAGE_SIZE, src++, dst++)
		if ((*src & MIGRATE_PFN_MIGRATE) && *dst)
			atomic_fetch_add(&driver->to_system, 1);
}

static const struct migrate_vma_ops driver_to_system = {
	.alloc_and_copy = driver_alloc_and_copy_home,
	.finalize_and_map = driver_finalize_home,
};

/* The CPU touches a page that we have. It must come home; some neighbours may, which saves their faults. */
static int driver_fault(struct hmm_devmem *devmem, struct vm_area_struct *vma, unsigned long addr,
			struct page *page, unsigned flags, pmd_t *pmdp)
{
	struct driver *driver = dev_get_drvdata(devmem->device);
	unsigned long src[FAULT_AROUND], dst[FAULT_AROUND];
	unsigned long start = addr & PAGE_MASK;
	unsigned long end = start + FAULT_AROUND * PAGE_SIZE;

	(void)page, (void)flags, (void)pmdp;
	atomic_fetch_add(&driver->cpu_faults, 1);
	if (end > hmm_vma_end(vma))
		end = hmm_vma_end(vma);
	/* Somebody else may bring it home meanwhile: as good. A call that fails loses nothing: the access is made again. */
	return migrate_vma(&driver_to_system, vma, FAULT_AROUND, start, end, src, dst, driver) ? VM_FAULT_OOM : 0;
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

/* ---- Opening and closing ------------------------------------------------------------------------------------- */

/* Opens a driver in memory that is all zeros. */
static int driver_open(struct driver *driver)
{
	long ret;

	pthread_mutex_init(&driver->update, NULL);
	pthread_mutex_init(&driver->free_lock, NULL);
	pthread_mutex_init(&driver->fault_lock, NULL);
	for (; driver->free_count < DEVICE_PAGES; driver->free_count++)
		driver->free_pages[driver->free_count] = driver->free_count;

	driver->mm = hmm_mm_current();
	if (IS_ERR(driver->mm))
		return (int)PTR_ERR(driver->mm);
	/* Callbacks touch this structure, so it must never migrate. */
	ret = hmm_pin_range(driver->mm, driver, sizeof(*driver));
	if (ret)
		goto put_mm;
	driver->device = hmm_device_new(driver);
	ret = PTR_ERR(driver->device);
	if (IS_ERR(driver->device))
		goto unpin;
	driver->devmem = hmm_devmem_add(&driver_devmem_ops, &driver->device->device, sizeof(driver->memory));
	ret = PTR_ERR(driver->devmem);
	if (IS_ERR(driver->devmem))
		goto put_device;
	hmm_devmem_set_signal_safe(driver->devmem, true);	/* as the three rules at the top are kept */
	driver->mirror.ops = &driver_mirror_ops;
	ret = hmm_mirror_register(&driver->mirror, driver->mm);
	if (!ret)
		return 0;

	hmm_devmem_remove(driver->devmem);
put_device:
	hmm_device_put(driver->device);
unpin:
	hmm_unpin_range(driver->mm, driver, sizeof(*driver));
put_mm:
	hmm_mm_put(driver->mm);
	return (int)ret;
}

/* Closes it: the pages come home first; then nobody calls us any more. */
static void driver_close(struct driver *driver)
{
	hmm_devmem_remove(driver->devmem);
	hmm_mirror_unregister(&driver->mirror);
	hmm_device_put(driver->device);
	hmm_unpin_range(driver->mm, driver, sizeof(*driver));
	hmm_mm_put(driver->mm);
}

/* ---- A program that uses it ---------------------------------------------------------------------------------- */

#define WORDS ((size_t)128 * 1024)	/* 1 MiB of numbers: more than the device's memory holds */

static void must(const char *what, long ret)
{
	if (ret >= 0)
		return;
	fprintf(stderr, "driver: %s: %s\n", what, *hmm_last_error() ? hmm_last_error() : strerror((int)-ret));
	exit(EXIT_FAILURE);
}

/* Says what happened so far, and draws where the buffer's pages are: s in system memory, D on the device. */
static void report(struct driver *driver, const char *what, const uint64_t *numbers)
{
	unsigned char places[WORDS * sizeof(*numbers) / PAGE_SIZE + 1];
	size_t bytes = WORDS * sizeof(*numbers);

	printf("%s\n  faults: device %lu, CPU %lu; pages: to the device %lu, home %lu, freed %lu; invalidations %lu",
	       what, driver->device_faults, driver->cpu_faults, driver->to_device, driver->to_system, driver->freed,
	       driver->invalidations);
	memset(places, HMM_RESIDENCY_UNMAPPED, sizeof(places));
	must("residency", hmm_residency(driver->mm, numbers, bytes, places, sizeof(places)));
	for (size_t i = 0; i < sizeof(places); i++)
		printf("%s%c", i % 86 ? "" : "\n  ", "-sD>! "[places[i]]);
	printf("\n");
}

int main(void)
{
	static _Alignas(4096) struct driver driver;
	uint64_t *numbers = malloc(WORDS * sizeof(*numbers));
	unsigned long start = (unsigned long)numbers & PAGE_MASK;
	unsigned long end = ((unsigned long)(numbers + WORDS) + PAGE_SIZE - 1) & PAGE_MASK;
	size_t wrong = 0;

	must("malloc", numbers ? 0 : -ENOMEM);
	must("open", driver_open(&driver));
	printf("libhmm %s, engine %s; device memory: %d pages\n", hmm_version_string(), hmm_mm_engine(driver.mm),
	       DEVICE_PAGES);
	for (size_t i = 0; i < WORDS; i++)
		numbers[i] = i;

	must("run", driver_run(&driver, numbers, WORDS));
	report(&driver, "The device worked on the buffer in system memory.", numbers);
	must("migrate", driver_migrate(&driver, start, end));
	report(&driver, "The buffer migrated, as far as the device had room.", numbers);
	must("run", driver_run(&driver, numbers, WORDS));
	for (size_t i = 0; i < WORDS / 2; i++)
		wrong += numbers[i] != i + 2;
	report(&driver, "The device worked on it, and the CPU read the first half.", numbers);
	must("run", driver_run(&driver, numbers, WORDS));
	for (size_t i = 0; i < WORDS; i++)
		wrong += numbers[i] != i + 3;
	report(&driver, "The device worked on both parts, and the CPU read all.", numbers);

	driver_close(&driver);
	printf("%zu words, %zu wrong; %lu device pages were used, %lu were freed\n", WORDS, wrong,
	       driver.to_device, driver.freed);
	free(numbers);
	return wrong || driver.freed != driver.to_device ? EXIT_FAILURE : EXIT_SUCCESS;
}
