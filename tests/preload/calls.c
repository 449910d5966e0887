/* Every form of read and write: absent buffers, what is held and released, errno, and what goes straight through. */
#include "pretend.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#define BYTES (2 * PAGE)

/* Not declared by libc's headers without fortification. */
ssize_t __read(int fd, void *buffer, size_t count);
ssize_t __write(int fd, const void *buffer, size_t count);
ssize_t __pread64(int fd, void *buffer, size_t count, off_t offset);
ssize_t __pwrite64(int fd, const void *buffer, size_t count, off_t offset);
/* Only on x86-64. */
ssize_t __send(int fd, const void *buffer, size_t count, int flags) __attribute__((weak));

struct form {
	const char *name;
	ssize_t (*call)(int fd, void *buffer);
};

#define FORM(name, expression)                                                                 \
	static ssize_t call_##name(int fd, void *buffer)                                       \
	{                                                                                      \
		struct iovec vector[2] = { { buffer, 100 }, { (char *)buffer + 100, BYTES - 100 } }; \
		(void)vector;                                                                  \
		return expression;                                                             \
	}
#define ENTRY(name) { #name, call_##name }

FORM(read, read(fd, buffer, BYTES))
FORM(__read, __read(fd, buffer, BYTES))
FORM(pread, pread(fd, buffer, BYTES, 0))
FORM(pread64, pread64(fd, buffer, BYTES, 0))
FORM(__pread64, __pread64(fd, buffer, BYTES, 0))
FORM(readv, readv(fd, vector, 2))
FORM(preadv, preadv(fd, vector, 2, 0))
FORM(preadv64, preadv64(fd, vector, 2, 0))
FORM(preadv2, preadv2(fd, vector, 2, 0, 0))
FORM(preadv64v2, preadv64v2(fd, vector, 2, 0, 0))
FORM(write, write(fd, buffer, BYTES))
FORM(__write, __write(fd, buffer, BYTES))
FORM(pwrite, pwrite(fd, buffer, BYTES, 0))
FORM(pwrite64, pwrite64(fd, buffer, BYTES, 0))
FORM(__pwrite64, __pwrite64(fd, buffer, BYTES, 0))
FORM(writev, writev(fd, vector, 2))
FORM(pwritev, pwritev(fd, vector, 2, 0))
FORM(pwritev64, pwritev64(fd, vector, 2, 0))
FORM(pwritev2, pwritev2(fd, vector, 2, 0, 0))
FORM(pwritev64v2, pwritev64v2(fd, vector, 2, 0, 0))
FORM(recv, recv(fd, buffer, BYTES, 0))
FORM(recvfrom, recvfrom(fd, buffer, BYTES, 0, NULL, NULL))
FORM(send, send(fd, buffer, BYTES, 0))
FORM(__send, (__send ? __send : send)(fd, buffer, BYTES, 0))
FORM(sendto, sendto(fd, buffer, BYTES, 0, NULL, 0))

static const struct form from_file[] = {
	ENTRY(read), ENTRY(__read), ENTRY(pread), ENTRY(pread64), ENTRY(__pread64), ENTRY(readv), ENTRY(preadv),
	ENTRY(preadv64), ENTRY(preadv2), ENTRY(preadv64v2),
};
static const struct form to_file[] = {
	ENTRY(write), ENTRY(__write), ENTRY(pwrite), ENTRY(pwrite64), ENTRY(__pwrite64), ENTRY(writev), ENTRY(pwritev),
	ENTRY(pwritev64), ENTRY(pwritev2), ENTRY(pwritev64v2),
};
static const struct form from_socket[] = { ENTRY(recv), ENTRY(recvfrom), ENTRY(read), ENTRY(readv) };
static const struct form to_socket[] = { ENTRY(send), ENTRY(__send), ENTRY(sendto), ENTRY(write), ENTRY(writev) };

static unsigned char expected[BYTES], got[BYTES];
static unsigned char *buffer;

