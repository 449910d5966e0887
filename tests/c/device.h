/* A device for tests: memory, a free list, the callbacks of a driver, and knobs to make it behave badly. */
#ifndef DEVICE_H
#define DEVICE_H

#include "memory.h"
#include "tap.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#define TEST_DEVICE_PAGES 64

/* Works in both forms of the interface. */
#ifdef HMM_API_4_17
#define TEST_MIGRATE(ops, vma, mentries, ...) migrate_vma(ops, vma, __VA_ARGS__)
#else
#define TEST_MIGRATE(ops, vma, mentries, ...) migrate_vma(ops, vma, mentries, __VA_ARGS__)
#endif

struct test_device {
	struct mm_struct *mm;
	struct hmm_device *device;
	struct hmm_devmem *devmem;

	pthread_mutex_t lock;
	unsigned int free_count;
	unsigned int free_pages[TEST_DEVICE_PAGES];
	unsigned char memory[TEST_DEVICE_PAGES][PAGE];

	/* Knobs. */
	atomic_bool lose;		/* fault says that the data is lost */
	_Atomic(unsigned long) lose_only;	/* of the page at this address, unless it is 0 */
	atomic_bool leave_odd;		/* every other page is left where it is */

	/* What the callbacks saw. */
	atomic_int faults, frees, copies, finals;
	atomic_int freed_twice;
	atomic_int is_used[TEST_DEVICE_PAGES];
	atomic_ulong fault_addr, fault_flags;
	atomic_int fault_thread;
	struct hmm_devmem *fault_devmem;
	unsigned long src[TEST_DEVICE_PAGES * 4], dst[TEST_DEVICE_PAGES * 4];
};

static inline unsigned long test_device_index(struct test_device *device, const struct page *page)
{
	return page_to_pfn(page) - device->devmem->pfn_first;
}

static inline struct page *test_device_alloc(struct test_device *device)
{
	struct page *page = NULL;

	pthread_mutex_lock(&device->lock);
	if (device->free_count) {
		unsigned int index = device->free_pages[--device->free_count];

		device->is_used[index] = 1;
		page = pfn_to_page(device->devmem->pfn_first + index);
	}
	pthread_mutex_unlock(&device->lock);
	return page;
}

static inline void test_device_free(struct hmm_devmem *devmem, struct page *page)
{
	struct test_device *device = dev_get_drvdata(devmem->device);
	unsigned long index = test_device_index(device, page);

	pthread_mutex_lock(&device->lock);
	if (atomic_exchange(&device->is_used[index], 0))
		device->free_pages[device->free_count++] = (unsigned int)index;
	else
		device->freed_twice++;
	pthread_mutex_unlock(&device->lock);
	device->frees++;
}

static inline void test_copy_out(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst,
				 unsigned long start, unsigned long end, void *data)
{
	struct test_device *device = data;

	(void)vma;
	device->copies++;
	for (unsigned long i = 0; i < (end - start) / PAGE; i++) {
		struct page *spage = migrate_pfn_to_page(src[i]);
		struct page *dpage;

		if (!(src[i] & MIGRATE_PFN_MIGRATE) || src[i] & MIGRATE_PFN_DEVICE || (device->leave_odd && i & 1))
			continue;
		dpage = test_device_alloc(device);
		if (!dpage)
			break;
		if (spage)
			memcpy(device->memory[test_device_index(device, dpage)], hmm_page_to_virt(spage), PAGE);
		else
			memset(device->memory[test_device_index(device, dpage)], 0, PAGE);
		hmm_devmem_page_set_drvdata(dpage, start + i * PAGE);
		dst[i] = migrate_pfn(page_to_pfn(dpage)) | MIGRATE_PFN_LOCKED | MIGRATE_PFN_DEVICE;
	}
}

static inline void test_copy_home(struct vm_area_struct *vma, const unsigned long *src, unsigned long *dst,
				  unsigned long start, unsigned long end, void *data)
{
	struct test_device *device = data;

	device->copies++;
	for (unsigned long i = 0; i < (end - start) / PAGE; i++) {
		struct page *dpage = migrate_pfn_to_page(src[i]);
		struct page *spage;

		if (!(src[i] & MIGRATE_PFN_MIGRATE) || !hmm_devmem_has_page(device->devmem, dpage))
			continue;
		spage = hmm_vma_alloc_locked_page(vma, start + i * PAGE);
		if (!spage)
			continue;
		memcpy(hmm_page_to_virt(spage), device->memory[test_device_index(device, dpage)], PAGE);
		dst[i] = migrate_pfn(page_to_pfn(spage)) | MIGRATE_PFN_LOCKED;
	}
}

