/* What the compiler knows of the header: sizes, offsets, constants, versions, conversions. Needs no engine. */
#include "tap.h"

#include <stddef.h>

#define SAME(value, expected) _Static_assert((value) == (expected), #value " is not " #expected)
#define OFFSET(type, member, expected) SAME(offsetof(type, member), expected)

/* Structures of the kernel's shape: part of the ABI. */
SAME(sizeof(struct hmm_list), 16);
SAME(sizeof(struct hmm_mirror_ops), 16);
OFFSET(struct hmm_mirror_ops, release, 0);
OFFSET(struct hmm_mirror_ops, sync_cpu_device_pagetables, 8);
SAME(sizeof(struct hmm_mirror), 64);
OFFSET(struct hmm_mirror, hmm, 0);
OFFSET(struct hmm_mirror, ops, 8);
OFFSET(struct hmm_mirror, list, 16);
SAME(sizeof(hmm_pfn_t), 8);
SAME(sizeof(struct hmm_range), 48);
OFFSET(struct hmm_range, list, 0);
OFFSET(struct hmm_range, start, 16);
OFFSET(struct hmm_range, end, 24);
OFFSET(struct hmm_range, pfns, 32);
OFFSET(struct hmm_range, valid, 40);
SAME(sizeof(struct hmm_range_4_17), 72);
OFFSET(struct hmm_range_4_17, vma, 0);
OFFSET(struct hmm_range_4_17, list, 8);
OFFSET(struct hmm_range_4_17, start, 24);
OFFSET(struct hmm_range_4_17, pfns, 40);
OFFSET(struct hmm_range_4_17, flags, 48);
OFFSET(struct hmm_range_4_17, values, 56);
OFFSET(struct hmm_range_4_17, pfn_shift, 64);
OFFSET(struct hmm_range_4_17, valid, 65);
SAME(sizeof(struct hmm_devmem_ops), 16);
OFFSET(struct hmm_devmem_ops, free, 0);
OFFSET(struct hmm_devmem_ops, fault, 8);
SAME(sizeof(struct hmm_devmem), 64);
OFFSET(struct hmm_devmem, pfn_first, 0);
OFFSET(struct hmm_devmem, pfn_last, 8);
OFFSET(struct hmm_devmem, device, 16);
OFFSET(struct hmm_devmem, ops, 24);
SAME(sizeof(struct device), 32);
SAME(sizeof(struct hmm_device), 48);
OFFSET(struct hmm_device, device, 0);
OFFSET(struct hmm_device, minor, 32);
SAME(sizeof(struct migrate_vma_ops), 16);
OFFSET(struct migrate_vma_ops, alloc_and_copy, 0);
OFFSET(struct migrate_vma_ops, finalize_and_map, 8);
SAME(sizeof(enum hmm_update_type), sizeof(unsigned int));
SAME(HMM_UPDATE_INVALIDATE, 0);
_Static_assert(_Generic((enum hmm_update)0, enum hmm_update_type: 1, default: 0), "two names, one type");

/* Structures of ours: size first. */
SAME(sizeof(struct hmm_mm_counters), 120);
OFFSET(struct hmm_mm_counters, size, 0);
OFFSET(struct hmm_mm_counters, cpu_faults, 8);
OFFSET(struct hmm_mm_counters, self_faults, 112);
SAME(sizeof(struct hmm_guard), 32);
OFFSET(struct hmm_guard, held, 0);
OFFSET(struct hmm_guard, start, 8);
OFFSET(struct hmm_guard, end, 16);
SAME(sizeof(struct hmm_soft_config), 40);
OFFSET(struct hmm_soft_config, size, 0);
OFFSET(struct hmm_soft_config, memory_bytes, 8);
OFFSET(struct hmm_soft_config, threads, 36);
SAME(sizeof(struct hmm_mm_rss), 32);
OFFSET(struct hmm_mm_rss, anon, 8);
OFFSET(struct hmm_mm_rss, shmem, 24);
SAME(sizeof(struct hmm_group_state), 56);
OFFSET(struct hmm_group_state, max, 8);
OFFSET(struct hmm_group_state, events_max, 48);
SAME(sizeof(struct hmm_soft_counters), 72);
OFFSET(struct hmm_soft_counters, size, 0);
OFFSET(struct hmm_soft_counters, jobs, 64);

/* Values that drivers compile in: those of kernel v4.14. */
SAME(HMM_PFN_VALID, 1);
SAME(HMM_PFN_READ, 2);
SAME(HMM_PFN_WRITE, 4);
SAME(HMM_PFN_ERROR, 8);
SAME(HMM_PFN_EMPTY, 16);
SAME(HMM_PFN_SPECIAL, 32);
SAME(HMM_PFN_DEVICE_UNADDRESSABLE, 64);
SAME(HMM_PFN_SHIFT, 7);
SAME(MIGRATE_PFN_VALID, 1);
SAME(MIGRATE_PFN_MIGRATE, 2);
SAME(MIGRATE_PFN_LOCKED, 4);
SAME(MIGRATE_PFN_WRITE, 8);
SAME(MIGRATE_PFN_DEVICE, 16);
SAME(MIGRATE_PFN_ERROR, 32);
SAME(MIGRATE_PFN_SHIFT, 6);
SAME(VM_FAULT_OOM, 1);
SAME(VM_FAULT_SIGBUS, 2);
SAME(VM_FAULT_MAJOR, 4);
SAME(FAULT_FLAG_WRITE, 1);
SAME(FAULT_FLAG_REMOTE, 0x80);
SAME(HMM_CAPABILITY_MISSING_FAULTS, 1);
SAME(HMM_CAPABILITY_MOVE, 2);
SAME(HMM_CAPABILITY_KERNEL_FAULTS, 4);
SAME(HMM_CAPABILITY_POISON, 8);
SAME(HMM_CAPABILITY_EVENTS, 16);
SAME(HMM_CAPABILITY_PRIVATE_FILES, 32);
SAME(HMM_CAPABILITY_ORDERED, 64);
SAME(PAGE_SIZE, 4096);
SAME(PAGE_MASK, ~4095UL);

