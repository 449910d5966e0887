/* What the compiler knows of the header's part for today's kernels: sizes, offsets, constants. Needs no engine. */
#define HMM_API_7_3
#include "tap.h"

#include <stddef.h>

#define SAME(value, expected) _Static_assert((value) == (expected), #value " is not " #expected)
#define OFFSET(type, member, expected) SAME(offsetof(type, member), expected)

SAME(sizeof(struct mmu_notifier_range), 40);
OFFSET(struct mmu_notifier_range, mm, 0);
OFFSET(struct mmu_notifier_range, start, 8);
OFFSET(struct mmu_notifier_range, end, 16);
OFFSET(struct mmu_notifier_range, flags, 24);
OFFSET(struct mmu_notifier_range, event, 28);
OFFSET(struct mmu_notifier_range, owner, 32);
SAME(sizeof(struct mmu_interval_notifier), 72);
OFFSET(struct mmu_interval_notifier, interval_tree.start, 0);
OFFSET(struct mmu_interval_notifier, interval_tree.last, 8);
OFFSET(struct mmu_interval_notifier, ops, 16);
OFFSET(struct mmu_interval_notifier, mm, 24);
OFFSET(struct mmu_interval_notifier, invalidate_seq, 32);
SAME(sizeof(struct mmu_interval_notifier_ops), 8);
SAME(sizeof(struct hmm_range), 64);
OFFSET(struct hmm_range, notifier, 0);
OFFSET(struct hmm_range, notifier_seq, 8);
OFFSET(struct hmm_range, start, 16);
OFFSET(struct hmm_range, end, 24);
OFFSET(struct hmm_range, hmm_pfns, 32);
OFFSET(struct hmm_range, default_flags, 40);
OFFSET(struct hmm_range, pfn_flags_mask, 48);
OFFSET(struct hmm_range, dev_private_owner, 56);
_Static_assert(_Generic((struct hmm_range *)0, struct hmm_range_7_3 *: 1, default: 0), "two names, one type");
SAME(sizeof(struct migrate_vma), 112);
OFFSET(struct migrate_vma, vma, 0);
OFFSET(struct migrate_vma, dst, 8);
OFFSET(struct migrate_vma, src, 16);
OFFSET(struct migrate_vma, cpages, 24);
OFFSET(struct migrate_vma, npages, 32);
OFFSET(struct migrate_vma, start, 40);
OFFSET(struct migrate_vma, end, 48);
OFFSET(struct migrate_vma, pgmap_owner, 56);
OFFSET(struct migrate_vma, flags, 64);
OFFSET(struct migrate_vma, fault_page, 72);
SAME(sizeof(struct vm_fault), 32);
OFFSET(struct vm_fault, vma, 0);
OFFSET(struct vm_fault, address, 8);
OFFSET(struct vm_fault, page, 16);
OFFSET(struct vm_fault, flags, 24);
SAME(sizeof(struct dev_pagemap_ops), 16);
OFFSET(struct dev_pagemap_ops, page_free, 0);
OFFSET(struct dev_pagemap_ops, migrate_to_ram, 8);
SAME(sizeof(struct dev_pagemap), 80);
OFFSET(struct dev_pagemap, type, 0);
OFFSET(struct dev_pagemap, flags, 4);
OFFSET(struct dev_pagemap, ops, 8);
OFFSET(struct dev_pagemap, owner, 16);
OFFSET(struct dev_pagemap, nr_range, 24);
OFFSET(struct dev_pagemap, range.start, 32);
OFFSET(struct dev_pagemap, range.end, 40);
_Static_assert(_Generic(((struct dev_pagemap *)0)->type, enum memory_type: 1, default: 0), "an enum in C");
SAME(sizeof(enum memory_type), sizeof(unsigned int));

/* The kernel's numbers. */
SAME(HMM_PFN_VALID, 1UL << 63);
SAME(HMM_PFN_WRITE, 1UL << 62);
SAME(HMM_PFN_ERROR, 1UL << 61);
SAME(HMM_PFN_REQ_FAULT, HMM_PFN_VALID);
SAME(HMM_PFN_REQ_WRITE, HMM_PFN_WRITE);
SAME(HMM_PFN_DMA_MAPPED, 1UL << 60);
SAME(HMM_PFN_P2PDMA, 1UL << 59);
SAME(HMM_PFN_P2PDMA_BUS, 1UL << 58);
SAME(HMM_PFN_ORDER_SHIFT, 53);
SAME(HMM_PFN_FLAGS, 0xffe0000000000000);
SAME(HMM_RANGE_DEFAULT_TIMEOUT, 1000);
SAME(MMU_NOTIFY_UNMAP, 0);
SAME(MMU_NOTIFY_CLEAR, 1);
SAME(MMU_NOTIFY_PROTECTION_VMA, 2);
SAME(MMU_NOTIFY_PROTECTION_PAGE, 3);
SAME(MMU_NOTIFY_SOFT_DIRTY, 4);
SAME(MMU_NOTIFY_RELEASE, 5);
SAME(MMU_NOTIFY_MIGRATE, 6);
SAME(MMU_NOTIFY_EXCLUSIVE, 7);
SAME(MMU_NOTIFIER_RANGE_BLOCKABLE, 1);
SAME(MIGRATE_VMA_SELECT_SYSTEM, 1);
SAME(MIGRATE_VMA_SELECT_DEVICE_PRIVATE, 2);
SAME(MIGRATE_VMA_SELECT_DEVICE_COHERENT, 4);
SAME(MEMORY_DEVICE_PRIVATE, 1);
SAME(MEMORY_DEVICE_COHERENT, 2);
SAME(MEMORY_DEVICE_FS_DAX, 3);
SAME(MEMORY_DEVICE_GENERIC, 4);
SAME(MEMORY_DEVICE_PCI_P2PDMA, 5);

static void entries_carry_pfns(void)
{
	unsigned long entry = 0x1234 | HMM_PFN_VALID | HMM_PFN_WRITE | HMM_PFN_DMA_MAPPED | 9UL << HMM_PFN_ORDER_SHIFT;

	CHECK(hmm_pfn_to_page(entry) == pfn_to_page(0x1234));
	CHECK(hmm_pfn_to_page(HMM_DEVICE_PFN | HMM_PFN_VALID) == pfn_to_page(HMM_DEVICE_PFN));
	CHECK_EQ(hmm_pfn_to_map_order(entry), 9);
	CHECK_EQ(hmm_pfn_to_map_order(0x1234 | HMM_PFN_FLAGS), 31);
	CHECK_EQ(hmm_pfn_to_phys(entry), 0x1234000);
}

int main(void)
{
	static const struct tap_test tests[] = { TEST(entries_carry_pfns) };

	return tap_run(tests, sizeof(tests) / sizeof(*tests));
}
