#if !defined(__linux__) || !defined(__LP64__)
#error "libhmm needs 64-bit Linux"
#endif

/**
 * @file hmm.h
 * Heterogeneous memory management in user space.
 *
 * Linux HMM lets a kernel driver mirror a process's address space into its device's page table,
 * keep the two in step, and migrate ordinary pages to device memory and back; when the CPU
 * touches a migrated page it faults, and the driver brings the page home. This library is that
 * for drivers in user space, on the real memory of the process they run in: plain malloc(),
 * mmap(), any pointer.
 *
 * Names, argument orders and semantics are those of Documentation/vm/hmm.txt and of the headers
 * of its age (kernels v4.14 to v4.17); and, behind them, those of today's kernels (v5.5 to v7.3).
 * Both work on one mechanism, and may be used side by side. What is ours and not the kernel's begins with hmm_mm_,
 * hmm_soft_, or is marked "Source: ours". Numbered promises (1 to 82) are the statements of
 * hmm.txt that the tests of this project are named after.
 *
 * A driver in five steps (examples/c/driver.c is the whole of it):
 *
 *  1. hmm_mm_current() gives the address space; hmm_pin_range() keeps the driver's own memory
 *     from migrating.
 *  2. hmm_mirror_register(): from now on sync_cpu_device_pagetables is called for each change
 *     of the CPU page table. It takes the driver's update lock and drops what the device knew
 *     of the range.
 *  3. To let the device use a range: hmm_mm_read_lock(), find_vma(), hmm_vma_fault(); then,
 *     under the update lock, hmm_vma_range_done(): if it is true, write the device's page
 *     table, else start over.
 *  4. hmm_devmem_add() gives device memory pages; migrate_vma() moves pages there and back.
 *  5. The fault callback brings a page home when the CPU touches it, by migrate_vma(); the free
 *     callback gets the device page back.
 *
 * Conventions
 *
 *  - Functions return 0 or a count, or a negative errno. Functions that return a pointer return
 *    ERR_PTR(-errno), or NULL where they say so. hmm_last_error() has the text of the thread's
 *    last error. An error changes nothing, except where the function says so.
 *  - Handles (struct mm_struct, struct vm_area_struct, struct hmm_devmem, struct hmm_device,
 *    struct hmm_soft_device) are checked: NULL, foreign pointers and handles that were given
 *    back are refused with -EINVAL. Other pointers must be valid; NULL and misaligned ones are
 *    refused.
 *  - Addresses of ranges are unsigned long where the kernel's are, and pointers in functions of
 *    ours. A page is 4 KiB.
 *  - A struct of ours that may grow begins with its size. A shorter one than the library knows
 *    is an older one; a longer one must be zero behind what the library knows.
 *  - Callbacks are called with no lock of the library held, and their structs are copied when
 *    they are handed over. They run on the thread that caused them, which for CPU faults and
 *    for layout changes of the process is a service thread of the library. So they must not
 *    touch memory that may migrate: not the heap, not a global, unless pinned. They must not
 *    call malloc(), printf() and the like, and must not leave by longjmp() or an exception.
 *    They may call the functions whose Context says "callbacks included", and what their own
 *    description allows.
 *  - Any function may be called from any thread, except where it says otherwise.
 *  - System calls on memory that may be on a device: see HMM_CAPABILITY_KERNEL_FAULTS and
 *    hmm_guard().
 *  - The engines "uffd-inline" and "signal" learn of touches by SIGSEGV and SIGBUS. The library's
 *    handler is first, and gives signals that are not its own to the one that was installed
 *    before hmm_mm_current(). A program that installs one later gets the library's signals until
 *    the next migration, unless it was started with libhmm_preload.so. Threads that touch memory
 *    which may be on a device do not block these signals.
 *  - fork() brings every page home first, or leaves pages on devices out of the child: see
 *    hmm_mm_set_fork_mode(). In the child the address space of the parent is dead
 *    (-ENODEV); hmm_mm_current() opens one of the child's own.
 *  - The library stays loaded once it is: dlclose() does not unload it.
 *
 * To compile: cc -I... program.c -lhmm. Define before the include, if wanted:
 *
 *  - HMM_API_4_17: names that changed their arguments stand for the forms of kernel v4.17 (see
 *    the end of this file).
 *  - HMM_API_7_3: names that have another meaning in today's kernels (HMM_PFN_VALID and its
 *    kin, struct hmm_range, hmm_pfn_to_page) have that of kernel v7.3. For drivers that use
 *    hmm_range_fault(); everything else of today's kernels is there without it. Excludes
 *    HMM_API_4_17.
 *  - HMM_NO_KERNEL_NAMES: leave out the short helper names of the kernel (IS_ERR, page_to_pfn,
 *    find_vma, container_of, ...); each has a name with hmm_ in front that is always there.
 *  - HMM_NO_STRUCT_DEVICE: leave struct device and struct hmm_device incomplete, for programs
 *    with a struct device of their own.
 */

