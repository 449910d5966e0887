/*
 * commands.c - what the device does for a program. Piece sizes, counts and error codes are those of the kernel's
 * driver.
 *
 * Data goes through a buffer of the driver's, never directly: the program's buffer may lie on the device itself, and a
 * touch of it must not happen under a lock.
 */
#define _GNU_SOURCE
#include "driver.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define STUCK_MS 10000		/* a range that is taken away again and again is not ours to have */

/* ---- Memory of the program ------------------------------------------------------------------------------------- */

static int copy_in(const struct command *command, void *to, unsigned long from, size_t bytes)
{
	return hmm_mm_read(command->mirror->mm, (const void *)from, to, bytes) == (long)bytes ? 0 : -EFAULT;
}

int copy_out(const struct command *command, unsigned long to, const void *from, size_t bytes)
{
	return hmm_mm_write(command->mirror->mm, (void *)to, from, bytes) == (long)bytes ? 0 : -EFAULT;
}

/* Room for as much data as the command's range has. */
static int data_map(struct command *command)
{
	command->data = driver_map(command->npages * PAGE_SIZE, MEMORY_PLAIN);
	return command->data ? 0 : -ENOMEM;
}

/* ---- READ, WRITE ----------------------------------------------------------------------------------------------- */

/*
 * The device reads or writes one page, through its page table. Called with the mutex. -ENOENT is a device page fault.
 *
 * Its own memory it reaches as it likes. Pages of system memory it reaches as hardware does, without the CPU's page
 * table, and coherent pages lie in system memory, too: peek and poke neither fault nor wait. When they say no then the
 * page is not where the table says, so the entry goes.
 */
static int device_access(struct dmirror *mirror, unsigned long addr, void *data, bool write)
{
	unsigned long entry = table_get(&mirror->table, addr);
	struct page *page = pfn_to_page(table_pfn(entry));
	bool done = true;
	void *memory;

	if (!entry || (write && table_tag(entry) != TABLE_WRITE))
		return -ENOENT;
	memory = table_tag(entry) == TABLE_ATOMIC ? hmm_page_to_virt(page) : device_page_memory(page);
	if (memory && write)
		memcpy(memory, data, PAGE_SIZE);
	else if (memory)
		memcpy(data, memory, PAGE_SIZE);
	else if (write)
		done = hmm_mm_poke(mirror->mm, (void *)addr, data, PAGE_SIZE);
	else
		done = hmm_mm_peek(mirror->mm, (const void *)addr, data, PAGE_SIZE);
	if (done)
		return 0;
	table_set(&mirror->table, addr, 0);
	return -ENOENT;
}

/* Goes on from where cpages says. 0 at the end of the range, -ENOENT at the first page that the device cannot reach. */
static int device_go_on(struct command *command, bool write)
{
	struct dmirror *mirror = command->mirror;
	int ret = 0;

	pthread_mutex_lock(&mirror->mutex);
	while (command->args.cpages < command->npages) {
		size_t offset = command->args.cpages * PAGE_SIZE;

		ret = device_access(mirror, command->start + offset, command->data + offset, write);
		if (ret)
			break;
		command->args.cpages++;
	}
	pthread_mutex_unlock(&mirror->mutex);
	return ret;
}

/* Works through the range. Each device page fault is for all of the rest, so a fresh range costs one. */
static int device_run(struct command *command, bool write)
{
	struct timespec begin;
	uint64_t before = 0;
	int ret;

	clock_gettime(CLOCK_MONOTONIC, &begin);
	while ((ret = device_go_on(command, write)) == -ENOENT) {
		if (command->args.cpages > before)
			clock_gettime(CLOCK_MONOTONIC, &begin);
		else if (deadline_passed(&begin, STUCK_MS))
			return -EBUSY;
		before = command->args.cpages;
		ret = mirror_fault(command, command->start + before * PAGE_SIZE, command->end, write);
		if (ret)
			return ret;
		command->args.faults++;
	}
	return ret;
}

static int command_read(struct command *command)
{
	int ret = data_map(command);

	if (!ret)
		ret = device_run(command, false);
	return ret ? ret : copy_out(command, command->args.ptr, command->data, command->npages * PAGE_SIZE);
}

static int command_write(struct command *command)
{
	int ret = data_map(command);

	if (!ret)
		ret = copy_in(command, command->data, command->args.ptr, command->npages * PAGE_SIZE);
	return ret ? ret : device_run(command, true);
}

/* ---- MIGRATE_TO_DEV, EXCLUSIVE --------------------------------------------------------------------------------- */

/* Reads back through the device's table what should be there now: what is not is an error, not a fault. */
static int read_back(struct command *command)
{
	int ret = data_map(command);

	if (!ret)
		ret = device_go_on(command, false);
	return ret ? ret : copy_out(command, command->args.ptr, command->data, command->npages * PAGE_SIZE);
}

static int command_migrate_to_device(struct command *command)
{
	int ret = migrate_to_device(command);

	return ret ? ret : read_back(command);
}

/*
 * Takes pages from the CPU for the device alone. They are locked until they are in the table; the first touch by the
 * CPU gets them back, after invalidate() has removed them from it.
 */
