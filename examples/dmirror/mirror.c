/*
 * mirror.c - one opened device: it mirrors the address space of the process that opened it.
 *
 * Locks, from the outside in. Whoever holds one never takes one above it:
 *
 *   opening                 which devices this process has
 *   resize, of a device     its pages are handed out; its chunks come and go
 *   hmm_mm_read_lock()      the library's
 *   mirrors_lock, of a device, then mutex, of each of its mirrors: what the device knows
 *   pages, of a device      its free pages
 *
 * Why callbacks cannot deadlock. Callbacks (invalidate, migrate_to_ram, page_free) take the last two lines only. Nobody
 * who holds one of these waits for anything: no memory is mapped or freed under them, the memory that is touched is the
 * driver's own (memory.c), and of the library only those functions are called that never wait: hmm_mm_peek(),
 * hmm_mm_poke(), the sequence number, page_pgmap(). Memory of the program is read and written before and after
 * (commands.c), with no lock at all: a touch of it may be a fault that waits for migrate_to_ram.
 */
#include "driver.h"

#include <errno.h>
#include <unistd.h>

/* ---- The CPU's page table changes ------------------------------------------------------------------------------ */

/*
 * Once the mutex is ours the device uses none of its translations; when we return it has none of this range any more.
 * The sequence number tells whoever looked at the range before to look again.
 */
static bool invalidate(struct mmu_interval_notifier *sub, const struct mmu_notifier_range *range,
		       unsigned long cur_seq)
{
	struct dmirror *mirror = container_of(sub, struct dmirror, notifier);

	/* Our own migration: it says itself which pages to forget (migrate.c). */
	if (range->event == MMU_NOTIFY_MIGRATE && range->owner == mirror->device)
		return true;
	if (mmu_notifier_range_blockable(range))
		pthread_mutex_lock(&mirror->mutex);
	else if (pthread_mutex_trylock(&mirror->mutex))
		return false;
	mmu_interval_set_seq(sub, cur_seq);
	table_forget(&mirror->table, range->start, range->end);
	pthread_mutex_unlock(&mirror->mutex);
	return true;
}

static const struct mmu_interval_notifier_ops mirror_ops = {
	.invalidate = invalidate,
};

void mirrors_forget(struct device_unit *device, unsigned long addr)
{
	pthread_mutex_lock(&device->mirrors_lock);
	for (struct dmirror *mirror = device->mirrors; mirror; mirror = mirror->next) {
		pthread_mutex_lock(&mirror->mutex);
		table_set(&mirror->table, addr, 0);
		pthread_mutex_unlock(&mirror->mutex);
	}
	pthread_mutex_unlock(&device->mirrors_lock);
}

/* ---- Device page faults ---------------------------------------------------------------------------------------- */

/* Looks at the CPU's page table, making pages present as the CPU's own faults would. -EBUSY: it changed meanwhile. */
static int look(const struct command *command, struct hmm_range *range)
{
	struct mm_struct *mm = command->mirror->mm;
	int ret;

	if (command->unlocked)
		return hmm_range_fault_unlocked_timeout(range, 0);
	/* The number first, the lock second: read_begin waits for a change that is under way. */
	range->notifier_seq = mmu_interval_read_begin(range->notifier);
	ret = hmm_mm_read_lock(mm);
	if (ret)
		return ret;
	ret = hmm_range_fault(range);
	hmm_mm_read_unlock(mm);
	return ret;
}

/* Writes what was found into the device's page table. Called with the mutex, after read_retry said that it stands. */
static int fill(struct dmirror *mirror, const struct hmm_range *range, bool write)
{
	for (unsigned long i = 0; range->start + i * PAGE_SIZE < range->end; i++) {
		unsigned long entry = range->hmm_pfns[i];

		if (!(entry & HMM_PFN_VALID) || (write && !(entry & HMM_PFN_WRITE)))
			return -EFAULT;
		table_set(&mirror->table, range->start + i * PAGE_SIZE,
			  table_make(entry & ~HMM_PFN_FLAGS, entry & HMM_PFN_WRITE ? TABLE_WRITE : TABLE_READ));
	}
	return 0;
}