/* The version of the interface that this header describes. */
#define HMM_VERSION_MAJOR @MAJOR@
#define HMM_VERSION_MINOR @MINOR@
#define HMM_VERSION_PATCH @PATCH@
#define HMM_VERSION_STRING "@MAJOR@.@MINOR@.@PATCH@"
/** A version as one number, to compare with: HMM_VERSION(0, 1, 0). */
#define HMM_VERSION(major, minor, patch) (((major) << 16) | ((minor) << 8) | (patch))
/** The version of this header as one number; hmm_version() is that of the library that runs. */
#define HMM_VERSION_NUMBER HMM_VERSION(HMM_VERSION_MAJOR, HMM_VERSION_MINOR, HMM_VERSION_PATCH)

/*
 * Pages. System memory is numbered by its address (pfn = address >> 12), as behind an IOMMU
 * that maps the addresses of the process one to one. Device memory has pfns of its own, from
 * HMM_DEVICE_PFN on.
 */
#define HMM_PAGE_SHIFT 12
#define HMM_PAGE_SIZE (1UL << HMM_PAGE_SHIFT)
#define HMM_PAGE_MASK (~(HMM_PAGE_SIZE - 1))
/** First pfn of device memory. */
#define HMM_DEVICE_PFN (1UL << 36)

/*
 * Entries of hmm_vma_get_pfns() and hmm_vma_fault(): what is at one page. The values are those
 * of kernel v4.14. With HMM_API_4_17 the same names are indices into the driver's own tables,
 * and with HMM_API_7_3 they are the entries of hmm_range_fault().
 */
#if defined(HMM_API_4_17) && defined(HMM_API_7_3)
#error "HMM_API_4_17 and HMM_API_7_3 exclude each other: they give the same names to different things"
#endif
#if !defined(HMM_API_4_17) && !defined(HMM_API_7_3)
/** The entry holds a pfn. */
#define HMM_PFN_VALID (1UL << 0)
/** The mapping is readable. */
#define HMM_PFN_READ (1UL << 1)
/** The page can be written now, without a fault. */
#define HMM_PFN_WRITE (1UL << 2)
/** The memory is poisoned, or the page cannot be had. */
#define HMM_PFN_ERROR (1UL << 3)
/** Nothing is there yet: never touched, or dropped. */
#define HMM_PFN_EMPTY (1UL << 4)
/** Driver memory and the like: never mirror it; the pfn means nothing. */
#define HMM_PFN_SPECIAL (1UL << 5)
/** The page is device memory, which the CPU cannot address. */
#define HMM_PFN_DEVICE_UNADDRESSABLE (1UL << 6)
/** Position of the pfn in an entry. */
#define HMM_PFN_SHIFT 7
#elif defined(HMM_API_4_17)
/** Indices into range->flags: the driver's own bits. */
enum hmm_pfn_flag_e {
  /** Holds a pfn, and is readable. In a request: make it present. */
  HMM_PFN_VALID = 0,
  /** Can be written. In a request: make it writable. */
  HMM_PFN_WRITE,
  /** Device memory. In a request: bring it home. */
  HMM_PFN_DEVICE_PRIVATE,
  /** Entries of range->flags. */
  HMM_PFN_FLAG_MAX
};
/** Indices into range->values: the driver's own whole entries. */
enum hmm_pfn_value_e {
  /** Poisoned, or cannot be had. */
  HMM_PFN_ERROR,
  /** Nothing is there. Choose 0. */
  HMM_PFN_NONE,
  /** Never mirror it. */
  HMM_PFN_SPECIAL,
  /** Entries of range->values. */
  HMM_PFN_VALUE_MAX
};
#else
/** The entry holds a pfn, in its low bits; the page can be read. */
#define HMM_PFN_VALID (1UL << 63)
/** The page can be written now, without a fault. */
#define HMM_PFN_WRITE (1UL << 62)
/** Nothing is mapped there, or the page cannot be had. */
#define HMM_PFN_ERROR (1UL << 61)
/** In a request: make it present. */
#define HMM_PFN_REQ_FAULT HMM_PFN_VALID
/** In a request, with HMM_PFN_REQ_FAULT: make it writable. */
#define HMM_PFN_REQ_WRITE HMM_PFN_WRITE
/** The driver's, as the next two: the library leaves them as they are. The page is mapped for DMA. */
#define HMM_PFN_DMA_MAPPED (1UL << 60)
/** The page is reached from device to device. */
#define HMM_PFN_P2PDMA (1UL << 59)
/** The page is reached from device to device by a bus address. */
#define HMM_PFN_P2PDMA_BUS (1UL << 58)
/** Position of the order of the mapping, in 5 bits: hmm_pfn_to_map_order() reads it. */
#define HMM_PFN_ORDER_SHIFT 53
/** All bits that are not the pfn's. */
#define HMM_PFN_FLAGS (~0UL << HMM_PFN_ORDER_SHIFT)
#endif

