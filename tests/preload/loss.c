/* What a system call loses when its buffer is away: without the library's help, and with it. */
#include "pretend.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <sys/eventfd.h>
#include <sys/inotify.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>

/* Something that data comes out of: `ready` makes a descriptor on which some wait. */
struct source {
	const char *name;
	int (*ready)(void);
	/* Kept by every kernel, lost by every kernel, or the kernel's choice. */
	enum { KEPT, LOST, EITHER } fate;
};

static unsigned char *buffer;
static int other = -1;

static int from_pair(int domain, int type)
{
	int pair[2];

	CHECK_EQ(socketpair(domain, type, 0, pair), 0);
	CHECK_EQ(send(pair[1], "data", 4, 0), 4);
	other = pair[1];
	return pair[0];
}

static int stream(void)
{
	return from_pair(AF_UNIX, SOCK_STREAM);
}

static int datagram(void)
{
	return from_pair(AF_UNIX, SOCK_DGRAM);
}

static int packet(void)
{
	return from_pair(AF_UNIX, SOCK_SEQPACKET);
}

static int from_network(int type)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t size = sizeof(to);
	int fd = socket(AF_INET, type, 0);

	if (fd < 0 || bind(fd, (struct sockaddr *)&to, size) || getsockname(fd, (struct sockaddr *)&to, &size))
		return -1;
	other = socket(AF_INET, type, 0);
	if (type == SOCK_STREAM)
		CHECK_EQ(listen(fd, 1), 0);
	if (connect(other, (struct sockaddr *)&to, size))
		return -1;
	if (type == SOCK_STREAM) {
		int listening = fd;

		fd = accept(listening, NULL, NULL);
		close(listening);
	}
	CHECK_EQ(send(other, "data", 4, 0), 4);
	/* It arrives at once, or nearly. */
	CHECK_EQ(recv(fd, buffer + PAGE, 4, MSG_PEEK), 4);
	return fd;
}

static int tcp(void)
{
	return from_network(SOCK_STREAM);
}

static int udp(void)
{
	return from_network(SOCK_DGRAM);
}

static int from_pipe(void)
{
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	CHECK_EQ(write(ends[1], "data", 4), 4);
	other = ends[1];
	return ends[0];
}

static int file(void)
{
	int fd = memfd_create("test", 0);

	CHECK_EQ(pwrite(fd, "data", 4, 0), 4);
	return fd;
}

static int event(void)
{
	return eventfd(5, 0);
}

static int timer(void)
{
	struct itimerspec at = { .it_value.tv_nsec = 1 };
	struct timespec moment = { .tv_nsec = 2000000 };
	int fd = timerfd_create(CLOCK_MONOTONIC, 0);

	CHECK_EQ(timerfd_settime(fd, 0, &at, NULL), 0);
	nanosleep(&moment, NULL);
	return fd;
}

static int signals(void)
{
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGUSR1);
	CHECK_EQ(sigprocmask(SIG_BLOCK, &set, NULL), 0);
	raise(SIGUSR1);
	return signalfd(-1, &set, 0);
}

static int watch(void)
{
	int fd = inotify_init1(0), file_descriptor;

	CHECK(inotify_add_watch(fd, "/tmp", IN_OPEN) >= 0);
	file_descriptor = open("/tmp", O_RDONLY | O_DIRECTORY);
	close(file_descriptor);
	return fd;
}

static const struct source sources[] = {
	{ "a file", file, KEPT },          { "a pipe", from_pipe, KEPT },
	{ "a local stream", stream, KEPT }, { "a TCP stream", tcp, KEPT },
	{ "a local datagram", datagram, LOST }, { "a local packet", packet, LOST },
	{ "a UDP datagram", udp, LOST },   { "an eventfd", event, EITHER },
	{ "a timerfd", timer, EITHER },    { "a signalfd", signals, EITHER },
	{ "an inotify descriptor", watch, EITHER },
};

static void finish(int fd)
{
	close(fd);
	if (other >= 0)
		close(other);
	other = -1;
}

/* What is lost at an absent page when nobody helps: the reason for holding before the call. */
static void datagrams_are_lost_without_help(void)
{
	for (size_t i = 0; i < COUNT(sources); i++) {
		int fd;

		attach(&plain_hooks);
		detach();
		fd = sources[i].ready();
		if (fd < 0) {
			printf("# %s: cannot be had here\n", sources[i].name);
			finish(fd);
			continue;
		}
		away(buffer, PAGE);
		CHECK_FAILS(read(fd, buffer, PAGE), EFAULT);
		*(volatile unsigned char *)buffer = 0;
		fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
		int kept = read(fd, buffer, PAGE) > 0;

		printf("# %s is %s\n", sources[i].name, kept ? "kept" : "lost");
		if (sources[i].fate != EITHER)
			CHECK_EQ(kept, sources[i].fate == KEPT);
		finish(fd);
	}
}

static void nothing_is_lost_with_help(void)
{
	for (size_t i = 0; i < COUNT(sources); i++) {
		int fd, failures = tap_failures;

		attach(&plain_hooks);
		fd = sources[i].ready();
		if (fd >= 0) {
			away(buffer, PAGE);
			CHECK(read(fd, buffer, PAGE) > 0);
			CHECK(balanced());
		}
		if (tap_failures > failures)
			printf("# from %s\n", sources[i].name);
		finish(fd);
		detach();
	}
}

/* A write that meets an absent page half-way does not fail: it is short, which nobody expects of a pipe. */
static void short_writes_are_avoided(void)
{
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	attach(&plain_hooks);
	detach();
	away(buffer + PAGE, PAGE);
	CHECK_EQ(write(ends[1], buffer, 2 * PAGE), PAGE);
	attach(&plain_hooks);
	away(buffer + PAGE, PAGE);
	CHECK_EQ(write(ends[1], buffer, 2 * PAGE), 2 * PAGE);
	detach();
	close(ends[0]);
	close(ends[1]);
}

static void short_reads_are_avoided(void)
{
	unsigned char bytes[2 * PAGE];
	int fd = memfd_create("test", 0);

	fill(bytes, sizeof(bytes));
	CHECK_EQ(write(fd, bytes, sizeof(bytes)), sizeof(bytes));
	attach(&plain_hooks);
	detach();
	away(buffer + PAGE, PAGE);
	CHECK_EQ(pread(fd, buffer, 2 * PAGE, 0), PAGE);
	attach(&plain_hooks);
	away(buffer + PAGE, PAGE);
	CHECK_EQ(pread(fd, buffer, 2 * PAGE, 0), 2 * PAGE);
	detach();
	close(fd);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(datagrams_are_lost_without_help),
		TEST(nothing_is_lost_with_help),
		TEST(short_writes_are_avoided),
		TEST(short_reads_are_avoided),
	};

	pretend_start();
	buffer = area.memory;
	return tap_run(tests, COUNT(tests));
}
