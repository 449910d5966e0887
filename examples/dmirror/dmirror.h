/*
 * dmirror.h - the interface of the kernel's HMM test device (lib/test_hmm.c), as kernel v6.1 has it, with two commands
 * of v7.3; and the same device as a library.
 *
 * A program that opens /dev/hmm_dmirrorN needs nothing of the second half: libhmm_dmirror.so serves it. A program of
 * ours may link device.c and its neighbours, and call dmirror_open() instead of open().
 */
#ifndef DMIRROR_H
#define DMIRROR_H

#include <stdint.h>
#include <sys/ioctl.h>
#include <sys/types.h>

/* Units 0 and 1 have private memory, which the CPU cannot reach; units 2 and 3 coherent memory, which it can. */
#define DMIRROR_UNITS 4

/* What a command gets, and what it says. On an error nothing of it is written back. */
struct hmm_dmirror_cmd {
	uint64_t addr;		/* in: where the device works; page aligned */
	uint64_t ptr;		/* in: the program's buffer: data, or one byte a page for SNAPSHOT */
	uint64_t npages;	/* in: how many pages, at least one; FLAGS: the flags */
	uint64_t cpages;	/* out: pages that were copied, reported or migrated */
	uint64_t faults;	/* out: device page faults that it took */
};

#define HMM_DMIRROR_READ		_IOWR('H', 0x00, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_WRITE		_IOWR('H', 0x01, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_MIGRATE_TO_DEV	_IOWR('H', 0x02, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_MIGRATE_TO_SYS	_IOWR('H', 0x03, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_SNAPSHOT		_IOWR('H', 0x04, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_EXCLUSIVE		_IOWR('H', 0x05, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_CHECK_EXCLUSIVE	_IOWR('H', 0x06, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_RELEASE		_IOWR('H', 0x07, struct hmm_dmirror_cmd)
#define HMM_DMIRROR_FLAGS		_IOWR('H', 0x08, struct hmm_dmirror_cmd)	/* v7 */
#define HMM_DMIRROR_READ_UNLOCKED	_IOWR('H', 0x09, struct hmm_dmirror_cmd)	/* v7.3 */

/* FLAGS: the next page that a migration asks for cannot be had. */
#define HMM_DMIRROR_FLAG_FAIL_ALLOC (1ULL << 0)

/* What SNAPSHOT says of a page. WRITE alone is readable and writable; the others are added to READ or WRITE. */
enum {
	HMM_DMIRROR_PROT_ERROR = 0xFF,
	HMM_DMIRROR_PROT_NONE = 0x00,
	HMM_DMIRROR_PROT_READ = 0x01,
	HMM_DMIRROR_PROT_WRITE = 0x02,
	HMM_DMIRROR_PROT_PMD = 0x04,			/* part of a page of 2 MiB */
	HMM_DMIRROR_PROT_PUD = 0x08,			/* part of a page of 1 GiB */
	HMM_DMIRROR_PROT_ZERO = 0x10,			/* the page of zeros */
	HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL = 0x20,	/* on this device */
	HMM_DMIRROR_PROT_DEV_PRIVATE_REMOTE = 0x30,	/* on another: never seen, those are PROT_NONE */
	HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL = 0x40,
	HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE = 0x50,
};

/* One opened device: a mirror of the address space of the process that opened it. */
struct dmirror;

/*
 * Opens a unit for this process; NULL with errno on failure. A child of fork() has nothing of what its parent opened
 * (each command says -ENODEV there), and opens units of its own.
 */
struct dmirror *dmirror_open(unsigned int unit);

/* Does one command, as ioctl() on the kernel's device would. 0 or a negative errno. */
long dmirror_command(struct dmirror *mirror, unsigned long request, struct hmm_dmirror_cmd *command);

/* Maps fresh pages of the device, as mmap() of the kernel's device would. MAP_FAILED with errno on failure. */
void *dmirror_mmap(struct dmirror *mirror, void *addr, size_t length, int protection, int flags);

/* Closes it: every page on the unit comes home, whoever moved it there. No command may be running. */
void dmirror_close(struct dmirror *mirror);

#endif
