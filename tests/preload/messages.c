/* Vectors and messages: memory that names other memory, all of it away. */
#include "pretend.h"

#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>

#define MANY 1024

static unsigned char expected[AREA_PAGES * PAGE];
static unsigned char *memory;

static int file_with(const unsigned char *bytes, size_t count)
{
	int fd = memfd_create("test", 0);

	CHECK_EQ(pwrite(fd, bytes, count, 0), count);
	return fd;
}

static void vectors_may_be_away_themselves(void)
{
	struct iovec *vector = (void *)(memory + 10 * PAGE - 8);
	int fd = file_with(expected, 300), ends[2];
	unsigned char got[300];

	attach(&plain_hooks);
	vector[0] = (struct iovec){ memory + 100, 100 };
	vector[1] = (struct iovec){ null, 0 };
	vector[2] = (struct iovec){ memory + 5 * PAGE - 50, 200 };
	away(memory, 12 * PAGE);
	CHECK_EQ(readv(fd, vector, 3), 300);
	CHECK_EQ(counted.holds, 3);
	CHECK_EQ(counted.writes, 2);
	CHECK(balanced());
	CHECK_EQ(counted.touches, 0);
	CHECK_EQ(wrong(memory + 100, 100), 0);
	CHECK_EQ(memcmp(memory + 5 * PAGE - 50, expected + 100, 200), 0);
	away(memory, 12 * PAGE);
	CHECK_EQ(pipe(ends), 0);
	CHECK_EQ(writev(ends[1], vector, 3), 300);
	CHECK_EQ(read(ends[0], got, 300), 300);
	CHECK_EQ(wrong(got, 300), 0);
	CHECK(balanced());
	detach();
	close(fd);
	close(ends[0]);
	close(ends[1]);
}

/* A vector that ends early: only a part of the elements is filled, all are let go. */
static void short_vectors_are_released_whole(void)
{
	struct iovec vector[5];
	int ends[2];

	CHECK_EQ(pipe(ends), 0);
	CHECK_EQ(write(ends[1], expected, 2 * PAGE + 7), 2 * PAGE + 7);
	attach(&plain_hooks);
	for (size_t i = 0; i < 5; i++)
		vector[i] = (struct iovec){ memory + i * PAGE, PAGE };
	away(memory, 5 * PAGE);
	CHECK_EQ(readv(ends[0], vector, 5), 2 * PAGE + 7);
	CHECK_EQ(counted.holds, 6);
	CHECK(balanced());
	detach();
	CHECK_EQ(wrong(memory, 2 * PAGE + 7), 0);
	close(ends[0]);
	close(ends[1]);
}

/* As many elements as the kernel takes, and one more. */
static void long_vectors_are_held_whole(void)
{
	static struct iovec vector[MANY + 1];
	const size_t each = 4 * PAGE / MANY;
	int fd = file_with(expected, 4 * PAGE);

	for (size_t i = 0; i <= MANY; i++)
		vector[i] = (struct iovec){ memory + i * each, each };
	for (int count = 13; count <= MANY; count += count < 18 ? 1 : MANY - 18) {
		attach(&plain_hooks);
		away(memory, 4 * PAGE);
		lseek(fd, 0, SEEK_SET);
		errno = 77;
		CHECK_EQ(readv(fd, vector, count), (size_t)count * each);
		CHECK_EQ(errno, 77);
		CHECK(counted.holds >= count + 1);
		CHECK(balanced());
		CHECK_EQ(counted.touches, 0);
		CHECK_EQ(wrong(memory, (size_t)count * each), 0);
	}
	attach(&plain_hooks);
	CHECK_FAILS(readv(fd, vector, MANY + 1), EINVAL);
	CHECK_EQ(counted.holds, 0);
	detach();
	close(fd);
}

/* One bad element among good ones: the kernel stops there, and nothing stays held. */
static void a_bad_element_ends_the_transfer_before_it(void)
{
	struct iovec vector[3] = { { memory, 100 }, { low, 100 }, { memory + PAGE, 100 } };
	int fd = file_with(expected, 300);

	attach(&plain_hooks);
	away(memory, 2 * PAGE);
	CHECK_EQ(readv(fd, vector, 3), 100);
	CHECK_EQ(counted.refused, 1);
	CHECK(balanced());
	detach();
	CHECK_EQ(wrong(memory, 100), 0);
	close(fd);
}

union control {
	struct cmsghdr header;
	char room[CMSG_SPACE(sizeof(int))];
};

/* Header, name, control data, vector and buffers in pages of their own. */
static struct msghdr *message_at(unsigned char *where, size_t bytes)
{
	struct msghdr *message = (void *)where;
	struct iovec *vector = (void *)(where + PAGE);

