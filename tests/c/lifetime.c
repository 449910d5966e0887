/* Closing and forking while pages are on a device: no byte is lost. */
#include "device.h"

#include <sys/wait.h>
#include <unistd.h>

#define PAGES 16

static struct mm_struct *mm;
static struct test_device device;

/* Fresh memory whose pages are all on the device. */
static unsigned char *on_device(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	test_device_open(&device, mm);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), PAGES);
	return memory;
}

static void references_are_counted(void)
{
	CHECK(hmm_mm_current() == mm);
	CHECK(hmm_mm_current() == mm);
	CHECK_EQ(hmm_mm_put(mm), 0);
	CHECK_EQ(hmm_mm_put(mm), 0);
	CHECK_EQ(hmm_mm_sync(mm), 0);
}

static void closing_brings_every_page_home(void)
{
	unsigned char *memory = on_device();

	CHECK_EQ(hmm_mm_put(mm), 0);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), 0);
	CHECK_EQ(device.frees, PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.faults, PAGES);
	mm = hmm_mm_current();
	CHECK(!IS_ERR(mm));
	/* Device memory outlives the address space. */
	CHECK_EQ(hmm_pin_range(mm, &device, sizeof(device)), 0);
	device.mm = mm;
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	test_device_close(&device);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

/* What the child finds; its exit status says how many things were wrong. */
static int child(const unsigned char *memory)
{
	struct mm_struct *mine;

	tap_failures = 0;
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	REFUSED(hmm_make_present(mm, memory, PAGE, false), ENODEV);
	REFUSED(hmm_pin_range(mm, memory, PAGE), ENODEV);
	mine = hmm_mm_current();
	CHECK(!IS_ERR(mine) && mine != mm);
	CHECK_EQ(hmm_make_present(mine, memory, PAGE, true), 0);
	CHECK_EQ(hmm_mm_put(mine), 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	fflush(stdout);
	return tap_failures;
}

static void parent_and_child_see_the_contents_after_a_fork(void)
{
	unsigned char *memory = on_device();
	int status = -1;
	pid_t pid = fork();

	if (!pid)
		_exit(child(memory));
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(device.frees, PAGES);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(references_are_counted),
		TEST(closing_brings_every_page_home),
		TEST(parent_and_child_see_the_contents_after_a_fork),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
