/* The functions that a fortified program calls instead: compiled with -O2 -D_FORTIFY_SOURCE=2. */
#include "pretend.h"

#include <sys/socket.h>
#include <sys/wait.h>

static char small[64];
/* The compiler must not see it: it would check the lengths itself. */
static volatile size_t length;

static void fortified_calls_fill_absent_memory(void)
{
	/* The size of this is known to the compiler, its length is not. */
	static char room[4 * PAGE];
	char *page = (char *)((address(room) + PAGE - 1) & -PAGE);
	struct sockaddr_storage from;
	socklen_t size = sizeof(from);
	int pair[2], fd = memfd_create("test", 0);

	area.memory = (unsigned char *)page;
	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), 0);
	CHECK_EQ(write(fd, "0123456789", 10), 10);
	for (int i = 0; i < 5; i++) {
		char *into = room + (page - room);

		CHECK_EQ(send(pair[0], "0123456789", 10, 0), 10);
		lseek(fd, 0, SEEK_SET);
		attach(&plain_hooks);
		memset(into, 0, 10);
		length = 10;
		mprotect(page, PAGE, PROT_NONE);
		area.away[0] = 1;
		errno = 77;
		switch (i) {
		case 0:
			CHECK_EQ(read(fd, into, length), 10);
			break;
		case 1:
			CHECK_EQ(pread(fd, into, length, 0), 10);
			break;
		case 2:
			CHECK_EQ(__pread64_chk(fd, into, length, 0, PAGE), 10);
			break;
		case 3:
			CHECK_EQ(recv(pair[1], into, length, 0), 10);
			break;
		default:
			CHECK_EQ(recvfrom(pair[1], into, length, 0, (struct sockaddr *)&from, &size), 10);
		}
		CHECK_EQ(errno, 77);
		CHECK(counted.holds > 0 && counted.touches == 0);
		CHECK(balanced());
		CHECK_EQ(memcmp(into, "0123456789", 10), 0);
		detach();
	}
	close(fd);
	close(pair[0]);
	close(pair[1]);
}

static void overflow(int form, int fd, int socket_fd)
{
	length = sizeof(small) + 1;
	switch (form) {
	case 0:
		length = (size_t)read(fd, small, length);
		break;
	case 1:
		length = (size_t)pread(fd, small, length, 0);
		break;
	case 2:
		length = (size_t)recv(socket_fd, small, length, 0);
		break;
	default:
		length = (size_t)recvfrom(socket_fd, small, length, 0, NULL, NULL);
	}
}

/* Attached or not, what would overflow still ends the program. */
static void overflows_end_the_program(void)
{
	int pair[2], fd = memfd_create("test", 0);

	CHECK_EQ(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair), 0);
	CHECK_EQ(write(fd, "0123456789", 10), 10);
	for (int form = 0; form < 8; form++) {
		int status;
		pid_t child = fork();

		if (child == 0) {
			if (form & 1)
				attach(&plain_hooks);
			CHECK_EQ(send(pair[0], "0123456789", 10, 0), 10);
			close(2);
			overflow(form / 2, fd, pair[1]);
			_exit(0);
		}
		CHECK_EQ(waitpid(child, &status, 0), child);
		CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
	}
	close(fd);
	close(pair[0]);
	close(pair[1]);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(fortified_calls_fill_absent_memory),
		TEST(overflows_end_the_program),
	};

	pretend_start();
	return tap_run(tests, COUNT(tests));
}
