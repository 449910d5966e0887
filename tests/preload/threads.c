/* Many threads, signal handlers in the middle of calls, and calls that never return. */
#include "pretend.h"

#include <fcntl.h>
#include <setjmp.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

#define PAIRS 4
#define ROUNDS 2000
#define BYTES (2 * PAGE)

extern char **environ;

static unsigned char *memory;
static atomic_int stop;

static void pause_for(long milliseconds)
{
	struct timespec time = { milliseconds / 1000, milliseconds % 1000 * 1000000 };

	while (nanosleep(&time, &time))
		;
}

/* Until a condition is true; the test fails when that takes too long. */
#define AWAIT(condition)                                                                       \
	do {                                                                                   \
		int left = 2000;                                                               \
		while (!(condition) && --left)                                                 \
			pause_for(5);                                                          \
		CHECK(condition);                                                              \
	} while (0)

struct pair {
	int ends[2];
	unsigned char *from, *to;
	atomic_int wrong;
};

static void *sender(void *argument)
{
	struct pair *pair = argument;

	fill(pair->from, BYTES);
	for (int i = 0; i < ROUNDS; i++) {
		struct iovec vector[2] = { { pair->from, 100 }, { pair->from + 100, BYTES - 100 } };
		ssize_t sent = i % 2 ? send(pair->ends[0], pair->from, BYTES, 0) : writev(pair->ends[0], vector, 2);

		pair->wrong += sent != (ssize_t)BYTES;
	}
	return NULL;
}

static void *receiver(void *argument)
{
	struct pair *pair = argument;

	for (int i = 0; i < ROUNDS; i++) {
		struct iovec vector = { pair->to, BYTES };
		struct msghdr message = { .msg_iov = &vector, .msg_iovlen = 1 };

		memset(pair->to, 0, BYTES);
		ssize_t got = i % 3 ? recv(pair->ends[1], pair->to, BYTES, 0) : recvmsg(pair->ends[1], &message, 0);

		pair->wrong += got != (ssize_t)BYTES || wrong(pair->to, BYTES) != 0;
	}
	return NULL;
}

static void *migrator(void *argument)
{
	unsigned int state = 1;

	(void)argument;
	while (!stop) {
		state = state * 1103515245 + 12345;
		away(memory + (state >> 8) % AREA_PAGES * PAGE, PAGE);
	}
	return NULL;
}

/* Packets keep their borders: a lost or shortened one is seen at once. */
static void no_byte_is_lost_while_pages_come_and_go(void)
{
	static struct pair pairs[PAIRS];
	pthread_t threads[PAIRS][2], moves;

	attach(&plain_hooks);
	stop = 0;
	for (int i = 0; i < PAIRS; i++) {
		CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pairs[i].ends), 0);
		pairs[i].from = memory + (size_t)i * 16 * PAGE + 100;
		pairs[i].to = memory + ((size_t)i * 16 + 8) * PAGE - 50;
		pthread_create(&threads[i][0], NULL, sender, &pairs[i]);
		pthread_create(&threads[i][1], NULL, receiver, &pairs[i]);
	}
	pthread_create(&moves, NULL, migrator, NULL);
	for (int i = 0; i < PAIRS; i++) {
		pthread_join(threads[i][0], NULL);
		pthread_join(threads[i][1], NULL);
		CHECK_EQ(pairs[i].wrong, 0);
		close(pairs[i].ends[0]);
		close(pairs[i].ends[1]);
	}
	stop = 1;
	pthread_join(moves, NULL);
	printf("# %ld holds, %ld touches\n", (long)counted.holds, (long)counted.touches);
	CHECK(balanced());
	detach();
}

static atomic_int order, program_cleaned;

static void cleaned(void *argument)
{
	(void)argument;
	program_cleaned = ++order;
}

static int cancel_fd;
static int cancel_by_vector;

static void *read_for_ever(void *argument)
{
	struct iovec vector[20];
	struct msghdr message = { .msg_iov = vector, .msg_iovlen = 20 };

	for (size_t i = 0; i < 20; i++)
		vector[i] = (struct iovec){ memory + i * 16, 16 };
	pthread_cleanup_push(cleaned, NULL);
	if (cancel_by_vector)
		recvmsg(cancel_fd, &message, 0);
	else
		read(cancel_fd, memory, PAGE);
	pthread_cleanup_pop(0);
	return argument;
}

