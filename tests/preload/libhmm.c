/* With the real libhmm: an ordinary program's system calls on memory that is on a device, whatever the engine. */
#include "tap.h"

#include <hmm.h>

#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL
#define PAGES 16UL
#define BYTES (PAGES * PAGE)
#define ROUNDS 300

static struct mm_struct *mm;
static struct hmm_soft_device *device;
static unsigned char *memory;

static unsigned char pattern(size_t index, unsigned int round)
{
	return (unsigned char)(index * 31 + index / PAGE + round);
}

static void fill(unsigned char *bytes, size_t count, unsigned int round)
{
	for (size_t i = 0; i < count; i++)
		bytes[i] = pattern(i, round);
}

static size_t wrong(const unsigned char *bytes, size_t count, unsigned int round)
{
	size_t found = 0;

	for (size_t i = 0; i < count; i++)
		found += bytes[i] != pattern(i, round);
	return found;
}

static long on_device(void)
{
	unsigned char places[PAGES];
	long count = 0;

	CHECK_EQ(hmm_residency(mm, memory, BYTES, places, PAGES), 0);
	for (size_t i = 0; i < PAGES; i++)
		count += places[i] == HMM_RESIDENCY_DEVICE;
	return count;
}

static void send_away(void)
{
	CHECK_EQ(hmm_soft_migrate(device, memory, BYTES), PAGES);
	CHECK_EQ(on_device(), PAGES);
}

static void files_are_read_and_written(void)
{
	struct iovec *vector = (void *)memory;
	int fd = memfd_create("test", 0);
	unsigned char *got = malloc(BYTES);

	fill(memory, BYTES, 1);
	send_away();
	CHECK_EQ(write(fd, memory, BYTES), BYTES);
	CHECK_EQ(pread(fd, got, BYTES, 0), BYTES);
	CHECK_EQ(wrong(got, BYTES, 1), 0);
	memset(memory, 0, BYTES);
	send_away();
	CHECK_EQ(pread(fd, memory, BYTES, 0), BYTES);
	CHECK_EQ(wrong(memory, BYTES, 1), 0);
	/* The vector is away, too. */
	vector[0] = (struct iovec){ memory + PAGE, PAGE };
	vector[1] = (struct iovec){ memory + 5 * PAGE - 1, PAGE };
	memset(memory + PAGE, 0, BYTES - PAGE);
	send_away();
	CHECK_EQ(preadv(fd, vector, 2, 0), 2 * PAGE);
	CHECK_EQ(wrong(memory + PAGE, PAGE, 1), 0);
	CHECK_EQ(memory[5 * PAGE - 1], pattern(PAGE, 1));
	free(got);
	close(fd);
}

/* A hole beside pages that are away. */
static void first_touches_are_system_calls(void)
{
	unsigned char *fresh = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	fill(fresh, 2 * PAGE, 2);
	CHECK_EQ(hmm_soft_migrate(device, fresh, 8 * PAGE), 8);
	CHECK_EQ(write(ends[1], fresh, 4 * PAGE), 4 * PAGE);
	CHECK_EQ(read(ends[0], fresh + 4 * PAGE, 4 * PAGE), 4 * PAGE);
	CHECK_EQ(wrong(fresh + 4 * PAGE, 2 * PAGE, 2), 0);
	CHECK_EQ(fresh[7 * PAGE], 0);
	munmap(fresh, 8 * PAGE);
	close(ends[0]);
	close(ends[1]);
}

static void errors_stay_errors(void)
{
	unsigned char *read_only = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	void *volatile nothing = (void *)8;
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	CHECK_EQ(write(ends[1], read_only, 10), 10);
	CHECK_FAILS(read(ends[0], read_only, 10), EFAULT);
	CHECK_FAILS(read(ends[0], nothing, 10), EFAULT);
	CHECK_FAILS(readv(ends[0], nothing, 1), EFAULT);
	CHECK_EQ(read(ends[0], memory, 10), 10);
	munmap(read_only, PAGE);
	close(ends[0]);
	close(ends[1]);
}

static int pair[2];
static volatile int stop;

static void *echo(void *argument)
{
	unsigned char *mine = memory + 8 * PAGE;
	ssize_t got;

	while ((got = recv(pair[1], mine, 4 * PAGE, 0)) > 1)
		if (send(pair[1], mine, (size_t)got, 0) != got)
			break;
	return argument;
}

static void *migrate(void *argument)
{
	while (!stop)
		hmm_soft_migrate(device, memory, BYTES);
	return argument;
}

