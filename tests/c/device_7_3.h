/* A device for tests in the terms of today's kernels: memory behind a dev_pagemap, a free list, and its callbacks. */
#ifndef DEVICE_7_3_H
#define DEVICE_7_3_H

#include "memory.h"
#include "tap.h"

#include <pthread.h>
#include <stdatomic.h>

#define TEST_PAGES 64

struct test_device {
	struct dev_pagemap pagemap;
	struct mm_struct *mm;

	pthread_mutex_t lock;
	unsigned int free_count;
	unsigned int free_pages[TEST_PAGES];
	unsigned char memory[TEST_PAGES][PAGE];

	/* Knobs. */
	atomic_bool leave_odd;	/* every other page is left where it is */
	atomic_bool lose;	/* migrate_to_ram says that the data is lost */

	/* What the callbacks saw. */
	atomic_int faults, frees, freed_twice;
	atomic_int is_used[TEST_PAGES];
	atomic_ulong fault_address, fault_flags;
	unsigned long src[TEST_PAGES * 4], dst[TEST_PAGES * 4];
};

static inline bool test_is_coherent(const struct test_device *device)
{
	return device->pagemap.type == MEMORY_DEVICE_COHERENT;
}

static inline unsigned long test_first_pfn(const struct test_device *device)
{
	return device->pagemap.range.start >> PAGE_SHIFT;
}

static inline unsigned char *test_memory(struct test_device *device, const struct page *page)
{
	return device->memory[page_to_pfn(page) - test_first_pfn(device)];
}

static inline struct page *test_alloc(struct test_device *device)
{
	struct page *page = NULL;

	pthread_mutex_lock(&device->lock);
	if (device->free_count) {
		unsigned int index = device->free_pages[--device->free_count];

		device->is_used[index] = 1;
		page = pfn_to_page(test_first_pfn(device) + index);
		zone_device_page_init(page);
	}
	pthread_mutex_unlock(&device->lock);
	return page;
}

static inline void test_page_free(struct page *page)
{
	struct test_device *device = container_of(page_pgmap(page), struct test_device, pagemap);
	unsigned long index = page_to_pfn(page) - test_first_pfn(device);

	pthread_mutex_lock(&device->lock);
	if (atomic_exchange(&device->is_used[index], 0))
		device->free_pages[device->free_count++] = (unsigned int)index;
	else
		device->freed_twice++;
	pthread_mutex_unlock(&device->lock);
	device->frees++;
}

/* Names destinations on the device, and copies. */
static inline void test_copy_out(struct test_device *device, const unsigned long *src, unsigned long *dst, size_t pages)
{
	for (size_t i = 0; i < pages; i++) {
		struct page *spage = migrate_pfn_to_page(src[i]), *dpage;

		dst[i] = 0;
		if (!(src[i] & MIGRATE_PFN_MIGRATE) || (device->leave_odd && i & 1))
			continue;
		dpage = test_alloc(device);
		if (!dpage)
			continue;
		if (!test_is_coherent(device) && spage)
			memcpy(test_memory(device, dpage), hmm_page_to_virt(spage), PAGE);
		else
			memset(test_memory(device, dpage), 0, PAGE);
		dst[i] = migrate_pfn(page_to_pfn(dpage));
	}
}

/* Names destinations in system memory, and copies. */
static inline void test_copy_home(struct test_device *device, const unsigned long *src, unsigned long *dst, size_t pages)
{
	for (size_t i = 0; i < pages; i++) {
		struct page *dpage = migrate_pfn_to_page(src[i]), *spage;

		dst[i] = 0;
		if (!(src[i] & MIGRATE_PFN_MIGRATE) || page_pgmap(dpage) != &device->pagemap)
			continue;
		spage = hmm_migrate_alloc_page(&src[i]);
		if (!spage)
			continue;
		if (!test_is_coherent(device))
			memcpy(hmm_page_to_virt(spage), test_memory(device, dpage), PAGE);
		dst[i] = migrate_pfn(page_to_pfn(spage));
	}
}