static void a_cancelled_call_lets_go(void)
{
	int pair[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
	cancel_fd = pair[0];
	for (cancel_by_vector = 0; cancel_by_vector < 2; cancel_by_vector++) {
		pthread_t thread;
		void *result = NULL;

		attach(&plain_hooks);
		order = program_cleaned = 0;
		CHECK_EQ(pthread_create(&thread, NULL, read_for_ever, NULL), 0);
		AWAIT(counted.holds >= (cancel_by_vector ? 22 : 1));
		pause_for(20);
		CHECK(!balanced());
		CHECK_EQ(pthread_cancel(thread), 0);
		CHECK_EQ(pthread_join(thread, &result), 0);
		CHECK(result == PTHREAD_CANCELED);
		CHECK_EQ(program_cleaned, 1);
		CHECK(balanced());
		detach();
	}
	close(pair[0]);
	close(pair[1]);
}

/* Cancellation waits until libhmm is done, and then strikes. */
static void cancel_this_thread(void)
{
	pretend.inside = NULL;
	pthread_cancel(pthread_self());
	/* A cancellation point. */
	pause_for(1);
}

static void libhmm_is_not_cancelled(void)
{
	pthread_t thread;
	void *result = NULL;

	cancel_fd = open("/dev/zero", O_RDONLY);
	cancel_by_vector = 0;
	attach(&plain_hooks);
	pretend.inside = cancel_this_thread;
	CHECK_EQ(pthread_create(&thread, NULL, read_for_ever, NULL), 0);
	CHECK_EQ(pthread_join(thread, &result), 0);
	CHECK(result == PTHREAD_CANCELED);
	CHECK_EQ(counted.holds, 1);
	CHECK(balanced());
	detach();
	close(cancel_fd);
}

static sigjmp_buf out;

static void jump(int signal)
{
	(void)signal;
	siglongjmp(out, 1);
}

static void a_jump_out_of_a_call_lets_go(void)
{
	volatile int rounds = 0;
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	CHECK(signal(SIGALRM, jump) != SIG_ERR);
	attach(&plain_hooks);
	if (sigsetjmp(out, 1) == 0 || rounds < 3) {
		rounds++;
		ualarm(30000, 0);
		read(ends[0], memory, PAGE);
		CHECK(0);
	}
	CHECK_EQ(counted.holds, 3);
	CHECK(balanced());
	/* The library works on. */
	away(memory, PAGE);
	CHECK_EQ(write(ends[1], memory, 10), 10);
	CHECK_EQ(read(ends[0], memory, 10), 10);
	CHECK_EQ(counted.holds, 5);
	CHECK(balanced());
	detach();
	signal(SIGALRM, SIG_DFL);
	close(ends[0]);
	close(ends[1]);
}

static int handler_fd;
static volatile ssize_t handler_wrote;

/* Three pieces from pages that are away, on whatever stack there is. */
static void write_in_handler(int signal)
{
	struct iovec vector[3] = { { memory, 1 }, { memory + PAGE, 1 }, { memory + 2 * PAGE, 1 } };
	int error = errno;

	(void)signal;
	handler_wrote = writev(handler_fd, vector, 3);
	errno = error;
}

static void handlers_make_calls_on_small_stacks(void)
{
	struct sigaction action = { .sa_handler = write_in_handler, .sa_flags = SA_ONSTACK | SA_RESTART };
	/* What programs use: a few kilobytes, the kernel's frame included. */
	size_t size = 8192 + (size_t)sysconf(_SC_MINSIGSTKSZ);
	unsigned char *stack = calloc(1, size + PAGE);
	stack_t alternate = { .ss_sp = stack + PAGE, .ss_size = size }, old;
	int ends[2], more[2];
	char got[3];

	CHECK_EQ(pipe(ends), 0);
	CHECK_EQ(pipe(more), 0);
	handler_fd = ends[1];
	CHECK_EQ(sigaltstack(&alternate, &old), 0);
	CHECK_EQ(sigaction(SIGALRM, &action, NULL), 0);
	attach(&plain_hooks);
	memcpy(memory, "a", 1);
	memcpy(memory + PAGE, "b", 1);
	memcpy(memory + 2 * PAGE, "c", 1);
	memset(stack, 0x5a, PAGE);
	away(memory, 4 * PAGE);
	raise(SIGALRM);
	CHECK_EQ(handler_wrote, 3);
	CHECK_EQ(read(ends[0], got, 3), 3);
	CHECK_EQ(memcmp(got, "abc", 3), 0);
	for (size_t i = 0; i < PAGE; i++)
		if (stack[i] != 0x5a) {
			CHECK_EQ(i, -1);
			break;
		}
	/* In the middle of a call of this thread, which goes on afterwards. */
	away(memory, 4 * PAGE);
	ualarm(30000, 0);
	if (fork() == 0) {
		pause_for(150);
		_exit(write(more[1], "x", 1) != 1);
	}
	CHECK_EQ(read(more[0], memory + 3 * PAGE, PAGE), 1);
	wait(NULL);
	CHECK_EQ(memory[3 * PAGE], 'x');
	CHECK_EQ(read(ends[0], got, 3), 3);
	CHECK(balanced());
	detach();
	CHECK_EQ(sigaltstack(&old, NULL), 0);
	signal(SIGALRM, SIG_DFL);
	free(stack);
	for (int i = 0; i < 2; i++) {
		close(ends[i]);
		close(more[i]);
	}
}

static void children_work(void)
{
	int ends[2], status;
	char *arguments[] = { "sh", "-c", "read line; test \"$line\" = through", NULL };
	posix_spawn_file_actions_t actions;
	pid_t child;

	CHECK_EQ(pipe(ends), 0);
	attach(&plain_hooks);
	away(memory, 2 * PAGE);
	child = fork();
	if (child == 0) {
		memcpy(memory, "child", 5);
		away(memory, PAGE);
		_exit(write(ends[1], memory, 5) != 5 || !balanced());
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
	CHECK_EQ(read(ends[0], memory + PAGE, 5), 5);
	CHECK_EQ(memcmp(memory + PAGE, "child", 5), 0);
	child = vfork();
	if (child == 0) {
		write(ends[1], memory, 3);
		_exit(0);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(read(ends[0], memory + PAGE, 10), 3);
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, ends[0], 0);
	CHECK_EQ(posix_spawnp(&child, "sh", &actions, NULL, arguments, environ), 0);
	memcpy(memory, "through\n", 8);
	away(memory, PAGE);
	CHECK_EQ(write(ends[1], memory, 8), 8);
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK_EQ(status, 0);
	CHECK(balanced());
	posix_spawn_file_actions_destroy(&actions);
	detach();
	close(ends[0]);
	close(ends[1]);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(no_byte_is_lost_while_pages_come_and_go),
		TEST(a_cancelled_call_lets_go),
		TEST(libhmm_is_not_cancelled),
		TEST(a_jump_out_of_a_call_lets_go),
		TEST(handlers_make_calls_on_small_stacks),
		TEST(children_work),
	};

	pretend_start();
	memory = area.memory;
	return tap_run(tests, COUNT(tests));
}