/* The composed version, which other libraries got wrong. */
SAME(HMM_VERSION(1, 2, 3), 0x010203);
SAME(HMM_VERSION_NUMBER, (HMM_VERSION_MAJOR << 16) + (HMM_VERSION_MINOR << 8) + HMM_VERSION_PATCH);
_Static_assert(HMM_VERSION(0, 2, 0) > HMM_VERSION(0, 1, 255), "versions compare");

struct outer {
	int before;
	struct hmm_mirror mirror;
};

static void the_library_has_the_version_of_the_header(void)
{
	char text[32];

	CHECK_EQ(hmm_version(), HMM_VERSION_NUMBER);
	CHECK(!strcmp(hmm_version_string(), HMM_VERSION_STRING));
	snprintf(text, sizeof(text), "%u.%u.%u", hmm_version() >> 16, hmm_version() >> 8 & 255, hmm_version() & 255);
	CHECK(!strcmp(text, HMM_VERSION_STRING));
}

static void errors_travel_in_pointers(void)
{
	int object = 0;

	CHECK(IS_ERR(ERR_PTR(-1)) && IS_ERR(ERR_PTR(-4095)) && !IS_ERR(ERR_PTR(-4096)));
	CHECK(!IS_ERR(NULL) && !IS_ERR(&object) && IS_ERR_OR_NULL(NULL) && IS_ERR_OR_NULL(ERR_PTR(-EINVAL)));
	CHECK_EQ(PTR_ERR(ERR_PTR(-EINVAL)), -EINVAL);
}

static void pages_are_pfns_in_disguise(void)
{
	static const unsigned long pfns[] = { 0, 1, HMM_DEVICE_PFN - 1, HMM_DEVICE_PFN, (1UL << 48) - 1 };
	int object = 0;

	for (size_t i = 0; i < sizeof(pfns) / sizeof(*pfns); i++)
		CHECK_EQ(page_to_pfn(pfn_to_page(pfns[i])), pfns[i]);
	CHECK(!pfn_to_page(1UL << 48) && !pfn_to_page(~0UL));
	CHECK_EQ(page_to_pfn(NULL), -1);
	CHECK_EQ(page_to_pfn((struct page *)(void *)&object), -1);
	CHECK(hmm_page_is_device(pfn_to_page(HMM_DEVICE_PFN)) && !hmm_page_is_device(pfn_to_page(5)));
	CHECK(!hmm_page_is_device(NULL) && !is_device_private_page(NULL) && !is_device_coherent_page(NULL));
	CHECK(pfn_to_virt(5) == (void *)0x5000 && hmm_page_to_virt(pfn_to_page(5)) == (void *)0x5000);
	CHECK(!pfn_to_virt(HMM_DEVICE_PFN) && !hmm_page_to_virt(NULL));
}

static void entries_carry_pfns(void)
{
	struct page *page = pfn_to_page(0x1234);

	CHECK_EQ(migrate_pfn(0x1234), (0x1234 << 6) | 1);
	CHECK(migrate_pfn_to_page(migrate_pfn(0x1234)) == page);
	CHECK(!migrate_pfn_to_page(0x1234UL << 6));
	CHECK_EQ(hmm_pfn_t_from_pfn(0x1234), (0x1234 << 7) | 1);
	CHECK_EQ(hmm_pfn_t_from_page(page), hmm_pfn_t_from_pfn(0x1234));
	CHECK_EQ(hmm_pfn_t_to_pfn(hmm_pfn_t_from_pfn(0x1234) | HMM_PFN_WRITE), 0x1234);
	CHECK(hmm_pfn_t_to_page(hmm_pfn_t_from_pfn(0x1234)) == page);
	CHECK_EQ(hmm_pfn_t_to_pfn(HMM_PFN_EMPTY), -1);
	CHECK(!hmm_pfn_t_to_page(HMM_PFN_SPECIAL));
}

static void members_lead_back_to_their_structure(void)
{
	struct outer outer = { 0 };

	CHECK(container_of(&outer.mirror, struct outer, mirror) == &outer);
}

int main(void)
{
	static const struct tap_test tests[] = {
		TEST(the_library_has_the_version_of_the_header),
		TEST(errors_travel_in_pointers),
		TEST(pages_are_pfns_in_disguise),
		TEST(entries_carry_pfns),
		TEST(members_lead_back_to_their_structure),
	};

	return tap_run(tests, sizeof(tests) / sizeof(*tests));
}
