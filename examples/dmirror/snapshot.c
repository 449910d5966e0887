/*
 * snapshot.c - what the CPU's page table says of a range, without faulting anything in.
 *
 * Each piece has a notifier of its own that lives as long as the look: nothing of the device's table is involved.
 */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PMD_SHIFT 21
#define PUD_SHIFT 30

/* ---- The page of zeros ----------------------------------------------------------------------------------------- */

/*
 * libhmm numbers system memory by its address, so its pfn does not tell that the page of zeros is mapped. The kernel
 * says so since v6.7, by PAGEMAP_SCAN. Older kernels: nobody says, and the page is one that can be read.
 */
struct pagemap_scan {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

struct pagemap_region {
	uint64_t start, end, categories;
};

#define PAGEMAP_SCAN_REQUEST _IOWR('f', 16, struct pagemap_scan)
#define IS_PAGE_OF_ZEROS (1UL << 5)

/* Marks in bytes the pages of a range at which the page of zeros is mapped. */
static void find_zeros(unsigned long start, unsigned long end, unsigned char *bytes)
{
	int file = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	struct pagemap_region found[FAULT_PAGES];
	struct pagemap_scan scan = {
		.size = sizeof(scan),
		.start = start,
		.end = end,
		.vec = (uintptr_t)found,
		.vec_len = FAULT_PAGES,
		.category_mask = IS_PAGE_OF_ZEROS,
		.return_mask = IS_PAGE_OF_ZEROS,
	};
	int count = file >= 0 ? ioctl(file, PAGEMAP_SCAN_REQUEST, &scan) : -1;

	if (file >= 0)
		close(file);
	for (int i = 0; i < count; i++)
		for (uint64_t addr = found[i].start; addr < found[i].end; addr += PAGE_SIZE)
			bytes[(addr - start) >> PAGE_SHIFT] = HMM_DMIRROR_PROT_ZERO;
}

/* ---- One piece ------------------------------------------------------------------------------------------------- */

static bool invalidate(struct mmu_interval_notifier *sub, const struct mmu_notifier_range *range,
		       unsigned long cur_seq)
{
	struct dmirror *mirror = container_of(sub, struct command, snapshot)->mirror;

	if (mmu_notifier_range_blockable(range))
		pthread_mutex_lock(&mirror->mutex);
	else if (pthread_mutex_trylock(&mirror->mutex))
		return false;
	/* Nothing to forget: only the number matters. */
	mmu_interval_set_seq(sub, cur_seq);
	pthread_mutex_unlock(&mirror->mutex);
	return true;
}

static const struct mmu_interval_notifier_ops snapshot_ops = {
	.invalidate = invalidate,
};

/* What is said of one page; zero is HMM_DMIRROR_PROT_ZERO for the page of zeros, else 0. */
static unsigned char describe(const struct device_unit *device, unsigned long entry, unsigned char zero)
{
	unsigned char said = entry & HMM_PFN_WRITE ? HMM_DMIRROR_PROT_WRITE : HMM_DMIRROR_PROT_READ;
	unsigned int shift = PAGE_SHIFT + hmm_pfn_to_map_order(entry);
	const struct page *page = pfn_to_page(entry & ~HMM_PFN_FLAGS);

	if (entry & HMM_PFN_ERROR)
		return HMM_DMIRROR_PROT_ERROR;
	if (!(entry & HMM_PFN_VALID))
		return HMM_DMIRROR_PROT_NONE;
	if (hmm_page_is_device_private(page))
		said |= device_of_page(page) == device ? HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL
						       : HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE;
	else if (hmm_page_is_device_coherent(page))
		said |= device_of_page(page) == device ? HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL
						       : HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE;
	else
		said |= zero;
	if (shift == PMD_SHIFT)
		said |= HMM_DMIRROR_PROT_PMD;
	else if (shift == PUD_SHIFT)
		said |= HMM_DMIRROR_PROT_PUD;
	return said;
}

/* Looks once. -EBUSY: something changed meanwhile. */
static int look_once(struct command *command, struct hmm_range *range)
{
	struct dmirror *mirror = command->mirror;
	int ret;

	memset(command->bytes, 0, sizeof(command->bytes));
	range->notifier_seq = mmu_interval_read_begin(range->notifier);
	ret = hmm_mm_read_lock(mirror->mm);
	if (ret)
		return ret;
	ret = hmm_range_fault(range);
	hmm_mm_read_unlock(mirror->mm);
	if (ret)
		return ret;
	find_zeros(range->start, range->end, command->bytes);

	pthread_mutex_lock(&mirror->mutex);
	if (mmu_interval_read_retry(range->notifier, range->notifier_seq))
		ret = -EBUSY;
	for (unsigned long i = 0; !ret && range->start + i * PAGE_SIZE < range->end; i++)
		command->bytes[i] = describe(mirror->device, command->pfns[i], command->bytes[i]);
	pthread_mutex_unlock(&mirror->mutex);
	return ret;
}

static int snapshot_piece(struct command *command, unsigned long start, unsigned long end)
{
	struct hmm_range range = {
		.notifier = &command->snapshot,
		.start = start,
		.end = end,
		.hmm_pfns = command->pfns,
		.dev_private_owner = command->mirror->device,
	};
	struct timespec begin;
	int ret;

	ret = mmu_interval_notifier_insert(&command->snapshot, command->mirror->mm, start, end - start, &snapshot_ops);
	if (ret)
		return ret;
	clock_gettime(CLOCK_MONOTONIC, &begin);
	do
		ret = look_once(command, &range);
	while (ret == -EBUSY && !deadline_passed(&begin, HMM_RANGE_DEFAULT_TIMEOUT));
	mmu_interval_notifier_remove(&command->snapshot);
	return ret;
}

int command_snapshot(struct command *command)
{
	unsigned long to = command->args.ptr;

	for (unsigned long start = command->start, end; start < command->end; start = end) {
		unsigned long count;
		int ret;

		end = start + FAULT_PAGES * PAGE_SIZE;
		if (end > command->end || end < start)
			end = command->end;
		count = (end - start) >> PAGE_SHIFT;
		ret = snapshot_piece(command, start, end);
		if (!ret)
			ret = copy_out(command, to, command->bytes, count);
		if (ret)
			return ret;
		to += count;
		command->args.cpages += count;
	}
	return 0;
}