static inline void test_finalize(struct vm_area_struct *vma, const unsigned long *src, const unsigned long *dst,
				 unsigned long start, unsigned long end, void *data)
{
	struct test_device *device = data;

	(void)vma, (void)src, (void)dst, (void)start, (void)end;
	device->finals++;
}

static const struct migrate_vma_ops test_to_device = { test_copy_out, test_finalize };
static const struct migrate_vma_ops test_to_system = { test_copy_home, test_finalize };

static inline int test_device_fault(struct hmm_devmem *devmem, struct vm_area_struct *vma, unsigned long addr,
				    HMM_FAULT_PAGE *page, unsigned int flags, pmd_t *pmdp)
{
	struct test_device *device = dev_get_drvdata(devmem->device);
	unsigned long src, dst, start = addr & PAGE_MASK;

	device->faults++;
	device->fault_addr = addr;
	device->fault_flags = flags;
	device->fault_thread = gettid();
	device->fault_devmem = devmem;
	if (device->lose && (!device->lose_only || device->lose_only == start))
		return VM_FAULT_SIGBUS;
	if (pmdp || !hmm_devmem_has_page(devmem, page))
		return VM_FAULT_SIGBUS;
	/* A call that failed lost nothing: the access is made again. */
	return TEST_MIGRATE(&test_to_system, vma, 1, start, start + PAGE, &src, &dst, device) ? VM_FAULT_OOM
											      : VM_FAULT_MAJOR;
}

static const struct hmm_devmem_ops test_devmem_ops = { test_device_free, test_device_fault };

/* Opens a device in memory that is all zeros; the program ends when it cannot. */
static inline void test_device_open(struct test_device *device, struct mm_struct *mm)
{
	pthread_mutex_init(&device->lock, NULL);
	device->mm = mm;
	for (device->free_count = 0; device->free_count < TEST_DEVICE_PAGES; device->free_count++)
		device->free_pages[device->free_count] = device->free_count;
	device->device = hmm_device_new(device);
	if (hmm_pin_range(mm, device, sizeof(*device)) || IS_ERR(device->device))
		goto failed;
	device->devmem = hmm_devmem_add(&test_devmem_ops, &device->device->device, sizeof(device->memory));
	if (!IS_ERR(device->devmem))
		return;
failed:
	fprintf(stderr, "test device: %s\n", hmm_last_error());
	exit(2);
}

/* Closes it, and checks that every page came back exactly once. */
static inline void test_device_close(struct test_device *device)
{
	CHECK_EQ(hmm_mm_check_accounts(device->mm), 0);
	hmm_devmem_remove(device->devmem);
	CHECK_EQ(hmm_last_errno(), 0);
	CHECK_EQ(hmm_mm_check_accounts(device->mm), 0);
	CHECK_EQ(device->free_count, TEST_DEVICE_PAGES);
	CHECK_EQ(device->freed_twice, 0);
	hmm_device_put(device->device);
	CHECK_EQ(hmm_unpin_range(device->mm, device, sizeof(*device)), 0);
	memset(device, 0, sizeof(*device));
}

/* migrate_vma() on pages of one mapping, with the lock and the arrays. */
static inline int test_device_migrate(struct test_device *device, const struct migrate_vma_ops *ops,
				      const void *memory, size_t pages)
{
	struct vm_area_struct *vma;
	unsigned long start = address(memory);
	int ret;

	hmm_mm_read_lock(device->mm);
	vma = find_vma(device->mm, start);
	ret = TEST_MIGRATE(ops, vma, pages, start, start + pages * PAGE, device->src, device->dst, device);
	hmm_mm_read_unlock(device->mm);
	return ret;
}

/* Changes a page so that mirrors hear of it: drops its contents, or sends it to the device where that is not noticed. */
static inline void test_device_change(struct test_device *device, unsigned char *page)
{
	if (hmm_mm_capabilities(device->mm) & HMM_CAPABILITY_EVENTS)
		madvise(page, PAGE, MADV_DONTNEED);
	else
		test_device_migrate(device, &test_to_device, page, 1);
}

#endif
