/* Tests in plain C with TAP output: each test is a function, each CHECK that fails says where and what. */
#ifndef TAP_H
#define TAP_H

#include <hmm.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>

struct tap_test {
	const char *name;
	void (*run)(void);
};

#define TEST(function) { #function, function }

static int tap_failures;
static const char *tap_skip_reason;

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
			printf("# %s:%d: %s is %lld, not %lld (last error: %s)\n", __FILE__,   \
			       __LINE__, #value, tap_value, tap_expected, hmm_last_error());   \
		}                                                                              \
	} while (0)

/* A call is refused with an errno and leaves a text. */
#define REFUSED(call, error)                                                                   \
	do {                                                                                   \
		CHECK_EQ(call, -(error));                                                      \
		CHECK(*hmm_last_error() != '\0');                                              \
		CHECK_EQ(hmm_last_errno(), -(error));                                          \
	} while (0)

/* A call that returns a pointer is refused. */
#define REFUSED_POINTER(call, error)                                                           \
	do {                                                                                   \
		const void *tap_pointer = (call);                                              \
		CHECK(hmm_is_err(tap_pointer));                                                \
		CHECK_EQ(hmm_ptr_err(tap_pointer), -(error));                                  \
	} while (0)

/* A call that returns nothing is refused. */
#define REFUSED_VOID(call, error)                                                              \
	do {                                                                                   \
		call;                                                                          \
		CHECK_EQ(hmm_last_errno(), -(error));                                          \
	} while (0)

/* Leaves a test that is about what the engine lacks: NEEDS(mm, EVENTS). What is about something else uses another way. */
#define NEEDS(mm, capability)                                                                  \
	do {                                                                                   \
		if (!(hmm_mm_capabilities(mm) & HMM_CAPABILITY_##capability)) {                \
			tap_skip_reason = "the engine lacks " #capability;                     \
			return;                                                                \
		}                                                                              \
	} while (0)

/* Runs the tests; returns what main() returns. */
static inline int tap_run(const struct tap_test *tests, int count)
{
	int failed = 0;

	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("1..%d\n", count);
	for (int i = 0; i < count; i++) {
		tap_failures = 0;
		tap_skip_reason = NULL;
		tests[i].run();
		failed += tap_failures > 0;
		printf("%sok %d - %s", tap_failures ? "not " : "", i + 1, tests[i].name);
		if (tap_skip_reason)
			printf(" # SKIP %s", tap_skip_reason);
		printf("\n");
	}
	return failed ? 1 : 0;
}

/* The address space, or the end of the program with all tests skipped when no engine works here. */
static inline struct mm_struct *tap_mm(const struct tap_test *tests, int count)
{
	struct mm_struct *mm = hmm_mm_current();

	if (!hmm_is_err(mm)) {
		printf("# engine %s\n", hmm_mm_engine(mm));
		return mm;
	}
	printf("1..%d\n", count);
	for (int i = 0; i < count; i++)
		printf("%sok %d - %s # SKIP %s\n", hmm_ptr_err(mm) == -EOPNOTSUPP ? "" : "not ", i + 1,
		       tests[i].name, hmm_last_error());
	return NULL;
}

#endif
