/* Bad input to the functions of the address space: the documented error, and nothing changed. */
#include "device.h"

#define PAGES 4

static struct mm_struct *mm;
static unsigned char *memory;

/* Pointers that are no handle of any kind. */
static void *const foreign[] = {
	NULL, (void *)1, (void *)0x1000, (void *)0x7fffffffe000, (void *)-8L, (void *)-4096L, (void *)&mm, (void *)&foreign,
};

#define FOREIGN (sizeof(foreign) / sizeof(*foreign))

static void foreign_handles_are_refused(void)
{
	struct hmm_mm_counters counters = { .size = sizeof(counters) };
	unsigned char places[PAGES] = { 9 }, byte = 9;

	for (size_t i = 0; i < FOREIGN; i++) {
		struct mm_struct *bad = foreign[i];

		REFUSED(hmm_mm_put(bad), EINVAL);
		REFUSED(hmm_mm_sync(bad), EINVAL);
		REFUSED(hmm_mm_read_lock(bad), EINVAL);
		REFUSED(hmm_mm_read_unlock(bad), EINVAL);
		REFUSED(hmm_mm_write_lock(bad), EINVAL);
		REFUSED(hmm_mm_write_unlock(bad), EINVAL);
		REFUSED(hmm_mm_read(bad, memory, &byte, 1), EINVAL);
		REFUSED(hmm_mm_write(bad, memory, &byte, 1), EINVAL);
		REFUSED(hmm_pin_range(bad, memory, PAGE), EINVAL);
		REFUSED(hmm_unpin_range(bad, memory, PAGE), EINVAL);
		REFUSED(hmm_make_present(bad, memory, PAGE, true), EINVAL);
		REFUSED(hmm_residency(bad, memory, PAGE, places, PAGES), EINVAL);
		REFUSED(hmm_mm_counters(bad, &counters), EINVAL);
		CHECK(!hmm_mm_engine(bad));
		REFUSED(hmm_mm_capabilities(bad), EINVAL);
		CHECK(!hmm_mm_peek(bad, memory, &byte, 1) && !hmm_mm_poke(bad, memory, &byte, 1));
		CHECK(!hmm_find_vma(bad, address(memory)));
		CHECK_EQ(hmm_last_errno(), -EINVAL);
	}
	CHECK_EQ(byte, 9);
	CHECK_EQ(places[0], 9);
	CHECK_EQ(counters.cpu_faults, 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK(hmm_mm_current() == mm);
	CHECK_EQ(hmm_mm_put(mm), 0);
}

static void foreign_vmas_are_refused(void)
{
	for (size_t i = 0; i < FOREIGN; i++) {
		struct vm_area_struct *bad = foreign[i];

		CHECK_EQ(hmm_vma_start(bad), 0);
		CHECK_EQ(hmm_vma_end(bad), 0);
		CHECK_EQ(hmm_vma_flags(bad), 0);
		CHECK(!hmm_vma_mm(bad));
		CHECK(!hmm_vma_alloc_locked_page(bad, address(memory)));
		CHECK_EQ(hmm_last_errno(), -EINVAL);
	}
}

static void bad_ranges_are_refused(void)
{
	static const struct {
		unsigned long addr, length;
	} bad[] = { { 0, PAGE }, { PAGE, 0 }, { ~0UL, 1 }, { ~0UL - PAGE, 4 * PAGE }, { 1UL << 47, PAGE },
		    { PAGE, ~0UL }, { PAGE, 1UL << 47 } };
	unsigned char places[PAGES] = { 9 };

	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		void *addr = (void *)bad[i].addr;

		REFUSED(hmm_pin_range(mm, addr, bad[i].length), EINVAL);
		REFUSED(hmm_unpin_range(mm, addr, bad[i].length), EINVAL);
		REFUSED(hmm_make_present(mm, addr, bad[i].length, false), EINVAL);
		REFUSED(hmm_residency(mm, addr, bad[i].length, places, PAGES), EINVAL);
	}
	CHECK_EQ(places[0], 9);
	REFUSED(hmm_unpin_range(mm, memory, PAGE), EINVAL);
	REFUSED(hmm_residency(mm, memory, PAGES * PAGE, NULL, PAGES), EINVAL);
	REFUSED(hmm_residency(mm, memory, PAGES * PAGE, places, PAGES - 1), EINVAL);
	REFUSED(hmm_residency(mm, memory + PAGE - 1, 2, places, 1), EINVAL);
	CHECK_EQ(places[0], 9);
	CHECK_EQ(hmm_residency(mm, memory + PAGE - 1, 2, places, 2), 0);
	CHECK_EQ(places[0], HMM_RESIDENCY_SYSTEM);
}

