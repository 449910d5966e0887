/* Guards: system calls on memory that is on a device, on every engine. */
#include "device.h"

#include <sys/uio.h>
#include <sys/wait.h>

#define PAGES 8
/* Bytes that begin and end in the middle of pages. */
#define OFFSET 100
#define BYTES (PAGES * PAGE - 300)

static struct mm_struct *mm;
static struct test_device device;
static int file;

/* Fresh memory whose pages are all on the device. */
static unsigned char *on_device(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);

	memory_fill(memory, PAGES);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	return memory;
}

/* Tries to send all pages away. They are home first: one that is still on its way after a touch would stay. */
static void check_migrates(unsigned char *memory, size_t pages)
{
	CHECK(hmm_make_present(mm, memory, PAGES * PAGE, true) >= 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), pages);
}

static void check_empty(const struct hmm_guard *guard)
{
	CHECK(!guard->held && !guard->start && !guard->end && !guard->reserved);
}

static void system_calls_work_on_guarded_pages(void)
{
	unsigned char *from = on_device(), *to = on_device();
	struct hmm_guard reads = HMM_GUARD_NONE, writes = HMM_GUARD_NONE;
	struct iovec parts[2] = { { to + OFFSET, PAGE }, { to + OFFSET + PAGE, BYTES - PAGE } };

	CHECK_EQ(hmm_guard(mm, &reads, from + OFFSET, BYTES, false), 0);
	CHECK_EQ(reads.start, address(from));
	CHECK_EQ(reads.end, address(from) + PAGES * PAGE);
	CHECK_EQ(pwrite(file, from + OFFSET, BYTES, 0), BYTES);
	hmm_unguard(&reads);
	check_empty(&reads);

	memset(to, 0, PAGES * PAGE);
	check_migrates(to, PAGES);
	CHECK_EQ(hmm_guard(mm, &writes, to + OFFSET, BYTES, true), 0);
	CHECK_EQ(preadv(file, parts, 2, 0), BYTES);
	hmm_unguard(&writes);
	CHECK(!memcmp(from + OFFSET, to + OFFSET, BYTES));
	CHECK(!to[OFFSET - 1] && !to[OFFSET + BYTES]);
	CHECK_EQ(memory_wrong(from, PAGES), 0);
	memory_unmap(from, PAGES);
	memory_unmap(to, PAGES);
}

