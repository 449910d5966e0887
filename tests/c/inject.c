/* Failures on request through the C face: what fails leaves pages where they are. */
#include "device.h"

#define PAGES 32
#define ROUNDS 40

static struct mm_struct *mm;
static struct test_device device;

static void memory_survives_failing_calls(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	test_device_open(&device, mm);
	CHECK_EQ(hmm_inject("all/7,seed=3"), 0);
	for (int round = 0; round < ROUNDS; round++) {
		memset(memory, round + 1, PAGES * PAGE);
		(void)test_device_migrate(&device, &test_to_device, memory, PAGES);
		for (size_t at = 0; at < PAGES * PAGE; at += 100)
			CHECK_EQ(memory[at], round + 1);
	}
	CHECK_EQ(hmm_inject(""), 0);
	test_device_close(&device);
	munmap(memory, PAGES * PAGE);
}

static void nonsense_is_refused(void)
{
	CHECK_EQ(hmm_inject(NULL), -EINVAL);
	CHECK_EQ(hmm_inject("copy"), -EOPNOTSUPP);
	CHECK(strstr(hmm_last_error(), "\"copy\"") != NULL);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(memory_survives_failing_calls),
		TEST(nonsense_is_refused),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
