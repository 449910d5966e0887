/* Handlers and masks of SIGSEGV and SIGBUS: libhmm's handler stays the first, and its signals are never blocked. */
#include "pretend.h"

int __sigaction(int signal, const struct sigaction *action, struct sigaction *old);
__sighandler_t bsd_signal(int signal, __sighandler_t handler);
__sighandler_t sysv_signal(int signal, __sighandler_t handler);
__sighandler_t __sysv_signal(int signal, __sighandler_t handler);

static unsigned char *memory;

/* What the hook was asked last, and what it answers. */
static struct {
	int calls, signal, answer;
	struct sigaction action, before;
} asked;

static int pretend_signal_action(int signal, const struct sigaction *action, struct sigaction *old)
{
	asked.calls++;
	asked.signal = signal;
	if (asked.answer)
		return asked.answer;
	if (old)
		*old = asked.before;
	if (action)
		asked.before = asked.action = *action;
	return 0;
}

static const struct hmm_preload_hooks signal_hooks = {
	sizeof(signal_hooks), pretend_hold, pretend_release, pretend_signal_action,
};

static void handler_one(int signal)
{
	(void)signal;
}

static void handler_two(int signal)
{
	(void)signal;
}

/* The handler that the kernel has, whatever the library says. */
static __sighandler_t installed(int signal)
{
	struct { __sighandler_t handler; unsigned long flags; void (*restorer)(void); unsigned long mask; } now = { 0 };

	syscall(SYS_rt_sigaction, signal, NULL, &now, sizeof(now.mask));
	return now.handler;
}

static unsigned long blocked(void)
{
	unsigned long mask = 0;

	syscall(SYS_rt_sigprocmask, SIG_BLOCK, NULL, &mask, sizeof(mask));
	return mask;
}

static unsigned long bit(int signal)
{
	return 1UL << (signal - 1);
}

static const unsigned long faults = 1UL << (SIGSEGV - 1) | 1UL << (SIGBUS - 1);

static void start_asking(void)
{
	attach(&signal_hooks);
	memset(&asked, 0, sizeof(asked));
}

static void handlers_of_faults_go_to_libhmm(void)
{
	int (*const forms[])(int, const struct sigaction *, struct sigaction *) = { sigaction, __sigaction };
	const int signals[] = { SIGSEGV, SIGBUS };

	for (int i = 0; i < 4; i++) {
		struct sigaction action = { .sa_handler = handler_one, .sa_flags = SA_NODEFER }, old = { 0 };
		int signal = signals[i % 2];
		__sighandler_t before = installed(signal);

		start_asking();
		CHECK_EQ(forms[i / 2](signal, &action, NULL), 0);
		CHECK_EQ(asked.calls, 1);
		CHECK_EQ(asked.signal, signal);
		CHECK(asked.action.sa_handler == handler_one && asked.action.sa_flags == SA_NODEFER);
		CHECK_EQ(forms[i / 2](signal, NULL, &old), 0);
		CHECK(old.sa_handler == handler_one);
		CHECK(installed(signal) == before);
		asked.answer = -EINVAL;
		CHECK_FAILS(forms[i / 2](signal, &action, NULL), EINVAL);
		detach();
	}
}

static void signal_comes_in_two_tastes(void)
{
	__sighandler_t (*const forms[])(int, __sighandler_t) = { signal, bsd_signal, ssignal, sysv_signal, __sysv_signal };

	for (size_t i = 0; i < COUNT(forms); i++) {
		__sighandler_t before = installed(SIGSEGV);

		start_asking();
		asked.before.sa_handler = SIG_IGN;
		CHECK(forms[i](SIGSEGV, handler_one) == SIG_IGN);
		CHECK(forms[i](SIGSEGV, handler_two) == handler_one);
		CHECK_EQ(asked.action.sa_flags, i < 3 ? SA_RESTART : (int)(SA_RESETHAND | SA_NODEFER));
		CHECK(installed(SIGSEGV) == before);
		asked.answer = -EPERM;
		CHECK(forms[i](SIGSEGV, handler_one) == SIG_ERR);
		CHECK_EQ(errno, EPERM);
		asked.calls = 0;
		CHECK(forms[i](SIGUSR1, handler_one) != SIG_ERR);
		CHECK(installed(SIGUSR1) == handler_one);
		CHECK(forms[i](SIGUSR1, SIG_DFL) == handler_one);
		CHECK(forms[i](SIGSEGV, SIG_ERR) == SIG_ERR);
		CHECK_EQ(errno, EINVAL);
		CHECK_EQ(asked.calls, 0);
		detach();
	}
}

static void what_libhmm_leaves_is_libcs(void)
{
	struct sigaction action = { .sa_handler = handler_one }, old;

	start_asking();
	asked.answer = 1;
	CHECK_EQ(sigaction(SIGBUS, &action, &old), 0);
	CHECK(installed(SIGBUS) == handler_one);
	CHECK(signal(SIGBUS, handler_two) == handler_one);
	CHECK(installed(SIGBUS) == handler_two);
	CHECK_EQ(asked.calls, 2);
	/* An engine that needs no signals. */
	attach(&plain_hooks);
	CHECK(signal(SIGBUS, SIG_DFL) == handler_two);
	detach();
	CHECK_EQ(sigaction(SIGBUS, &old, NULL), 0);
	CHECK_EQ(asked.calls, 2);
	CHECK_FAILS(sigaction(1000, &action, NULL), EINVAL);
}

