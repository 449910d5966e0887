/* gdb and core dumps: a process with pages on a device is attached to, read, dumped, and goes on with its data. */
#include "memory.h"
#include "tap.h"

#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGES 48UL
#define BUSY_PAGES 32UL
/* A core of this size would hold address space that nobody uses. */
#define CORE_LIMIT (2UL << 30)
#define GDB "gdb -nx -batch -iex 'set debuginfod enabled off' "
#define PASS "-ex 'handle SIGSEGV SIGBUS nostop noprint pass' "

static struct mm_struct *mm;
static struct hmm_soft_device *device;
/* Two mappings: one is sent to the device, one stays at home. */
static unsigned char *away, *home;
static char folder[] = "/tmp/hmm-debugger-XXXXXX";
static char output[1 << 18];

static void open_device(void)
{
	/* Where Yama says so, only a parent may attach without this. */
	prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);
	device = hmm_soft_create(mm, NULL);
	CHECK(!hmm_is_err(device));
	home = memory_map(PAGES, PROT_READ | PROT_WRITE);
	away = memory_map(PAGES, PROT_READ | PROT_WRITE);
	memory_fill(home, PAGES);
	memory_fill(away, PAGES);
	CHECK_EQ(hmm_soft_migrate(device, away, PAGES * PAGE), PAGES);
}

static void close_device(void)
{
	CHECK_EQ(memory_wrong(away, PAGES) + memory_wrong(home, PAGES), 0);
	CHECK_EQ(hmm_mm_check_accounts(mm), 0);
	CHECK_EQ(hmm_soft_destroy(device), 0);
	memory_unmap(away, PAGES);
	memory_unmap(home, PAGES);
}

/* Runs a shell command; what it printed is in `output`, its exit status is returned. popen() does not fork as fork()
 * does: no page comes home for it. */
static int shell(const char *command)
{
	FILE *pipe = popen(command, "r");
	size_t length = 0, got;

	while (pipe && (got = fread(output + length, 1, sizeof(output) - 1 - length, pipe)) > 0)
		length += got;
	output[length] = '\0';
	return pipe ? pclose(pipe) : -1;
}

/* Lets gdb run a script on this process; its exit status, 137 in its upper byte when it did not end. SIGCONT: a gdb that
 * is killed half-way leaves its SIGSTOP behind. */
static int gdb_within(const char *script, int seconds)
{
	char command[4096];

	snprintf(command, sizeof(command),
		 "timeout -s KILL %d " GDB PASS "-p %d %s -ex detach 2>&1; s=$?; kill -CONT %d; exit $s", seconds, getpid(),
		 script, getpid());
	return shell(command);
}

/* Lets gdb run a script on this process; false, with a reason to skip, where it may not attach. */
static bool gdb(const char *script)
{
	int status = gdb_within(script, 40);

	if (strstr(output, "ptrace: ")) {
		tap_skip_reason = "this process may not be attached to";
		return false;
	}
	CHECK_EQ(status, 0);
	return true;
}

static bool is_there(const char *program)
{
	char command[64];

	snprintf(command, sizeof(command), "command -v %s", program);
	if (shell(command) == 0)
		return true;
	tap_skip_reason = "gdb is not installed";
	return false;
}

/* Whether gdb printed that the bytes at an address are `byte`, as x/2xb does. */
static bool shows(const unsigned char *at, unsigned char byte)
{
	char line[80];

	snprintf(line, sizeof(line), "%p:\t0x%02x\t0x%02x\n", (const void *)at, byte, byte);
	return strstr(output, line) != NULL;
}

static bool cannot_read(const unsigned char *at)
{
	char line[80];

	snprintf(line, sizeof(line), "Cannot access memory at address %p", (const void *)at);
	return strstr(output, line) != NULL;
}

static atomic_bool busy_ends;
static atomic_size_t busy_wrong;

/* Moves memory of its own to and fro while gdb looks. */
static void *busy(void *unused)
{
	unsigned char *memory = memory_map(BUSY_PAGES, PROT_READ | PROT_WRITE);

	(void)unused;
	memory_fill(memory, BUSY_PAGES);
	while (!busy_ends) {
		hmm_soft_migrate(device, memory, BUSY_PAGES * PAGE);
		busy_wrong += memory_wrong(memory, BUSY_PAGES);
	}
	memory_unmap(memory, BUSY_PAGES);
	return NULL;
}

