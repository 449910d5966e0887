/* What a device learns of the process's table without faulting anything. */
#include "kinds.h"

#include <sys/uio.h>

enum {
	ERROR = HMM_DMIRROR_PROT_ERROR,
	NONE = HMM_DMIRROR_PROT_NONE,
	READ = HMM_DMIRROR_PROT_READ,
	WRITE = HMM_DMIRROR_PROT_WRITE,
	ZERO = HMM_DMIRROR_PROT_ZERO,
	PMD = HMM_DMIRROR_PROT_PMD,
	PUD = HMM_DMIRROR_PROT_PUD,
	PRIVATE = HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL,
	COHERENT = HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL,
	OTHER_COHERENT = HMM_DMIRROR_PROT_DEV_COHERENT_REMOTE,
};

static void mixedmap(void)
{
	unsigned char *buffer = buffer_map(1);
	void *memory = dmirror_mmap(device, NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	CHECK(memory != MAP_FAILED);
	if (memory != MAP_FAILED) {
		DOES(device, SNAPSHOT, memory, buffer, 1);
		CHECK_EQ(buffer[0], READ);
		munmap(memory, PAGE);
	}
	memory_unmap(buffer, 1);
}
CASE(mixedmap)

static void snapshot(void)
{
	unsigned char *memory = memory_map(7, PROT_READ | PROT_WRITE), *buffer = buffer_map(1), *bytes = buffer_map(1);
	const volatile unsigned char *zero = memory + 2 * PAGE;

	/* No access, a hole, the kernel's zeros, data to be read, data, and a page on each device. */
	CHECK_EQ(mprotect(memory, PAGE, PROT_NONE), 0);
	CHECK_EQ(munmap(memory + PAGE, PAGE), 0);
	numbers_fill(memory + 3 * PAGE, 4, 1, 0);
	CHECK_EQ(mprotect(memory + 2 * PAGE, 2 * PAGE, PROT_READ), 0);
	CHECK_EQ(*zero, 0);
	DOES(device, MIGRATE_TO_DEV, memory + 5 * PAGE, buffer, 1);
	DOES(other_device, MIGRATE_TO_DEV, memory + 6 * PAGE, buffer, 1);
	DOES(device, SNAPSHOT, memory, bytes, 7);
	CHECK_EQ(bytes[0], ERROR);
	CHECK_EQ(bytes[1], ERROR);
	CHECK_EQ(bytes[2], kernel_tells_zeros() ? ZERO | READ : READ);
	CHECK_EQ(bytes[3], READ);
	CHECK_EQ(bytes[4], WRITE);
	CHECK_EQ(bytes[5], (is_coherent() ? COHERENT : PRIVATE) | WRITE);
	CHECK_EQ(bytes[6], is_coherent() ? OTHER_COHERENT | WRITE : NONE);
	/* One byte for each page, and no more. */
	CHECK_EQ(bytes_wrong(bytes + 7, PAGE - 7, UNWRITTEN), 0);
	CHECK_EQ(numbers_wrong(memory + 3 * PAGE, 4, 1, 0), 0);
	memory_unmap_around(memory, 7, 1, 1);
	memory_unmap(buffer, 1);
	memory_unmap(bytes, 1);
}
CASE_OF_TWO(snapshot)

static void compound(void)
{
	const size_t length = huge_length(), pages = length / PAGE, in_buffer = (pages + PAGE - 1) / PAGE;
	unsigned char *memory = huge_map(), *bytes;
	unsigned char size;

	if (!memory)
		return;
	size = length > HUGE_SIZE ? PUD : PMD;
	bytes = buffer_map(in_buffer);
	numbers_fill(memory, pages, 1, 0);
	DOES(device, SNAPSHOT, memory, bytes, pages);
	CHECK_EQ(bytes_wrong(bytes, pages, WRITE | size), 0);
	CHECK_EQ(mprotect(memory, length, PROT_READ), 0);
	DOES(device, SNAPSHOT, memory, bytes, pages);
	CHECK_EQ(bytes_wrong(bytes, pages, READ | size), 0);
	CHECK_EQ(numbers_wrong(memory, pages, 1, 0), 0);
	munmap(memory, length);
	memory_unmap(bytes, in_buffer);
}
CASE(compound)

/*
 * The kernel takes pages for I/O: two for the moment, which system calls do, and two for long, which is what
 * hmm_pin_range() is for. (The kernel's own form of this case asks a debug file of the kernel.)
 */
static void hmm_gup_test(void)
{
	unsigned char *memory = numbers_map(4), *copy = buffer_map(1), *buffer = buffer_map(4);
	struct iovec here = { copy, PAGE }, there = { memory, PAGE };
	int pipes[2];

	if (!is_coherent())
		NEEDS(mm, KERNEL_FAULTS);
	CHECK_EQ(pipe(pipes), 0);
	DOES(device, MIGRATE_TO_DEV, memory, buffer, 4);
	CHECK_EQ(process_vm_readv(getpid(), &here, 1, &there, 1, 0), PAGE);
	CHECK_EQ(numbers_wrong(copy, 1, 1, 0), 0);
	CHECK_EQ(write(pipes[1], memory + PAGE, PAGE), PAGE);
	CHECK_EQ(read(pipes[0], copy, PAGE), PAGE);
	CHECK_EQ(numbers_wrong(copy, 1, 1, (int)(PAGE / sizeof(int))), 0);
	CHECK_EQ(hmm_pin_range(mm, memory + 2 * PAGE, 2 * PAGE), 0);
	DOES(device, SNAPSHOT, memory, buffer, 4);
	CHECK_EQ(buffer[0], is_coherent() ? COHERENT | WRITE : WRITE);
	CHECK_EQ(buffer[1], is_coherent() ? COHERENT | WRITE : WRITE);
	CHECK_EQ(buffer[2], WRITE);
	CHECK_EQ(buffer[3], WRITE);
	CHECK_EQ(numbers_wrong(memory, 4, 1, 0), 0);
	CHECK_EQ(hmm_unpin_range(mm, memory + 2 * PAGE, 2 * PAGE), 0);
	close(pipes[0]);
	close(pipes[1]);
	memory_unmap(memory, 4);
	memory_unmap(copy, 1);
	memory_unmap(buffer, 4);
}
CASE(hmm_gup_test)

int main(void)
{
	static const struct tap_test tests[] = {
		BOTH(mixedmap),
		BOTH(snapshot),
		BOTH(compound),
		BOTH(hmm_gup_test),
	};

	return CASES_RUN(tests);
}
