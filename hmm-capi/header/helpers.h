/*
 * Pages
 *
 * A struct page is a pfn in a pointer's clothes: nothing is behind it, and any access through
 * it is a fault. Only the conversions below look inside. None of them blocks, and all may be
 * called from callbacks.
 */

/* Bits 48 to 63 of a page pointer, which make it an address that no memory can have. */
#define HMM_PAGE_TAG 0x4d50UL

/** The page of a pfn; NULL for a number that is no pfn. */
static inline struct page *hmm_pfn_to_struct_page(unsigned long pfn)
{
  return pfn >> 48 ? (struct page *)0 : (struct page *)((HMM_PAGE_TAG << 48) | pfn);
}

/** The pfn of a page; ~0UL for a pointer that is no page. */
static inline unsigned long hmm_page_to_pfn(const struct page *page)
{
  unsigned long value = (unsigned long)page;

  return value >> 48 == HMM_PAGE_TAG ? value & ((1UL << 48) - 1) : ~0UL;
}

/** Whether a pfn is that of device memory. */
static inline bool hmm_pfn_is_device(unsigned long pfn)
{
  return pfn >= HMM_DEVICE_PFN && pfn >> 48 == 0;
}

/** Whether a page is device memory. */
static inline bool hmm_page_is_device(const struct page *page)
{
  return hmm_pfn_is_device(hmm_page_to_pfn(page));
}

/** Where the CPU finds a page of system memory; NULL for device memory, and for what is no pfn. */
static inline void *hmm_pfn_to_virt(unsigned long pfn)
{
  return pfn < HMM_DEVICE_PFN ? (void *)(pfn << HMM_PAGE_SHIFT) : (void *)0;
}

/** Where the CPU finds a page of system memory; NULL for device memory, and for a pointer that is no page. */
static inline void *hmm_page_to_virt(const struct page *page)
{
  return hmm_pfn_to_virt(hmm_page_to_pfn(page));
}

/** Whether a page is one of this device memory. */
static inline bool hmm_devmem_has_page(const struct hmm_devmem *devmem, const struct page *page)
{
  unsigned long pfn = hmm_page_to_pfn(page);

  return devmem->pfn_first <= pfn && pfn < devmem->pfn_last;
}

/*
 * Entries of migrate_vma()
 */

/** An entry for dst: the pfn, and MIGRATE_PFN_VALID. */
static inline unsigned long migrate_pfn(unsigned long pfn)
{
  return (pfn << MIGRATE_PFN_SHIFT) | MIGRATE_PFN_VALID;
}

/* Bits from here on say why an entry of src does not migrate. */
#define HMM_MIGRATE_REASON_SHIFT 58

/** The page of an entry; NULL unless MIGRATE_PFN_VALID. */
static inline struct page *migrate_pfn_to_page(unsigned long mpfn)
{
  unsigned long pfn = (mpfn & ((1UL << HMM_MIGRATE_REASON_SHIFT) - 1)) >> MIGRATE_PFN_SHIFT;

  return mpfn & MIGRATE_PFN_VALID ? hmm_pfn_to_struct_page(pfn) : (struct page *)0;
}

/** Why the page of an entry of src stayed: of enum hmm_stay; 0 when it migrates. */
static inline unsigned long hmm_migrate_reason(unsigned long mpfn)
{
  return mpfn & MIGRATE_PFN_MIGRATE ? 0 : mpfn >> HMM_MIGRATE_REASON_SHIFT;
}

/*
 * Errors in pointers: the last 4095 addresses stand for negative errnos, as in the kernel.
 */

/** Whether a pointer is an error. */
static inline bool hmm_is_err(const void *pointer)
{
  return (unsigned long)pointer >= (unsigned long)-4095L;
}

/** The negative errno in a pointer that is an error. */
static inline long hmm_ptr_err(const void *pointer)
{
  return (long)pointer;
}

/** A pointer that carries a negative errno. */
static inline void *hmm_err_ptr(long error)
{
  return (void *)error;
}

/*
 * Guards
 */

/** A guard that holds nothing: struct hmm_guard guard = HMM_GUARD_NONE; */
#ifdef __cplusplus
#define HMM_GUARD_NONE {}
#else
#define HMM_GUARD_NONE { 0 }
#endif

