/* A device has pages alone, for atomic operations, until the process touches them. */
#include "children.h"

/* Fresh memory with the numbers that the device has alone. */
static unsigned char *exclusive_map(void)
{
	unsigned char *memory = numbers_map(PAGES), *buffer = buffer_map(PAGES);

	DOES(device, EXCLUSIVE, memory, buffer, PAGES);
	CHECK_EQ(numbers_wrong(buffer, PAGES, 1, 0), 0);
	memory_unmap(buffer, PAGES);
	return memory;
}

static void increment_all(unsigned char *memory)
{
	volatile int *numbers = (volatile int *)memory;

	for (size_t i = 0; i < PAGES * PAGE / sizeof(int); i++)
		numbers[i]++;
}

static void exclusive(void)
{
	unsigned char *memory = exclusive_map();

	CHECK_EQ(command(device, HMM_DMIRROR_CHECK_EXCLUSIVE, memory, NULL, PAGES), -EPERM);
	increment_all(memory);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 1), 0);
	CHECK_EQ(command(device, HMM_DMIRROR_CHECK_EXCLUSIVE, memory, NULL, PAGES), 0);
	memory_unmap(memory, PAGES);
}
CASE(exclusive)

static void exclusive_mprotect(void)
{
	unsigned char *memory = exclusive_map(), *buffer = buffer_map(PAGES);

	CHECK_EQ(mprotect(memory, PAGES * PAGE, PROT_READ), 0);
	CHECK_EQ(command(device, HMM_DMIRROR_WRITE, memory, buffer, PAGES), -EPERM);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(exclusive_mprotect)

static void exclusive_cow(void)
{
	unsigned char *memory = exclusive_map();
	pid_t child = child_fork();

	/* Each process has its own copy. */
	increment_all(memory);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 1), 0);
	if (!child)
		child_end();
	child_was_well(child);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 1), 0);
	memory_unmap(memory, PAGES);
}
CASE(exclusive_cow)

int main(void)
{
	static const struct tap_test tests[] = {
		BOTH(exclusive),
		BOTH(exclusive_mprotect),
		BOTH(exclusive_cow),
	};

	return CASES_RUN(tests);
}