	memset(where, 0, 4 * PAGE);
	message->msg_iov = vector;
	message->msg_iovlen = 2;
	vector[0] = (struct iovec){ where + 2 * PAGE, bytes / 2 };
	vector[1] = (struct iovec){ where + 3 * PAGE, bytes - bytes / 2 };
	message->msg_control = where + 4 * PAGE;
	message->msg_controllen = sizeof(union control);
	return message;
}

static void messages_carry_descriptors(void)
{
	struct msghdr *message = message_at(memory, 1000);
	struct cmsghdr *control = CMSG_FIRSTHDR(message);
	int fd = file_with(expected, 10), pair[2], received = -1;
	char byte[10];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, pair), 0);
	control->cmsg_level = SOL_SOCKET;
	control->cmsg_type = SCM_RIGHTS;
	control->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(control), &fd, sizeof(fd));
	memcpy(message->msg_iov[0].iov_base, expected, 500);
	memcpy(message->msg_iov[1].iov_base, expected + 500, 500);
	attach(&plain_hooks);
	away(memory, 5 * PAGE);
	CHECK_EQ(sendmsg(pair[0], message, 0), 1000);
	CHECK_EQ(counted.holds, 5);
	CHECK_EQ(counted.writes, 0);
	message = message_at(memory, 1000);
	away(memory, 5 * PAGE);
	CHECK_EQ(recvmsg(pair[1], message, 0), 1000);
	CHECK_EQ(counted.holds, 10);
	CHECK_EQ(counted.writes, 4);
	CHECK(balanced());
	control = CMSG_FIRSTHDR(message);
	CHECK(control && control->cmsg_type == SCM_RIGHTS);
	if (control)
		memcpy(&received, CMSG_DATA(control), sizeof(received));
	CHECK_EQ(pread(received, byte, 10, 0), 10);
	CHECK_EQ(memcmp(message->msg_iov[0].iov_base, expected, 500), 0);
	CHECK_EQ(memcmp(message->msg_iov[1].iov_base, expected + 500, 500), 0);
	CHECK_FAILS(recvmsg(pair[1], low, 0), EFAULT);
	CHECK_FAILS(sendmsg(pair[1], low, 0), EFAULT);
	detach();
	close(received);
	close(fd);
	close(pair[0]);
	close(pair[1]);
}

