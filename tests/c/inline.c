/* Inline ranges: the toucher answers itself, and system calls on absent pages of them fail, of them alone. */
#include "device.h"

#define PAGES 8

static struct mm_struct *mm;
static struct test_device device;
static int file;

static void send(unsigned char *memory)
{
	CHECK(hmm_make_present(mm, memory, PAGES * PAGE, true) >= 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
}

static void system_calls_fail_on_inline_ranges_alone(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	bool waits = hmm_mm_capabilities(mm) & HMM_CAPABILITY_KERNEL_FAULTS;
	struct hmm_guard guard = HMM_GUARD_NONE;

	memory_fill(memory, PAGES);
	send(memory);
	CHECK_EQ(hmm_mm_inline_range(mm, memory, PAGES / 2 * PAGE), 0);
	send(memory);
	errno = 0;
	CHECK_EQ(pwrite(file, memory, PAGE, 0), -1);
	CHECK_EQ(errno, EFAULT);
	CHECK_EQ(pwrite(file, memory + (PAGES - 1) * PAGE, PAGE, 0), waits ? (long)PAGE : -1);
	CHECK_EQ(hmm_guard(mm, &guard, memory, PAGE, false), 0);
	CHECK_EQ(pwrite(file, memory, PAGE, 0), PAGE);
	hmm_unguard(&guard);
	send(memory);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(hmm_mm_blocking_range(mm, memory, PAGES * PAGE), 0);
	send(memory);
	CHECK_EQ(pwrite(file, memory, PAGE, 0), waits ? (long)PAGE : -1);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	munmap(memory, PAGES * PAGE);
}

static void bad_ranges_are_refused(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	CHECK_EQ(hmm_mm_inline_range(mm, memory + 1, PAGE), -EINVAL);
	CHECK_EQ(hmm_mm_inline_range(mm, memory, PAGE + 1), -EINVAL);
	CHECK_EQ(hmm_mm_inline_range(mm, memory, 0), -EINVAL);
	CHECK_EQ(hmm_mm_inline_range(mm, memory, SIZE_MAX), -EINVAL);
	CHECK_EQ(hmm_mm_inline_range(mm, NULL, PAGE), -EINVAL);
	CHECK_EQ(hmm_mm_inline_range(NULL, memory, PAGE), -EINVAL);
	munmap(memory + PAGE, PAGE);
	CHECK_EQ(hmm_mm_inline_range(mm, memory, PAGES * PAGE), -EINVAL);
	CHECK_EQ(hmm_mm_blocking_range(mm, memory, PAGES * PAGE), -EINVAL);
	munmap(memory, PAGES * PAGE);
}