static void everything_blocked_is_not_quite_everything(void)
{
	sigset_t all, old, now;

	sigfillset(&all);
	start_asking();
	for (int form = 0; form < 4; form++) {
		int how = form & 1 ? SIG_BLOCK : SIG_SETMASK;

		CHECK_EQ(form & 2 ? sigprocmask(how, &all, &old) : pthread_sigmask(how, &all, &old), 0);
		CHECK(!sigismember(&old, SIGUSR1) && !sigismember(&old, SIGSEGV));
		CHECK_EQ(blocked() & (faults | bit(SIGUSR1)), bit(SIGUSR1));
		away(memory, PAGE);
		*(volatile unsigned char *)memory = 1;
		CHECK_EQ(form & 2 ? sigprocmask(0, NULL, &now) : pthread_sigmask(0, NULL, &now), 0);
		CHECK(sigismember(&now, SIGUSR1) && !sigismember(&now, SIGSEGV) && !sigismember(&now, SIGBUS));
		CHECK_EQ(sigprocmask(SIG_SETMASK, &old, NULL), 0);
	}
	CHECK_EQ(counted.touches, 4);
	CHECK_EQ(pthread_sigmask(1000, &all, NULL), EINVAL);
	CHECK_FAILS(sigprocmask(1000, &all, NULL), EINVAL);
	/* What was blocked before libhmm came can be unblocked. */
	detach();
	CHECK_EQ(sigprocmask(SIG_BLOCK, &all, &old), 0);
	CHECK_EQ(blocked() & faults, faults);
	attach(&signal_hooks);
	CHECK_EQ(sigprocmask(SIG_UNBLOCK, &all, NULL), 0);
	CHECK_EQ(blocked() & faults, 0);
	detach();
	CHECK_EQ(sigprocmask(SIG_SETMASK, &old, NULL), 0);
}

static void sets_may_be_away_themselves(void)
{
	sigset_t *set = (void *)memory, *old = (void *)(memory + PAGE);

	start_asking();
	sigemptyset(set);
	sigaddset(set, SIGUSR2);
	memset(old, 0x55, sizeof(*old));
	away(memory, 2 * PAGE);
	CHECK_EQ(sigprocmask(SIG_BLOCK, set, old), 0);
	CHECK_EQ(counted.touches, 2);
	CHECK(!sigismember(old, SIGUSR2) && sigismember(set, SIGUSR2));
	/* The kernel writes one word. */
	CHECK_EQ(((unsigned char *)old)[8], 0x55);
	away(memory, 2 * PAGE);
	CHECK_EQ(pthread_sigmask(SIG_UNBLOCK, set, old), 0);
	CHECK(sigismember(old, SIGUSR2));
	CHECK_EQ(blocked() & bit(SIGUSR2), 0);
	detach();
}

static unsigned long blocked_in_handler;

static void touch_in_handler(int signal)
{
	(void)signal;
	blocked_in_handler = blocked();
	*(volatile unsigned char *)memory = 1;
}

static void handlers_of_other_signals_may_touch(void)
{
	struct sigaction action = { .sa_handler = touch_in_handler }, old;
	sigset_t but_one;

	sigfillset(&action.sa_mask);
	start_asking();
	CHECK_EQ(sigaction(SIGUSR1, &action, NULL), 0);
	CHECK_EQ(asked.calls, 0);
	away(memory, PAGE);
	raise(SIGUSR1);
	CHECK_EQ(counted.touches, 1);
	CHECK_EQ(blocked_in_handler & (faults | bit(SIGUSR2)), bit(SIGUSR2));
	CHECK_EQ(sigaction(SIGUSR1, NULL, &old), 0);
	CHECK(sigismember(&old.sa_mask, SIGUSR2) && !sigismember(&old.sa_mask, SIGSEGV));
	/* The same for a handler that runs in sigsuspend. */
	sigemptyset(&but_one);
	sigaddset(&but_one, SIGUSR1);
	CHECK_EQ(sigprocmask(SIG_BLOCK, &but_one, NULL), 0);
	raise(SIGUSR1);
	sigfillset(&but_one);
	sigdelset(&but_one, SIGUSR1);
	away(memory, PAGE);
	CHECK_FAILS(sigsuspend(&but_one), EINTR);
	CHECK_EQ(counted.touches, 2);
	detach();
	signal(SIGUSR1, SIG_DFL);
	sigemptyset(&but_one);
	sigaddset(&but_one, SIGUSR1);
	CHECK_EQ(sigprocmask(SIG_UNBLOCK, &but_one, NULL), 0);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(handlers_of_faults_go_to_libhmm),
		TEST(signal_comes_in_two_tastes),
		TEST(what_libhmm_leaves_is_libcs),
		TEST(everything_blocked_is_not_quite_everything),
		TEST(sets_may_be_away_themselves),
		TEST(handlers_of_other_signals_may_touch),
	};

	pretend_start();
	memory = area.memory;
	return tap_run(tests, COUNT(tests));
}
