/*
 * memory.c - memory for the driver itself.
 *
 * Callbacks answer page faults, so nothing that they touch, and nothing that is touched under a lock of theirs, may be
 * away or wait to be filled by somebody else. The usual way is a mapping that hmm_pin_range() keeps at home, as
 * examples/c/driver.c does. But pinned memory is present as a whole, and the memory behind a private device is 256 MiB
 * of which most is never used. So all of the driver's memory is *shared* anonymous memory: libhmm never moves that
 * (HMM_STAY_SHARED), no neighbour of the program's can be merged with it, and a first touch is the kernel's business.
 *
 * It is shared with children of fork(), too, and that is not wanted. They get none of it (MADV_DONTFORK), with two
 * exceptions: struct dmirror, where a child finds out that it is its parent's, and the devices, which libhmm knows by
 * their addresses, so that a child's own must have others.
 */
#define _GNU_SOURCE
#include "driver.h"

#include <sys/mman.h>

void *driver_map(size_t bytes, enum memory_kind kind)
{
	int flags = MAP_SHARED | MAP_ANONYMOUS | (kind == MEMORY_SPARSE ? MAP_NORESERVE : 0);
	void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);

	if (memory == MAP_FAILED)
		return NULL;
	if (kind != MEMORY_INHERITED && madvise(memory, bytes, MADV_DONTFORK)) {
		driver_unmap(memory, bytes);
		return NULL;
	}
	return memory;
}

void driver_unmap(void *memory, size_t bytes)
{
	if (memory)
		munmap(memory, bytes);
}
