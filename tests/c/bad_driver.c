/* Bad input to the functions of mirrors, ranges, device memory and migration: the documented error, nothing changed. */
#include "device.h"

#include <fcntl.h>
#include <unistd.h>

#define PAGES 4

static struct mm_struct *mm;
static unsigned char *memory;
static struct test_device device;

static void on_update(struct hmm_mirror *mirror, enum hmm_update_type type, unsigned long start, unsigned long end)
{
	(void)mirror, (void)type, (void)start, (void)end;
}

static const struct hmm_mirror_ops ops = { .sync_cpu_device_pagetables = on_update };
static struct hmm_mirror mirror = { .ops = &ops };

/* One byte behind something that is aligned. */
static void *misaligned(const void *pointer)
{
	return (char *)pointer + 1;
}

static void mirrors_are_checked(void)
{
	static const struct hmm_mirror_ops empty;
	struct hmm_mirror bad = { .ops = &ops }, before;

	REFUSED(hmm_mirror_register(NULL, mm), EINVAL);
	REFUSED(hmm_mirror_register(misaligned(&bad), mm), EINVAL);
	REFUSED(hmm_mirror_register(&bad, NULL), EINVAL);
	REFUSED(hmm_mirror_register(&bad, (struct mm_struct *)(void *)&bad), EINVAL);
	REFUSED(hmm_mirror_register_locked(&bad, mm), EINVAL);
	REFUSED(hmm_mirror_register_locked(NULL, mm), EINVAL);
	bad.ops = NULL;
	REFUSED(hmm_mirror_register(&bad, mm), EINVAL);
	bad.ops = &empty;
	REFUSED(hmm_mirror_register(&bad, mm), EINVAL);
	bad.ops = misaligned(&ops);
	memcpy(&before, &bad, sizeof(bad));
	REFUSED(hmm_mirror_register(&bad, mm), EINVAL);
	CHECK(!memcmp(&before, &bad, sizeof(bad)));

	bad.ops = &ops;
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	REFUSED(hmm_mirror_register(&bad, mm), EDEADLK);
	REFUSED(hmm_mirror_register_locked(&bad, mm), EINVAL);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	CHECK_EQ(hmm_mm_write_lock(mm), 0);
	REFUSED(hmm_mirror_register(&bad, mm), EDEADLK);
	CHECK_EQ(hmm_mirror_register_locked(&bad, mm), 0);
	CHECK_EQ(hmm_mm_write_unlock(mm), 0);
	REFUSED(hmm_mirror_register(&bad, mm), EBUSY);
	hmm_mirror_unregister(&bad);
	CHECK_EQ(hmm_last_errno(), 0);
	hmm_mirror_unregister(&bad);
	CHECK_EQ(hmm_last_errno(), 0);
	hmm_mirror_unregister(NULL);
	CHECK_EQ(hmm_last_errno(), 0);
}

static void ranges_need_a_mirror(void)
{
	hmm_pfn_t pfn = 0x77;
	struct hmm_range range;
	struct vm_area_struct *vma;

	hmm_mirror_unregister(&mirror);
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	vma = find_vma(mm, address(memory));
	REFUSED(hmm_vma_get_pfns(vma, &range, address(memory), address(memory) + PAGE, &pfn), EINVAL);
	REFUSED(hmm_vma_fault(vma, &range, address(memory), address(memory) + PAGE, &pfn, true, true), EINVAL);
	CHECK_EQ(pfn, 0x77);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	CHECK_EQ(hmm_mirror_register(&mirror, mm), 0);
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	/* The old handle died with its lock. */
	REFUSED(hmm_vma_get_pfns(vma, &range, address(memory), address(memory) + PAGE, &pfn), EINVAL);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
}