/* A lost datagram would be waited for in vain. */
static void no_datagram_is_lost_while_pages_migrate(void)
{
	struct timeval patience = { 20, 0 };
	pthread_t echoes, migrates;
	unsigned char *sent = memory, *got = memory + 4 * PAGE;

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), 0);
	setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	stop = 0;
	pthread_create(&echoes, NULL, echo, NULL);
	pthread_create(&migrates, NULL, migrate, NULL);
	for (unsigned int round = 0; round < ROUNDS && !tap_failures; round++) {
		size_t bytes = 100 + round * 37 % (3 * PAGE);

		fill(sent, bytes, round);
		CHECK_EQ(send(pair[0], sent, bytes, 0), bytes);
		CHECK_EQ(recv(pair[0], got, 4 * PAGE, 0), bytes);
		CHECK_EQ(wrong(got, bytes, round), 0);
	}
	stop = 1;
	pthread_join(migrates, NULL);
	CHECK_EQ(send(pair[0], sent, 1, 0), 1);
	pthread_join(echoes, NULL);
	close(pair[0]);
	close(pair[1]);
}

static volatile int caught;

static void on_fault(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	caught++;
	/* What the program did itself is put right by its own means. */
	mprotect((void *)((uintptr_t)info->si_addr & -PAGE), PAGE, PROT_READ | PROT_WRITE);
}

/* The program's handler comes later than libhmm's, and blocks everything: neither is in the way. */
static void the_programs_handler_gets_its_own(void)
{
	struct sigaction action = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO }, old, now;
	unsigned char *mine = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	sigset_t all, before;

	sigfillset(&action.sa_mask);
	sigfillset(&all);
	CHECK_EQ(sigaction(SIGSEGV, &action, &old), 0);
	CHECK_EQ(sigaction(SIGSEGV, NULL, &now), 0);
	CHECK(now.sa_sigaction == on_fault);
	CHECK_EQ(pthread_sigmask(SIG_SETMASK, &all, &before), 0);
	fill(memory, BYTES, 3);
	send_away();
	CHECK_EQ(wrong(memory, BYTES, 3), 0);
	CHECK_EQ(caught, 0);
	CHECK_EQ(pthread_sigmask(SIG_SETMASK, &before, NULL), 0);
	*(volatile unsigned char *)mine = 1;
	CHECK_EQ(caught, 1);
	CHECK_EQ(sigaction(SIGSEGV, &old, NULL), 0);
	munmap(mine, PAGE);
}

/* The default action ends the program, and is not mistaken for one that the program asks for. */
static void a_crash_is_still_a_crash(void)
{
	int status;
	pid_t child = fork();

	if (child == 0) {
		volatile unsigned char *volatile nothing = (void *)8;

		alarm(10);
		_exit(*nothing);
	}
	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
}

static void it_goes_on_after_closing(void)
{
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	fill(memory, BYTES, 4);
	send_away();
	CHECK_EQ(hmm_soft_destroy(device), 0);
	CHECK_EQ(hmm_mm_put(mm), 0);
	CHECK_EQ(write(ends[1], memory, PAGE), PAGE);
	mm = hmm_mm_current();
	device = IS_ERR(mm) ? NULL : hmm_soft_create(mm, NULL);
	CHECK(!IS_ERR(mm) && !IS_ERR(device));
	send_away();
	CHECK_EQ(write(ends[1], memory, PAGE), PAGE);
	CHECK_EQ(read(ends[0], memory + PAGE, 2 * PAGE), 2 * PAGE);
	CHECK_EQ(wrong(memory + PAGE, PAGE, 4), 0);
	CHECK_EQ(memcmp(memory, memory + 2 * PAGE, PAGE), 0);
	close(ends[0]);
	close(ends[1]);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(files_are_read_and_written),
		TEST(first_touches_are_system_calls),
		TEST(errors_stay_errors),
		TEST(no_datagram_is_lost_while_pages_migrate),
		TEST(the_programs_handler_gets_its_own),
		TEST(a_crash_is_still_a_crash),
		TEST(it_goes_on_after_closing),
	};

	mm = hmm_mm_current();
	if (IS_ERR(mm)) {
		printf("1..0 # SKIP %s\n", hmm_last_error());
		return hmm_ptr_err(mm) != -EOPNOTSUPP;
	}
	device = hmm_soft_create(mm, NULL);
	memory = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (IS_ERR(device) || memory == MAP_FAILED) {
		printf("Bail out! %s\n", hmm_last_error());
		return 2;
	}
	return tap_run(tests, COUNT(tests));
}
