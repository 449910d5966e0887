/* A device writes to memory of the process, and works on files. */
#include "kinds.h"

static void anon_write(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE), *buffer = numbers_map(PAGES);

	DOES_WITH_ONE_FAULT(device, WRITE, memory, buffer, PAGES);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(anon_write)

static void anon_write_prot(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ), *buffer = numbers_map(PAGES);
	unsigned char *seen = buffer_map(1);

	DOES_WITH_ONE_FAULT(device, READ, memory, seen, 1);
	CHECK_EQ(bytes_wrong(seen, PAGE, 0), 0);
	CHECK_EQ(command(device, HMM_DMIRROR_WRITE, memory, buffer, PAGES), -EPERM);
	CHECK_EQ(bytes_wrong(memory, PAGES * PAGE, 0), 0);
	/* What the device may only read, it asks for again: the kernel's page of zeros makes room for one that is written. */
	CHECK_EQ(mprotect(memory, PAGES * PAGE, PROT_READ | PROT_WRITE), 0);
	DOES_WITH_ONE_FAULT(device, WRITE, memory, buffer, PAGES);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
	memory_unmap(seen, 1);
}
CASE(anon_write_prot)

static void anon_write_huge(void)
{
	const size_t pages = HUGE_SIZE / PAGE;
	unsigned char *whole = memory_map(2 * pages, PROT_READ | PROT_WRITE), *buffer = numbers_map(pages);
	unsigned char *memory = whole + (-address(whole) & (HUGE_SIZE - 1));

	/* A kernel without huge pages refuses the advice; then it is ordinary memory. */
	if (madvise(memory, HUGE_SIZE, MADV_HUGEPAGE))
		printf("# no transparent huge pages here: %s\n", strerror(errno));
	DOES_WITH_ONE_FAULT(device, WRITE, memory, buffer, pages);
	CHECK_EQ(numbers_wrong(memory, pages, 1, 0), 0);
	memory_unmap(whole, 2 * pages);
	memory_unmap(buffer, pages);
}
CASE(anon_write_huge)

static void anon_write_hugetlbfs(void)
{
	const size_t length = huge_length(), pages = length / PAGE;
	unsigned char *memory = huge_map(), *buffer;

	if (!memory)
		return;
	buffer = numbers_map(pages);
	DOES_WITH_ONE_FAULT(device, WRITE, memory, buffer, pages);
	CHECK_EQ(numbers_wrong(memory, pages, 1, 0), 0);
	munmap(memory, length);
	memory_unmap(buffer, pages);
}
CASE(anon_write_hugetlbfs)

static void file_read(void)
{
	unsigned char *data = numbers_map(PAGES), *buffer = buffer_map(PAGES), *memory;
	int file = file_of(data, PAGES);

	if (file < 0)
		return;
	memory = mmap(NULL, PAGES * PAGE, PROT_READ, MAP_SHARED, file, 0);
	CHECK(memory != MAP_FAILED);
	DOES_WITH_ONE_FAULT(device, READ, memory, buffer, PAGES);
	CHECK_EQ(numbers_wrong(buffer, PAGES, 1, 0), 0);
	munmap(memory, PAGES * PAGE);
	close(file);
	memory_unmap(data, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(file_read)

static void file_write(void)
{
	unsigned char *zeros = memory_map(PAGES, PROT_READ | PROT_WRITE), *buffer = numbers_map(PAGES), *memory;
	int file = file_of(zeros, PAGES);

	if (file < 0)
		return;
	memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	CHECK(memory != MAP_FAILED);
	DOES_WITH_ONE_FAULT(device, WRITE, memory, buffer, PAGES);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
	/* And whoever reads the file sees it. */
	CHECK_EQ(pread(file, zeros, PAGES * PAGE, 0), PAGES * PAGE);
	CHECK_EQ(numbers_wrong(zeros, PAGES, 1, 0), 0);
	munmap(memory, PAGES * PAGE);
	close(file);
	memory_unmap(zeros, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(file_write)

int main(void)
{
	static const struct tap_test tests[] = {
		BOTH(anon_write),
		BOTH(anon_write_prot),
		BOTH(anon_write_huge),
		BOTH(anon_write_hugetlbfs),
		BOTH(file_read),
		BOTH(file_write),
	};

	return CASES_RUN(tests);
}