static void ranges_are_checked(void)
{
	unsigned long start = address(memory), end = start + PAGES * PAGE;
	hmm_pfn_t pfns[PAGES + 1];
	struct hmm_range range, before;
	struct vm_area_struct *vma;

	memset(pfns, 0x77, sizeof(pfns));
	memset(&range, 0x66, sizeof(range));
	before = range;
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	vma = find_vma(mm, start);
#define BAD(vma, range, start, end, pfns)                                                      \
	do {                                                                                   \
		REFUSED(hmm_vma_get_pfns(vma, range, start, end, pfns), EINVAL);               \
		REFUSED(hmm_vma_fault(vma, range, start, end, pfns, false, true), EINVAL);     \
		REFUSED(hmm_vma_fault(vma, range, start, end, pfns, true, false), EINVAL);     \
	} while (0)
	BAD(NULL, &range, start, end, pfns);
	BAD((struct vm_area_struct *)(void *)mm, &range, start, end, pfns);
	BAD(vma, NULL, start, end, pfns);
	BAD(vma, (struct hmm_range *)misaligned(&range), start, end, pfns);
	BAD(vma, &range, start, end, NULL);
	BAD(vma, &range, start, end, (hmm_pfn_t *)misaligned(pfns));
	BAD(vma, &range, start + 1, end, pfns);
	BAD(vma, &range, start, end - 1, pfns);
	BAD(vma, &range, end, start, pfns);
	BAD(vma, &range, start, start, pfns);
	BAD(vma, &range, start - PAGE, end, pfns);
	BAD(vma, &range, start, end + PAGE, pfns);
	BAD(vma, &range, 0, ~0UL & PAGE_MASK, pfns);
	BAD(vma, &range, start, 1UL << 63, pfns);
	CHECK(!hmm_vma_range_done(vma, &range));
	CHECK(!hmm_vma_range_done(vma, NULL));
	CHECK(!hmm_vma_range_done(vma, misaligned(&range)));
	CHECK_EQ(hmm_last_errno(), -EINVAL);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	CHECK(!memcmp(&before, &range, sizeof(range)));
	for (size_t i = 0; i <= PAGES; i++)
		CHECK_EQ(pfns[i], 0x7777777777777777);
}

static void special_mappings_are_reported_as_special(void)
{
	unsigned long vdso = 0, end;
	char line[256];
	FILE *maps = fopen("/proc/self/maps", "r");
	hmm_pfn_t pfns[64] = { 0 };
	unsigned long src[64], dst[64];
	struct hmm_range range;
	struct vm_area_struct *vma;

	while (fgets(line, sizeof(line), maps))
		if (strstr(line, "[vvar]"))
			vdso = strtoul(line, NULL, 16);
	fclose(maps);
	if (!vdso)
		return;
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	vma = find_vma(mm, vdso);
	CHECK_EQ(hmm_vma_flags(vma) & VM_PFNMAP, VM_PFNMAP);
	end = hmm_vma_end(vma);
	REFUSED(hmm_vma_get_pfns(vma, &range, vdso, end, pfns), EINVAL);
	for (size_t i = 0; i < (end - vdso) / PAGE; i++)
		CHECK_EQ(pfns[i], HMM_PFN_SPECIAL);
	CHECK_EQ(pfns[(end - vdso) / PAGE], 0);
	REFUSED(migrate_vma(&test_to_device, vma, 64, vdso, end, src, dst, &device), EINVAL);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
}

