/* Devices of parents and children: each has its own address space, and what one writes is the other's only if they share. */
#include "children.h"

/* A child's own device writes negative numbers over memory that it has from its parent. */
static void child_writes(unsigned char *memory)
{
	unsigned char *buffer = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct dmirror *own = unit_open(first_unit);

	if (own) {
		CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
		numbers_fill(buffer, PAGES, -1, 0);
		DOES_WITH_ONE_FAULT(own, WRITE, memory, buffer, PAGES);
		CHECK_EQ(numbers_wrong(memory, PAGES, -1, 0), 0);
		dmirror_close(own);
	}
	child_end();
}

static void anon_write_child(void)
{
	unsigned char *memory = numbers_map(PAGES);
	pid_t child = child_fork();

	if (!child)
		child_writes(memory);
	child_was_well(child);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
	memory_unmap(memory, PAGES);
}
CASE(anon_write_child)

static void anon_write_child_shared(void)
{
	const int flags = MAP_SHARED | MAP_ANONYMOUS;
	unsigned char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
	pid_t child;

	CHECK(memory != MAP_FAILED);
	numbers_fill(memory, PAGES, 1, 0);
	child = child_fork();
	if (!child)
		child_writes(memory);
	child_was_well(child);
	CHECK_EQ(numbers_wrong(memory, PAGES, -1, 0), 0);
	munmap(memory, PAGES * PAGE);
}
CASE(anon_write_child_shared)

static void hmm_cow_in_device(void)
{
	unsigned char *memory = numbers_map(4), *buffer = buffer_map(4);
	int status = -1;
	pid_t child;

	DOES(device, MIGRATE_TO_DEV, memory, buffer, 4);
	child = child_fork();
	while (!child)
		pause();
	/* While the child shares the pages, the process writes: it gets pages of its own, in system memory. */
	numbers_fill(memory, 4, 1, 1);
	CHECK_EQ(kill(child, SIGKILL), 0);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
	DOES(device, SNAPSHOT, memory, buffer, 4);
	CHECK_EQ(bytes_wrong(buffer, 4, HMM_DMIRROR_PROT_WRITE), 0);
	CHECK_EQ(numbers_wrong(memory, 4, 1, 1), 0);
	memory_unmap(memory, 4);
	memory_unmap(buffer, 4);
}
CASE(hmm_cow_in_device)

int main(void)
{
	static const struct tap_test tests[] = {
		BOTH(anon_write_child),
		BOTH(anon_write_child_shared),
		BOTH(hmm_cow_in_device),
	};

	return CASES_RUN(tests);
}
