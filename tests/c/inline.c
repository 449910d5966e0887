/* Inline ranges: the toucher answers itself, and system calls on absent pages of them fail, of them alone. */
#include "device.h"

#define PAGES 8

static struct mm_struct *mm;
static struct test_device device;
static int file;

/* False, and the test is skipped, on an engine that answers all touches alike in its own way. */
static bool can_be_inline(void)
{
	unsigned char *memory = memory_map(1, PROT_READ | PROT_WRITE);
	int result = hmm_mm_inline_range(mm, memory, PAGE);

	munmap(memory, PAGE);
	if (result == -EOPNOTSUPP)
		tap_skip_reason = "the engine has no inline ranges";
	else
		CHECK_EQ(result, 0);
	return result == 0;
}

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

	if (!can_be_inline())
		return;
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

	if (!can_be_inline())
		return;
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

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(system_calls_fail_on_inline_ranges_alone),
		TEST(bad_ranges_are_refused),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	file = memfd_create("inline", MFD_CLOEXEC);
	test_device_open(&device, mm);
	failed = tap_run(tests, count);
	test_device_close(&device);
	return hmm_mm_put(mm) ? 1 : failed;
}
