/* How a program may end while its memory is on a device and other threads migrate: nothing hangs, no byte is lost, nothing
 * stays behind. Each test runs this program again, with an argument, in a process of its own. */
#include "memory.h"
#include "tap.h"

#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGES 16UL
#define PLACES 3
/* What a child writes down, by this descriptor. */
#define REPORT 100
#define LIMIT_SECONDS 25

extern char **environ;

/* Shared with the child by a memfd. */
struct report {
	atomic_int looks;		/* how often somebody looked at memory that was away */
	atomic_int away;		/* pages that were away before it looked */
	atomic_ulong wrong;		/* bytes that were wrong then */
	atomic_int at_start;		/* descriptors before the library was opened */
	atomic_int strangers;		/* descriptors that a new program inherited */
	atomic_int threads;
	unsigned char copy[PAGE];
};

static struct report *report;
static struct mm_struct *mm;
static struct hmm_soft_device *device;
static unsigned char *places[PLACES];
static atomic_ulong moves;

static struct report *report_map(int fd)
{
	struct report *mapped = mmap(NULL, sizeof(*mapped), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	return mapped == MAP_FAILED ? NULL : mapped;
}

/* The child's side. */

/* Looks at a place that is away, as an exit handler or destructor does. */
static void look(int place)
{
	unsigned char where[PAGES];

	if (!places[place] || hmm_residency(mm, places[place], PAGES * PAGE, where, PAGES))
		return;
	for (size_t i = 0; i < PAGES; i++)
		report->away += where[i] == HMM_RESIDENCY_DEVICE;
	memcpy(report->copy, places[place], PAGE);
	report->wrong += memory_wrong(places[place], PAGES);
	report->looks++;
}

static void first_handler(void)
{
	look(0);
}

static void last_handler(void)
{
	look(1);
}

__attribute__((destructor)) static void at_the_very_end(void)
{
	look(2);
}

static void *migrate_for_ever(void *unused)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	(void)unused;
	for (;;) {
		memory_fill(memory, PAGES);
		hmm_soft_migrate(device, memory, PAGES * PAGE);
		moves++;
		report->wrong += memory_wrong(memory, PAGES);
		/* Closed meanwhile: what is left to do is nothing. */
		if (hmm_soft_migrate(device, memory, PAGES * PAGE) < 0)
			usleep(1000);
	}
	return NULL;
}

/* All places on the device, and two threads that migrate; exit handlers before and after the library's beginning. */
static void get_going(void)
{
	pthread_t thread;

	atexit(first_handler);
	mm = hmm_mm_current();
	device = hmm_is_err(mm) ? NULL : hmm_soft_create(mm, NULL);
	if (!device || hmm_is_err(device))
		_exit(99);
	atexit(last_handler);
	for (int i = 0; i < PLACES; i++) {
		places[i] = memory_map(PAGES, PROT_READ | PROT_WRITE);
		memory_fill(places[i], PAGES);
		if (hmm_soft_migrate(device, places[i], PAGES * PAGE) != PAGES)
			_exit(98);
	}
	for (int i = 0; i < 2; i++)
		if (pthread_create(&thread, NULL, migrate_for_ever, NULL))
			_exit(97);
	while (moves < 4)
		usleep(1000);
}

static int count_entries(const char *folder)
{
	DIR *list = opendir(folder);
	int count = 0;

	for (struct dirent *entry; list && (entry = readdir(list));)
		count += entry->d_name[0] != '.' && atoi(entry->d_name) != dirfd(list);
	if (list)
		closedir(list);
	return count;
}

/* The program that exec starts: it has what it was given, and can migrate itself. */
static int after_exec(void)
{
	report->strangers = count_entries("/proc/self/fd") - report->at_start;
	report->threads = count_entries("/proc/self/task");
	get_going();
	look(0);
	_exit(report->wrong ? 1 : 40);
}