static int exclusive_step(struct command *command, unsigned long start, unsigned long end)
{
	struct dmirror *mirror = command->mirror;
	int wanted = (int)((end - start) >> PAGE_SHIFT), mapped = 0, got;
	int ret = table_reserve(&mirror->table, &mirror->mutex, start, end);

	if (!ret)
		ret = hmm_mm_read_lock(mirror->mm);
	if (ret)
		return ret;
	memset(command->pages, 0, sizeof(command->pages));
	got = make_device_exclusive_range(mirror->mm, start, end, command->pages, mirror->device);
	pthread_mutex_lock(&mirror->mutex);
	for (int i = 0; got == wanted && i < wanted; i++) {
		if (!command->pages[i])
			continue;
		table_set(&mirror->table, start + (unsigned long)i * PAGE_SIZE,
			  table_make(page_to_pfn(command->pages[i]), TABLE_ATOMIC));
		mapped++;
	}
	pthread_mutex_unlock(&mirror->mutex);
	for (int i = 0; i < got; i++) {
		if (!command->pages[i])
			continue;
		unlock_page(command->pages[i]);
		put_page(command->pages[i]);
	}
	hmm_mm_read_unlock(mirror->mm);
	return mapped == wanted ? 0 : -EBUSY;
}

static int command_exclusive(struct command *command)
{
	int ret = 0;

	for (unsigned long start = command->start, end; !ret && start < command->end; start = end) {
		end = start + STEP_PAGES * PAGE_SIZE;
		if (end > command->end || end < start)
			end = command->end;
		ret = exclusive_step(command, start, end);
	}
	return ret ? ret : read_back(command);
}

/* 0: the device has no page of the range for itself any more. */
static int command_check_exclusive(struct command *command)
{
	struct dmirror *mirror = command->mirror;
	bool has;

	pthread_mutex_lock(&mirror->mutex);
	has = table_has_atomic(&mirror->table, command->start, command->end);
	pthread_mutex_unlock(&mirror->mutex);
	return has ? -EPERM : 0;
}

/* ---- All of them ----------------------------------------------------------------------------------------------- */

static int command_do(struct command *command, unsigned long request)
{
	struct device_unit *device = command->mirror->device;

	switch (request) {
	case HMM_DMIRROR_READ_UNLOCKED:
		command->unlocked = true;
		return command_read(command);
	case HMM_DMIRROR_READ:
		return command_read(command);
	case HMM_DMIRROR_WRITE:
		return command_write(command);
	case HMM_DMIRROR_MIGRATE_TO_DEV:
		return command_migrate_to_device(command);
	case HMM_DMIRROR_MIGRATE_TO_SYS:
		return migrate_to_system(command);
	case HMM_DMIRROR_SNAPSHOT:
		return command_snapshot(command);
	case HMM_DMIRROR_EXCLUSIVE:
		return command_exclusive(command);
	case HMM_DMIRROR_CHECK_EXCLUSIVE:
		return command_check_exclusive(command);
	case HMM_DMIRROR_RELEASE:
		device_release(device);
		return 0;
	case HMM_DMIRROR_FLAGS:
		atomic_store(&device->flags, (unsigned int)command->args.npages);
		return 0;
	default:
		return -EINVAL;
	}
}

/* Checks what all commands have in common; the sums are those of the kernel's driver, overflows included. */
static int command_check(struct command *command)
{
	command->start = command->args.addr;
	command->end = command->start + (command->args.npages << PAGE_SHIFT);
	if (command->start & ~PAGE_MASK || command->start >= command->end)
		return -EINVAL;
	command->npages = (command->end - command->start) >> PAGE_SHIFT;
	command->args.cpages = command->args.faults = 0;
	return 0;
}

long dmirror_command(struct dmirror *mirror, unsigned long request, struct hmm_dmirror_cmd *args)
{
	struct command *command;
	int ret;

	if (mirror->process != getpid())
		return -ENODEV;
	command = driver_map(sizeof(*command), MEMORY_PLAIN);
	if (!command)
		return -ENOMEM;
	command->mirror = mirror;
	ret = copy_in(command, &command->args, (unsigned long)args, sizeof(*args));
	if (!ret)
		ret = command_check(command);
	if (!ret)
		ret = command_do(command, request);
	if (!ret)
		ret = copy_out(command, (unsigned long)args, &command->args, sizeof(*args));
	driver_unmap(command->data, command->npages * PAGE_SIZE);
	driver_unmap(command, sizeof(*command));
	return ret;
}

void *dmirror_mmap(struct dmirror *mirror, void *addr, size_t length, int protection, int flags)
{
	int file = mirror->process == getpid() ? memfd_create("hmm_dmirror", MFD_CLOEXEC) : -1;
	void *mapped = MAP_FAILED;

	if (mirror->process != getpid())
		errno = ENODEV;
	/* Fresh pages for each mapping. They are there at once, for reading: a write gets a copy, as of any private page. */
	if (file >= 0 && !ftruncate(file, (off_t)length))
		mapped = mmap(addr, length, protection, flags & ~MAP_ANONYMOUS, file, 0);
	if (mapped != MAP_FAILED && protection & PROT_READ)
		madvise(mapped, length, MADV_POPULATE_READ);
	if (file >= 0)
		close(file);
	return mapped;
}