/**
 * Declares a guard that holds nothing, and lets go of what hmm_guard() made it hold when its scope
 * is left, by whatever way: return, break, goto, an exception. For compilers that know the
 * attribute cleanup (gcc, clang).
 */
#define HMM_GUARD_SCOPE(name)                                                                      \
  __attribute__((cleanup(hmm_unguard))) struct hmm_guard name = HMM_GUARD_NONE

/** Whether an invalidate callback may sleep: always. */
static inline bool mmu_notifier_range_blockable(const struct mmu_notifier_range *range)
{
  return (range->flags & MMU_NOTIFIER_RANGE_BLOCKABLE) != 0;
}

/*
 * Ranges: reading entries
 */
#if !defined(HMM_API_4_17) && !defined(HMM_API_7_3)

/** The pfn of an entry; ~0UL unless HMM_PFN_VALID. */
static inline unsigned long hmm_pfn_t_to_pfn(hmm_pfn_t entry)
{
  return entry & HMM_PFN_VALID ? entry >> HMM_PFN_SHIFT : ~0UL;
}

/** The page of an entry; NULL unless HMM_PFN_VALID. */
static inline struct page *hmm_pfn_t_to_page(hmm_pfn_t entry)
{
  return entry & HMM_PFN_VALID ? hmm_pfn_to_struct_page(entry >> HMM_PFN_SHIFT)
                               : (struct page *)0;
}

/** An entry for a pfn. */
static inline hmm_pfn_t hmm_pfn_t_from_pfn(unsigned long pfn)
{
  return (pfn << HMM_PFN_SHIFT) | HMM_PFN_VALID;
}

/** An entry for a page. */
static inline hmm_pfn_t hmm_pfn_t_from_page(const struct page *page)
{
  return hmm_pfn_t_from_pfn(hmm_page_to_pfn(page));
}

#elif defined(HMM_API_4_17)

/*
 * The forms of kernel v4.17. Ranges carry their arguments, the driver chooses how entries are
 * encoded, migrate_vma() has no mentries, and hmm_mirror_register() wants the lock of the
 * address space held for writing. Programs with and without HMM_API_4_17 can be linked
 * together: the names stand for different symbols.
 */
#define hmm_range hmm_range_4_17
#define hmm_vma_get_pfns hmm_vma_get_pfns_4_17
#define hmm_vma_fault hmm_vma_fault_4_17
#define hmm_vma_range_done hmm_vma_range_done_4_17
#define migrate_vma migrate_vma_4_17
#define hmm_mirror_register hmm_mirror_register_locked

/** The pfn of an entry; ~0UL for the driver's special values, and unless its VALID bit is set. */
static inline unsigned long hmm_pfn_to_pfn(const struct hmm_range *range, uint64_t entry)
{
  if (entry == range->values[HMM_PFN_NONE] || entry == range->values[HMM_PFN_ERROR] ||
      entry == range->values[HMM_PFN_SPECIAL] || !(entry & range->flags[HMM_PFN_VALID]))
    return ~0UL;
  return (unsigned long)(entry >> range->pfn_shift);
}

/** The page of an entry; NULL for the driver's special values, and unless its VALID bit is set. */
static inline struct page *hmm_pfn_to_page(const struct hmm_range *range, uint64_t entry)
{
  return hmm_pfn_to_struct_page(hmm_pfn_to_pfn(range, entry));
}

/** An entry for a pfn, in the driver's encoding. */
static inline uint64_t hmm_pfn_from_pfn(const struct hmm_range *range, unsigned long pfn)
{
  return ((uint64_t)pfn << range->pfn_shift) | range->flags[HMM_PFN_VALID];
}

/** An entry for a page, in the driver's encoding. */
static inline uint64_t hmm_pfn_from_page(const struct hmm_range *range, const struct page *page)
{
  return hmm_pfn_from_pfn(range, hmm_page_to_pfn(page));
}

#else

/*
 * The forms of kernel v7.3. Of the calls for ranges, hmm_range_fault() and
 * hmm_range_fault_unlocked_timeout() belong to them; hmm_vma_get_pfns() and hmm_vma_fault() go on
 * to write the entries of v4.14, whose names are not there.
 */