static void do_exec(void)
{
	char *const arguments[] = { "ending", "after-exec", NULL }, *const nothing[] = { NULL };

	/* One that fails changes nothing. */
	execve("/nonexistent/program", nothing, environ);
	look(0);
	if (report->wrong || report->away != PAGES)
		_exit(1);
	report->away = 0;
	execve("/proc/self/exe", arguments, environ);
	_exit(2);
}

static void *exec_in_thread(void *unused)
{
	(void)unused;
	do_exec();
	return NULL;
}

/* A program that is started meanwhile inherits nothing either, and the memory of this one stays where it is. */
static void do_spawn(void)
{
	char *const arguments[] = { "ending", "after-exec", NULL };
	int status = -1;
	pid_t pid;

	if (posix_spawn(&pid, "/proc/self/exe", NULL, NULL, arguments, environ) || waitpid(pid, &status, 0) != pid)
		_exit(3);
	_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 4);
}

static void *exit_in_thread(void *unused)
{
	(void)unused;
	exit(33);
}

/* Closes while others migrate, twice, and looks. */
static void do_close(void)
{
	for (int round = 0; round < 2; round++)
		if (hmm_mm_put(mm) != (round ? -EINVAL : 0))
			_exit(5);
	for (int i = 0; i < PLACES; i++)
		report->wrong += memory_wrong(places[i], PAGES);
	_exit(report->wrong ? 1 : 44);
}

static pthread_key_t key;

static void last_of_thread(void *place)
{
	report->wrong += memory_wrong(place, PAGES);
	report->looks++;
}

static void *thread_with_data(void *place)
{
	pthread_setspecific(key, place);
	return NULL;
}

/* What a thread's own destructors read may be away. */
static void do_threads(void)
{
	pthread_t threads[PLACES];

	pthread_key_create(&key, last_of_thread);
	for (int i = 0; i < PLACES; i++)
		pthread_create(&threads[i], NULL, thread_with_data, places[i]);
	for (int i = 0; i < PLACES; i++)
		pthread_join(threads[i], NULL);
	_exit(report->looks == PLACES ? 45 : 6);
}

static int child(const char *how)
{
	struct rlimit no_core = { 0, 0 };
	pthread_t thread;
	int number = atoi(how);

	setrlimit(RLIMIT_CORE, &no_core);
	report = report_map(REPORT);
	if (!report)
		return 96;
	if (!strcmp(how, "after-exec"))
		return after_exec();
	report->at_start = count_entries("/proc/self/fd");
	get_going();
	if (!strcmp(how, "return"))
		return 31;
	if (!strcmp(how, "exit"))
		exit(32);
	if (!strcmp(how, "exit-in-thread") && !pthread_create(&thread, NULL, exit_in_thread, NULL))
		pause();
	if (!strcmp(how, "main-thread-leaves") && !pthread_create(&thread, NULL, exit_in_thread, NULL))
		pthread_exit(NULL);
	if (!strcmp(how, "_exit")) {
		memcpy(report->copy, places[0], PAGE);
		_exit(34);
	}
	if (!strcmp(how, "exec"))
		do_exec();
	if (!strcmp(how, "exec-in-thread") && !pthread_create(&thread, NULL, exec_in_thread, NULL))
		pause();
	if (!strcmp(how, "spawn"))
		do_spawn();
	if (!strcmp(how, "close"))
		do_close();
	if (!strcmp(how, "threads"))
		do_threads();
	if (!strcmp(how, "abort"))
		abort();
	if (!strcmp(how, "null"))
		*(volatile int *)(long)number = 1;
	if (number)
		kill(getpid(), number);
	pause();
	return 95;
}

/* The parent's side. */

/* Runs a child; its wait status, or -1 when it hung. */
static int run(const char *how)
{
	char *const arguments[] = { "ending", (char *)how, NULL };
	posix_spawn_file_actions_t actions;
	int fd = memfd_create("report", MFD_CLOEXEC), status;
	pid_t pid = 0;

	CHECK(ftruncate(fd, sizeof(*report)) == 0);
	if (report)
		munmap(report, sizeof(*report));
	report = report_map(fd);
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, fd, REPORT);
	CHECK_EQ(posix_spawn(&pid, "/proc/self/exe", &actions, NULL, arguments, environ), 0);
	posix_spawn_file_actions_destroy(&actions);
	close(fd);
	for (int i = 0; i < LIMIT_SECONDS * 200; i++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return status;
		usleep(5000);
	}
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	return -1;
}

