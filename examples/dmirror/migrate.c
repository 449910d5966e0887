/*
 * migrate.c - pages to the device, and home again: on request, by a touch of the CPU, by the number of a device page.
 *
 * All ways have the steps of the kernel's interface: setup takes pages away from the CPU, then we choose destinations
 * and copy, ..._pages() commits, we write the device's page table, ..._finalize() lets everybody go on.
 *
 * The notifier of a device ignores what the device migrates itself: else a migration to the device would also drop
 * what is on it already. So we say by hand which addresses the mirrors of the device have to forget, after setup and
 * before anything is copied. From then on a device access to such a page is a device fault, and waits.
 */
#include "driver.h"

#include <errno.h>
#include <string.h>

/* ---- Home ------------------------------------------------------------------------------------------------------ */

/*
 * Chooses the page of system memory that one device page comes home to, and copies. The library has it ready: no
 * allocation can fail here. What a coherent page holds is where it shall be already.
 */
static unsigned long copy_home(const unsigned long *src)
{
	const struct page *from = migrate_pfn_to_page(*src);
	const void *memory = device_page_memory(from);
	struct page *to;

	if (!(*src & MIGRATE_PFN_MIGRATE) || !device_of_page(from))
		return 0;
	to = hmm_migrate_alloc_page(src);
	if (IS_ERR_OR_NULL(to))
		return 0;
	if (memory)
		memcpy(hmm_page_to_virt(to), memory, PAGE_SIZE);
	return migrate_pfn(page_to_pfn(to));
}

/*
 * The CPU touches a page of a private unit. A callback.
 *
 * The kernel's driver says VM_FAULT_SIGBUS when it cannot even begin. To libhmm that means that the data is lost, and
 * it is not: OOM has the access made again.
 */
vm_fault_t migrate_to_ram(struct vm_fault *vmf)
{
	struct device_unit *device = device_of_page(vmf->page);
	unsigned long src = 0, dst = 0;
	struct migrate_vma args = {
		.vma = vmf->vma,
		.start = vmf->address,
		.end = vmf->address + PAGE_SIZE,
		.src = &src,
		.dst = &dst,
		.pgmap_owner = device,
		.flags = MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
		.fault_page = vmf->page,
	};

	if (!device || device_fails_once(device) || migrate_vma_setup(&args))
		return VM_FAULT_OOM;
	if (args.cpages) {
		mirrors_forget(device, args.start);
		dst = copy_home(&src);
	}
	migrate_vma_pages(&args);
	migrate_vma_finalize(&args);
	/* If somebody else has the page just now, the access comes again. */
	return 0;
}

void migrate_chunk_home(struct chunk *chunk, unsigned int first, unsigned int count, unsigned long *src,
			unsigned long *dst)
{
	if (migrate_device_range(src, chunk->first_pfn + first, count))
		return;
	/* Here the library knows the addresses, and we do not: it has told all mirrors (the event is CLEAR, of no owner). */
	for (unsigned int i = 0; i < count; i++)
		dst[i] = copy_home(&src[i]);
	migrate_device_pages(src, dst, count);
	migrate_device_finalize(src, dst, count);
}

/* ---- One step of a command: up to STEP_PAGES pages of one mapping ---------------------------------------------- */

/* Finds the mapping, and how far the step goes. */
static int step_begin(struct command *command, struct migrate_vma *args, unsigned long start)
{
	struct vm_area_struct *vma = find_vma(command->mirror->mm, start);
	unsigned long end = start + STEP_PAGES * PAGE_SIZE;

	if (!vma || hmm_vma_start(vma) > start || !(hmm_vma_flags(vma) & VM_READ))
		return -EINVAL;
	if (end > command->end)
		end = command->end;
	if (end > hmm_vma_end(vma))
		end = hmm_vma_end(vma);
	memset(command->src, 0, sizeof(command->src));
	memset(command->dst, 0, sizeof(command->dst));
	*args = (struct migrate_vma){
		.vma = vma,
		.start = start,
		.end = end,
		.src = command->src,
		.dst = command->dst,
		.pgmap_owner = command->mirror->device,
	};
	return 0;
}

/* Chooses and fills device pages. What is left of the pages that were taken is counted in *left. */
static void copy_to_device(struct command *command, const struct migrate_vma *args, unsigned int *left)
{
	struct device_unit *device = command->mirror->device;

	for (unsigned long i = 0; i < args->npages && *left; i++) {
		const struct page *from = migrate_pfn_to_page(args->src[i]);
		struct page *page;
		void *memory;

		if (!(args->src[i] & MIGRATE_PFN_MIGRATE) || device_fails_once(device))
			continue;
		mirrors_forget(device, args->start + i * PAGE_SIZE);
		page = command->pages[--*left];
		zone_device_page_init(page);
		memory = device_page_memory(page);
		if (memory && from)
			memcpy(memory, hmm_page_to_virt(from), PAGE_SIZE);
		else if (memory)	/* nothing was ever there: zeros */
			memset(memory, 0, PAGE_SIZE);
		args->dst[i] = migrate_pfn(page_to_pfn(page));
	}
}

