/* Tests in plain C with TAP output, as tests/c/tap.h, for programs that are not linked with libhmm. */
#ifndef TAP_H
#define TAP_H

#include <errno.h>
#include <stdio.h>
#include <string.h>

struct tap_test {
	const char *name;
	void (*run)(void);
};

#define TEST(function) { #function, function }
#define COUNT(array) (sizeof(array) / sizeof(*(array)))

static int tap_failures;

/* Holds or is reported; the test goes on. */
#define CHECK(condition)                                                                       \
	do {                                                                                   \
		if (!(condition)) {                                                            \
			tap_failures++;                                                        \
			printf("# %s:%d: not true: %s\n", __FILE__, __LINE__, #condition);     \
		}                                                                              \
	} while (0)

/* Two integers are equal, or both are reported. */
#define CHECK_EQ(value, expected)                                                              \
	do {                                                                                   \
		long long tap_value = (long long)(value);                                      \
		long long tap_expected = (long long)(expected);                                \
		if (tap_value != tap_expected) {                                               \
			tap_failures++;                                                        \
			printf("# %s:%d: %s is %lld, not %lld (errno: %s)\n", __FILE__,        \
			       __LINE__, #value, tap_value, tap_expected, strerror(errno));    \
		}                                                                              \
	} while (0)

/* A call fails with an errno. */
#define CHECK_FAILS(call, error)                                                               \
	do {                                                                                   \
		CHECK_EQ(call, -1);                                                            \
		CHECK_EQ(errno, error);                                                        \
	} while (0)

/* Runs the tests; returns what main() returns. */
static inline int tap_run(const struct tap_test *tests, int count)
{
	int failed = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("1..%d\n", count);
	for (int i = 0; i < count; i++) {
		tap_failures = 0;
		tests[i].run();
		failed += tap_failures > 0;
		printf("%sok %d - %s\n", tap_failures ? "not " : "", i + 1, tests[i].name);
	}
	return failed ? 1 : 0;
}

#endif