/* Why there are guards: what the capability says is what happens. No byte is lost by it. */
static void without_a_guard_system_calls_wait_or_fail(void)
{
	unsigned char *memory = on_device();
	bool waits = hmm_mm_capabilities(mm) & HMM_CAPABILITY_KERNEL_FAULTS;
	ssize_t count = pwrite(file, memory, PAGE, 0);

	CHECK_EQ(count, waits ? (ssize_t)PAGE : -1);
	CHECK(waits || errno == EFAULT);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

static void guarded_pages_stay_and_holes_become_present(void)
{
	unsigned char *memory = on_device(), *holes = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_guard guard = HMM_GUARD_NONE;

	/* One byte before and one behind the border of two pages. */
	CHECK_EQ(hmm_guard(mm, &guard, memory + 3 * PAGE - 1, 2, true), 0);
	CHECK_EQ(memory_count(mm, memory + 2 * PAGE, 2, HMM_RESIDENCY_SYSTEM), 2);
	check_migrates(memory, PAGES - 2);
	CHECK_EQ(memory_count(mm, memory + 2 * PAGE, 2, HMM_RESIDENCY_SYSTEM), 2);
	hmm_unguard(&guard);
	check_migrates(memory, PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);

	CHECK_EQ(hmm_guard(mm, &guard, holes, 2 * PAGE, true), 0);
	CHECK_EQ(memory_count(mm, holes, PAGES, HMM_RESIDENCY_SYSTEM), 2);
	check_migrates(holes, PAGES - 2);
	hmm_unguard(&guard);
	check_migrates(holes, PAGES);
	memory_unmap(memory, PAGES);
	memory_unmap(holes, PAGES);
}

static void guards_nest(void)
{
	unsigned char *memory = on_device();
	struct hmm_guard outer = HMM_GUARD_NONE, same = HMM_GUARD_NONE, inner = HMM_GUARD_NONE;

	CHECK_EQ(hmm_guard(mm, &outer, memory, 4 * PAGE, true), 0);
	CHECK_EQ(hmm_guard(mm, &same, memory, 4 * PAGE, false), 0);
	CHECK_EQ(hmm_guard(mm, &inner, memory + PAGE, 1, true), 0);
	CHECK_EQ(hmm_pin_range(mm, memory + 2 * PAGE, PAGE), 0);
	check_migrates(memory, PAGES - 4);
	/* Not in the order in which they came. */
	hmm_unguard(&outer);
	check_migrates(memory, PAGES - 4);
	hmm_unguard(&same);
	check_migrates(memory, PAGES - 2);
	hmm_unguard(&inner);
	check_migrates(memory, PAGES - 1);
	CHECK_EQ(hmm_unpin_range(mm, memory + 2 * PAGE, PAGE), 0);
	check_migrates(memory, PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

/* Leaves its scopes in the middle. */
static int leave_at(unsigned char *memory, int place)
{
	HMM_GUARD_SCOPE(outer);

	if (place == 0)
		return 0;
	CHECK_EQ(hmm_guard(mm, &outer, memory, PAGE, true), 0);
	for (int round = 0; round < 3; round++) {
		HMM_GUARD_SCOPE(inner);

		CHECK_EQ(hmm_guard(mm, &inner, memory + 4 * PAGE, 2 * PAGE, false), 0);
		check_migrates(memory, PAGES - 3);
		if (place == 1)
			return 1;
		if (place == 2)
			break;
	}
	check_migrates(memory, PAGES - 1);
	return place;
}

static void scopes_let_go_however_they_are_left(void)
{
	unsigned char *memory = on_device();

	for (int place = 0; place < 4; place++) {
		CHECK_EQ(leave_at(memory, place), place);
		check_migrates(memory, PAGES);
	}
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

static void letting_go_twice_does_no_harm(void)
{
	unsigned char *memory = on_device();
	struct hmm_guard guard = HMM_GUARD_NONE, copy, odd;

	CHECK_EQ(hmm_guard(mm, &guard, memory, PAGE, true), 0);
	/* It holds something: that must not be forgotten. */
	copy = guard;
	REFUSED(hmm_guard(mm, &guard, memory + PAGE, PAGE, true), EINVAL);
	CHECK(!memcmp(&copy, &guard, sizeof(guard)));
	check_migrates(memory, PAGES - 1);

	REFUSED(hmm_mm_sync(NULL), EINVAL);
	CHECK_EQ(hmm_pin_range(mm, memory, 0), -EINVAL);
	hmm_unguard(&guard);
	check_empty(&guard);
	hmm_unguard(&guard);
	hmm_unguard(NULL);
	check_empty(&guard);
	check_migrates(memory, PAGES);

	/* A copy is the same guard, and what never was one is none. */
	CHECK_EQ(hmm_guard(mm, &guard, memory, PAGE, true), 0);
	copy = guard;
	hmm_unguard(&copy);
	REFUSED_VOID(hmm_unguard(&guard), EINVAL);
	check_empty(&guard);
	memset(&odd, 0x5a, sizeof(odd));
	REFUSED(hmm_guard(mm, &odd, memory, PAGE, true), EINVAL);
	REFUSED_VOID(hmm_unguard(&odd), EINVAL);
	check_empty(&odd);
	check_migrates(memory, PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

static void bad_input_is_refused_and_holds_nothing(void)
{
	static const struct {
		unsigned long addr, length;
	} bad[] = { { 0, PAGE }, { PAGE, 0 }, { ~0UL, 1 }, { ~0UL - PAGE, 4 * PAGE }, { 1UL << 47, PAGE }, { PAGE, ~0UL } };
	unsigned char *memory = on_device(), *hole = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_guard guard = HMM_GUARD_NONE;

	memory_unmap(hole, PAGES);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++)
		REFUSED(hmm_guard(mm, &guard, (void *)bad[i].addr, bad[i].length, true), EINVAL);
	REFUSED(hmm_guard(NULL, &guard, memory, PAGE, true), EINVAL);
	REFUSED(hmm_guard((void *)memory, &guard, memory, PAGE, true), EINVAL);
	REFUSED(hmm_guard(mm, NULL, memory, PAGE, true), EINVAL);
	REFUSED(hmm_guard(mm, (void *)((char *)&guard + 1), memory, PAGE, true), EINVAL);
	REFUSED(hmm_guard(mm, &guard, hole, PAGE, false), EFAULT);
	/* The page behind the memory is not to be had. */
	CHECK(hmm_guard(mm, &guard, memory + PAGE, PAGES * PAGE, false) < 0);
	check_empty(&guard);
	check_migrates(memory, PAGES);
	CHECK_EQ(hmm_make_present(mm, memory, PAGE, true), 1);
	CHECK_EQ(mprotect(memory, PAGE, PROT_READ), 0);
	REFUSED(hmm_guard(mm, &guard, memory, PAGE, true), EPERM);
	check_empty(&guard);
	CHECK_EQ(hmm_guard(mm, &guard, memory, PAGE, false), 0);
	hmm_unguard(&guard);
	CHECK_EQ(mprotect(memory, PAGE, PROT_READ | PROT_WRITE), 0);
	check_migrates(memory, PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	memory_unmap(memory, PAGES);
}

static void lost_pages_cannot_be_guarded(void)
{
	unsigned char *memory = on_device();
	struct hmm_guard guard = HMM_GUARD_NONE;

	device.lose = true;
	REFUSED(hmm_guard(mm, &guard, memory + PAGE, PAGE, false), EIO);
	check_empty(&guard);
	device.lose = false;
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_POISONED), 1);
	CHECK_EQ(hmm_guard(mm, &guard, memory + 2 * PAGE, PAGE, false), 0);
	hmm_unguard(&guard);
	memory_unmap(memory, PAGES);
	CHECK_EQ(hmm_mm_sync(mm), 0);
}

static void guards_run_out_and_come_back(void)
{
	static struct hmm_guard guards[2000];
	unsigned char *memory = on_device();
	int count = 0;

	while (count < 2000 && !hmm_guard(mm, &guards[count], memory + count % 2 * PAGE, 1, false))
		count++;
	CHECK_EQ(count, 1024);
	REFUSED(hmm_guard(mm, &guards[count], memory, 1, false), ENOMEM);
	check_empty(&guards[count]);
	check_migrates(memory, PAGES - 2);
	hmm_unguard(&guards[500]);
	CHECK_EQ(hmm_guard(mm, &guards[500], memory, 1, false), 0);
	while (count)
		hmm_unguard(&guards[--count]);
	check_migrates(memory, PAGES);
	memory_unmap(memory, PAGES);
}

static atomic_bool stop;

/* Writes its page to the file and reads it again, guarded: neither may fail or come short. */
static void *use_a_page(void *argument)
{
	unsigned char *page = argument;
	off_t place = (off_t)(address(page) / PAGE % PAGES * PAGE);
	size_t failures = 0;

	while (!stop) {
		struct hmm_guard guard = HMM_GUARD_NONE;

		failures += hmm_guard(mm, &guard, page, PAGE, true) != 0;
		failures += pwrite(file, page, PAGE, place) != (ssize_t)PAGE;
		failures += pread(file, page, PAGE, place) != (ssize_t)PAGE;
		hmm_unguard(&guard);
	}
	return (void *)failures;
}

static void guards_hold_while_others_migrate(void)
{
	unsigned char *memory = on_device();
	pthread_t threads[3];
	int copies = device.copies;

	stop = false;
	for (int i = 0; i < 3; i++)
		pthread_create(&threads[i], NULL, use_a_page, memory + 2 * i * PAGE);
	for (int i = 0; i < 2000; i++)
		CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES), 0);
	stop = true;
	for (int i = 0; i < 3; i++) {
		void *failures;

		pthread_join(threads[i], &failures);
		CHECK_EQ((size_t)failures, 0);
	}
	printf("# %d copies by the device\n", device.copies - copies);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	check_migrates(memory, PAGES);
	memory_unmap(memory, PAGES);
}

static void a_child_lets_go_of_its_own_copy(void)
{
	unsigned char *memory = on_device();
	struct hmm_guard guard = HMM_GUARD_NONE, other = HMM_GUARD_NONE;
	int status = -1;
	pid_t pid;

	CHECK_EQ(hmm_guard(mm, &guard, memory, PAGE, true), 0);
	pid = fork();
	if (!pid) {
		tap_failures = 0;
		hmm_unguard(&guard);
		check_empty(&guard);
		REFUSED(hmm_guard(mm, &other, memory, PAGE, true), ENODEV);
		fflush(stdout);
		_exit(tap_failures);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
	check_migrates(memory, PAGES - 1);
	hmm_unguard(&guard);
	check_migrates(memory, PAGES);
	memory_unmap(memory, PAGES);
}

static void guards_may_outlive_their_memory_and_the_address_space(void)
{
	unsigned char *memory = on_device();
	struct hmm_guard gone = HMM_GUARD_NONE, held = HMM_GUARD_NONE, late = HMM_GUARD_NONE;
	struct mm_struct *before = mm;

	CHECK_EQ(hmm_guard(mm, &gone, memory + (PAGES - 1) * PAGE, PAGE, true), 0);
	CHECK_EQ(hmm_guard(mm, &held, memory, PAGE, true), 0);
	munmap(memory + (PAGES - 1) * PAGE, PAGE);
	hmm_unguard(&gone);
	test_device_close(&device);
	CHECK_EQ(hmm_mm_put(mm), 0);
	REFUSED(hmm_guard(before, &late, memory, PAGE, true), EINVAL);
	check_empty(&late);
	CHECK_EQ(memory_wrong(memory, PAGES - 1), 0);
	hmm_unguard(&held);
	check_empty(&held);
	mm = hmm_mm_current();
	CHECK(!IS_ERR(mm));
	test_device_open(&device, mm);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, memory, PAGES - 1), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES - 1);
	memory_unmap(memory, PAGES);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(system_calls_work_on_guarded_pages),
		TEST(without_a_guard_system_calls_wait_or_fail),
		TEST(guarded_pages_stay_and_holes_become_present),
		TEST(guards_nest),
		TEST(scopes_let_go_however_they_are_left),
		TEST(letting_go_twice_does_no_harm),
		TEST(bad_input_is_refused_and_holds_nothing),
		TEST(lost_pages_cannot_be_guarded),
		TEST(guards_run_out_and_come_back),
		TEST(guards_hold_while_others_migrate),
		TEST(a_child_lets_go_of_its_own_copy),
		TEST(guards_may_outlive_their_memory_and_the_address_space),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	file = memfd_create("guard", MFD_CLOEXEC);
	test_device_open(&device, mm);
	failed = tap_run(tests, count);
	test_device_close(&device);
	return hmm_mm_put(mm) ? 1 : failed;
}