static void memory_that_is_not_there(void)
{
	unsigned char *hole = memory_map(PAGES, PROT_READ | PROT_WRITE);
	unsigned char buffer[2 * PAGE], places[PAGES];

	memory_unmap(hole, PAGES);
	REFUSED(hmm_mm_read(mm, hole, buffer, 1), EFAULT);
	REFUSED(hmm_mm_write(mm, hole, buffer, 1), EFAULT);
	REFUSED(hmm_make_present(mm, hole, PAGE, false), EFAULT);
	CHECK(!hmm_mm_peek(mm, hole, buffer, 1) && !hmm_mm_poke(mm, hole, buffer, 1));
	CHECK_EQ(hmm_residency(mm, hole, PAGE, places, 1), 0);
	CHECK_EQ(places[0], HMM_RESIDENCY_UNMAPPED);
	REFUSED(hmm_mm_read(mm, memory, NULL, 1), EINVAL);
	REFUSED(hmm_mm_write(mm, memory, NULL, 1), EINVAL);
	CHECK(!hmm_mm_peek(mm, memory, NULL, 1) && !hmm_mm_poke(mm, memory, NULL, 1));
	/* The guard page behind the memory ends the transfer. */
	CHECK_EQ(hmm_mm_read(mm, memory + (PAGES - 1) * PAGE, buffer, 2 * PAGE), PAGE);
	CHECK_EQ(buffer[0], memory_pattern(PAGES - 1));
	mprotect(memory, PAGE, PROT_READ);
	REFUSED(hmm_mm_write(mm, memory, buffer, 1), EFAULT);
	REFUSED(hmm_make_present(mm, memory, PAGE, true), EPERM);
	mprotect(memory, PAGE, PROT_READ | PROT_WRITE);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
}

static void locks_are_held_by_threads(void)
{
	struct vm_area_struct *vma;

	REFUSED(hmm_mm_read_unlock(mm), EINVAL);
	REFUSED(hmm_mm_write_unlock(mm), EINVAL);
	CHECK(!find_vma(mm, address(memory)));
	CHECK_EQ(hmm_last_errno(), -EINVAL);

	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	REFUSED(hmm_mm_write_lock(mm), EDEADLK);
	REFUSED(hmm_mm_write_unlock(mm), EINVAL);
	vma = find_vma(mm, address(memory));
	CHECK(find_vma(mm, address(memory) + PAGE) == vma);
	CHECK_EQ(hmm_vma_start(vma), address(memory));
	CHECK_EQ(hmm_vma_end(vma), address(memory) + PAGES * PAGE);
	CHECK_EQ(hmm_vma_flags(vma), VM_READ | VM_WRITE);
	CHECK(hmm_vma_mm(vma) == mm);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	CHECK_EQ(hmm_vma_start(vma), address(memory));
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	CHECK_EQ(hmm_vma_start(vma), 0);
	REFUSED(hmm_mm_read_unlock(mm), EINVAL);

	CHECK_EQ(hmm_mm_write_lock(mm), 0);
	REFUSED(hmm_mm_write_lock(mm), EDEADLK);
	REFUSED(hmm_mm_read_lock(mm), EDEADLK);
	REFUSED(hmm_mm_read_unlock(mm), EINVAL);
	CHECK(find_vma(mm, address(memory)));
	CHECK(!find_vma(mm, 1UL << 47));
	CHECK_EQ(hmm_mm_write_unlock(mm), 0);
}

static void *unlock_for_another(void *result)
{
	*(int *)result = hmm_mm_read_unlock(mm);
	return NULL;
}