/** A usual limit for hmm_range_fault_unlocked_timeout(), and for a driver's own rounds: milliseconds. */
#define HMM_RANGE_DEFAULT_TIMEOUT 1000

/** In mmu_notifier_range.flags: the callback may sleep. */
#define MMU_NOTIFIER_RANGE_BLOCKABLE (1 << 0)

/** What migrate_vma_setup() collects: a set of these is migrate_vma.flags. The values are the kernel's. */
enum migrate_vma_direction {
  /** Pages of system memory, and holes. (The kernel collects holes whatever flags says.) */
  MIGRATE_VMA_SELECT_SYSTEM = 1 << 0,
  /** Pages of device memory that the CPU cannot address, of pgmap_owner. */
  MIGRATE_VMA_SELECT_DEVICE_PRIVATE = 1 << 1,
  /** Pages of device memory that the CPU can address, of pgmap_owner. */
  MIGRATE_VMA_SELECT_DEVICE_COHERENT = 1 << 2
};

/* Entries of src and dst of migrate_vma() and of migrate_vma_setup(); the values are the kernel's. */
/** The entry holds a pfn. */
#define MIGRATE_PFN_VALID (1UL << 0)
/** In src: will migrate (in alloc_and_copy), did migrate (in finalize_and_map and afterwards). */
#define MIGRATE_PFN_MIGRATE (1UL << 1)
/** The page is locked by the migration; the driver sets it in dst. */
#define MIGRATE_PFN_LOCKED (1UL << 2)
/** In src: the page was writable. */
#define MIGRATE_PFN_WRITE (1UL << 3)
/** The page is device memory. */
#define MIGRATE_PFN_DEVICE (1UL << 4)
/** In dst, without VALID: the driver lost the data; a touch of the page gets SIGBUS. */
#define MIGRATE_PFN_ERROR (1UL << 5)
/** Position of the pfn in an entry. */
#define MIGRATE_PFN_SHIFT 6

/* What a fault callback returns; it may also return 0. The values are those of kernel v4.14. */
/** There is no memory now: the access is tried again. */
#define VM_FAULT_OOM 0x0001
/** The data is lost: the access gets SIGBUS. */
#define VM_FAULT_SIGBUS 0x0002
/** Done, and it took a transfer. Means the same as 0. */
#define VM_FAULT_MAJOR 0x0004

/* Flags that a fault callback receives; the values are the kernel's. */
/** The access is a write. */
#define FAULT_FLAG_WRITE 0x01
/** Not a touch by the CPU, but a request of the library: eviction, hmm_make_present(), closing. */
#define FAULT_FLAG_REMOTE 0x80

/* Flags of a mapping, from hmm_vma_flags(); the values are the kernel's. */
/** Readable. */
#define VM_READ 0x00000001UL
/** Writable. */
#define VM_WRITE 0x00000002UL
/** Executable. */
#define VM_EXEC 0x00000004UL
/** Shared with other processes, or with a file. */
#define VM_SHARED 0x00000008UL
/** Driver memory and the like: never mirrored. */
#define VM_PFNMAP 0x00000400UL
/** Memory of hugetlbfs: never mirrored. */
#define VM_HUGETLB 0x00400000UL

/*
 * What an engine can do, from hmm_mm_capabilities(), and what to do where it cannot.
 */