/* A pair of UDP sockets on this machine; false where there is no network at all. */
static int udp_pair(int pair[2], struct sockaddr_in *to)
{
	socklen_t size = sizeof(*to);
	int room = 4 << 20;

	*to = (struct sockaddr_in){ .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	pair[0] = socket(AF_INET, SOCK_DGRAM, 0);
	pair[1] = socket(AF_INET, SOCK_DGRAM, 0);
	setsockopt(pair[1], SOL_SOCKET, SO_RCVBUF, &room, sizeof(room));
	return !bind(pair[1], (struct sockaddr *)to, sizeof(*to)) &&
	       !getsockname(pair[1], (struct sockaddr *)to, &size);
}

static void udp_messages_keep_their_sender(void)
{
	struct msghdr *message = message_at(memory, 1000);
	struct sockaddr_in to, from = { 0 };
	struct timeval patience = { 10, 0 };
	socklen_t size = sizeof(from);
	int pair[2];

	if (!udp_pair(pair, &to)) {
		printf("# no network: left out\n");
		return;
	}
	setsockopt(pair[1], SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	message->msg_controllen = 0;
	message->msg_name = memory + 6 * PAGE;
	message->msg_namelen = sizeof(to);
	memcpy(memory + 6 * PAGE, &to, sizeof(to));
	attach(&plain_hooks);
	away(memory, 8 * PAGE);
	CHECK_EQ(sendmsg(pair[0], message, 0), 1000);
	message->msg_namelen = PAGE;
	away(memory, 8 * PAGE);
	CHECK_EQ(recvmsg(pair[1], message, 0), 1000);
	CHECK(balanced());
	CHECK_EQ(message->msg_namelen, sizeof(from));
	memcpy(&from, memory + 6 * PAGE, sizeof(from));
	CHECK_EQ(from.sin_addr.s_addr, htonl(INADDR_LOOPBACK));
	CHECK_EQ(getsockname(pair[0], (struct sockaddr *)&to, &size), 0);
	CHECK_EQ(from.sin_port, to.sin_port);
	detach();
	close(pair[0]);
	close(pair[1]);
}

/* `count` messages of `elements` pieces with `bytes` each, in the area from its first page on. */
static struct mmsghdr *messages(int count, size_t elements, size_t bytes)
{
	struct mmsghdr *array = (void *)memory;
	struct iovec *vector = (void *)(memory + 24 * PAGE);
	unsigned char *data = memory + 56 * PAGE;

	memset(memory, 0, 56 * PAGE);
	for (int i = 0; i < count; i++) {
		array[i].msg_hdr.msg_iov = vector;
		array[i].msg_hdr.msg_iovlen = elements;
		for (size_t k = 0; k < elements; k++) {
			*vector++ = (struct iovec){ data, bytes };
			data += bytes;
		}
	}
	return array;
}

/* So many messages that they do not fit into one call; an odd one is longer. */
static void many_messages_go_in_batches(void)
{
	const struct { int count; size_t elements; } cases[] = { { 1, 1 }, { 3, 2 }, { 300, 4 }, { 900, 2 }, { 5, 400 } };
	int pair[2], room = 8 << 20;

	for (size_t i = 0; i < COUNT(cases); i++) {
		int count = cases[i].count;
		size_t elements = cases[i].elements, bytes = elements * (size_t)count * 8;
		struct timespec *patience = (void *)(memory + 23 * PAGE);
		struct mmsghdr *array;
		int done = 0;

		CHECK_EQ(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair), 0);
		setsockopt(pair[0], SOL_SOCKET, SO_SNDBUFFORCE, &room, sizeof(room));
		attach(&plain_hooks);
		array = messages(count, elements, 8);
		fill(memory + 56 * PAGE, bytes);
		away(memory, AREA_PAGES * PAGE);
		errno = 77;
		/* A queue may be shorter than the array: take as many as were sent. */
		done = sendmmsg(pair[0], array, (unsigned int)count, MSG_DONTWAIT);
		CHECK_EQ(errno, 77);
		CHECK_EQ(counted.touches, 0);
		if (done < count)
			printf("# %d of %d messages fit into the socket\n", done, count);
		CHECK(done > 0);
		CHECK(balanced());
		for (int k = 0; k < done; k++)
			CHECK_EQ(array[k].msg_len, elements * 8);
		array = messages(count, elements, 8);
		memset(memory + 56 * PAGE, 0, bytes);
		*patience = (struct timespec){ 60, 0 };
		away(memory, AREA_PAGES * PAGE);
		counted.touches = 0;
		CHECK_EQ(recvmmsg(pair[1], array, (unsigned int)count, MSG_WAITFORONE, patience), done);
		CHECK_EQ(counted.touches, 0);
		CHECK(balanced());
		for (int k = 0; k < done; k++)
			CHECK_EQ(array[k].msg_len, elements * 8);
		CHECK_EQ(wrong(memory + 56 * PAGE, (size_t)done * elements * 8), 0);
		CHECK(patience->tv_sec >= 50 && patience->tv_sec < 60);
		detach();
		close(pair[0]);
		close(pair[1]);
	}
}

static void many_messages_fail_as_the_kernel_says(void)
{
	struct mmsghdr *array = messages(3, 1, 8);
	struct timespec *patience = (void *)(memory + 23 * PAGE);
	int pair[2];

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), 0);
	attach(&plain_hooks);
	CHECK_FAILS(recvmmsg(pair[1], array, 3, MSG_DONTWAIT, NULL), EAGAIN);
	CHECK_FAILS(recvmmsg(-1, array, 3, 0, NULL), EBADF);
	CHECK_FAILS(sendmmsg(pair[0], low, 3, 0), EFAULT);
	CHECK_FAILS(recvmmsg(pair[1], low, 3, MSG_DONTWAIT, NULL), EFAULT);
	CHECK_EQ(sendmmsg(pair[0], array, 0, 0), 0);
	/* The second is bad: the first was sent. */
	array[1].msg_hdr.msg_iov = low;
	CHECK_EQ(sendmmsg(pair[0], array, 3, 0), 1);
	CHECK(balanced());
	array = messages(3, 1, 8);
	*patience = (struct timespec){ 0, 0 };
	CHECK_EQ(recvmmsg(pair[1], array, 3, 0, patience), 1);
	CHECK(balanced());
	detach();
	close(pair[0]);
	close(pair[1]);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(vectors_may_be_away_themselves),
		TEST(short_vectors_are_released_whole),
		TEST(long_vectors_are_held_whole),
		TEST(a_bad_element_ends_the_transfer_before_it),
		TEST(messages_carry_descriptors),
		TEST(udp_messages_keep_their_sender),
		TEST(many_messages_go_in_batches),
		TEST(many_messages_fail_as_the_kernel_says),
	};

	pretend_start();
	memory = area.memory;
	fill(expected, sizeof(expected));
	return tap_run(tests, COUNT(tests));
}