static inline vm_fault_t test_migrate_to_ram(struct vm_fault *vmf)
{
	struct test_device *device = container_of(page_pgmap(vmf->page), struct test_device, pagemap);
	unsigned long src = 0, dst = 0;
	struct migrate_vma args = {
		.vma = vmf->vma,
		.src = &src,
		.dst = &dst,
		.start = vmf->address,
		.end = vmf->address + PAGE,
		.pgmap_owner = device->pagemap.owner,
		.flags = MIGRATE_VMA_SELECT_DEVICE_PRIVATE,
		.fault_page = vmf->page,
	};

	device->faults++;
	device->fault_address = vmf->address;
	device->fault_flags = vmf->flags;
	if (device->lose)
		return VM_FAULT_SIGBUS;
	/* A call that failed lost nothing: the access is made again. */
	if (migrate_vma_setup(&args))
		return VM_FAULT_OOM;
	test_copy_home(device, &src, &dst, 1);
	migrate_vma_pages(&args);
	migrate_vma_finalize(&args);
	return 0;
}

static const struct dev_pagemap_ops test_pagemap_ops = { test_page_free, test_migrate_to_ram };

/* Opens a device in memory that is all zeros; the program ends when it cannot. */
static inline void test_device_open(struct test_device *device, struct mm_struct *mm, enum memory_type type)
{
	pthread_mutex_init(&device->lock, NULL);
	device->mm = mm;
	for (device->free_count = 0; device->free_count < TEST_PAGES; device->free_count++)
		device->free_pages[device->free_count] = device->free_count;
	device->pagemap.type = type;
	device->pagemap.ops = &test_pagemap_ops;
	device->pagemap.owner = device;
	device->pagemap.range.end = sizeof(device->memory) - 1;
	device->pagemap.nr_range = 1;
	if (!hmm_pin_range(mm, device, sizeof(*device)) && !IS_ERR(memremap_pages(&device->pagemap, 0)))
		return;
	fprintf(stderr, "test device: %s\n", hmm_last_error());
	exit(2);
}

/* Closes it, and checks that every page came back exactly once. */
static inline void test_device_close(struct test_device *device)
{
	CHECK_EQ(hmm_mm_check_accounts(device->mm), 0);
	memunmap_pages(&device->pagemap);
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK_EQ(hmm_mm_check_accounts(device->mm), 0);
	CHECK_EQ(device->free_count, TEST_PAGES);
	CHECK_EQ(device->freed_twice, 0);
	CHECK_EQ(hmm_unpin_range(device->mm, device, sizeof(*device)), 0);
	memset(device, 0, sizeof(*device));
}

/* The arguments of a migration of pages of one mapping; the caller holds the lock. */
static inline struct migrate_vma test_args(struct test_device *device, const void *memory, size_t pages,
					   unsigned long flags)
{
	return (struct migrate_vma){
		.vma = find_vma(device->mm, address(memory)),
		.src = device->src,
		.dst = device->dst,
		.start = address(memory),
		.end = address(memory) + pages * PAGE,
		.pgmap_owner = device->pagemap.owner,
		.flags = flags,
	};
}

/* All three calls; returns the number of pages that moved, or -errno. */
static inline long test_migrate(struct test_device *device, const void *memory, size_t pages, bool out)
{
	unsigned long home = test_is_coherent(device) ? MIGRATE_VMA_SELECT_DEVICE_COHERENT
						      : MIGRATE_VMA_SELECT_DEVICE_PRIVATE;
	struct migrate_vma args;
	long moved = 0;
	int ret;

	hmm_mm_read_lock(device->mm);
	args = test_args(device, memory, pages, out ? MIGRATE_VMA_SELECT_SYSTEM : home);
	ret = migrate_vma_setup(&args);
	if (!ret) {
		(out ? test_copy_out : test_copy_home)(device, args.src, args.dst, args.npages);
		migrate_vma_pages(&args);
		CHECK_EQ(hmm_last_errno(), 0);
		for (size_t i = 0; i < args.npages; i++)
			moved += (args.src[i] & MIGRATE_PFN_MIGRATE) != 0;
		migrate_vma_finalize(&args);
		CHECK_EQ(hmm_last_errno(), 0);
	}
	hmm_mm_read_unlock(device->mm);
	return ret ? ret : moved;
}

#endif