static int file_with(const unsigned char *bytes, size_t count)
{
	int fd = memfd_create("test", 0);

	CHECK_EQ(pwrite(fd, bytes, count, 0), count);
	return fd;
}

/* One form that fills the buffer, while its pages are away. */
static void check_in(const struct form *form, int fd)
{
	int failures = tap_failures;

	memset(buffer, 0xee, 3 * PAGE);
	attach(&plain_hooks);
	away(buffer, 3 * PAGE);
	errno = 77;
	CHECK_EQ(form->call(fd, buffer + 50), BYTES);
	CHECK_EQ(errno, 77);
	CHECK(counted.holds > 0 && counted.writes > 0);
	CHECK(balanced());
	detach();
	CHECK_EQ(counted.touches, 0);
	CHECK_EQ(pages_away(), 0);
	CHECK_EQ(wrong(buffer + 50, BYTES), 0);
	if (tap_failures > failures)
		printf("# in %s\n", form->name);
}

/* One form that takes from the buffer. */
static void check_out(const struct form *form, int fd)
{
	int failures = tap_failures;

	fill(buffer + 50, BYTES);
	attach(&plain_hooks);
	away(buffer, 3 * PAGE);
	errno = 77;
	CHECK_EQ(form->call(fd, buffer + 50), BYTES);
	CHECK_EQ(errno, 77);
	CHECK(counted.holds > 0 && counted.writes == 0);
	CHECK(balanced());
	detach();
	CHECK_EQ(counted.touches, 0);
	if (tap_failures > failures)
		printf("# in %s\n", form->name);
}

static void files_are_read_into_absent_memory(void)
{
	int fd = file_with(expected, BYTES);

	for (size_t i = 0; i < COUNT(from_file); i++) {
		lseek(fd, 0, SEEK_SET);
		check_in(&from_file[i], fd);
	}
	close(fd);
}

static void files_are_written_from_absent_memory(void)
{
	for (size_t i = 0; i < COUNT(to_file); i++) {
		int fd = memfd_create("test", 0);

		check_out(&to_file[i], fd);
		memset(got, 0, BYTES);
		CHECK_EQ(pread(fd, got, BYTES, 0), BYTES);
		CHECK_EQ(wrong(got, BYTES), 0);
		close(fd);
	}
}

static void pipes_and_sockets_work_both_ways(void)
{
	int ends[2][2];

	CHECK_EQ(pipe(ends[0]), 0);
	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends[1]), 0);
	for (int kind = 0; kind < 2; kind++) {
		const struct form *in = kind ? from_socket : &from_file[0], *out = kind ? to_socket : &to_file[0];
		size_t ins = kind ? COUNT(from_socket) : 1, outs = kind ? COUNT(to_socket) : 1;

		for (size_t i = 0; i < ins; i++) {
			CHECK_EQ(write(ends[kind][1], expected, BYTES), BYTES);
			check_in(&in[i], ends[kind][0]);
		}
		for (size_t i = 0; i < outs; i++) {
			check_out(&out[i], ends[kind][1]);
			memset(got, 0, BYTES);
			CHECK_EQ(recv(ends[kind][0], got, BYTES, MSG_WAITALL) == BYTES ||
				 read(ends[kind][0], got, BYTES) == BYTES, 1);
			CHECK_EQ(wrong(got, BYTES), 0);
		}
		close(ends[kind][0]);
		close(ends[kind][1]);
	}
}