/* It is decided what moved, and the pages are locked: the device may know them. */
static void map_on_device(struct command *command, const struct migrate_vma *args)
{
	struct dmirror *mirror = command->mirror;
	bool holes_writable = hmm_vma_flags(args->vma) & VM_WRITE;

	pthread_mutex_lock(&mirror->mutex);
	for (unsigned long i = 0; i < args->npages; i++) {
		bool is_hole = !(args->src[i] & MIGRATE_PFN_VALID);
		bool writable = args->src[i] & MIGRATE_PFN_WRITE || (is_hole && holes_writable);
		const struct page *page = migrate_pfn_to_page(args->dst[i]);

		if ((args->src[i] & MIGRATE_PFN_MIGRATE) && page)
			table_set(&mirror->table, args->start + i * PAGE_SIZE,
				  table_make(page_to_pfn(page), writable ? TABLE_WRITE : TABLE_READ));
	}
	pthread_mutex_unlock(&mirror->mutex);
}

/* Called with the lock of the address space, and with pages to use. */
static int step_to_device(struct command *command, unsigned long *addr, unsigned int *left)
{
	struct migrate_vma args;
	int ret = step_begin(command, &args, *addr);

	if (ret)
		return ret;
	args.flags = MIGRATE_VMA_SELECT_SYSTEM;
	ret = migrate_vma_setup(&args);
	if (ret)
		return ret;
	copy_to_device(command, &args, left);
	migrate_vma_pages(&args);
	map_on_device(command, &args);
	migrate_vma_finalize(&args);
	*addr = args.end;
	return 0;
}

/* Called with the lock of the address space. */
static int step_to_system(struct command *command, unsigned long *addr)
{
	struct device_unit *device = command->mirror->device;
	struct migrate_vma args;
	int ret = step_begin(command, &args, *addr);

	if (ret)
		return ret;
	args.flags = device->is_coherent ? MIGRATE_VMA_SELECT_DEVICE_COHERENT : MIGRATE_VMA_SELECT_DEVICE_PRIVATE;
	ret = migrate_vma_setup(&args);
	if (ret)
		return ret;
	for (unsigned long i = 0; i < args.npages; i++) {
		if (!(args.src[i] & MIGRATE_PFN_MIGRATE) || device_fails_once(device))
			continue;
		mirrors_forget(device, args.start + i * PAGE_SIZE);
		args.dst[i] = copy_home(&args.src[i]);
	}
	migrate_vma_pages(&args);
	for (unsigned long i = 0; i < args.npages; i++)
		command->args.cpages += args.dst[i] && (args.src[i] & MIGRATE_PFN_MIGRATE);
	migrate_vma_finalize(&args);
	*addr = args.end;
	return 0;
}

/* ---- The two commands ------------------------------------------------------------------------------------------ */

/*
 * Room in the table and device pages are had before any page of the process is taken: that may need memory, and wait.
 * resize is held until the pages that nobody used are back, so that RELEASE does not take their chunk away.
 */
int migrate_to_device(struct command *command)
{
	struct dmirror *mirror = command->mirror;
	struct device_unit *device = mirror->device;
	int ret = 0;

	for (unsigned long addr = command->start; !ret && addr < command->end;) {
		unsigned int left;

		ret = table_reserve(&mirror->table, &mirror->mutex, addr, addr + STEP_PAGES * PAGE_SIZE);
		if (ret)
			break;
		pthread_mutex_lock(&device->resize);
		left = device_take_pages(device, command->pages, STEP_PAGES);
		ret = hmm_mm_read_lock(mirror->mm);
		if (!ret) {
			ret = step_to_device(command, &addr, &left);
			hmm_mm_read_unlock(mirror->mm);
		}
		device_return_pages(device, command->pages, left);
		pthread_mutex_unlock(&device->resize);
	}
	return ret;
}

int migrate_to_system(struct command *command)
{
	int ret = 0;

	for (unsigned long addr = command->start; !ret && addr < command->end;) {
		ret = hmm_mm_read_lock(command->mirror->mm);
		if (!ret) {
			ret = step_to_system(command, &addr);
			hmm_mm_read_unlock(command->mirror->mm);
		}
	}
	return ret;
}
