/* Children of a test: they check for themselves, and say at their end whether all was well. */
#ifndef CHILDREN_H
#define CHILDREN_H

#include "fixture.h"

#include <signal.h>
#include <sys/wait.h>

/* fork(); what the child finds wrong is its own. */
static inline pid_t child_fork(void)
{
	pid_t child = fork();

	CHECK(child >= 0);
	if (!child)
		tap_failures = 0;
	return child;
}

/* Ends a child. */
static inline void child_end(void)
{
	_exit(tap_failures ? 1 : 0);
}

/* A child has ended, and found nothing wrong. */
static inline void child_was_well(pid_t child)
{
	int status = -1;

	CHECK_EQ(waitpid(child, &status, 0), child);
	CHECK(WIFEXITED(status));
	CHECK_EQ(WEXITSTATUS(status), 0);
}

#endif