/*
 * One piece. Between our look and our lock anything may happen; under the lock read_retry() knows. If it says no, a
 * change that comes now waits for our lock in invalidate(), and removes afterwards what we write.
 */
static int fault_piece(struct command *command, unsigned long start, unsigned long end, bool write)
{
	struct dmirror *mirror = command->mirror;
	struct hmm_range range = {
		.notifier = &mirror->notifier,
		.start = start,
		.end = end,
		.hmm_pfns = command->pfns,
		.default_flags = write ? HMM_PFN_REQ_FAULT | HMM_PFN_REQ_WRITE : HMM_PFN_REQ_FAULT,
		.dev_private_owner = mirror->device,
	};
	struct timespec begin;
	int ret = table_reserve(&mirror->table, &mirror->mutex, start, end);

	clock_gettime(CLOCK_MONOTONIC, &begin);
	while (!ret) {
		if (deadline_passed(&begin, HMM_RANGE_DEFAULT_TIMEOUT))
			return -EBUSY;
		ret = look(command, &range);
		if (ret == -EBUSY) {
			ret = 0;
			continue;
		}
		if (ret)
			break;
		pthread_mutex_lock(&mirror->mutex);
		if (mmu_interval_read_retry(range.notifier, range.notifier_seq)) {
			pthread_mutex_unlock(&mirror->mutex);
			continue;
		}
		ret = fill(mirror, &range, write);
		pthread_mutex_unlock(&mirror->mutex);
		break;
	}
	return ret;
}

int mirror_fault(struct command *command, unsigned long start, unsigned long end, bool write)
{
	int ret = 0;

	for (unsigned long next; !ret && start < end; start = next) {
		next = start + FAULT_PAGES * PAGE_SIZE;
		if (next > end || next < start)
			next = end;
		ret = fault_piece(command, start, next, write);
	}
	return ret;
}

/* ---- Opening and closing --------------------------------------------------------------------------------------- */

struct dmirror *dmirror_open(unsigned int unit)
{
	struct device_unit *device = device_get(unit);
	struct dmirror *mirror;
	int ret;

	if (!device)
		return NULL;
	mirror = driver_map(sizeof(*mirror), MEMORY_INHERITED);
	if (!mirror)
		return NULL;
	mirror->process = getpid();
	mirror->mm = device->mm;
	mirror->device = device;
	pthread_mutex_init(&mirror->mutex, NULL);
	/* All addresses, as the kernel's driver: from 0 to the last page, which is left out. */
	ret = mmu_interval_notifier_insert(&mirror->notifier, mirror->mm, 0, ~0UL & PAGE_MASK, &mirror_ops);
	if (ret) {
		driver_unmap(mirror, sizeof(*mirror));
		errno = -ret;
		return NULL;
	}
	pthread_mutex_lock(&device->mirrors_lock);
	mirror->next = device->mirrors;
	device->mirrors = mirror;
	pthread_mutex_unlock(&device->mirrors_lock);
	return mirror;
}

static void leave_device(struct dmirror *mirror)
{
	struct device_unit *device = mirror->device;
	struct dmirror **link = &device->mirrors;

	pthread_mutex_lock(&device->mirrors_lock);
	while (*link && *link != mirror)
		link = &(*link)->next;
	if (*link)
		*link = mirror->next;
	pthread_mutex_unlock(&device->mirrors_lock);
}

void dmirror_close(struct dmirror *mirror)
{
	/* In a child of fork() it is the parent's, and nothing of it is here but this structure. */
	if (mirror->process != getpid())
		return;
	mmu_interval_notifier_remove(&mirror->notifier);
	leave_device(mirror);
	/* As the kernel's: pages of other mirrors of this device come home, too. */
	pthread_mutex_lock(&mirror->device->resize);
	device_evict(mirror->device);
	pthread_mutex_unlock(&mirror->device->resize);
	table_free(&mirror->table);
	driver_unmap(mirror, sizeof(*mirror));
}