static void ends_with(const char *how, int code)
{
	int status = run(how);

	if (!WIFEXITED(status) || WEXITSTATUS(status) != code)
		printf("# %s: status %x\n", how, (unsigned int)status);
	CHECK(status != -1 && WIFEXITED(status) && WEXITSTATUS(status) == code);
	CHECK_EQ(report->wrong, 0);
}

static void dies_by(const char *how, int signal)
{
	int status = run(how);

	if (!WIFSIGNALED(status) || WTERMSIG(status) != signal)
		printf("# %s: status %x\n", how, (unsigned int)status);
	CHECK(status != -1 && WIFSIGNALED(status) && WTERMSIG(status) == signal);
	CHECK_EQ(report->wrong, 0);
}

/* Every handler looked, at memory that was away. */
static void all_looked(void)
{
	CHECK_EQ(report->looks, PLACES);
	CHECK_EQ(report->away, PLACES * PAGES);
	CHECK_EQ(report->copy[PAGE - 1], memory_pattern(0));
}

static void exit_handlers_and_destructors_find_their_data(void)
{
	ends_with("return", 31);
	all_looked();
	ends_with("exit", 32);
	all_looked();
	ends_with("exit-in-thread", 33);
	all_looked();
	ends_with("main-thread-leaves", 33);
	all_looked();
}

static void _exit_ends_at_once(void)
{
	ends_with("_exit", 34);
	CHECK_EQ(report->copy[PAGE - 1], memory_pattern(0));
	CHECK_EQ(report->looks, 0);
}

static void signals_end_the_program(void)
{
	static const int deadly[] = { SIGTERM, SIGINT, SIGKILL, SIGSEGV, SIGBUS, SIGHUP };
	char number[8];

	for (size_t i = 0; i < sizeof(deadly) / sizeof(*deadly); i++) {
		snprintf(number, sizeof(number), "%d", deadly[i]);
		dies_by(number, deadly[i]);
	}
	dies_by("abort", SIGABRT);
	dies_by("null", SIGSEGV);
}

static void exec_starts_a_program_that_inherits_nothing(void)
{
	static const char *const ways[] = { "exec", "exec-in-thread", "spawn" };

	for (size_t i = 0; i < sizeof(ways) / sizeof(*ways); i++) {
		ends_with(ways[i], 40);
		CHECK_EQ(report->strangers, 0);
		CHECK_EQ(report->threads, 1);
		CHECK_EQ(report->away, PAGES);
	}
}

static void closing_while_others_migrate_loses_nothing(void)
{
	ends_with("close", 44);
}

static void destructors_of_threads_find_their_data(void)
{
	ends_with("threads", 45);
}

static void nothing_stays_behind(void)
{
	int before = count_entries("/dev/shm");

	ends_with("exit", 32);
	dies_by("9", SIGKILL);
	/* Others may use it, too; the library has no names there. */
	CHECK(count_entries("/dev/shm") <= before);
}

int main(int argc, char **argv)
{
	static const struct tap_test tests[] = {
		TEST(exit_handlers_and_destructors_find_their_data),
		TEST(_exit_ends_at_once),
		TEST(signals_end_the_program),
		TEST(exec_starts_a_program_that_inherits_nothing),
		TEST(closing_while_others_migrate_loses_nothing),
		TEST(destructors_of_threads_find_their_data),
		TEST(nothing_stays_behind),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;
	struct mm_struct *probe;

	if (argc > 1)
		return child(argv[1]);
	probe = tap_mm(tests, count);
	if (!probe)
		return 0;
	failed = tap_run(tests, count);
	return hmm_mm_put(probe) ? 1 : failed;
}