static void device_memory_is_checked(void)
{
	struct hmm_devmem_ops half = test_devmem_ops;
	struct resource *resource = (struct resource *)(void *)&half;

	REFUSED_POINTER(hmm_devmem_add(NULL, NULL, PAGE), EINVAL);
	REFUSED_POINTER(hmm_devmem_add(misaligned(&test_devmem_ops), NULL, PAGE), EINVAL);
	REFUSED_POINTER(hmm_devmem_add(&test_devmem_ops, NULL, 0), EINVAL);
	REFUSED_POINTER(hmm_devmem_add(&test_devmem_ops, NULL, ~0UL), EINVAL);
	REFUSED_POINTER(hmm_devmem_add(&test_devmem_ops, NULL, (256UL << 30) + 1), EINVAL);
	REFUSED_POINTER(hmm_devmem_add_resource(&test_devmem_ops, NULL, NULL), EINVAL);
	REFUSED_POINTER(hmm_devmem_add_resource(NULL, NULL, resource), EINVAL);
	REFUSED_POINTER(hmm_devmem_add_resource(&test_devmem_ops, NULL, resource), EOPNOTSUPP);
	half.free = NULL;
	REFUSED_POINTER(hmm_devmem_add(&half, NULL, PAGE), EINVAL);
	half = test_devmem_ops;
	half.fault = NULL;
	REFUSED_POINTER(hmm_devmem_add(&half, NULL, PAGE), EINVAL);
	REFUSED_POINTER(hmm_devmem_add_resource(&half, NULL, resource), EINVAL);

	hmm_devmem_remove(NULL);
	CHECK_EQ(hmm_last_errno(), 0);
	REFUSED_VOID(hmm_devmem_remove((struct hmm_devmem *)(void *)&device), EINVAL);
	REFUSED_VOID(hmm_devmem_remove(misaligned(device.devmem)), EINVAL);
	REFUSED(hmm_devmem_in_use(NULL), EINVAL);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), 0);
}

static void device_memory_runs_out_and_comes_back(void)
{
	struct hmm_devmem *all[65];
	int count = 0;

	while (count < 65 && !IS_ERR(all[count] = hmm_devmem_add(&test_devmem_ops, NULL, 1)))
		count++;
	CHECK(count >= 32 && count < 65);
	REFUSED_POINTER(all[count], ENOMEM);
	for (int i = 0; i < count; i++) {
		CHECK_EQ(all[i]->pfn_last - all[i]->pfn_first, 1);
		hmm_devmem_remove(all[i]);
		CHECK_EQ(hmm_last_errno(), 0);
	}
	REFUSED_VOID(hmm_devmem_remove(all[0]), EINVAL);
	all[0] = hmm_devmem_add(&test_devmem_ops, NULL, PAGE + 1);
	CHECK_EQ(all[0]->pfn_last - all[0]->pfn_first, 2);
	CHECK(all[0]->ops == &test_devmem_ops && !all[0]->device);
	hmm_devmem_remove(all[0]);
}

static void page_words_are_for_device_pages(void)
{
	struct page *page = pfn_to_page(device.devmem->pfn_first);
	struct page *const bad[] = { NULL, (struct page *)(void *)&device, pfn_to_page(address(memory) >> PAGE_SHIFT),
				     pfn_to_page(device.devmem->pfn_last), pfn_to_page((1UL << 48) - 1) };

	hmm_devmem_page_set_drvdata(page, 0x1234567890abcdef);
	CHECK_EQ(hmm_last_errno(), 0);
	for (size_t i = 0; i < sizeof(bad) / sizeof(*bad); i++) {
		REFUSED_VOID(hmm_devmem_page_set_drvdata(bad[i], 1), EINVAL);
		CHECK_EQ(hmm_devmem_page_get_drvdata(bad[i]), 0);
	}
	CHECK_EQ(hmm_devmem_page_get_drvdata(page), 0x1234567890abcdef);
}

static void devices_are_counted(void)
{
	struct hmm_device *all[257];
	int count = 0, data;

	while (count < 257 && !IS_ERR(all[count] = hmm_device_new(&data)))
		count++;
	CHECK_EQ(count, 255);
	REFUSED_POINTER(all[count], EBUSY);
	for (int i = 0; i < count; i++) {
		CHECK_EQ(all[i]->minor, i + 1);
		CHECK(dev_get_drvdata(&all[i]->device) == &data);
		hmm_device_put(all[i]);
		CHECK_EQ(hmm_last_errno(), 0);
	}
	REFUSED_VOID(hmm_device_put(all[0]), EINVAL);
	REFUSED_VOID(hmm_device_put(NULL), EINVAL);
	REFUSED_VOID(hmm_device_put((struct hmm_device *)(void *)&data), EINVAL);
}

