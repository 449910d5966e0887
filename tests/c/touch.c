/* Which thread answers a touch, and that every answer is right: with and without hmm_devmem_set_signal_safe(). */
#include "device.h"

#define PAGES 16
#define THREADS 3

static struct mm_struct *mm;
static struct test_device device;
static unsigned char *memory;

/* Engines that learn of a touch by a signal let a safe driver answer in the thread that touched. */
static bool answers_in_place(void)
{
	return strcmp(hmm_mm_engine(mm), "uffd") != 0;
}

/* Touches pages that are on the device, one after another; tells how many were answered by this very thread. */
static int answered_by_toucher(void)
{
	int here = 0;

	memory_fill(memory, PAGES);
	/* A page that is still on its way after a touch would stay. */
	CHECK_EQ(hmm_make_present(mm, memory, PAGES * PAGE, true), 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	for (size_t i = 0; i < PAGES; i++) {
		int faults = device.faults;

		CHECK_EQ(((volatile unsigned char *)memory)[i * PAGE + i], memory_pattern(i));
		CHECK_EQ(device.faults, faults + 1);
		CHECK_EQ(device.fault_flags & FAULT_FLAG_REMOTE, 0);
		here += device.fault_thread == gettid();
	}
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	return here;
}

static void service_threads_answer_at_first(void)
{
	CHECK_EQ(answered_by_toucher(), 0);
}

static void a_safe_driver_answers_where_the_engine_lets_it(void)
{
	CHECK_EQ(hmm_devmem_set_signal_safe(device.devmem, true), 0);
	CHECK_EQ(answered_by_toucher(), answers_in_place() ? PAGES : 0);
	CHECK_EQ(hmm_devmem_set_signal_safe(device.devmem, false), 0);
	CHECK_EQ(answered_by_toucher(), 0);
}

static void what_is_not_device_memory_is_refused(void)
{
	REFUSED(hmm_devmem_set_signal_safe(NULL, true), EINVAL);
	REFUSED(hmm_devmem_set_signal_safe((void *)&device, true), EINVAL);
	REFUSED(hmm_devmem_set_signal_safe((void *)((char *)device.devmem + 8), true), EINVAL);
	REFUSED(hmm_devmem_set_signal_safe((void *)mm, false), EINVAL);
}

static atomic_bool stop;

/* Adds one to a word of its own in each page, again and again. */
static void *increment(void *word)
{
	unsigned long rounds = 0;

	while (!stop) {
		for (size_t page = 0; page < PAGES; page++)
			((volatile unsigned long *)word)[page * PAGE / sizeof(long)]++;
		rounds++;
	}
	return (void *)rounds;
}

/* Several threads touch the same pages at once, and the driver is made safe and unsafe in between. */
static void many_threads_touch_at_once(void)
{
	unsigned long *words = (void *)memory;
	pthread_t threads[THREADS];
	int faults = device.faults;

	memset(memory, 0, PAGES * PAGE);
	stop = false;
	for (int i = 0; i < THREADS; i++)
		pthread_create(&threads[i], NULL, increment, &words[i * 16]);
	for (int i = 0; i < 600; i++) {
		CHECK_EQ(hmm_devmem_set_signal_safe(device.devmem, i / 20 % 2), 0);
		CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	}
	stop = true;
	for (int i = 0; i < THREADS; i++) {
		void *rounds;

		pthread_join(threads[i], &rounds);
		for (size_t page = 0; page < PAGES; page++)
			CHECK_EQ(words[page * PAGE / sizeof(long) + i * 16], rounds);
	}
	printf("# %d touches answered\n", device.faults - faults);
	CHECK(device.faults > faults);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(service_threads_answer_at_first),
		TEST(a_safe_driver_answers_where_the_engine_lets_it),
		TEST(what_is_not_device_memory_is_refused),
		TEST(many_threads_touch_at_once),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	test_device_open(&device, mm);
	failed = tap_run(tests, count);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
	return hmm_mm_put(mm) ? 1 : failed;
}