static void gdb_attaches_reads_and_lets_go(void)
{
	char script[512];

	if (!is_there("gdb"))
		return;
	open_device();
	snprintf(script, sizeof(script), "-ex 'thread apply all bt 4' -ex 'x/2xb %p' -ex 'x/2xb %p' -ex 'x/2xb %p'",
		 (void *)(home + PAGE), (void *)away, (void *)(away + 5 * PAGE));
	for (int round = 0; round < 3 && gdb(script); round++) {
		CHECK(strstr(output, "hmm-watch") && strstr(output, "detached"));
		CHECK(shows(home + PAGE, memory_pattern(1)));
		/* Never the bytes of something else: an error, or where the engine drops pages under protection, zeros. */
		CHECK(cannot_read(away) || shows(away, 0));
		CHECK(cannot_read(away + 5 * PAGE) || shows(away + 5 * PAGE, 0));
		CHECK_EQ(memory_count(mm, away, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	}
	close_device();
}

/* Stopped at any point of a migration, the process goes on. gdb itself may wait for ever for a thread whose madvise()
 * waits for a service thread that gdb has stopped already: then it is killed, and tries again. */
static void gdb_stops_migrations_at_any_point(void)
{
	pthread_t thread;
	int attached = 0, gave_up = 0;

	if (!is_there("gdb"))
		return;
	open_device();
	busy_ends = false;
	CHECK_EQ(pthread_create(&thread, NULL, busy, NULL), 0);
	for (int round = 0; round < 4; round++) {
		int status = gdb_within("-ex 'thread apply all bt 2'", 6);

		if (strstr(output, "ptrace: "))
			tap_skip_reason = "this process may not be attached to";
		attached += status == 0 && strstr(output, "detached");
		gave_up += status != 0;
	}
	printf("# gdb attached %d times, and was killed %d times\n", attached, gave_up);
	CHECK(attached + gave_up == 4);
	busy_ends = true;
	pthread_join(thread, NULL);
	CHECK_EQ(busy_wrong, 0);
	close_device();
}

static void gdb_brings_memory_home_by_a_call(void)
{
	char script[1024];
	const char *call = "((int (*)(void *, void *, unsigned long, int))hmm_make_present)";

	if (!is_there("gdb"))
		return;
	open_device();
	snprintf(script, sizeof(script), "-ex 'print %s(%p, %p, %lu, 0)' -ex 'x/2xb %p' -ex 'x/2xb %p'", call, (void *)mm,
		 (void *)away, 4 * PAGE, (void *)away, (void *)(away + 3 * PAGE));
	if (gdb(script)) {
		/* So many pages came home by the call: neighbours may have come along with others. */
		CHECK(strstr(output, "$1 = ") && !strstr(output, "$1 = -"));
		CHECK(shows(away, memory_pattern(0)));
		CHECK(shows(away + 3 * PAGE, memory_pattern(3)));
		CHECK(memory_count(mm, away, 4, HMM_RESIDENCY_SYSTEM) == 4);
	}
	close_device();
}

/* What gdb reads in a core: what was at home is whole, what was away reads as zeros or not at all. */
static void check_core(const char *core)
{
	char command[1024];
	struct stat file;

	CHECK_EQ(stat(core, &file), 0);
	CHECK(file.st_size > 0 && (unsigned long)file.st_size < CORE_LIMIT);
	snprintf(command, sizeof(command), "timeout -s KILL 40 " GDB "-ex 'x/2xb %p' -ex 'x/2xb %p' /proc/%d/exe %s 2>&1", (void *)(home + 2 * PAGE),
		 (void *)(away + 2 * PAGE), getpid(), core);
	CHECK_EQ(shell(command), 0);
	CHECK(shows(home + 2 * PAGE, memory_pattern(2)));
	CHECK(shows(away + 2 * PAGE, 0) || cannot_read(away + 2 * PAGE));
}

static void gcore_ends_and_the_process_goes_on(void)
{
	char command[512], core[256];

	if (!is_there("gcore"))
		return;
	open_device();
	snprintf(command, sizeof(command), "ulimit -f %lu; timeout -s KILL 40 gcore -o %s/gcore %d 2>&1", CORE_LIMIT / 512,
		 folder, getpid());
	if (shell(command) && strstr(output, "ptrace: ")) {
		tap_skip_reason = "this process may not be attached to";
	} else if (access("/proc/self/mem", W_OK)) {
		tap_skip_reason = "gcore reads a process by /proc/PID/mem";
	} else {
		snprintf(core, sizeof(core), "%s/gcore.%d", folder, getpid());
		CHECK(strstr(output, "Saved corefile"));
		check_core(core);
		unlink(core);
		CHECK_EQ(memory_count(mm, away, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	}
	close_device();
}

/* Brings home what a core should have: any touch does. */
static void touch_all(int signal)
{
	for (size_t page = 0; page < PAGES; page += 1)
		(void)*(volatile unsigned char *)(away + page * PAGE);
	(void)signal;
}

/* Dies with a core in the folder that it is in. The addresses go to stdout first. */
static int crash(bool touches)
{
	struct sigaction action = { .sa_handler = touch_all };
	struct rlimit limit = { CORE_LIMIT, CORE_LIMIT };

	mm = hmm_mm_current();
	open_device();
	setrlimit(RLIMIT_CORE, &limit);
	if (touches)
		sigaction(SIGABRT, &action, NULL);
	printf("%p %p\n", (void *)home, (void *)away);
	fflush(stdout);
	abort();
}

/* Runs `crash` in a child, and looks at its core for the first byte of a page that was away. */
static void crash_and_look(bool touches)
{
	char command[512], pattern[128] = "";
	FILE *file = fopen("/proc/sys/kernel/core_pattern", "r");
	void *home_there = NULL, *away_there = NULL;
	const unsigned char *page;

	if (file && fgets(pattern, sizeof(pattern), file) && strchr("|/@", pattern[0]))
		tap_skip_reason = "core dumps go elsewhere (core_pattern)";
	if (file)
		fclose(file);
	if (tap_skip_reason || !is_there("gdb"))
		return;
	/* exec: the shell shall not report the signal in its own way. */
	snprintf(command, sizeof(command), "p=$(realpath /proc/%d/exe); cd %s && exec timeout -s KILL 40 \"$p\" %s 2>&1", getpid(),
		 folder, touches ? "touch" : "crash");
	/* timeout hands on the status of a command that a signal ended; where it dumps core itself, it dies by it. */
	CHECK(shell(command) != 0);
	CHECK_EQ(sscanf(output, "%p %p", &home_there, &away_there), 2);
	page = (unsigned char *)away_there + 2 * PAGE;
	snprintf(command, sizeof(command), "timeout -s KILL 40 " GDB "-ex 'x/2xb %p' -ex 'x/2xb %p' /proc/%d/exe %s/core* 2>&1",
		 (void *)((char *)home_there + 2 * PAGE), (const void *)page, getpid(), folder);
	CHECK_EQ(shell(command), 0);
	CHECK(shows((unsigned char *)home_there + 2 * PAGE, memory_pattern(2)));
	if (touches)
		CHECK(shows(page, memory_pattern(2)));
	else
		CHECK(shows(page, 0) || cannot_read(page));
	snprintf(command, sizeof(command), "rm -f %s/core*", folder);
	shell(command);
}

static void a_core_dump_ends(void)
{
	crash_and_look(false);
}

static void a_handler_that_touches_memory_puts_it_into_the_core(void)
{
	crash_and_look(true);
}

int main(int argc, char **argv)
{
	static const struct tap_test tests[] = {
		TEST(gdb_attaches_reads_and_lets_go),
		TEST(gdb_stops_migrations_at_any_point),
		TEST(gdb_brings_memory_home_by_a_call),
		TEST(gcore_ends_and_the_process_goes_on),
		TEST(a_core_dump_ends),
		TEST(a_handler_that_touches_memory_puts_it_into_the_core),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	if (argc > 1)
		return crash(!strcmp(argv[1], "touch"));
	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	if (!mkdtemp(folder))
		return 1;
	failed = tap_run(tests, count);
	rmdir(folder);
	return hmm_mm_put(mm) ? 1 : failed;
}
