/* Memory groups and resident memory, through the C face: promises 75 to 78. */
#include "device.h"

#define PAGES 24

static struct mm_struct *mm;
static struct test_device device;

static struct hmm_group_state state_of(const struct hmm_group *group)
{
	struct hmm_group_state state = { .size = sizeof(state) };

	CHECK_EQ(hmm_group_read(group, &state), 0);
	CHECK_EQ(state.stat_anon, state.current);
	return state;
}

static uint64_t anonymous(void)
{
	struct hmm_mm_rss rss = { .size = sizeof(rss) };

	CHECK_EQ(hmm_mm_rss(mm, &rss), 0);
	CHECK(rss.file > 0);
	return rss.anon;
}

static int to_device(void *memory, size_t pages)
{
	return test_device_migrate(&device, &test_to_device, memory, pages);
}

static void a_charge_follows_its_page_and_stays_with_its_group(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_group *parent = hmm_group_create(NULL), *group = hmm_group_create(parent);
	struct hmm_group *other = hmm_group_create(NULL);

	test_device_open(&device, mm);
	CHECK_EQ(hmm_mm_set_group(mm, group), 0);
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(state_of(group).stat_device, PAGES * PAGE);
	CHECK_EQ(hmm_mm_set_group(mm, other), 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_system, memory, PAGES), 0);
	CHECK_EQ(state_of(group).current, PAGES * PAGE);
	CHECK_EQ(state_of(group).stat_device, 0);
	CHECK_EQ(state_of(parent).current, PAGES * PAGE);
	CHECK_EQ(state_of(other).current, 0);
	CHECK_EQ(hmm_mm_move_charges(mm), PAGES);
	CHECK_EQ(state_of(group).current, 0);
	CHECK_EQ(state_of(group).peak, PAGES * PAGE);
	CHECK_EQ(state_of(other).current, PAGES * PAGE);
	CHECK(state_of(NULL).current >= PAGES * PAGE);
	memory_unmap(memory, PAGES);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	CHECK_EQ(hmm_mm_settle_charges(mm), 0);
	CHECK_EQ(state_of(other).current, 0);
	test_device_close(&device);
	CHECK_EQ(hmm_mm_set_group(mm, NULL), 0);
	CHECK_EQ(hmm_group_put(group) | hmm_group_put(parent) | hmm_group_put(other), 0);
}

static void a_limit_keeps_holes_and_nothing_else(void)
{
	unsigned char *memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	struct hmm_group *group = hmm_group_create(NULL);

	test_device_open(&device, mm);
	CHECK_EQ(hmm_mm_set_group(mm, group), 0);
	CHECK_EQ(hmm_group_set_max(group, 10 * PAGE + 5), 0);
	CHECK_EQ(state_of(group).max, 10 * PAGE);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), 10);
	CHECK_EQ(state_of(group).events_max, PAGES - 10);
	memory_fill(memory, PAGES);
	CHECK_EQ(to_device(memory, PAGES), 0);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_DEVICE), PAGES);
	CHECK_EQ(state_of(group).current, PAGES * PAGE);
	CHECK_EQ(hmm_group_set_max(group, 0), 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
	CHECK_EQ(hmm_group_set_max(group, HMM_GROUP_NO_LIMIT), 0);
	CHECK(state_of(group).max == HMM_GROUP_NO_LIMIT);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	test_device_close(&device);
	memory_unmap(memory, PAGES);
	/* The address space is in it still: the handle may go. */
	CHECK_EQ(hmm_group_put(group), 0);
	CHECK_EQ(hmm_mm_set_group(mm, NULL), 0);
}

static void resident_memory_does_not_change_by_migration(void)
{
	unsigned char *memory = memory_map(64, PROT_READ | PROT_WRITE);
	long long before, away;

	test_device_open(&device, mm);
	memset(device.memory, 1, sizeof(device.memory));
	memory_fill(memory, 64);
	CHECK_EQ(to_device(memory, 64), 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_system, memory, 64), 0);
	before = (long long)anonymous();
	CHECK_EQ(to_device(memory, 64), 0);
	away = (long long)anonymous();
	CHECK(llabs(away - before) < 32 * (long long)PAGE);
	test_device_close(&device);
	memory_unmap(memory, 64);
}

static void evicted_pages_make_room(void)
{
	unsigned char *memory = memory_map(80, PROT_READ | PROT_WRITE);
	unsigned long first;

	test_device_open(&device, mm);
	first = device.devmem->pfn_first;
	memory_fill(memory, 80);
	CHECK_EQ(to_device(memory, 80), 0);
	CHECK_EQ(memory_count(mm, memory, 80, HMM_RESIDENCY_DEVICE), TEST_DEVICE_PAGES);
	CHECK_EQ(hmm_devmem_evict(device.devmem, first, 16), 16);
	CHECK_EQ(hmm_devmem_evict(device.devmem, first, 16), 0);
	CHECK_EQ(to_device(memory + 64 * PAGE, 16), 0);
	CHECK_EQ(memory_count(mm, memory + 64 * PAGE, 16, HMM_RESIDENCY_DEVICE), 16);
	CHECK_EQ(memory_wrong(memory, 80), 0);
	REFUSED(hmm_devmem_evict(device.devmem, first, TEST_DEVICE_PAGES + 1), EINVAL);
	CHECK_EQ(hmm_mm_sync(mm), 0);
	test_device_close(&device);
	memory_unmap(memory, 80);
}

static void bad_arguments_are_refused(void)
{
	struct hmm_group *group = hmm_group_create(NULL);
	struct hmm_group_state state = { .size = 3 };
	struct hmm_mm_rss rss = { .size = 0 };
	struct hmm_group *none = (struct hmm_group *)(void *)&state;

	REFUSED(hmm_group_read(group, &state), EINVAL);
	REFUSED(hmm_group_read(group, NULL), EINVAL);
	REFUSED(hmm_group_read(none, &state), EINVAL);
	REFUSED(hmm_group_set_max(NULL, 0), EINVAL);
	REFUSED(hmm_mm_set_group(mm, none), EINVAL);
	REFUSED(hmm_mm_set_group(NULL, group), EINVAL);
	REFUSED(hmm_mm_rss(mm, &rss), EINVAL);
	REFUSED(hmm_mm_check_accounts(NULL), EINVAL);
	REFUSED_POINTER(hmm_group_create(none), EINVAL);
	CHECK_EQ(hmm_group_put(group), 0);
	REFUSED(hmm_group_put(group), EINVAL);
	REFUSED(hmm_group_put(NULL), EINVAL);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(a_charge_follows_its_page_and_stays_with_its_group),
		TEST(a_limit_keeps_holes_and_nothing_else),
		TEST(resident_memory_does_not_change_by_migration),
		TEST(evicted_pages_make_room),
		TEST(bad_arguments_are_refused),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	failed = tap_run(tests, count);
	return hmm_mm_put(mm) ? 1 : failed;
}
