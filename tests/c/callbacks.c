/* What callbacks may do, and what they are refused instead of hanging. */
#include "device.h"

#include <unistd.h>

#define PAGES 8

static struct mm_struct *mm;
static unsigned char *memory;

/* A device whose fault callback tries things out before it does its work. Pinned, since callbacks write to it. */
static struct {
	struct test_device device;
	struct hmm_mirror mirror;
	atomic_int inside_sync;
	int put, read_lock, read_unlock, outer_unlock, write_lock, alloc_errno, migrate, register_locked;
	unsigned long start, end, found;
	struct mm_struct *mm;
	bool stale;
	struct vm_area_struct *vma, *found_vma;
} probe;

static int probing_fault(struct hmm_devmem *devmem, struct vm_area_struct *vma, unsigned long addr, struct page *page,
			 unsigned int flags, pmd_t *pmdp)
{
	probe.vma = vma;
	probe.mm = hmm_vma_mm(vma);
	probe.start = hmm_vma_start(vma);
	probe.end = hmm_vma_end(vma);
	probe.put = hmm_mm_put(probe.mm);
	probe.read_lock = hmm_mm_read_lock(probe.mm);
	probe.found_vma = find_vma(probe.mm, addr);
	probe.found = hmm_vma_start(probe.found_vma);
	probe.read_unlock = hmm_mm_read_unlock(probe.mm);
	probe.outer_unlock = hmm_mm_read_unlock(probe.mm);
	probe.write_lock = hmm_mm_write_lock(probe.mm);
	probe.register_locked = hmm_mirror_register_locked(&probe.mirror, probe.mm);
	hmm_vma_alloc_locked_page(vma, addr);
	probe.alloc_errno = hmm_last_errno();
	return test_device_fault(devmem, vma, addr, page, flags, pmdp);
}

static void a_fault_callback_holds_the_lock_for_reading(void)
{
	static const struct hmm_devmem_ops ops = { test_device_free, probing_fault };

	hmm_devmem_remove(probe.device.devmem);
	probe.device.devmem = hmm_devmem_add(&ops, &probe.device.device->device, TEST_DEVICE_PAGES * PAGE);
	memory_fill(memory, PAGES);
	CHECK_EQ(test_device_migrate(&probe.device, &test_to_device, memory, PAGES), 0);
	CHECK_EQ(memory[PAGE], memory_pattern(1));
	CHECK(probe.mm == mm);
	CHECK(probe.start <= address(memory) + PAGE && address(memory) + 2 * PAGE <= probe.end);
	CHECK_EQ(probe.read_lock, 0);
	CHECK_EQ(probe.found, address(memory));
	CHECK_EQ(probe.read_unlock, 0);
	/* The callback's own hold is not the driver's to release; the rest would wait for itself. */
	CHECK_EQ(probe.outer_unlock, -EINVAL);
	CHECK_EQ(probe.write_lock, -EDEADLK);
	CHECK_EQ(probe.register_locked, -EINVAL);
	CHECK_EQ(probe.put, -EDEADLK);
	CHECK_EQ(probe.alloc_errno, -EINVAL);
	/* Handles that the callback got, or found, end with it; the touch may have gone on a little earlier. */
	for (int i = 0; i < 5000 && hmm_vma_start(probe.vma); i++)
		usleep(1000);
	CHECK_EQ(hmm_vma_start(probe.vma), 0);
	CHECK_EQ(hmm_vma_start(probe.found_vma), 0);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
}

/* Migration would wait for the very invalidation that this callback belongs to. */
static void trying_update(struct hmm_mirror *mirror, enum hmm_update_type type, unsigned long start, unsigned long end)
{
	static unsigned long src, dst;
	unsigned long other = address(memory) + 3 * PAGE;

	(void)mirror, (void)type;
	if (end <= address(memory) || address(memory) + PAGES * PAGE <= start || atomic_exchange(&probe.inside_sync, 1))
		return;
	hmm_mm_read_lock(mm);
	probe.migrate = migrate_vma(&test_to_device, find_vma(mm, other), 1, other, other + PAGE, &src, &dst, &probe.device);
	hmm_mm_read_unlock(mm);
}

static void an_update_callback_does_not_migrate(void)
{
	static const struct hmm_mirror_ops ops = { .sync_cpu_device_pagetables = trying_update };
	static hmm_pfn_t pfns[PAGES];
	struct hmm_range range;

	memory_fill(memory, PAGES);
	probe.mirror.ops = &ops;
	CHECK_EQ(hmm_mirror_register(&probe.mirror, mm), 0);
	hmm_mm_read_lock(mm);
	CHECK_EQ(hmm_vma_get_pfns(find_vma(mm, address(memory)), &range, address(memory),
				  address(memory) + PAGES * PAGE, pfns), 0);
	hmm_vma_range_done(NULL, &range);
	hmm_mm_read_unlock(mm);
	test_device_change(&probe.device, memory);
	hmm_mm_sync(mm);
	CHECK_EQ(probe.inside_sync, 1);
	CHECK_EQ(probe.migrate, -EDEADLK);
	hmm_mirror_unregister(&probe.mirror);
}

static void *fail_on_another_thread(void *text)
{
	hmm_mm_sync(NULL);
	snprintf(text, 64, "%s", hmm_last_error());
	return NULL;
}

static void errors_belong_to_threads(void)
{
	char mine[256], text[64] = "";
	pthread_t thread;

	REFUSED(hmm_residency(mm, memory, 0, NULL, 0), EINVAL);
	snprintf(mine, sizeof(mine), "%s", hmm_last_error());
	pthread_create(&thread, NULL, fail_on_another_thread, text);
	pthread_join(thread, NULL);
	CHECK(strstr(text, "mm_struct"));
	CHECK(!strcmp(mine, hmm_last_error()) && strcmp(mine, text));
	CHECK_EQ(hmm_last_errno(), -EINVAL);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(a_fault_callback_holds_the_lock_for_reading),
		TEST(an_update_callback_does_not_migrate),
		TEST(errors_belong_to_threads),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	test_device_open(&probe.device, mm);
	if (hmm_pin_range(mm, &probe, sizeof(probe)))
		return 2;
	failed = tap_run(tests, count);
	test_device_close(&probe.device);
	return hmm_mm_put(mm) ? 1 : failed;
}