static void datagrams_keep_their_sender(void)
{
	struct sockaddr_storage *from = (void *)(buffer + 5 * PAGE);
	socklen_t *size = (void *)(buffer + 6 * PAGE);
	struct sockaddr to = { .sa_family = AF_UNIX };
	struct sockaddr_storage name;
	socklen_t name_size = sizeof(name);
	int one = socket(AF_UNIX, SOCK_DGRAM, 0), other = socket(AF_UNIX, SOCK_DGRAM, 0);

	/* An abstract name of the kernel's choice. */
	CHECK_EQ(bind(one, &to, sizeof(sa_family_t)), 0);
	CHECK_EQ(bind(other, &to, sizeof(sa_family_t)), 0);
	CHECK_EQ(getsockname(one, (struct sockaddr *)&name, &name_size), 0);
	memcpy(from, &name, name_size);
	memcpy(buffer, "datagram", 8);
	attach(&plain_hooks);
	away(buffer, 8 * PAGE);
	CHECK_EQ(sendto(other, buffer, 8, 0, (struct sockaddr *)from, name_size), 8);
	CHECK_EQ(counted.holds, 2);
	*size = sizeof(*from);
	away(buffer, 8 * PAGE);
	CHECK_EQ(recvfrom(one, buffer, 100, 0, (struct sockaddr *)from, size), 8);
	CHECK_EQ(counted.holds, 5);
	CHECK_EQ(counted.writes, 3);
	CHECK(balanced());
	detach();
	name_size = sizeof(name);
	CHECK_EQ(getsockname(other, (struct sockaddr *)&name, &name_size), 0);
	CHECK_EQ(*size, name_size);
	CHECK_EQ(memcmp(from, &name, name_size), 0);
	close(one);
	close(other);
}

static void detached_calls_go_straight_through(void)
{
	int fd = file_with(expected, BYTES);

	attach(&plain_hooks);
	detach();
	CHECK_EQ(read(fd, buffer, BYTES), BYTES);
	lseek(fd, 0, SEEK_SET);
	away(buffer, 3 * PAGE);
	for (size_t i = 0; i < COUNT(from_file); i++)
		CHECK_FAILS(from_file[i].call(fd, buffer + 50), EFAULT);
	for (size_t i = 0; i < COUNT(to_file); i++)
		CHECK_FAILS(to_file[i].call(fd, buffer + 50), EFAULT);
	CHECK_EQ(counted.holds + counted.releases + counted.refused, 0);
	buffer[0] = buffer[PAGE] = buffer[2 * PAGE] = 0;
	CHECK_EQ(counted.touches, 3);
	close(fd);
}

/* An older libhmm has less than is needed here, a newer one more. */
static void only_hooks_that_are_long_enough_are_attached(void)
{
	struct hmm_preload_hooks hooks = plain_hooks;
	int fd = file_with(expected, BYTES);

	hooks.size = sizeof(hooks) - 1;
	attach(&hooks);
	CHECK_EQ(pread(fd, buffer, 10, 0), 10);
	CHECK_EQ(counted.holds, 0);
	hooks.size = sizeof(hooks) + 8;
	attach(&hooks);
	CHECK_EQ(pread(fd, buffer, 10, 0), 10);
	CHECK_EQ(counted.holds, 1);
	detach();
	close(fd);
}

static void nothing_and_null_are_the_kernels_business(void)
{
	int fd = file_with(expected, BYTES);

	attach(&plain_hooks);
	CHECK_EQ(read(fd, buffer, 0), 0);
	CHECK_EQ(write(fd, null, 0), 0);
	CHECK_FAILS(read(fd, null, 10), EFAULT);
	CHECK_FAILS(readv(fd, null, 2), EFAULT);
	CHECK_EQ(readv(fd, null, 0), 0);
	CHECK_FAILS(sendmsg(fd, NULL, 0), ENOTSOCK);
	CHECK_EQ(counted.holds + counted.refused, 0);
	detach();
	close(fd);
}

