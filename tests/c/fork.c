/* What children get of pages that are on a device: a copy, or no mapping; never zeros. */
#include "device.h"

#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>

#define PAGES 8

extern char **environ;

static struct mm_struct *mm;
static struct test_device device;

/* Fresh memory whose pages are all on the device, except for the first one. */
static unsigned char *on_device(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory + PAGE, PAGES - 1), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES - 1);
	return memory;
}

/* The wait status of a child that reads a page; it ends with 1 when a byte is wrong. */
static int child_that_reads(const unsigned char *memory, size_t page)
{
	static const struct rlimit no_core;
	int status = -1;
	pid_t pid = fork();

	if (!pid) {
		setrlimit(RLIMIT_CORE, &no_core);
		for (size_t byte = 0; byte < PAGE; byte++)
			if (memory[page * PAGE + byte] != memory_pattern(page))
				_exit(1);
		_exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	return status;
}

static void modes_are_set_and_told(void)
{
	CHECK_EQ(hmm_mm_fork_mode(mm), HMM_FORK_HOME);
	CHECK_EQ(hmm_mm_set_fork_mode(mm, HMM_FORK_DONT_COPY), 0);
	CHECK_EQ(hmm_mm_fork_mode(mm), HMM_FORK_DONT_COPY);
	CHECK_EQ(hmm_mm_set_fork_mode(mm, 2), -EINVAL);
	CHECK_EQ(hmm_mm_set_fork_mode(mm, -1), -EINVAL);
	CHECK_EQ(hmm_mm_set_fork_mode(NULL, HMM_FORK_HOME), -EINVAL);
	CHECK_EQ(hmm_mm_fork_mode(NULL), -EINVAL);
	CHECK_EQ(hmm_mm_fork_mode(mm), HMM_FORK_DONT_COPY);
	CHECK_EQ(hmm_mm_set_fork_mode(mm, HMM_FORK_HOME), 0);
}

static void pages_come_home_or_are_left_out(void)
{
	unsigned char *memory = on_device();
	int status;

	CHECK_EQ(hmm_mm_set_fork_mode(mm, HMM_FORK_DONT_COPY), 0);
	status = child_that_reads(memory, 3);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	CHECK_EQ(child_that_reads(memory, 0), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES - 1);
	CHECK_EQ(hmm_mm_set_fork_mode(mm, HMM_FORK_HOME), 0);
	CHECK_EQ(child_that_reads(memory, 3), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

static void a_device_that_fails_leaves_no_zeros_to_the_child(void)
{
	unsigned char *memory = on_device();
	int status;

	device.lose = true;
	status = child_that_reads(memory, 5);
	device.lose = false;
	CHECK(WIFSIGNALED(status));
	munmap(memory, PAGES * PAGE);
	CHECK_EQ(hmm_mm_sync(mm), 0);
}

static void programs_are_started_with_pages_away(void)
{
	static char *const argv[] = { "sh", "-c", "exit 7", NULL };
	unsigned char *memory = on_device();
	char text[8] = "";
	int status = -1;
	pid_t pid;
	FILE *pipe;

	CHECK_EQ(WEXITSTATUS(system("exit 3")), 3);
	CHECK_EQ(posix_spawn(&pid, "/bin/sh", NULL, NULL, argv, environ), 0);
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(WEXITSTATUS(status), 7);
	pipe = popen("echo well", "r");
	CHECK(pipe && fgets(text, sizeof(text), pipe) && !strcmp(text, "well\n"));
	CHECK_EQ(pclose(pipe), 0);
	pid = vfork();
	if (!pid) {
		execv("/bin/sh", argv);
		_exit(1);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(WEXITSTATUS(status), 7);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES - 1);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(modes_are_set_and_told),
		TEST(pages_come_home_or_are_left_out),
		TEST(a_device_that_fails_leaves_no_zeros_to_the_child),
		TEST(programs_are_started_with_pages_away),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	test_device_open(&device, mm);
	failed = tap_run(tests, count);
	test_device_close(&device);
	return hmm_mm_put(mm) ? 1 : failed;
}
