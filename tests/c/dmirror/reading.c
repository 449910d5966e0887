/* A device reads memory of the process: one device page fault for a whole range, and never what is not there any more. */
#include "fixture.h"

#include <pthread.h>

static void open_close(void)
{
	struct dmirror *again = unit_open(first_unit);

	if (again)
		dmirror_close(again);
}
CASE(open_close)

static void anon_read(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE), *buffer = buffer_map(PAGES);
	const volatile unsigned char *touched = memory + PAGE;

	/* Page 0 was never touched, page 1 was read: the kernel has its page of zeros there. */
	numbers_fill(memory + 2 * PAGE, PAGES - 2, 1, (int)(2 * PAGE / sizeof(int)));
	CHECK_EQ(mprotect(memory, PAGES * PAGE, PROT_READ), 0);
	CHECK_EQ(*touched, 0);
	DOES_WITH_ONE_FAULT(device, READ, memory, buffer, PAGES);
	CHECK_EQ(bytes_wrong(buffer, 2 * PAGE, 0), 0);
	CHECK_EQ(numbers_wrong_from(buffer, 2, PAGES, 1, 0), 0);
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(anon_read)

static void anon_read_prot(void)
{
	unsigned char *memory = numbers_map(PAGES), *buffer = buffer_map(PAGES);

	CHECK_EQ(mprotect(memory, PAGES * PAGE, PROT_NONE), 0);
	CHECK_EQ(command(device, HMM_DMIRROR_READ, memory, buffer, PAGES), -EFAULT);
	CHECK_EQ(bytes_wrong(buffer, PAGES * PAGE, UNWRITTEN), 0);
	CHECK_EQ(mprotect(memory, PAGES * PAGE, PROT_READ), 0);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(anon_read_prot)

/* New memory where the old one was: the device must not go by what it knew of the old one. */
static void anon_read_multiple(void)
{
	const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE), *buffer = buffer_map(PAGES);

	for (int round = 0; round < 10; round++) {
		CHECK(mmap(memory, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0) == memory);
		/* Where changes are only observed, a device that goes on without asking may be too early. */
		CHECK_EQ(hmm_mm_sync(mm), 0);
		numbers_fill(memory, PAGES, 1, round);
		DOES_WITH_ONE_FAULT(device, READ, memory, buffer, PAGES);
		CHECK_EQ(numbers_wrong(buffer, PAGES, 1, round), 0);
	}
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(anon_read_multiple)

/* Unmaps the second half of memory after a random moment of up to 31 us. */
static void *unmap_half(void *memory)
{
	static unsigned int seed = 1;

	seed = seed * 1103515245 + 12345;
	usleep(seed >> 16 & 31);
	munmap((unsigned char *)memory + PAGES / 2 * PAGE, PAGES / 2 * PAGE);
	return NULL;
}

static void anon_teardown(void)
{
	for (int round = 0; round < 10; round++) {
		unsigned char *memory = numbers_map(PAGES), *buffer = buffer_map(PAGES);
		pthread_t thread;
		long result;

		CHECK_EQ(pthread_create(&thread, NULL, unmap_half, memory), 0);
		result = command(device, HMM_DMIRROR_READ, memory, buffer, PAGES);
		if (!result) {
			CHECK_EQ(said.cpages, PAGES);
			CHECK_EQ(said.faults, 1);
			CHECK_EQ(numbers_wrong(buffer, PAGES, 1, 0), 0);
		} else {
			CHECK(result == -EFAULT || result == -EBUSY);
			CHECK_EQ(bytes_wrong(buffer, PAGES * PAGE, UNWRITTEN), 0);
		}
		CHECK_EQ(pthread_join(thread, NULL), 0);
		CHECK_EQ(numbers_wrong(memory, PAGES / 2, 1, 0), 0);
		memory_unmap_around(memory, PAGES, PAGES / 2, PAGES / 2);
		memory_unmap(buffer, PAGES);
	}
}
CASE(anon_teardown)

int main(void)
{
	static const struct tap_test tests[] = {
		BOTH(open_close),
		BOTH(anon_read),
		BOTH(anon_read_prot),
		BOTH(anon_read_multiple),
		BOTH(anon_teardown),
	};

	return CASES_RUN(tests);
}