static void errors_are_the_kernels(void)
{
	void *bad = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct iovec vector = { bad, 10 };
	int fd = file_with(expected, BYTES);

	munmap(bad, PAGE);
	attach(&plain_hooks);
	CHECK_FAILS(read(-1, buffer, 10), EBADF);
	CHECK_EQ(counted.holds, 1);
	CHECK(balanced());
	CHECK_FAILS(read(fd, bad, 10), EFAULT);
	CHECK_FAILS(write(fd, bad, 10), EFAULT);
	CHECK_FAILS(recvfrom(fd, bad, 10, 0, NULL, NULL), ENOTSOCK);
	CHECK_FAILS(readv(fd, &vector, 1), EFAULT);
	/* Looking at an array that is not there would be the end. */
	CHECK_FAILS(readv(fd, bad, 1), EFAULT);
	CHECK_FAILS(writev(fd, low, 3), EFAULT);
	CHECK_FAILS(readv(fd, &vector, minus_one), EINVAL);
	CHECK_EQ(counted.refused, 6);
	CHECK(balanced());
	detach();
	close(fd);
}

static void a_page_that_went_all_the_same_is_held_again(void)
{
	int fd = file_with(expected, BYTES);

	attach(&plain_hooks);
	away(buffer, PAGE);
	pretend.lies = 3;
	errno = 77;
	CHECK_EQ(pread(fd, buffer, 100, 0), 100);
	CHECK_EQ(errno, 77);
	CHECK_EQ(counted.holds, 4);
	/* What does not help is given up. */
	away(buffer, PAGE);
	memset(area.held, 0, sizeof(area.held));
	attach(&plain_hooks);
	away(buffer, PAGE);
	pretend.lies = 1000;
	CHECK_FAILS(pread(fd, buffer, 100, 0), EFAULT);
	CHECK_EQ(counted.holds, 9);
	CHECK_EQ(counted.releases, 9);
	pretend.lies = 0;
	memset(area.held, 0, sizeof(area.held));
	detach();
	buffer[0] = 0;
	close(fd);
}

static void nothing_to_do_means_no_release(void)
{
	int fd = file_with(expected, BYTES);

	attach(&plain_hooks);
	pretend.nothing_to_do = 1;
	CHECK_EQ(pread(fd, buffer, BYTES, 0), BYTES);
	CHECK_EQ(call_preadv(fd, buffer), BYTES);
	away(buffer, PAGE);
	CHECK_FAILS(pread(fd, buffer, 100, 0), EFAULT);
	CHECK_EQ(counted.releases, 0);
	pretend.nothing_to_do = 0;
	buffer[0] = 0;
	detach();
	close(fd);
}

static int inside_fd;
static int inside_calls;

static void call_from_inside(void)
{
	struct iovec vector = { got, 10 };
	sigset_t set;

	inside_calls++;
	CHECK_EQ(pread(inside_fd, got, 10, 0), 10);
	CHECK_EQ(preadv(inside_fd, &vector, 1, 0), 10);
	CHECK_EQ(pthread_sigmask(SIG_BLOCK, NULL, &set), 0);
}

static void calls_from_inside_a_hook_pass_through(void)
{
	inside_fd = file_with(expected, BYTES);
	attach(&plain_hooks);
	pretend.inside = call_from_inside;
	inside_calls = 0;
	away(buffer, PAGE);
	CHECK_EQ(pread(inside_fd, buffer, 100, 0), 100);
	CHECK_EQ(inside_calls, 1);
	CHECK_EQ(counted.holds, 1);
	pretend.inside = NULL;
	CHECK(balanced());
	detach();
	close(inside_fd);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(files_are_read_into_absent_memory),
		TEST(files_are_written_from_absent_memory),
		TEST(pipes_and_sockets_work_both_ways),
		TEST(datagrams_keep_their_sender),
		TEST(detached_calls_go_straight_through),
		TEST(only_hooks_that_are_long_enough_are_attached),
		TEST(nothing_and_null_are_the_kernels_business),
		TEST(errors_are_the_kernels),
		TEST(a_page_that_went_all_the_same_is_held_again),
		TEST(nothing_to_do_means_no_release),
		TEST(calls_from_inside_a_hook_pass_through),
	};

	pretend_start();
	buffer = area.memory;
	fill(expected, BYTES);
	return tap_run(tests, COUNT(tests));
}