static void migrations_are_checked(void)
{
	unsigned long start = address(memory), end = start + PAGES * PAGE, src[PAGES + 1], dst[PAGES + 1];
	struct migrate_vma_ops half = { .alloc_and_copy = test_copy_out };
	const struct migrate_vma_ops *good = &test_to_device;
	struct vm_area_struct *vma;

	memset(src, 0x77, sizeof(src));
	memset(dst, 0x77, sizeof(dst));
	device.copies = 0;
	CHECK_EQ(hmm_mm_read_lock(mm), 0);
	vma = find_vma(mm, start);
	REFUSED(migrate_vma(NULL, vma, PAGES, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(misaligned(good), vma, PAGES, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(&half, vma, PAGES, start, end, src, dst, &device), EINVAL);
	half = (struct migrate_vma_ops){ .finalize_and_map = test_finalize };
	REFUSED(migrate_vma(&half, vma, PAGES, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, NULL, PAGES, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, (void *)mm, PAGES, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, PAGES - 1, start, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, PAGES, end, start, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, PAGES, start, start, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, PAGES, start, start + PAGE - 1, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, PAGES + 1, start, end + PAGE, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, ~0UL, start - PAGE, end, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, ~0UL, 0, ~0UL, src, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, PAGES, start, end, NULL, dst, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, PAGES, start, end, src, NULL, &device), EINVAL);
	REFUSED(migrate_vma(good, vma, PAGES, start, end, misaligned(src), dst, &device), EINVAL);
	CHECK_EQ(hmm_mm_read_unlock(mm), 0);
	REFUSED(migrate_vma(good, vma, PAGES, start, end, src, dst, &device), EINVAL);
	CHECK_EQ(device.copies, 0);
	for (size_t i = 0; i <= PAGES; i++)
		CHECK(src[i] == 0x7777777777777777 && dst[i] == 0x7777777777777777);
	CHECK_EQ(memory_count(mm, memory, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	CHECK_EQ(memory_wrong(memory, PAGES), 0);
}

static void memory_of_other_kinds_stays_where_it_is(void)
{
	unsigned char *shared = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	int file = open("/proc/self/exe", O_RDONLY);
	unsigned char *mapped = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, file, 0), first = mapped[0];

	memory_fill(shared, PAGES);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, shared, PAGES), 0);
	CHECK_EQ(memory_count(mm, shared, PAGES, HMM_RESIDENCY_SYSTEM), PAGES);
	CHECK_EQ(memory_wrong(shared, PAGES), 0);
	CHECK_EQ(test_device_migrate(&device, &test_to_device, mapped, 1), 0);
	CHECK_EQ(mapped[0], first);
	CHECK_EQ(hmm_devmem_in_use(device.devmem), 0);
	munmap(shared, PAGES * PAGE);
	munmap(mapped, PAGE);
	close(file);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(mirrors_are_checked),
		TEST(ranges_need_a_mirror),
		TEST(ranges_are_checked),
		TEST(special_mappings_are_reported_as_special),
		TEST(device_memory_is_checked),
		TEST(device_memory_runs_out_and_comes_back),
		TEST(page_words_are_for_device_pages),
		TEST(devices_are_counted),
		TEST(migrations_are_checked),
		TEST(memory_of_other_kinds_stays_where_it_is),
	};
	int count = sizeof(tests) / sizeof(*tests), failed;

	mm = tap_mm(tests, count);
	if (!mm)
		return 0;
	memory = memory_map(PAGES, PROT_READ | PROT_WRITE);
	memory_fill(memory, PAGES);
	test_device_open(&device, mm);
	if (hmm_mirror_register(&mirror, mm))
		return 2;
	failed = tap_run(tests, count);
	hmm_mirror_unregister(&mirror);
	test_device_close(&device);
	return hmm_mm_put(mm) ? 1 : failed;
}