#define hmm_range hmm_range_7_3

/** The page of an entry that is HMM_PFN_VALID. */
static inline struct page *hmm_pfn_to_page(unsigned long entry)
{
  return hmm_pfn_to_struct_page(entry & ~HMM_PFN_FLAGS);
}

/** The address of the page of an entry that is HMM_PFN_VALID, as a device sees it. */
static inline uint64_t hmm_pfn_to_phys(unsigned long entry)
{
  return (uint64_t)(entry & ~HMM_PFN_FLAGS) << HMM_PAGE_SHIFT;
}

/** The order of the mapping that an entry is of: it has 1 << order pages, naturally aligned. */
static inline unsigned int hmm_pfn_to_map_order(unsigned long entry)
{
  return (unsigned int)(entry >> HMM_PFN_ORDER_SHIFT) & 0x1f;
}

#endif

/* hmm.txt says enum hmm_update, the merged headers enum hmm_update_type. */
#define hmm_update hmm_update_type

/*
 * The kernel's short names
 */
#ifndef HMM_NO_KERNEL_NAMES

#ifndef PAGE_SHIFT
#define PAGE_SHIFT 12
#endif
#ifndef PAGE_SIZE
#define PAGE_SIZE (1UL << PAGE_SHIFT)
#endif
#ifndef PAGE_MASK
#define PAGE_MASK (~(PAGE_SIZE - 1))
#endif

/** The structure of a type that has a member at an address. */
#ifndef container_of
#define container_of(pointer, type, member)                                                        \
  ((type *)(void *)((char *)(pointer)-offsetof(type, member)))
#endif

/** As hmm_is_err(). */
static inline bool IS_ERR(const void *pointer)
{
  return hmm_is_err(pointer);
}

/** As hmm_is_err(), and also true for NULL. */
static inline bool IS_ERR_OR_NULL(const void *pointer)
{
  return !pointer || hmm_is_err(pointer);
}

/** As hmm_ptr_err(). */
static inline long PTR_ERR(const void *pointer)
{
  return hmm_ptr_err(pointer);
}

/** As hmm_err_ptr(). */
static inline void *ERR_PTR(long error)
{
  return hmm_err_ptr(error);
}

/** As hmm_page_to_pfn(). */
static inline unsigned long page_to_pfn(const struct page *page)
{
  return hmm_page_to_pfn(page);
}

/** As hmm_pfn_to_struct_page(). */
static inline struct page *pfn_to_page(unsigned long pfn)
{
  return hmm_pfn_to_struct_page(pfn);
}

/** As hmm_pfn_to_virt(). */
static inline void *pfn_to_virt(unsigned long pfn)
{
  return hmm_pfn_to_virt(pfn);
}

/** As hmm_page_is_device_private(). */
static inline bool is_device_private_page(const struct page *page)
{
  return hmm_page_is_device_private(page);
}

/** As hmm_page_is_device_coherent(). */
static inline bool is_device_coherent_page(const struct page *page)
{
  return hmm_page_is_device_coherent(page);
}

/** As hmm_page_unlock(). */
static inline void unlock_page(struct page *page)
{
  hmm_page_unlock(page);
}

/** As hmm_page_unlock(). */
static inline void folio_unlock(struct folio *folio)
{
  hmm_page_unlock((struct page *)(void *)folio);
}

/**
 * Does nothing: drivers hold no references. A device page that was not named as a destination is
 * the driver's own, and does not come back through page_free.
 */
static inline void put_page(struct page *page)
{
  (void)page;
}

/** As put_page(). */
static inline void folio_put(struct folio *folio)
{
  (void)folio;
}

/** As hmm_find_vma(). */
static inline struct vm_area_struct *find_vma(struct mm_struct *mm, unsigned long addr)
{
  return hmm_find_vma(mm, addr);
}

#ifndef HMM_NO_STRUCT_DEVICE

/** The driver's pointer in a device. */
static inline void *dev_get_drvdata(const struct device *device)
{
  return device->driver_data;
}

/** Sets the driver's pointer in a device. */
static inline void dev_set_drvdata(struct device *device, void *data)
{
  device->driver_data = data;
}

#endif
#endif