static void locks_are_not_released_by_others(void)
{
	pthread_t thread;
	int result = 0;

	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	pthread_create(&thread, NULL, unlock_for_another, &result);
	pthread_join(thread, NULL);
	CHECK_EQ(result, -EINVAL);
	CHECK(find_vma(mm, address(memory)));
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
}

static void vma_handles_run_out_and_come_back(void)
{
	unsigned char *two[2] = { memory, memory_map(1, PROT_READ) };
	int found = 0;

	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	while (find_vma(mm, address(two[found & 1])) && found < 100000)
		found++;
	CHECK_EQ(hmm_last_errno(), -ENOMEM);
	CHECK_EQ(found, 4096);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	CHECK(find_vma(mm, address(memory)));
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	memory_unmap(two[1], 1);
}

static void sized_structs_are_checked(void)
{
	struct {
		struct hmm_mm_counters counters;
		uint64_t guard;
	} out;

	memset(&out, 0x33, sizeof(out));
	out.counters.size = 3;
	REFUSED(hmm_mm_counters(mm, &out.counters), EINVAL);
	REFUSED(hmm_mm_counters(mm, NULL), EINVAL);
	REFUSED(hmm_mm_counters(mm, (void *)((char *)&out + 1)), EINVAL);
	CHECK_EQ(out.counters.cpu_faults, 0x3333333333333333);
	out.counters.size = 16;
	CHECK_EQ(hmm_mm_counters(mm, &out.counters), 0);
	CHECK(out.counters.cpu_faults != 0x3333333333333333);
	CHECK_EQ(out.counters.device_faults, 0x3333333333333333);
	CHECK_EQ(out.counters.size, 16);
	out.counters.size = sizeof(out);
	CHECK_EQ(hmm_mm_counters(mm, &out.counters), 0);
	CHECK_EQ(out.guard, 0);
	CHECK_EQ(out.counters.reserved, 0);
}

/* What the names of the engines promise. */
static void engines_say_what_they_can_do(void)
{
	const char *engine = hmm_mm_engine(mm);
	int can = hmm_mm_capabilities(mm);

	CHECK(can > 0 && can & HMM_CAPABILITY_MISSING_FAULTS);
	CHECK_EQ(!(can & HMM_CAPABILITY_KERNEL_FAULTS), strcmp(engine, "uffd") != 0);
	CHECK_EQ(!(can & HMM_CAPABILITY_EVENTS), !strcmp(engine, "signal"));
	CHECK_EQ(can & ~(HMM_CAPABILITY_MISSING_FAULTS | HMM_CAPABILITY_MOVE | HMM_CAPABILITY_KERNEL_FAULTS |
			 HMM_CAPABILITY_POISON | HMM_CAPABILITY_EVENTS | HMM_CAPABILITY_PRIVATE_FILES |
			 HMM_CAPABILITY_ORDERED), 0);
}

static void closed_address_spaces_are_refused(void)
{
	int capabilities = hmm_mm_capabilities(mm);
	struct mm_struct *before = mm;
	char engine[16];

	snprintf(engine, sizeof(engine), "%s", hmm_mm_engine(mm));
	CHECK_EQ(hmm_mm_put(mm), 0);
	REFUSED(hmm_mm_put(before), EINVAL);
	REFUSED(hmm_mm_sync(before), EINVAL);
	CHECK(!hmm_mm_engine(before));
	REFUSED(hmm_mm_capabilities(before), EINVAL);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	mm = hmm_mm_current();
	CHECK(!IS_ERR(mm));
	CHECK(!strcmp(hmm_mm_engine(mm), engine));
	CHECK_EQ(hmm_mm_capabilities(mm), capabilities);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(foreign_handles_are_refused),
		TEST(foreign_vmas_are_refused),
		TEST(bad_ranges_are_refused),
		TEST(memory_that_is_not_there),
		TEST(locks_are_held_by_threads),
		TEST(locks_are_not_released_by_others),
		TEST(vma_handles_run_out_and_come_back),
		TEST(sized_structs_are_checked),
		TEST(engines_say_what_they_can_do),
		TEST(closed_address_spaces_are_refused),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	memory_fill(memory, PAGES);
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
