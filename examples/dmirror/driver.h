/*
 * driver.h - what the parts of the driver share. Data flows down this list; nobody calls upwards:
 *
 *   shim.c       open, ioctl, mmap and close of an unmodified program
 *   commands.c   what a command does, piece by piece; snapshot.c: one of them
 *   mirror.c     one opened device: notifier, device page faults; says in which order locks are taken
 *   migrate.c    pages to the device and home again
 *   device.c     the four devices, their memory, its pages
 *   table.c      a device's page table
 *   memory.c     memory for the driver itself
 */
#ifndef DRIVER_H
#define DRIVER_H

#define HMM_API_7_3
#include <hmm.h>

#include "dmirror.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <time.h>

#define FAULT_PAGES 32		/* pages that one hmm_range_fault() looks at */
#define STEP_PAGES 64		/* pages of one migration, or of one request for exclusive access */
#define CHUNK_BYTES (256UL << 20)
#define CHUNK_PAGES (CHUNK_BYTES / PAGE_SIZE)
#define DEVICE_CHUNKS 16	/* a unit has 4 GiB at most */

/* ---- memory.c ------------------------------------------------------------------------------------------------- */

enum memory_kind {
	MEMORY_PLAIN,
	MEMORY_SPARSE,		/* most of it will never be touched: ask for more than there is */
	MEMORY_INHERITED,	/* children of fork() have it, too */
};
/* Zeroed memory that never migrates; NULL when there is none. Both calls may wait: never under a lock of callbacks. */
void *driver_map(size_t bytes, enum memory_kind kind);
void driver_unmap(void *memory, size_t bytes);

/* ---- table.c -------------------------------------------------------------------------------------------------- */

/*
 * A device's page table: four levels of 512 entries, as the CPU's. The mutex of its mirror guards it; only
 * table_reserve() is called without.
 */
struct table {
	struct table_node *root;
	struct table_node *spare;	/* unused nodes */
	struct table_node *slabs;	/* where nodes come from, for the end */
};

/* An entry: the pfn above, what the device may do below; 0: nothing is known of this address. */
enum table_tag {
	TABLE_READ = 1,		/* it may read */
	TABLE_WRITE = 2,	/* it may read and write */
	TABLE_ATOMIC = 3,	/* it has the page alone, in memory of the library's, and reads it */
};

static inline unsigned long table_make(unsigned long pfn, enum table_tag tag)
{
	return pfn << 2 | tag;
}

static inline enum table_tag table_tag(unsigned long entry)
{
	return (enum table_tag)(entry & 3);
}

static inline unsigned long table_pfn(unsigned long entry)
{
	return entry >> 2;
}

/* Makes room for a range, so that table_set() cannot fail. 0 or -ENOMEM. Takes the mutex itself. */
int table_reserve(struct table *table, pthread_mutex_t *mutex, unsigned long start, unsigned long end);
unsigned long table_get(const struct table *table, unsigned long addr);
void table_set(struct table *table, unsigned long addr, unsigned long entry);
void table_forget(struct table *table, unsigned long start, unsigned long end);
/* Whether the device has some page of a range alone. */
bool table_has_atomic(const struct table *table, unsigned long start, unsigned long end);
void table_free(struct table *table);

/* ---- device.c ------------------------------------------------------------------------------------------------- */

/* A piece of device memory. A slot is free while device is NULL. */
struct chunk {
	struct dev_pagemap pagemap;
	struct device_unit *device;
	unsigned long first_pfn;
	unsigned char *memory;		/* what the pages hold; NULL for a coherent unit, whose pages lie in the process */
	unsigned int *free;		/* numbers of free pages: a stack */
	unsigned int free_count;
	unsigned int used_to;		/* no page from here on was ever used */
	bool in_service;		/* false: its pages are not handed out any more */
};

