/* Memory moves to a device and home again. */
#include "kinds.h"

/* Fresh memory with the numbers, all of it on the device, which has read it into the buffer. */
static unsigned char *migrated(unsigned char *buffer, size_t pages)
{
	unsigned char *memory = numbers_map(pages);

	DOES(device, MIGRATE_TO_DEV, memory, buffer, pages);
	CHECK_EQ(numbers_wrong(buffer, pages, 1, 0), 0);
	return memory;
}

/* How many pages the device says are its own. */
static size_t on_device(const void *memory, size_t pages)
{
	unsigned char *bytes = buffer_map(1);
	const int own = is_coherent() ? HMM_DMIRROR_PROT_DEV_COHERENT_LOCAL : HMM_DMIRROR_PROT_DEV_PRIVATE_LOCAL;
	size_t count = 0;

	DOES(device, SNAPSHOT, memory, bytes, pages);
	for (size_t i = 0; i < pages; i++)
		count += bytes[i] == (own | HMM_DMIRROR_PROT_WRITE);
	memory_unmap(bytes, 1);
	return count;
}

static void migrate(void)
{
	unsigned char *buffer = buffer_map(PAGES), *memory = migrated(buffer, PAGES);

	CHECK_EQ(on_device(memory, PAGES), PAGES);
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(migrate)

static void migrate_file_private(void)
{
	unsigned char *data = memory_map(PAGES, PROT_READ | PROT_WRITE), *buffer = buffer_map(PAGES), *memory;
	int file;

	NEEDS(mm, PRIVATE_FILES);
	file = file_of(data, PAGES);
	if (file < 0)
		return;
	/* Written by the process, each page is its own copy of the file's. */
	memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
	CHECK(memory != MAP_FAILED);
	numbers_fill(memory, PAGES, 1, 0);
	DOES(device, MIGRATE_TO_DEV, memory, buffer, PAGES);
	CHECK_EQ(numbers_wrong(buffer, PAGES, 1, 0), 0);
	CHECK_EQ(pread(file, data, PAGES * PAGE, 0), PAGES * PAGE);
	CHECK_EQ(bytes_wrong(data, PAGES * PAGE, 0), 0);
	munmap(memory, PAGES * PAGE);
	close(file);
	memory_unmap(data, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(migrate_file_private)

static void migrate_fault(void)
{
	unsigned char *buffer = buffer_map(PAGES), *memory = migrated(buffer, PAGES);

	/* The process takes half of it back by reading, unless it reaches it where it is. */
	CHECK_EQ(numbers_wrong(memory, PAGES / 2, 1, 0), 0);
	CHECK_EQ(on_device(memory, PAGES), is_coherent() ? PAGES : PAGES / 2);
	memset(buffer, UNWRITTEN, PAGES * PAGE);
	DOES(device, MIGRATE_TO_DEV, memory, buffer, PAGES);
	CHECK_EQ(numbers_wrong(buffer, PAGES, 1, 0), 0);
	CHECK_EQ(on_device(memory, PAGES), PAGES);
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(migrate_fault)

static void migrate_release(void)
{
	unsigned char *buffer = buffer_map(PAGES), *memory = migrated(buffer, PAGES);

	/* The device gives its memory away: everything comes home. Later it can have new memory. */
	CHECK_EQ(command(device, HMM_DMIRROR_RELEASE, memory, buffer, PAGES), 0);
	CHECK_EQ(on_device(memory, PAGES), 0);
	CHECK_EQ(numbers_wrong(memory, PAGES / 2, 1, 0), 0);
	DOES(device, MIGRATE_TO_DEV, memory, buffer, PAGES);
	CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
	memory_unmap(memory, PAGES);
	memory_unmap(buffer, PAGES);
}
CASE(migrate_release)

static void migrate_shared(void)
{
	const int flags = MAP_SHARED | MAP_ANONYMOUS;
	unsigned char *memory = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, flags, -1, 0);
	unsigned char *buffer = buffer_map(PAGES);

	CHECK(memory != MAP_FAILED);
	/* Shared memory stays. Nothing of it was touched, so the device has none of it in its table. */
	CHECK_EQ(command(device, HMM_DMIRROR_MIGRATE_TO_DEV, memory, buffer, PAGES), -ENOENT);
	munmap(memory, PAGES * PAGE);
	memory_unmap(buffer, PAGES);
}
CASE(migrate_shared)

static void migrate_mixed(void)
{
	unsigned char *memory = memory_map(6, PROT_NONE), *buffer = buffer_map(6);
	const volatile unsigned char *zero = memory + 2 * PAGE;

	CHECK_EQ(command(other_device, HMM_DMIRROR_MIGRATE_TO_DEV, memory, buffer, 6), -EINVAL);
	/* A range with a hole in it. */
	CHECK_EQ(munmap(memory + PAGE, PAGE), 0);
	CHECK_EQ(command(other_device, HMM_DMIRROR_MIGRATE_TO_DEV, memory, buffer, 3), -EINVAL);
	/* Page 2 is the kernel's zeros, page 3 is read-only with data, pages 4 and 5 may be written. */
	CHECK_EQ(mprotect(memory + 2 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE), 0);
	numbers_fill(memory + 3 * PAGE, 3, 1, 3);
	CHECK_EQ(mprotect(memory + 2 * PAGE, 2 * PAGE, PROT_READ), 0);
	CHECK_EQ(*zero, 0);
	DOES(other_device, MIGRATE_TO_DEV, memory + 2 * PAGE, buffer, 4);
	CHECK_EQ(bytes_wrong(buffer, PAGE, 0), 0);
	CHECK_EQ(numbers_wrong(buffer + PAGE, 3, 1, 3), 0);
	/* What is on one device does not go to another. */
	CHECK_EQ(command(device, HMM_DMIRROR_MIGRATE_TO_DEV, memory + 5 * PAGE, buffer, 1), -ENOENT);
	CHECK_EQ(bytes_wrong(memory + 2 * PAGE, PAGE, 0), 0);
	CHECK_EQ(numbers_wrong(memory + 3 * PAGE, 3, 1, 3), 0);
	memory_unmap_around(memory, 6, 1, 1);
	memory_unmap(buffer, 6);
}
CASE_OF_TWO(migrate_mixed)

static void migrate_multiple(void)
{
	unsigned char *buffer = buffer_map(PAGES);

	for (int round = 0; round < 10; round++) {
		unsigned char *memory = migrated(buffer, PAGES);

		if (is_coherent())
			DOES(device, MIGRATE_TO_SYS, memory, buffer, PAGES);
		CHECK_EQ(numbers_wrong(memory, PAGES, 1, 0), 0);
		CHECK_EQ(on_device(memory, PAGES), 0);
		memory_unmap(memory, PAGES);
	}
	memory_unmap(buffer, PAGES);
}
CASE(migrate_multiple)

static void double_map(void)
{
	unsigned char *memory = numbers_map(6), *buffer = buffer_map(6);

	CHECK_EQ(mprotect(memory, 6 * PAGE, PROT_READ), 0);
	DOES_WITH_ONE_FAULT(device, READ, memory, buffer, 6);
	CHECK_EQ(numbers_wrong(buffer, 6, 1, 0), 0);
	memset(buffer, UNWRITTEN, 6 * PAGE);
	DOES_WITH_ONE_FAULT(other_device, READ, memory, buffer, 6);
	CHECK_EQ(numbers_wrong(buffer, 6, 1, 0), 0);
	DOES(other_device, MIGRATE_TO_DEV, memory, buffer, 6);
	CHECK_EQ(numbers_wrong(buffer, 6, 1, 0), 0);
	/* The first device forgot the pages when they left for the second one, and asks again. */
	memset(buffer, UNWRITTEN, 6 * PAGE);
	DOES_WITH_ONE_FAULT(device, READ, memory, buffer, 6);
	CHECK_EQ(numbers_wrong(buffer, 6, 1, 0), 0);
	CHECK_EQ(numbers_wrong(memory, 6, 1, 0), 0);
	memory_unmap(memory, 6);
	memory_unmap(buffer, 6);
}
CASE_OF_TWO(double_map)

int main(void)
{
	static const struct tap_test tests[] = {
		BOTH(migrate),
		BOTH(migrate_file_private),
		BOTH(migrate_fault),
		BOTH(migrate_release),
		BOTH(migrate_shared),
		BOTH(migrate_mixed),
		BOTH(migrate_multiple),
		BOTH(double_map),
	};

	return CASES_RUN(tests);
}
