/* A library whose constructor runs before libhmm_preload.so is ready: calls work all the same. */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static void expect(int is_true, const char *what)
{
	if (!is_true) {
		perror(what);
		abort();
	}
}

__attribute__((constructor)) static void call_early(void)
{
	struct sigaction action = { .sa_handler = SIG_IGN }, old;
	struct iovec vector = { "abc", 3 };
	char got[3];
	sigset_t set;
	int pair[2];

	expect(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0, "socketpair");
	expect(writev(pair[0], &vector, 1) == 3, "writev");
	expect(recv(pair[1], got, 1, 0) == 1, "recv");
	expect(read(pair[1], got + 1, 2) == 2 && got[2] == 'c', "read");
	expect(write(-1, got, 3) == -1, "write");
	sigemptyset(&set);
	expect(sigprocmask(SIG_BLOCK, &set, NULL) == 0, "sigprocmask");
	expect(sigaction(SIGUSR1, &action, &old) == 0, "sigaction");
	expect(signal(SIGUSR1, old.sa_handler) == SIG_IGN, "signal");
	puts("early");
	close(pair[0]);
	close(pair[1]);
}