/* One of the four devices, as this process has it. Its address is the owner of its pages. */
struct device_unit {
	struct mm_struct *mm;
	unsigned int unit;
	bool is_coherent;
	pthread_mutex_t resize;		/* held while pages are handed out, and while chunks come and go */
	pthread_mutex_t pages;		/* guards the stacks of free pages */
	struct chunk chunks[DEVICE_CHUNKS];
	pthread_mutex_t mirrors_lock;	/* guards the list of mirrors */
	struct dmirror *mirrors;
	atomic_uint flags;		/* HMM_DMIRROR_FLAG_ */
};

/* The unit of this process, ready for use; NULL with errno. */
struct device_unit *device_get(unsigned int unit);
/* Free pages for a migration, at most so many; more memory is added if need be. Called with resize. */
unsigned int device_take_pages(struct device_unit *device, struct page **pages, unsigned int wanted);
/* Pages that were taken and named to nobody. */
void device_return_pages(struct device_unit *device, struct page **pages, unsigned int count);
/* Where the device finds a page of private memory; NULL for every other page. */
void *device_page_memory(const struct page *page);
/* The device that has a page; NULL for system memory and for devices that are not ours. */
struct device_unit *device_of_page(const struct page *page);
/* Whether an allocation shall fail now: once for each FLAGS. */
bool device_fails_once(struct device_unit *device);
/* Brings every page home. False when some did not come in time. Called with resize. */
bool device_evict(struct device_unit *device);
/* Gives all device memory back. */
void device_release(struct device_unit *device);

/* ---- mirror.c ------------------------------------------------------------------------------------------------- */

struct dmirror {
	pid_t process;			/* whose address space it is */
	struct mm_struct *mm;
	struct device_unit *device;
	struct dmirror *next;		/* of the same device; guarded by its mirrors_lock */
	struct mmu_interval_notifier notifier;
	pthread_mutex_t mutex;		/* guards the table; to hold it is to use the table's translations */
	struct table table;
};

struct command;

/* Device page faults for a range. 0 or a negative errno. */
int mirror_fault(struct command *command, unsigned long start, unsigned long end, bool write);
/* A page migrates on the device's own request: no mirror of the device knows the address any more. */
void mirrors_forget(struct device_unit *device, unsigned long addr);

static inline bool deadline_passed(const struct timespec *begin, long milliseconds)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (now.tv_sec - begin->tv_sec) * 1000 + (now.tv_nsec - begin->tv_nsec) / 1000000 >= milliseconds;
}

/* ---- migrate.c ------------------------------------------------------------------------------------------------ */

/* Both move what they can of the command's range; migrate_to_system() counts in cpages. 0 or a negative errno. */
int migrate_to_device(struct command *command);
int migrate_to_system(struct command *command);
/* For struct dev_pagemap_ops. */
vm_fault_t migrate_to_ram(struct vm_fault *vmf);
/* Brings pages of a chunk home, by their numbers in it; src and dst have room for count entries. */
void migrate_chunk_home(struct chunk *chunk, unsigned int first, unsigned int count, unsigned long *src,
			unsigned long *dst);

/* ---- commands.c ----------------------------------------------------------------------------------------------- */

/*
 * One command while it runs. The kernel's driver keeps this on its stack. Here callbacks of other threads wait for the
 * mutex under which some of it is used, and a stack is memory that may migrate: so it is memory of the driver's.
 */
struct command {
	struct dmirror *mirror;
	struct hmm_dmirror_cmd args;
	unsigned long start, end, npages;	/* the range */
	bool unlocked;				/* faults without the lock of the address space */
	unsigned char *data;			/* npages pages that are read, or to be written; or NULL */
	struct mmu_interval_notifier snapshot;	/* over the piece that SNAPSHOT looks at */
	unsigned char bytes[FAULT_PAGES];	/* and what it says */
	unsigned long pfns[FAULT_PAGES];
	unsigned long src[STEP_PAGES], dst[STEP_PAGES];
	struct page *pages[STEP_PAGES];
};

/* Writes memory of the program. 0 or -EFAULT. */
int copy_out(const struct command *command, unsigned long to, const void *from, size_t bytes);

/* ---- snapshot.c ------------------------------------------------------------------------------------------------ */

int command_snapshot(struct command *command);

#endif