/** Touches of absent pages are answered. Every engine of this version has it. */
#define HMM_CAPABILITY_MISSING_FAULTS (1 << 0)
/** Contents move without a copy. Where it is missing, migration takes one copy more, and is slower. */
#define HMM_CAPABILITY_MOVE (1 << 1)
/**
 * System calls on absent pages wait for them, as touches do. Where it is missing, read(2),
 * write(2), futex(2) and all others fail with EFAULT, or stop short, at a page that is on a
 * device. Keep their buffers present with hmm_guard(), or start the program with
 * libhmm_preload.so, which does that for the usual ones. The buffers of stdio lie in the heap:
 * if that migrates, setvbuf() gives them another place.
 */
#define HMM_CAPABILITY_KERNEL_FAULTS (1 << 2)
/** A touch of a page that a device lost gets SIGBUS. Every engine of this version has it. */
#define HMM_CAPABILITY_POISON (1 << 3)
/**
 * munmap(), mremap() and madvise() are noticed as they are made. Where it is missing:
 *
 *  - for pages that are on a device, munmap() and MADV_DONTNEED are noticed at the next touch or
 *    call that looks (hmm_mm_sync() does), and mprotect() and mremap() go wrong: call
 *    hmm_make_present() before them;
 *  - changes to pages in system memory are not noticed: mirrors are not called for them, and
 *    hmm_vma_range_done() does not see them. A driver that keeps translations of such pages, and
 *    whose program changes its mappings, has to drop them itself.
 *
 * Migration, and what the CPU's touches do, is told to mirrors on every engine.
 */
#define HMM_CAPABILITY_EVENTS (1 << 4)
/**
 * Private mappings of files migrate as anonymous memory does. Where it is missing, they are
 * mirrored, and stay where they are. System calls on pages of them that are on a device fail on
 * every engine, as is told at HMM_CAPABILITY_KERNEL_FAULTS.
 */
#define HMM_CAPABILITY_PRIVATE_FILES (1 << 5)
/**
 * The program announces changes of its layout, by way of libhmm_preload.so: callbacks of mirrors
 * have returned before munmap(), mmap() over something, mremap(), mprotect(), madvise(), brk() and
 * shmdt() change anything, and the change may be made while the memory migrates, on every engine.
 * HMM_LAYOUT=ordered asks for it; where HMM_CAPABILITY_EVENTS is missing it is there whenever the
 * library is loaded. What libc does by itself (free() and realloc() of large blocks, stacks of
 * threads) is not announced, and noticed as without.
 */
#define HMM_CAPABILITY_ORDERED (1 << 6)

/* Where a page is, from hmm_residency(). */
/** Mapped, but never touched or dropped again: reads as zeros. */
#define HMM_RESIDENCY_NONE 0
/** In system memory. */
#define HMM_RESIDENCY_SYSTEM 1
/** On a device. */
#define HMM_RESIDENCY_DEVICE 2
/** On its way. */
#define HMM_RESIDENCY_MIGRATING 3
/** Lost by its device: a touch gets SIGBUS. */
#define HMM_RESIDENCY_POISONED 4
/** Nothing is mapped there. */
#define HMM_RESIDENCY_UNMAPPED 5

/** A memory group without a limit of its own: the word "max" in cgroup files. */
#define HMM_GROUP_NO_LIMIT UINT64_MAX

/* What children of fork() get of pages that are on a device, for hmm_mm_set_fork_mode(). */
/** A copy: every page comes home before the fork. The default. */
#define HMM_FORK_HOME 0
/**
 * Nothing: the pages stay where they are, and the child has no mapping there (a touch of its is
 * SIGSEGV). For children that do not need the data, such as those that call exec() at once.
 */
#define HMM_FORK_DONT_COPY 1

/* When the soft device takes pages. */
/** When hmm_soft_migrate() asks for it, and for atomic operations. */
#define HMM_SOFT_ON_REQUEST 0
/** Also when a kernel touches them; the oldest pages make room. */
#define HMM_SOFT_ON_TOUCH 1
/** Never: kernels work on system memory in place; hmm_soft_migrate() and atomic operations are refused. */
#define HMM_SOFT_NEVER 2

struct hmm_mirror;
struct hmm_devmem;
struct mmu_interval_notifier;

/** The kernel's type for entries at the level of 2 MiB. */
typedef struct pmd_t pmd_t;

/* The page that a fault callback receives is const in the form of v4.17. */
#ifdef HMM_API_4_17
#define HMM_FAULT_PAGE const struct page
#else
#define HMM_FAULT_PAGE struct page
#endif
