#ifndef HMM_H
#define HMM_H

/* Generated from hmm-capi; do not edit. To make it anew: cargo run -p xtask -- gen-header */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
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
#define HMM_VERSION_MAJOR 0
#define HMM_VERSION_MINOR 1
#define HMM_VERSION_PATCH 0
#define HMM_VERSION_STRING "0.1.0"
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


/** What happened to the CPU page table. There is one kind: forget what you know of the range. */
enum hmm_update_type {
  /** The device must not use its translations of the range any more. */
  HMM_UPDATE_INVALIDATE,
};

/** Why a range is invalidated. The values are the kernel's. */
enum mmu_notifier_event {
  /** munmap(), or the old place of an mremap(). */
  MMU_NOTIFY_UNMAP = 0,
  /**
   * The contents are replaced or dropped, or the page is another one: madvise(), a page that
   * comes home, a page that the CPU takes back from its exclusive user.
   */
  MMU_NOTIFY_CLEAR = 1,
  /**
   * The protection of the mapping changes. Only where the program announces that: see
   * HMM_CAPABILITY_ORDERED.
   */
  MMU_NOTIFY_PROTECTION_VMA = 2,
  /** The kernel's, for single pages; not used here. */
  MMU_NOTIFY_PROTECTION_PAGE = 3,
  /** The kernel's, for its tracking of written pages; not used here. */
  MMU_NOTIFY_SOFT_DIRTY = 4,
  /**
   * The address space is being closed: start is 0, end ULONG_MAX, and the device must not use it
   * any more.
   */
  MMU_NOTIFY_RELEASE = 5,
  /** Pages migrate; owner is the pgmap_owner of who migrates them. */
  MMU_NOTIFY_MIGRATE = 6,
  /** Pages become one device's alone; owner is who asked for that. */
  MMU_NOTIFY_EXCLUSIVE = 7,
};

/**
 * Why a page of a migration stayed where it was: hmm_migrate_reason() reads it from an entry of
 * src. Numbers are added, and never change their meaning.
 */
enum hmm_stay {
  /** It did not stay, or nothing was said. */
  HMM_STAY_NONE = 0,
  /** It lies in a range that is pinned or guarded. */
  HMM_STAY_PINNED = 1,
  /** Memory of the library itself. */
  HMM_STAY_LIBRARY = 2,
  /** A migration under way needs it: its caller's stack, or its arrays. */
  HMM_STAY_NEEDED = 3,
  /** Shared anonymous memory, memfd or tmpfs. */
  HMM_STAY_SHARED = 4,
  /** A shared file mapping. */
  HMM_STAY_SHARED_FILE = 5,
  /**
   * A private file mapping, and an engine that cannot move its pages; or a page beyond the end
   * of the file.
   */
  HMM_STAY_FILE = 6,
  /** A mapping of a driver or of the kernel. */
  HMM_STAY_SPECIAL = 7,
  /** hugetlbfs. */
  HMM_STAY_HUGE = 8,
  /** The mapping is not readable and writable, or it is executable. */
  HMM_STAY_PROTECTION = 9,
  /** mlock and its kin. */
  HMM_STAY_LOCKED = 10,
  /** Another userfaultfd has the range. */
  HMM_STAY_WATCHED = 11,
  /**
   * Shared after a fork, or pinned by the kernel (direct I/O, io_uring, a device); or there was
   * no saying which.
   */
  HMM_STAY_BUSY = 12,
  /** Another migration holds it. */
  HMM_STAY_MIGRATING = 13,
  /** It is where the request did not ask for pages: on a device, or in system memory. */
  HMM_STAY_NOT_SELECTED = 14,
  /** A page of another owner's device. */
  HMM_STAY_FOREIGN = 15,
  /** Its device lost it before. */
  HMM_STAY_POISONED = 16,
  /** The program is dropping its contents (madvise). */
  HMM_STAY_DROPPED = 17,
  /** The program unmapped, moved or replaced it meanwhile. */
  HMM_STAY_CHANGING = 18,
  /** The driver named no destination. */
  HMM_STAY_LEFT_OUT = 19,
  /** The destination that the driver named is no free page of a device, or not the page's frame. */
  HMM_STAY_BAD_DESTINATION = 20,
  /** The driver said ERROR in dst: the contents are lost. */
  HMM_STAY_LOST = 21,
  /** No frame, or no memory for one. */
  HMM_STAY_NO_MEMORY = 22,
  /** The kernel refused, and gives no reason. */
  HMM_STAY_REFUSED = 23,
  /** A hole, and its memory group is at its limit. */
  HMM_STAY_LIMIT = 24,
};

/** Kinds of device memory: values of dev_pagemap.type. The values are the kernel's. */
enum memory_type {
  /** The CPU cannot address it: a touch of a page that is there brings it home. */
  MEMORY_DEVICE_PRIVATE = 1,
  /** The CPU addresses it as its own memory, coherently. Its pages can be evicted. */
  MEMORY_DEVICE_COHERENT = 2,
  /** The kernel's; not supported. */
  MEMORY_DEVICE_FS_DAX = 3,
  /** The kernel's; not supported. */
  MEMORY_DEVICE_GENERIC = 4,
  /** The kernel's; not supported. */
  MEMORY_DEVICE_PCI_P2PDMA = 5,
};

/** Pages that belong together: opaque. Here every page is alone, and a folio is its page. */
struct folio;

/** The library's side of a mirror: opaque. */
struct hmm;

/**
 * A memory group, in the words of cgroup v2: opaque.
 *
 * hmm_group_create() makes one, hmm_group_put() gives the handle back.
 */
struct hmm_group;

/** A software accelerator: opaque. */
struct hmm_soft_device;

/**
 * The address space of this process, as the library sees it: opaque.
 *
 * hmm_mm_current() opens it or takes one more reference, hmm_mm_put() drops one; the last put
 * closes it.
 */
struct mm_struct;

/**
 * A page of system or device memory: opaque, and nothing is behind the pointer. The pointer's
 * value carries the pfn, with bits set that make any access through it a fault.
 */
struct page;

/** An entry of a CPU page table at the level of 2 MiB: opaque, and always NULL here. */
struct pmd_t;

/** A range of physical addresses: opaque, for hmm_devmem_add_resource(). */
struct resource;

/**
 * One mapping of the process: opaque, read through hmm_vma_start() and its like.
 *
 * A handle comes from find_vma() and lives until the thread that asked for it releases the lock of
 * the address space; a handle that a callback received lives until the callback returns. It is a
 * look at one moment: the process may change its mappings at any time, and every function that
 * takes a vma looks again.
 */
struct vm_area_struct;

/**
 * A range of bytes that system calls can use; see hmm_guard(). The caller provides the memory,
 * usually on its stack, and it may move. All zeros (HMM_GUARD_NONE) holds nothing.
 */
struct hmm_guard {
  /** The library's; NULL when it holds nothing. */
  const void *held;
  /** First address of the pages that are held. */
  unsigned long start;
  /** First address behind them. */
  unsigned long end;
  /** Zero; room for later versions. */
  unsigned long reserved;
};

/**
 * What an address space has counted since it was opened.
 *
 * Set size to sizeof(struct hmm_mm_counters) before the call; later versions may add members at
 * the end.
 */
struct hmm_mm_counters {
  /** In: sizeof(struct hmm_mm_counters). */
  uint32_t size;
  /** Zero. */
  uint32_t reserved;
  /** CPU faults that service threads answered. */
  uint64_t cpu_faults;
  /** Of these: touches of pages that were on a device. */
  uint64_t device_faults;
  /** Of these: first touches of holes in a range whose absence is watched. */
  uint64_t zero_faults;
  /** Of these: touches of a page that a migration held; they slept until it was done. */
  uint64_t parked_faults;
  /** Pages that left for a device. */
  uint64_t migrated_to_device;
  /** Pages that came home. */
  uint64_t migrated_to_system;
  /** Pages that a migration was asked for and left where they were. */
  uint64_t not_migrated;
  /** Pages that are on devices now. */
  uint64_t device_pages;
  /** Invalidations of mirrored ranges. */
  uint64_t invalidations;
  /** Layout changes of the process (munmap, mremap, madvise) that were applied. */
  uint64_t map_events;
  /** Times that an operation waited for layout changes and tried again. */
  uint64_t retries;
  /** Device pages that were dropped with their range (munmap, madvise). */
  uint64_t device_pages_dropped;
  /** Pages whose device lost the data: SIGBUS at the touch. */
  uint64_t poisoned;
  /**
   * Faults raised by the library's own threads: a driver's callback touched memory that
   * migrates.
   */
  uint64_t self_faults;
};

/**
 * A driver's side of mirroring. Copied at registration, so it may live on the stack.
 *
 * Both are called with no lock of the library held. They must not touch memory that may migrate
 * (hmm_pin_range() what they need), must not call malloc or free, must not call a function that
 * this header does not mark "callbacks included", and must not leave by longjmp or an exception.
 */
struct hmm_mirror_ops {
  /**
   * Optional. The address space is being closed: the driver must not use the mirror for new
   * device mappings. Called once for each registered mirror (promise 43).
   * hmm_mirror_unregister() is still the driver's to call, later and elsewhere.
   */
  void (*release)(struct hmm_mirror *mirror);
  /**
   * Mandatory. The CPU page table changes between start (inclusive) and end (exclusive), which
   * may be more than what changes, and never less (promise 22). Take the driver's update lock,
   * drop the device's translations of the range and wait until the device uses none of them,
   * then return: the CPU side waits for it (promises 23 to 25). Calls for one mirror may come
   * from several threads at once.
   */
  void (*sync_cpu_device_pagetables)(struct hmm_mirror *mirror,
                                     enum hmm_update_type update_type,
                                     unsigned long start,
                                     unsigned long end);
};

/** Two words for the library's use, where kernel structs have a `struct list_head`. */
struct hmm_list {
  /** The library's. */
  void *next;
  /** The library's. */
  void *prev;
};

/**
 * A mirror of an address space. The driver embeds it in a structure of its own, sets ops,
 * registers it, and gets back to its structure with container_of(). It need not be cleared before.
 *
 * Its pages are pinned while it is registered. It must not move, and may be freed once
 * hmm_mirror_unregister() returned.
 */
struct hmm_mirror {
  /** The library's. */
  struct hmm *hmm;
  /** Set by the driver before registration. */
  const struct hmm_mirror_ops *ops;
  /** The library's. */
  struct hmm_list list;
  /** The library's; room for later versions. */
  unsigned long reserved[4];
};

/** One entry of a range: HMM_PFN_* flags in the low 7 bits, the pfn above. */
typedef unsigned long hmm_pfn_t;

/**
 * A range of addresses between a look at the CPU page table and hmm_vma_range_done(). The caller
 * provides the memory, usually on its stack, and need not set anything: the look fills it in. It
 * must not move while it is active.
 */
struct hmm_range {
  /** The library's. */
  struct hmm_list list;
  /** First address. */
  unsigned long start;
  /** First address behind the range. */
  unsigned long end;
  /** One entry for each page, as given by the caller. */
  hmm_pfn_t *pfns;
  /** What hmm_vma_range_done() returned, once it was called; true while the range is active. */
  bool valid;
};

/**
 * A range in the form of kernel v4.17, which the header calls `struct hmm_range` when HMM_API_4_17
 * is defined.
 *
 * The driver sets every member but list and valid before hmm_vma_get_pfns() or hmm_vma_fault().
 */
struct hmm_range_4_17 {
  /** The mapping that holds all of the range. */
  struct vm_area_struct *vma;
  /** The library's. */
  struct hmm_list list;
  /** First address, page aligned. */
  unsigned long start;
  /** First address behind the range, page aligned. */
  unsigned long end;
  /**
   * One entry for each page. For hmm_vma_fault() each says, in the driver's own flags, what is
   * wanted of its page.
   */
  uint64_t *pfns;
  /**
   * The driver's bits for HMM_PFN_VALID, HMM_PFN_WRITE and HMM_PFN_DEVICE_PRIVATE, in this
   * order.
   */
  const uint64_t *flags;
  /**
   * The driver's whole entries for HMM_PFN_ERROR, HMM_PFN_NONE and HMM_PFN_SPECIAL, in this
   * order. Choose 0 for NONE: entries that are invalidated become 0.
   */
  const uint64_t *values;
  /** How far a pfn is shifted in an entry; at most 12. */
  uint8_t pfn_shift;
  /** What hmm_vma_range_done() returned, once it was called; true while the range is active. */
  bool valid;
};

#ifndef HMM_NO_STRUCT_DEVICE

/** A device, as far as the library knows devices: the driver's own pointer, and room. */
struct device {
  /** The driver's, for dev_get_drvdata() and dev_set_drvdata(). */
  void *driver_data;
  /** Room for later versions. */
  unsigned long reserved[3];
};

/** A device without hardware. Pass its device member to hmm_devmem_add(). */
struct hmm_device {
  /** What hmm_devmem_add() takes. */
  struct device device;
  /** Its number, from 0 on; 256 exist. */
  unsigned int minor;
  /** Room for later versions. */
  unsigned int reserved[3];
};

#else

struct device;
struct hmm_device;

#endif

/**
 * A driver's side of device memory. Copied by hmm_devmem_add(), so it may live on the stack.
 *
 * Both are called with no lock of the library held, fault usually on a thread that answers CPU
 * faults (hmm_devmem_set_signal_safe() tells where else). They must not touch memory that may
 * migrate (hmm_pin_range() what they need), must not call malloc or free, and must not leave by
 * longjmp or an exception.
 */
struct hmm_devmem_ops {
  /**
   * Mandatory. The last reference to a device page is gone: nobody uses it any more, and the
   * driver may reuse it at once, even before it returns (promises 48, 56). Called exactly once
   * for each page that was named as a destination of a migration, also when that migration
   * failed. The driver's locks may be taken, but must not be held around calls that free pages
   * (hmm_devmem_remove, migrate_vma, munmap).
   */
  void (*free)(struct hmm_devmem *devmem, struct page *page);
  /**
   * Mandatory. The CPU touches addr, whose page is on the device. Bring it home with
   * migrate_vma(), on a range inside vma that holds addr; neighbours may come along (promises
   * 49, 50). The calling thread counts as holding the lock of the address space for reading, and
   * vma lives until the return.
   *
   * page is the device page, as a hint: it may have come home meanwhile, and then there is
   * nothing left to do. flags is a set of FAULT_FLAG_WRITE and FAULT_FLAG_REMOTE (a request of
   * the library or another thread, not a touch). pmdp is NULL.
   *
   * Returns 0 or VM_FAULT_MAJOR when it was done, VM_FAULT_SIGBUS when the data is lost (the CPU
   * access gets SIGBUS, never zeros), VM_FAULT_OOM when there is no memory now (the access is
   * tried again).
   */
  int (*fault)(struct hmm_devmem *devmem,
               struct vm_area_struct *vma,
               unsigned long addr,
               HMM_FAULT_PAGE *page,
               unsigned int flags,
               struct pmd_t *pmdp);
};

/**
 * Device memory that the library made page descriptors for. Made by hmm_devmem_add(), read by the
 * driver, given back to hmm_devmem_remove().
 */
struct hmm_devmem {
  /** First page. */
  unsigned long pfn_first;
  /** One behind the last page. */
  unsigned long pfn_last;
  /** As given to hmm_devmem_add(). */
  struct device *device;
  /** As given to hmm_devmem_add(); not looked at any more. */
  const struct hmm_devmem_ops *ops;
  /** The library's; room for later versions. */
  unsigned long reserved[4];
};

/**
 * A driver's side of a migration. Copied by migrate_vma().
 *
 * Both are called on the thread that called migrate_vma(), with no lock of the library held. A
 * large range may be cut into several batches: then both are called once for each, with that
 * batch's start and end, and with src and dst pointing at that batch's first entries of the
 * caller's arrays.
 */
struct migrate_vma_ops {
  /**
   * Mandatory. For each entry of src with MIGRATE_PFN_MIGRATE: choose a destination page, copy
   * (or clear it, when src has no MIGRATE_PFN_VALID: nothing was there), and store
   * migrate_pfn(pfn) | MIGRATE_PFN_LOCKED in dst, with MIGRATE_PFN_DEVICE for a device page.
   * Leave dst 0 to let a page stay where it is. The pages are taken from the CPU: nobody can
   * change them meanwhile (promise 61). src must not be changed.
   *
   * A source with MIGRATE_PFN_DEVICE is on a device, which need not be the driver's own: compare
   * its pfn. Others are readable by the CPU at pfn_to_virt(). A destination in system memory
   * comes from hmm_vma_alloc_locked_page(vma).
   */
  void (*alloc_and_copy)(struct vm_area_struct *vma,
                         const unsigned long *src,
                         unsigned long *dst,
                         unsigned long start,
                         unsigned long end,
                         void *private_data);
  /**
   * Mandatory. The outcome: entries of src that still have MIGRATE_PFN_MIGRATE moved, and only
   * those (promise 62). The pages are still locked, so device page tables may be updated here
   * (promise 63). src and dst must not be changed.
   */
  void (*finalize_and_map)(struct vm_area_struct *vma,
                           const unsigned long *src,
                           const unsigned long *dst,
                           unsigned long start,
                           unsigned long end,
                           void *private_data);
};

/** First and last address of a subscription. */
struct hmm_interval {
  /** First address. */
  unsigned long start;
  /** Last address, inclusive. */
  unsigned long last;
};

/** One change of the CPU page table, as invalidate() receives it. */
struct mmu_notifier_range {
  /** The address space. */
  struct mm_struct *mm;
  /** First address that changes; may be below the subscription's first one. */
  unsigned long start;
  /** First address behind what changes; may be above the subscription's last one. */
  unsigned long end;
  /** MMU_NOTIFIER_RANGE_BLOCKABLE, always: callbacks may sleep. */
  unsigned int flags;
  /** Why. */
  enum mmu_notifier_event event;
  /**
   * For MMU_NOTIFY_MIGRATE and MMU_NOTIFY_EXCLUSIVE: on whose behalf, so that a driver knows its
   * own changes; otherwise NULL.
   */
  void *owner;
};

/** A driver's side of an interval notifier. Copied by mmu_interval_notifier_insert(). */
struct mmu_interval_notifier_ops {
  /**
   * Mandatory. The CPU page table is about to change inside the subscription: take the driver's
   * update lock, call mmu_interval_set_seq() with cur_seq, drop the device's translations of the
   * range and wait until the device uses none of them, then return: the change waits for it.
   * Calls for one subscription may come from several threads at once.
   *
   * Returns true. (False is for kernel ranges that are not blockable, which there are none of
   * here; the change is made then all the same.)
   *
   * Called with no lock of the library held. It must not touch memory that may migrate
   * (hmm_pin_range() what it needs), must not call malloc or free, must not call a function that
   * this header does not mark "callbacks included", and must not leave by longjmp or an
   * exception.
   */
  bool (*invalidate)(struct mmu_interval_notifier *interval_sub,
                     const struct mmu_notifier_range *range,
                     unsigned long cur_seq);
};

/**
 * A subscription to the changes of a range. The driver embeds it in a structure of its own, and
 * gets back to that with container_of(). It need not be cleared before.
 *
 * Its pages are pinned while it is inserted. It must not move, and may be freed once
 * mmu_interval_notifier_remove() returned.
 */
struct mmu_interval_notifier {
  /** The range, as given to mmu_interval_notifier_insert(); to be read only. */
  struct hmm_interval interval_tree;
  /** As given to mmu_interval_notifier_insert(); not looked at any more. */
  const struct mmu_interval_notifier_ops *ops;
  /** As given to mmu_interval_notifier_insert(), without a reference. */
  struct mm_struct *mm;
  /** What mmu_interval_set_seq() stored. */
  unsigned long invalidate_seq;
  /** The library's; room for later versions. */
  unsigned long reserved[4];
};

/**
 * A range in the form of today's kernels, which the header calls `struct hmm_range` when
 * HMM_API_7_3 is defined. The driver sets every member; all of them stay its own.
 */
struct hmm_range_7_3 {
  /** A subscription that covers the range. */
  struct mmu_interval_notifier *notifier;
  /** What mmu_interval_read_begin() returned for it. */
  unsigned long notifier_seq;
  /** First address, page aligned. */
  unsigned long start;
  /** First address behind the range, page aligned. */
  unsigned long end;
  /** One entry for each page: in, what is wanted of it; out, what is there. */
  unsigned long *hmm_pfns;
  /**
   * Wanted of every page, beside what its entry says: HMM_PFN_REQ_FAULT, HMM_PFN_REQ_WRITE, both
   * or none.
   */
  unsigned long default_flags;
  /** Which of these flags of the entries count; 0: only default_flags do. */
  unsigned long pfn_flags_mask;
  /**
   * Whose device pages are reported as they are: the owner of the driver's own struct
   * dev_pagemap, or NULL. Pages on other devices that the CPU cannot address count as absent, and
   * come home when they are faulted.
   */
  void *dev_private_owner;
};

/** What migrate_to_ram returns: 0 or VM_FAULT_ values. */
typedef unsigned int vm_fault_t;

/** A touch of a page that is on a device, as migrate_to_ram receives it. */
struct vm_fault {
  /** The mapping around the address; the thread counts as holding the lock of the address space. */
  struct vm_area_struct *vma;
  /** The touched page's address. */
  unsigned long address;
  /** The device page; it stays what it is until the callback returns. */
  struct page *page;
  /** A set of FAULT_FLAG_WRITE and FAULT_FLAG_REMOTE. */
  unsigned int flags;
};

/**
 * A driver's side of device memory. Copied by memremap_pages().
 *
 * Both are called with no lock of the library held, migrate_to_ram usually on a thread that answers
 * CPU faults. They must not touch memory that may migrate (hmm_pin_range() what they need), must
 * not call malloc or free, and must not leave by longjmp or an exception.
 */
struct dev_pagemap_ops {
  /**
   * Mandatory. The last reference to a device page is gone: the driver may reuse it at once.
   * Called exactly once for each page that was named as a destination of a migration, also when
   * that failed. The driver's locks may be taken, but must not be held around calls that free
   * pages (memunmap_pages, migrate_vma_pages, migrate_vma_finalize, munmap).
   */
  void (*page_free)(struct page *page);
  /**
   * Mandatory for MEMORY_DEVICE_PRIVATE, not used for others. The CPU touches vmf->address, whose
   * page is on the device: bring it home with migrate_vma_setup(), migrate_vma_pages() and
   * migrate_vma_finalize() on a range inside vmf->vma that holds it, with vmf->page as fault_page;
   * neighbours may come along.
   *
   * Returns 0 or VM_FAULT_MAJOR when it was done, VM_FAULT_SIGBUS when the data is lost (the CPU
   * access gets SIGBUS, never zeros), VM_FAULT_OOM when there is no memory now (the access is
   * tried again).
   */
  vm_fault_t (*migrate_to_ram)(struct vm_fault *vmf);
};

/** A range of addresses of device memory. */
struct hmm_pagemap_range {
  /** First address. */
  uint64_t start;
  /** Last address, inclusive. */
  uint64_t end;
};

/**
 * Device memory, described by the driver, which sets type, ops, owner, and range to 0 and the size
 * minus 1. It may embed this in a structure of its own, and gets back to that with container_of().
 *
 * Its pages are pinned while it is registered. It must not move, and may be freed once
 * memunmap_pages() succeeded.
 */
struct dev_pagemap {
  /** MEMORY_DEVICE_PRIVATE or MEMORY_DEVICE_COHERENT. */
  enum memory_type type;
  /** The kernel's; not looked at. */
  unsigned int flags;
  /** The driver's callbacks; not looked at after memremap_pages(). */
  const struct dev_pagemap_ops *ops;
  /**
   * Whose the pages are: pgmap_owner of migrate_vma_setup(), dev_private_owner of
   * hmm_range_fault(). Not NULL.
   */
  void *owner;
  /** How many ranges; there is one, and 0 means the same as 1. */
  int nr_range;
  /**
   * In: how large it is, end - start + 1 bytes, rounded up to whole pages. Out: where it lies;
   * the first page is pfn_to_page(range.start >> PAGE_SHIFT).
   */
  struct hmm_pagemap_range range;
  /** The library's; room for later versions. */
  unsigned long reserved[4];
};

/**
 * A migration by address. The driver sets vma, src, dst, start, end, pgmap_owner, flags and
 * fault_page, and keeps it where it is until migrate_vma_finalize(). src and dst must not overlap.
 */
struct migrate_vma {
  /** The mapping that holds all of the range. */
  struct vm_area_struct *vma;
  /** One entry for each page: where the driver puts it. */
  unsigned long *dst;
  /** One entry for each page: what is there; filled in. */
  unsigned long *src;
  /** How many pages were collected: entries of src with MIGRATE_PFN_MIGRATE; filled in. */
  unsigned long cpages;
  /** How many pages the range has; filled in. */
  unsigned long npages;
  /** First address; rounded down to its page. */
  unsigned long start;
  /** First address behind the range; rounded down to its page. */
  unsigned long end;
  /**
   * Whose device pages are collected, and who invalidate callbacks are told to migrate: the owner
   * of the driver's struct dev_pagemap, or NULL.
   */
  void *pgmap_owner;
  /** A set of MIGRATE_VMA_SELECT_SYSTEM, _DEVICE_PRIVATE and _DEVICE_COHERENT. */
  unsigned long flags;
  /** In a migrate_to_ram callback vmf->page, otherwise NULL. */
  struct page *fault_page;
  /** The library's; room for later versions. */
  unsigned long reserved[4];
};

/**
 * What is charged to a group, and what happened to it; bytes, with the groups below it.
 *
 * Set size to sizeof(struct hmm_group_state) before the call; later versions may add members at
 * the end.
 */
struct hmm_group_state {
  /** In: sizeof(struct hmm_group_state). */
  uint32_t size;
  /** Zero. */
  uint32_t reserved;
  /** The group's own limit (memory.max), HMM_GROUP_NO_LIMIT without one. */
  uint64_t max;
  /** Charged now (memory.current). */
  uint64_t current;
  /** The most that was ever charged (memory.peak). */
  uint64_t peak;
  /** Anonymous memory (memory.stat): all that is charged, since what can leave is anonymous. */
  uint64_t stat_anon;
  /** Of this: in the memory of devices now. */
  uint64_t stat_device;
  /**
   * Times that a charge went above the limit of the group or of one below it, or was refused for
   * that (memory.events).
   */
  uint64_t events_max;
};

/**
 * Resident memory by kind, in bytes, with what is on devices counted in.
 *
 * Set size to sizeof(struct hmm_mm_rss) before the call; later versions may add members at the
 * end.
 */
struct hmm_mm_rss {
  /** In: sizeof(struct hmm_mm_rss). */
  uint32_t size;
  /** Zero. */
  uint32_t reserved;
  /** Anonymous memory (rss_anon). */
  uint64_t anon;
  /** Pages of files (rss_file). */
  uint64_t file;
  /** Shared anonymous memory, memfd, tmpfs (rss_shmem). */
  uint64_t shmem;
};

/**
 * What a soft device shall be like. Set size to sizeof(struct hmm_soft_config), and every member
 * that is left 0 gets its default.
 */
struct hmm_soft_config {
  /** sizeof(struct hmm_soft_config). */
  uint32_t size;
  /**
   * When pages move to the device: HMM_SOFT_ON_REQUEST (the default), HMM_SOFT_ON_TOUCH or
   * HMM_SOFT_NEVER.
   */
  uint32_t policy;
  /** Device memory in bytes, a whole number of pages up to 256 GiB. Default: 64 MiB. */
  uint64_t memory_bytes;
  /** Added for each batch copied and each device fault, in nanoseconds. Default: none. */
  uint64_t latency_ns;
  /** Bytes per second of the copy engine. Default: as fast as memory is. */
  uint64_t bandwidth;
  /** Most pages that one CPU fault brings home, 1 to 512. Default: 16. */
  uint32_t fault_around;
  /** Device threads, 1 to 64: so many kernels run at once. Default: 1. */
  uint32_t threads;
};

/**
 * What a soft device has counted since it was made. Set size to sizeof(struct hmm_soft_counters)
 * before the call; later versions may add members at the end.
 */
struct hmm_soft_counters {
  /** In: sizeof(struct hmm_soft_counters). */
  uint32_t size;
  /** Zero. */
  uint32_t reserved;
  /** Device page faults: a kernel met a page without a usable entry in the device's page table. */
  uint64_t device_faults;
  /** CPU faults on device pages that the device was called for. */
  uint64_t cpu_faults;
  /** Pages that moved into device memory. */
  uint64_t pages_to_device;
  /** Pages that moved back into system memory, evicted ones included. */
  uint64_t pages_to_system;
  /** Pages that moved back to make room for others. */
  uint64_t evictions;
  /** Invalidation callbacks received. */
  uint64_t invalidations;
  /**
   * Times that a range changed while a device fault looked at it, or a page went away before it
   * was used.
   */
  uint64_t retries;
  /** Kernels that ended, well or not. */
  uint64_t jobs;
};

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/* ---------------------------------------------------------------------------------------------
 * Version and errors
 * ------------------------------------------------------------------------------------------ */

/**
 * The version of the library that runs, which may be newer than the header that was compiled in.
 *
 * A program that needs something of version 0.2.0 asks for `hmm_version() >= HMM_VERSION(0, 2,
 * 0)`.
 *
 * @return The number that HMM_VERSION() composes: major << 16 | minor << 8 | patch.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
unsigned int hmm_version(void);

/**
 * The version of the library that runs, as text.
 *
 * @return A constant string such as "0.1.0".
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
const char *hmm_version_string(void);

/**
 * The text of the calling thread's last error.
 *
 * It says what was wrong, at which address, and often what to do about it: "invalid argument at
 * 0x7f0012345001: range is not page aligned". Every function that returns an error leaves one; a
 * success leaves the text as it is.
 *
 * @return A NUL-terminated string, empty when no call of this thread failed yet. It belongs to the
 * library and stays as it is until this thread calls hmm_last_error() again. Never NULL.
 *
 * Context: any thread, but not inside a callback (the first call on a thread may allocate).
 * Source: ours.
 */
const char *hmm_last_error(void);

/**
 * The errno of the calling thread's last failure, or of the last function that returns nothing.
 *
 * Some functions return nothing because their kernel models do: hmm_mirror_unregister(),
 * hmm_devmem_remove(), hmm_device_put(), hmm_devmem_page_set_drvdata(),
 * mmu_interval_notifier_remove(), migrate_vma_pages(), memunmap_pages() and others. They leave
 * their outcome here: 0 when they did what was asked, else the error. So do hmm_find_vma(),
 * hmm_vma_alloc_locked_page() and hmm_migrate_alloc_page(), whose NULL has several reasons, and
 * mmu_interval_read_begin() and mmu_interval_read_retry() when they fail.
 *
 * @return 0, or a negative errno such as -EINVAL.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
int hmm_last_errno(void);

/* ---------------------------------------------------------------------------------------------
 * The address space
 *
 * One address space is managed: that of the process itself. Everything below needs it, and
 * whoever needs it takes a reference of its own.
 * ------------------------------------------------------------------------------------------ */

/**
 * Opens the address space of this process, or takes one more reference to it.
 *
 * The first call chooses the engine and starts its service threads. The environment variable
 * HMM_ENGINE names one: uffd, uffd-inline or signal; auto, or nothing, takes the best that works
 * here. HMM_LAYOUT=ordered has changes of the layout announced (HMM_CAPABILITY_ORDERED), and is
 * refused without libhmm_preload.so; HMM_LAYOUT=observed has not. hmm_mm_capabilities() tells what
 * it can do.
 *
 * @return The address space: the same pointer for every caller until the last hmm_mm_put(). On
 * failure ERR_PTR():
 *  - -EOPNOTSUPP: no engine works on this kernel, or HMM_ENGINE or HMM_LAYOUT asks for what
 *    cannot be had, and hmm_last_error() says why and what would help;
 *  - -ENOMEM;
 *  - -EBUSY: another thread opens or closes it for more than 10 seconds;
 *  - -EDEADLK: called from inside a callback of its closing.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours; stands for the kernel's current->mm with mmget().
 */
struct mm_struct *hmm_mm_current(void);

/**
 * Drops one reference; the last one closes the address space.
 *
 * Closing calls the release callback of each mirror once, brings every page home from its device,
 * and stops the service threads. Mirrors stay the driver's to unregister; device memory stays the
 * driver's to remove.
 *
 * @param mm  What hmm_mm_current() returned.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle;
 *  - -EDEADLK: called from inside a callback;
 *  - -EBUSY, -EIO: a device did not give its pages back, or another thread opens or closes (the
 *    reference is kept, nothing is lost, try again).
 *
 * Context: any thread, but not inside a callback; may block; calls release, fault and free
 * callbacks.
 * Source: the kernel's mmput(); promise 43.
 */
int hmm_mm_put(struct mm_struct *mm);

/**
 * The name of the engine that changes CPU mappings, for people: "uffd", "uffd-inline" or "signal".
 *
 * Programs that behave differently from one engine to another ask hmm_mm_capabilities() instead.
 *
 * @param mm  The address space.
 * @return A string that lives as long as the address space is open; NULL when mm is no live
 * handle.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
const char *hmm_mm_engine(const struct mm_struct *mm);

/**
 * What the engine of an address space can do.
 *
 * @param mm  The address space.
 * @return A set of HMM_CAPABILITY_ bits, whose descriptions say what to do where one is missing;
 * or:
 *  - -EINVAL: mm is no live handle.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
int hmm_mm_capabilities(const struct mm_struct *mm);

/**
 * Waits until layout changes that were made before this call are applied and their callbacks are
 * done.
 *
 * munmap(), mremap() and madvise() of the process are reported to the library while they happen,
 * where the engine has HMM_CAPABILITY_EVENTS. A thread that made one and then starts device work
 * calls this in between, so that the device cannot use a translation from before.
 *
 * @param mm  The address space.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours; stands for the synchronous invalidation of hmm.txt, section 4 (promise 23).
 */
int hmm_mm_sync(struct mm_struct *mm);

/**
 * Reads memory of the process without ever raising a signal.
 *
 * Pages that are on a device come home first, as for any CPU access.
 *
 * @param mm      The address space.
 * @param addr    First byte to read; need not be mapped.
 * @param buffer  Where the bytes go; plain memory of the caller.
 * @param length  Bytes to read.
 * @return The bytes read, fewer than length when the mapping ends before, or:
 *  - -EFAULT: nothing is readable at addr;
 *  - -EINVAL: mm is no live handle, buffer is NULL, or length above SSIZE_MAX;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours; compare process_vm_readv(2).
 */
long hmm_mm_read(struct mm_struct *mm, const void *addr, void *buffer, size_t length);

/**
 * Writes memory of the process without ever raising a signal.
 *
 * Pages that are on a device come home first, as for any CPU access.
 *
 * @param mm      The address space.
 * @param addr    First byte to write; need not be mapped.
 * @param buffer  The bytes; plain memory of the caller.
 * @param length  Bytes to write.
 * @return The bytes written, fewer than length when the writable mapping ends before, or:
 *  - -EFAULT: nothing is writable at addr;
 *  - -EINVAL: mm is no live handle, buffer is NULL, or length above SSIZE_MAX;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours; compare process_vm_writev(2).
 */
long hmm_mm_write(struct mm_struct *mm, void *addr, const void *buffer, size_t length);

/**
 * Reads memory of the process only if that needs no waiting: for a device engine that works under
 * the driver's update lock, where a fault would wait for itself.
 *
 * @param mm      The address space.
 * @param addr    First byte to read; need not be mapped.
 * @param buffer  Where the bytes go; memory of the caller that does not migrate.
 * @param length  Bytes to read.
 * @return True when all bytes were read. False when some page of them is not present (it is on a
 * device, on its way, never touched, not mapped); then buffer may be partly written. Let go of the
 * lock, use hmm_vma_fault(), and try again. Also false for bad arguments.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours; stands for an access through the device's page table.
 */
bool hmm_mm_peek(struct mm_struct *mm, const void *addr, void *buffer, size_t length);

/**
 * Writes memory of the process only if that needs no waiting; see hmm_mm_peek().
 *
 * @param mm      The address space.
 * @param addr    First byte to write; need not be mapped.
 * @param buffer  The bytes; memory of the caller that does not migrate.
 * @param length  Bytes to write.
 * @return True when all bytes were written. False when some page of them is not present or not
 * writable; then the bytes of earlier pages may be written. Also false for bad arguments.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours; stands for an access through the device's page table.
 */
bool hmm_mm_poke(struct mm_struct *mm, void *addr, const void *buffer, size_t length);

/**
 * Sets what children of fork() get of pages that are on a device, from the next fork on.
 *
 * In every mode a child never reads zeros for data. What does not come home, because its device
 * fails or fork() is called inside a callback, is left out of the child as HMM_FORK_DONT_COPY
 * leaves it out.
 *
 * @param mm    The address space.
 * @param mode  HMM_FORK_HOME (the default) or HMM_FORK_DONT_COPY.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle, or there is no such mode;
 *  - -ENODEV: closed.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours; compare MADV_DONTFORK of madvise(2).
 */
int hmm_mm_set_fork_mode(struct mm_struct *mm, int mode);

/**
 * Tells what children of fork() get of pages that are on a device.
 *
 * @param mm  The address space.
 * @return HMM_FORK_HOME or HMM_FORK_DONT_COPY; -EINVAL when mm is no live handle.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
int hmm_mm_fork_mode(const struct mm_struct *mm);

/**
 * Lets whoever touches an absent page of a range bring it home itself, in a handler of SIGBUS,
 * instead of waiting for a service thread: the fastest way there is.
 *
 * For memory that the program never hands to the kernel while pages of it may be away, on an
 * engine that otherwise serves the kernel ("uffd"). System calls on absent pages of the range fail
 * with EFAULT from now on (on holes too, once pages of the range have migrated): keep what they
 * use present with hmm_guard(). Threads that touch it must not block SIGBUS, and the program must
 * not replace the handler. Exactly this range changes; the kernel cuts the mapping at its borders,
 * and mremap() moves what lies between two borders, not across one. What is unmapped is forgotten.
 *
 * Pages on devices come home first. Calling it again changes nothing; where everything is answered
 * so anyway ("uffd-inline") only the arguments are checked.
 *
 * @param mm      The address space.
 * @param addr    Start of the first page.
 * @param length  Bytes, a multiple of the page size, not 0.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle, a bad range, or something else than mapped, private anonymous
 *    memory of the program is in it;
 *  - -EBUSY: a page did not come home, or another userfaultfd of the process has the range;
 *  - -EIO: a device lost a page;
 *  - -ENOMEM: more than 4096 separate ranges, or too many mappings;
 *  - -EDEADLK: called from a callback;
 *  - -EOPNOTSUPP: an engine without userfaultfd, or the program ignores SIGBUS or SIGSEGV;
 *  - -ENODEV: closed.
 *    Of a longer range, a part may have changed then.
 *
 * Context: any thread, but not inside a callback; may block; calls invalidation, fault and free
 * callbacks.
 * Source: ours.
 */
int hmm_mm_inline_range(struct mm_struct *mm, const void *addr, size_t length);

/**
 * Undoes hmm_mm_inline_range() on a range, or a part of one: touches are answered as the engine
 * answers by itself, and system calls wait for absent pages again where the engine has
 * HMM_CAPABILITY_KERNEL_FAULTS.
 *
 * @param mm      The address space.
 * @param addr    Start of the first page.
 * @param length  Bytes, a multiple of the page size, not 0.
 * @return As hmm_mm_inline_range().
 *
 * Context: as hmm_mm_inline_range().
 * Source: ours.
 */
int hmm_mm_blocking_range(struct mm_struct *mm, const void *addr, size_t length);

/**
 * Brings a range home and keeps it in system memory until it is unpinned.
 *
 * For memory that a driver's callbacks touch, or that they hold a lock over: the driver's
 * structure, its page table, its lists. A callback that touched a page that is on a device would
 * wait for itself. Pins count: what is pinned twice is unpinned twice, with the same addr and
 * length.
 *
 * @param mm      The address space.
 * @param addr    Anywhere in the first page.
 * @param length  Bytes; every page that they touch is pinned.
 * @return 0 (what is not mapped counts as home), or:
 *  - -EINVAL: mm is no live handle, addr is NULL, length is 0 or overflows;
 *  - -EBUSY, -EIO: a page did not come home;
 *  - -ENOMEM: more than 4096 pins;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours; compare the kernel's pin_user_pages().
 */
int hmm_pin_range(struct mm_struct *mm, const void *addr, size_t length);

/**
 * Takes back one hmm_pin_range() of the same pages.
 *
 * @param mm      The address space.
 * @param addr    As given to hmm_pin_range().
 * @param length  As given to hmm_pin_range().
 * @return 0, or:
 *  - -EINVAL: mm is no live handle, a bad range, or these pages were not pinned by one call;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; does not block for long.
 * Source: ours; compare the kernel's unpin_user_pages().
 */
int hmm_unpin_range(struct mm_struct *mm, const void *addr, size_t length);

/**
 * Brings a range home and makes it present, as if the CPU had touched every page of it.
 *
 * It may leave again at once: what shall stay for a system call is kept by hmm_guard().
 *
 * @param mm      The address space.
 * @param addr    Anywhere in the first page.
 * @param length  Bytes, not 0; every page that they touch is made present.
 * @param write   As if for writing: copy-on-write is broken.
 * @return Pages that came home from devices, or:
 *  - -EINVAL: mm is no live handle, or a bad range;
 *  - -EFAULT: something is not mapped;
 *  - -EPERM: the protection forbids it;
 *  - -EIO: a device lost a page;
 *  - -EBUSY;
 *  - -ENOMEM;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block; calls fault and free callbacks.
 * Source: ours; compare madvise(MADV_POPULATE_WRITE).
 */
long hmm_make_present(struct mm_struct *mm, const void *addr, size_t length, bool write);

/**
 * Keeps bytes present for system calls until hmm_unguard(): brings their pages home, makes them
 * present as an access would, and keeps them from migrating.
 *
 * Where the engine lacks HMM_CAPABILITY_KERNEL_FAULTS, a system call fails with EFAULT (or stops
 * short) at a page that is on a device. Guard the buffers of the call, and it works on every
 * engine:
 *
 * ```c
 * HMM_GUARD_SCOPE(guard);
 * if (hmm_guard(mm, &guard, buffer, length, true))
 *   return -1;
 * got = read(file, buffer, length);
 * ```
 *
 * Guards of the same pages count: the pages stay until the last one lets go. Migration leaves
 * guarded pages where they are; nothing else of the process changes.
 *
 * @param mm      The address space.
 * @param guard   Holds nothing yet: all zeros, or as hmm_unguard() left it.
 * @param addr    First byte; need not be aligned.
 * @param length  Bytes, not 0; every page that they touch is held.
 * @param write   The system call writes to them, as read(2) does: copy-on-write is broken.
 * @return 0, or (and then it holds nothing):
 *  - -EINVAL: mm is no live handle; guard is NULL, misaligned, or holds something; addr is NULL,
 *    length is 0 or overflows;
 *  - -EFAULT: something is not mapped;
 *  - -EPERM: the protection forbids the access;
 *  - -EIO: a device lost a page;
 *  - -EBUSY: a page did not come home in time;
 *  - -ENOMEM: more than 1024 guards, or more than 4096 guards and pins together;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block; calls fault and free callbacks.
 * Source: ours; compare the kernel's pin_user_pages() around direct I/O.
 */
int hmm_guard(struct mm_struct *mm,
              struct hmm_guard *guard,
              const void *addr,
              size_t length,
              bool write);

/**
 * Lets go of what a guard holds; its pages may migrate again. A guard that holds nothing is left
 * as it is, so a second call does no harm.
 *
 * HMM_GUARD_SCOPE() calls it at the end of a scope.
 *
 * @param guard  As hmm_guard() filled it in, or all zeros; NULL does nothing.
 *
 * Returns nothing. hmm_last_errno() stays as it is, except -EINVAL when the guard was never
 * filled in by hmm_guard(), or a copy of it let go before; it holds nothing afterwards.
 *
 * Context: any thread, also another than that of hmm_guard(), but not inside a callback; does not
 * block for long.
 * Source: ours; compare the kernel's unpin_user_pages().
 */
void hmm_unguard(struct hmm_guard *guard);

/**
 * Tells where each page of a range is, without touching it.
 *
 * @param mm      The address space.
 * @param addr    Anywhere in the first page.
 * @param length  Bytes; every page that they touch is reported.
 * @param places  One byte for each page: HMM_RESIDENCY_NONE, _SYSTEM, _DEVICE, _MIGRATING,
 *                _POISONED or _UNMAPPED.
 * @param count   Bytes at places; at least one for each page.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle, a bad range, places is NULL or too small;
 *  - -ENODEV: closed (places may then be partly written).
 *
 * Context: any thread, but not inside a callback; does not block for long.
 * Source: ours; compare mincore(2).
 */
int hmm_residency(struct mm_struct *mm,
                  const void *addr,
                  size_t length,
                  uint8_t *places,
                  size_t count);

/**
 * Reads the counters of an address space.
 *
 * Device pages count in the process's size as before their migration (hmm.txt, section 7):
 * hmm_mm_rss() tells it.
 *
 * @param mm        The address space.
 * @param counters  Its size member says how much the caller knows; the rest is filled in.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle, counters is NULL or misaligned, or its size is below 4.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours; hmm.txt section 7 for what counts.
 */
int hmm_mm_counters(const struct mm_struct *mm, struct hmm_mm_counters *counters);

/* ---------------------------------------------------------------------------------------------
 * Mappings, and the lock of the address space
 * ------------------------------------------------------------------------------------------ */

/**
 * Finds the first mapping that ends above an address.
 *
 * As in the kernel the mapping may begin above the address: compare with hmm_vma_start(). The
 * header offers the kernel's name find_vma() for it.
 *
 * @param mm    The address space; the caller holds its lock (either way), or is inside a callback.
 * @param addr  Any address.
 * @return A handle that lives until the lock is released (or the callback returns). NULL when
 * there is no such mapping, and also on errors, which hmm_last_errno() tells apart: 0 no mapping,
 * -EINVAL mm is no live handle or the lock is not held, -ENODEV the address space is closed,
 * -ENOMEM more than 4096 handles are alive.
 *
 * Context: any thread that holds the lock, callbacks included; does not block.
 * Source: the kernel's find_vma().
 */
struct vm_area_struct *hmm_find_vma(struct mm_struct *mm, unsigned long addr);

/**
 * First address of a vma.
 *
 * @param vma  A live handle.
 * @return The address, or 0 when vma is not a live handle.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: the kernel's vm_area_struct.vm_start.
 */
unsigned long hmm_vma_start(const struct vm_area_struct *vma);

/**
 * First address behind a vma.
 *
 * @param vma  A live handle.
 * @return The address, or 0 when vma is not a live handle.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: the kernel's vm_area_struct.vm_end.
 */
unsigned long hmm_vma_end(const struct vm_area_struct *vma);

/**
 * Protection and kind of a vma.
 *
 * @param vma  A live handle.
 * @return A set of VM_READ, VM_WRITE, VM_EXEC, VM_SHARED, VM_HUGETLB and VM_PFNMAP; 0 also when
 * vma is not a live handle.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: the kernel's vm_area_struct.vm_flags.
 */
unsigned long hmm_vma_flags(const struct vm_area_struct *vma);

/**
 * The address space of a vma.
 *
 * @param vma  A live handle.
 * @return The mm, without a new reference: it is valid as long as the vma is. NULL when vma is not
 * a live handle.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: the kernel's vm_area_struct.vm_mm.
 */
struct mm_struct *hmm_vma_mm(const struct vm_area_struct *vma);

/**
 * Takes the lock of an address space shared (the kernel's mmap_lock, once mmap_sem).
 *
 * The lock orders drivers among themselves, and a vma handle lives as long as it is held. It does
 * not stop the process from changing its mappings (no user-space lock could): ranges are validated
 * by hmm_vma_range_done() for that. Nests on one thread. Inside fault, alloc_and_copy and
 * finalize_and_map callbacks the thread counts as holding it.
 *
 * @param mm  The address space.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle;
 *  - -EDEADLK: this thread holds it for writing;
 *  - -EBUSY: it was not free for 10 seconds;
 *  - -ENOMEM: more than 1024 threads hold locks.
 *
 * Context: any thread; blocks while another thread holds it for writing.
 * Source: the kernel's mmap_read_lock().
 */
int hmm_mm_read_lock(struct mm_struct *mm);

/**
 * Releases what hmm_mm_read_lock() took; the vma handles that this thread got meanwhile end.
 *
 * @param mm  The address space.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle, or this thread does not hold the lock for reading.
 *
 * Context: the thread that took it; does not block.
 * Source: the kernel's mmap_read_unlock().
 */
int hmm_mm_read_unlock(struct mm_struct *mm);

/**
 * Takes the lock of an address space alone; does not nest.
 *
 * @param mm  The address space.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle;
 *  - -EDEADLK: this thread holds it already, or is inside a callback;
 *  - -EBUSY: it was not free for 10 seconds;
 *  - -ENOMEM: more than 1024 threads hold locks.
 *
 * Context: any thread, but not inside a callback; blocks while others hold it.
 * Source: the kernel's mmap_write_lock().
 */
int hmm_mm_write_lock(struct mm_struct *mm);

/**
 * Releases what hmm_mm_write_lock() took; the vma handles that this thread got meanwhile end.
 *
 * @param mm  The address space.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle, or this thread does not hold the lock for writing.
 *
 * Context: the thread that took it; does not block.
 * Source: the kernel's mmap_write_unlock().
 */
int hmm_mm_write_unlock(struct mm_struct *mm);

/* ---------------------------------------------------------------------------------------------
 * Mirroring the address space (hmm.txt, section 4)
 *
 * The device has a page table of its own. A mirror tells the driver what to drop from it; a
 * range call tells it what to put into it. One lock of the driver's, its update lock, makes the
 * two fit: the callback takes it, and so does the code that writes the device's page table,
 * which asks hmm_vma_range_done() under it:
 *
 *     again:
 *       ret = hmm_vma_fault(vma, &range, start, end, pfns, write, true);
 *       if (ret)
 *         return ret;
 *       take_lock(driver->update);
 *       if (!hmm_vma_range_done(vma, &range)) {
 *         release_lock(driver->update);
 *         goto again;
 *       }
 *       ... write the device's page table from pfns ...
 *       release_lock(driver->update);
 *
 * Bound the number of rounds: somebody may change the range all the time.
 * ------------------------------------------------------------------------------------------ */

/**
 * Registers a mirror of an address space: from its return on, the mirror's callback is called for
 * every change of the CPU page table, in every range that a call of the library has looked at or
 * migrated.
 *
 * Takes the lock of the address space for writing itself, as hmm.txt tells it. (The merged kernels
 * want it held; with HMM_API_4_17 the name stands for hmm_mirror_register_locked().) Any number of
 * mirrors may be registered on one address space, and each gets every update.
 *
 * @param mirror  The driver's structure; mirror->ops is set, and ops->sync_cpu_device_pagetables
 *                with it.
 * @param mm      The address space.
 * @return 0, or:
 *  - -EINVAL: mirror, its ops or the callback is NULL, a pointer is misaligned, or mm is no live
 *    handle;
 *  - -EBUSY: the mirror is registered already, or the lock was not free for 10 seconds;
 *  - -EDEADLK: this thread holds the lock, or is inside a callback;
 *  - -ENOMEM: more than 1024 mirrors;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback, and without the lock; may block.
 * Source: hmm.txt section 4; promises 18 to 20.
 */
int hmm_mirror_register(struct hmm_mirror *mirror, struct mm_struct *mm);

/**
 * Registers a mirror; for callers that hold the lock of the address space for writing.
 *
 * @param mirror  As for hmm_mirror_register().
 * @param mm      The address space, locked by hmm_mm_write_lock() on this thread.
 * @return As hmm_mirror_register(), but -EINVAL when the lock is not held for writing by this
 * thread.
 *
 * Context: the thread that holds the lock; may block.
 * Source: hmm.txt section 4; promise 19; hmm_mirror_register() of kernels v4.14 to v4.17.
 */
int hmm_mirror_register_locked(struct hmm_mirror *mirror, struct mm_struct *mm);

/**
 * Unregisters a mirror: once it returned, no callback of the mirror runs or will run, and the
 * structure may be freed.
 *
 * Waits for callbacks that are running, at most 10 seconds. The driver's update lock must not be
 * held: a callback may be waiting for it. A mirror that is not registered is left alone.
 *
 * From inside a callback of the same address space it cannot wait for itself. Then the mirror is
 * switched off at once (no further callback begins), hmm_last_errno() says -EDEADLK, and the
 * structure must stay until a second call, from outside, finished the work. The same holds for
 * -EBUSY, when a callback did not return in time.
 *
 * @param mirror  The mirror.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EDEADLK inside a callback; -EBUSY a
 * callback did not return.
 *
 * Context: any thread; blocks while callbacks run.
 * Source: hmm.txt section 4; promise 42; the kernel's hmm_mirror_unregister().
 */
void hmm_mirror_unregister(struct hmm_mirror *mirror);

/**
 * Looks at the CPU page table of a range, without faulting anything in, and begins to track it.
 *
 * Entries describe what is present: flags and pfn where a page is (HMM_PFN_VALID), HMM_PFN_EMPTY
 * where none is, HMM_PFN_DEVICE_UNADDRESSABLE with the pfn of a device page, HMM_PFN_ERROR where
 * memory is poisoned. The CPU page table is not changed.
 *
 * On success the range is active: any change of the CPU page table inside it is noticed until
 * hmm_vma_range_done(), which must be called once. After an error the range is not active, and
 * hmm_vma_range_done() must not be called. The driver reads pfns under its update lock, where it
 * must not fault: pin them (hmm_pin_range) unless they are on memory that nobody migrates.
 *
 * @param vma    The mapping that holds all of the range; so the address space is locked by the
 *               caller.
 * @param range  Memory for the range; its contents before the call do not matter.
 * @param start  First address, page aligned.
 * @param end    First address behind the range, page aligned.
 * @param pfns   One entry for each page.
 * @return 0, whatever the entries say, or:
 *  - -EINVAL: a pointer is NULL or misaligned, vma is no live handle, the bounds are not page
 *    aligned, empty, reversed or outside the vma, no mirror is registered, or the mapping is of a
 *    kind that is never mirrored (then all entries are HMM_PFN_SPECIAL);
 *  - -EPERM: the mapping is not readable;
 *  - -EFAULT: it is gone;
 *  - -EBUSY: it changed all the time;
 *  - -ENOMEM: no memory for the entries, or more than 4096 ranges are active;
 *  - -ENODEV: closed.
 *
 * Context: a thread that holds the lock of the address space; not inside
 * sync_cpu_device_pagetables; may block.
 * Source: hmm.txt section 4; promises 26, 31 to 38; kernels v4.14 to v4.16.
 */
int hmm_vma_get_pfns(struct vm_area_struct *vma,
                     struct hmm_range *range,
                     unsigned long start,
                     unsigned long end,
                     hmm_pfn_t *pfns);

/**
 * Like hmm_vma_get_pfns(), but faults in what is missing first, as if the CPU had touched it.
 *
 * Missing pages are filled with zeros, read from their file, swapped in. With write, read-only
 * pages of writable mappings become writable (copy-on-write is broken). Pages on a device are
 * reported as they are, not brought home: look at HMM_PFN_DEVICE_UNADDRESSABLE.
 *
 * The library never has to drop the lock to wait for a fault. Only when a range keeps changing for
 * longer than a second does it give up; then block decides: if true, the result is -EBUSY and the
 * lock is still held; if false, the lock is released (if the caller holds it once and for reading)
 * and the result is -EAGAIN: the driver takes the lock, finds the vma, and starts over.
 *
 * @param vma    The mapping that holds all of the range; so the address space is locked by the
 *               caller.
 * @param range  Memory for the range; its contents before the call do not matter.
 * @param start  First address, page aligned.
 * @param end    First address behind the range, page aligned.
 * @param pfns   One entry for each page.
 * @param write  Pages are wanted writable.
 * @param block  What -EBUSY means, see above.
 * @return 0 (look at each entry: not every page can be made valid), or one of hmm_vma_get_pfns()'s
 * errors, or:
 *  - -EFAULT: a fault failed (the entries from there on are zero or HMM_PFN_ERROR);
 *  - -EPERM: write, and the mapping is not writable;
 *  - -EAGAIN: the lock was released.
 *
 * Context: a thread that holds the lock of the address space; not inside a callback; may block;
 * may call fault.
 * Source: hmm.txt section 4; promises 27 to 31, 34 to 38, 44 to 46; kernels v4.14 to v4.16.
 */
int hmm_vma_fault(struct vm_area_struct *vma,
                  struct hmm_range *range,
                  unsigned long start,
                  unsigned long end,
                  hmm_pfn_t *pfns,
                  bool write,
                  bool block);

/**
 * Ends the tracking of a range and tells whether what was found is still true.
 *
 * Called once after each success of hmm_vma_get_pfns() or hmm_vma_fault(), under the driver's
 * update lock, the one that sync_cpu_device_pagetables takes. Then either the change already came
 * (the result is false), or its callback waits for the lock and removes afterwards what the driver
 * writes now.
 *
 * When the result is false, the entries of what changed are zero. A driver may start over, or use
 * the entries that are left.
 *
 * @param vma    Not looked at: the range knows its address space. (It may be stale by now, so it
 *               may be NULL.)
 * @param range  The range.
 * @return True when nothing in the range was invalidated since the look began. False when
 * something was; also when the range is not active (nothing is changed then, and hmm_last_errno()
 * is -EINVAL).
 *
 * Context: any thread, with the driver's update lock; does not block.
 * Source: hmm.txt section 4; promises 36 to 40; kernels v4.14 to v4.16.
 */
bool hmm_vma_range_done(struct vm_area_struct *vma, struct hmm_range *range);

/**
 * hmm_vma_get_pfns() in the form of kernel v4.17; see HMM_API_4_17.
 *
 * @param range  All arguments.
 * @return As hmm_vma_get_pfns(), or:
 *  - -EINVAL: also when flags or values is NULL or pfn_shift is above 12.
 *
 * Context: as hmm_vma_get_pfns().
 * Source: hmm_vma_get_pfns() of kernel v4.17; promises 26, 30 to 38.
 */
int hmm_vma_get_pfns_4_17(struct hmm_range_4_17 *range);

/**
 * hmm_vma_fault() in the form of kernel v4.17; see HMM_API_4_17.
 *
 * Each entry says before the call what is wanted: the driver's bit for VALID, to have the page
 * present; with WRITE, writable; with DEVICE_PRIVATE, brought home if it is on a device. An entry
 * without VALID is only looked at.
 *
 * @param range  All arguments.
 * @param block  As for hmm_vma_fault().
 * @return As hmm_vma_fault(), or:
 *  - -EINVAL: also when flags or values is NULL or pfn_shift is above 12.
 *
 * Context: as hmm_vma_fault().
 * Source: hmm_vma_fault() of kernel v4.17; promises 27 to 31, 34 to 38, 44 to 46.
 */
int hmm_vma_fault_4_17(struct hmm_range_4_17 *range, bool block);

/**
 * hmm_vma_range_done() in the form of kernel v4.17; see HMM_API_4_17.
 *
 * @param range  The range.
 * @return As hmm_vma_range_done().
 *
 * Context: as hmm_vma_range_done().
 * Source: hmm_vma_range_done() of kernel v4.17; promises 36 to 40.
 */
bool hmm_vma_range_done_4_17(struct hmm_range_4_17 *range);

/* ---------------------------------------------------------------------------------------------
 * Device memory (hmm.txt, section 5)
 *
 * Memory that only the device can reach, with one page descriptor for each of its pages. A page
 * of it that holds data of the process looks to the CPU like a page that was swapped out. Every
 * such page is charged and counted as the page that it replaced.
 * ------------------------------------------------------------------------------------------ */

/**
 * Makes a device for drivers that have none of their own; a convenience, needed by nothing else.
 *
 * @param drvdata  The driver's pointer, kept in device.driver_data.
 * @return The device, to be given back with hmm_device_put(). On failure ERR_PTR(-EBUSY): all 256
 * numbers are taken.
 *
 * Context: any thread; does not block for long.
 * Source: hmm_device_new() of kernels v4.14 to v5.2.
 */
struct hmm_device *hmm_device_new(void *drvdata);

/**
 * Gives a device back. Device memory that was added on it must be removed before.
 *
 * @param hmm_device  What hmm_device_new() returned.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not a live device (nothing is
 * changed).
 *
 * Context: any thread; does not block for long.
 * Source: hmm_device_put() of kernels v4.14 to v5.2.
 */
void hmm_device_put(struct hmm_device *hmm_device);

/**
 * Registers device memory and makes a descriptor for each of its pages.
 *
 * The library never sees the memory itself: nothing of it is mapped, and a driver that hands out
 * page n of pfn_first + n decides what that means on its device. All pages are free at first and
 * the driver's to hand out, as destinations of migrate_vma(); the library has no allocator for
 * them.
 *
 * @param ops     The driver's callbacks; copied.
 * @param device  The device, kept for the driver in devmem->device; may be NULL.
 * @param size    Bytes, rounded up to whole pages; at most 256 GiB.
 * @return The device memory. On failure ERR_PTR():
 *  - -EINVAL: ops or a callback is NULL, ops is misaligned, size is 0 or too large;
 *  - -ENOMEM: no descriptors, or 64 devices exist already.
 *
 * Context: any thread; may block.
 * Source: hmm.txt section 5; promise 47.
 */
struct hmm_devmem *hmm_devmem_add(const struct hmm_devmem_ops *ops,
                                  struct device *device,
                                  unsigned long size);

/**
 * Registers device memory that the CPU can address coherently. Not supported yet.
 *
 * @param ops     The driver's callbacks.
 * @param device  The device; may be NULL.
 * @param res     Where the memory is.
 * @return Always ERR_PTR():
 *  - -EINVAL: ops, a callback or res is NULL, or ops is misaligned;
 *  - -EOPNOTSUPP: the arguments are good.
 *
 * Context: any thread; does not block.
 * Source: hmm_devmem_add_resource() of kernels v4.14 to v5.2.
 */
struct hmm_devmem *hmm_devmem_add_resource(const struct hmm_devmem_ops *ops,
                                           struct device *device,
                                           struct resource *res);

/**
 * Removes device memory: brings its pages home through fault, waits until every page is free, and
 * forgets it.
 *
 * If that takes longer than the library waits (about 10 seconds), or a page cannot come home, the
 * device memory stays as it is: hmm_last_errno() says why, and the call can be made again. The
 * driver's update lock must not be held.
 *
 * @param devmem  What hmm_devmem_add() returned; NULL does nothing.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not live device memory (nothing
 * is changed); -EBUSY; -EIO; -EDEADLK called from inside a callback.
 *
 * Context: any thread, but not inside a callback; may block; calls fault and free.
 * Source: hmm.txt section 5; promises 54, 81.
 */
void hmm_devmem_remove(struct hmm_devmem *devmem);

/**
 * Says that fault may run in a signal handler of the thread that touched a page.
 *
 * Some engines ("uffd-inline", "signal") learn of a touch by a signal in the thread that touched.
 * That thread then waits while a service thread calls fault; with safe it calls fault itself, and
 * saves two changes of threads for each touch. What fault leads to runs there too:
 * alloc_and_copy, finalize_and_map, free, and sync_cpu_device_pagetables of every mirror of the
 * range. So all of these must
 *
 *  - call only what may be called in a signal handler (signal-safety(7)): no malloc, no printf;
 *  - take no lock that is ever held over a touch of memory that may migrate: the thread that
 *    touches would wait for itself. (pthread_mutex_lock() is good for all other locks here,
 *    since the touch is synchronous.)
 *
 * Other engines call fault on service threads, whatever is said here; so does every engine when
 * the touch comes from inside a callback.
 *
 * @param devmem  The device memory.
 * @param safe    Whether fault may; false at first. Touches that are being answered are not
 *                changed.
 * @return 0, or:
 *  - -EINVAL: not live device memory.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
int hmm_devmem_set_signal_safe(struct hmm_devmem *devmem, bool safe);

/**
 * How many pages of device memory hold data of the process.
 *
 * @param devmem  The device memory.
 * @return Pages, or -EINVAL when it is not live.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
long hmm_devmem_in_use(const struct hmm_devmem *devmem);

/**
 * Brings home what some pages of device memory hold, wherever they are mapped, through the driver's
 * fault: how a driver makes room when its memory is full.
 *
 * The driver's policy chooses the pages. To be called before migrate_vma(), never in
 * alloc_and_copy, which holds pages and must not wait for others. Evict many pages at once: it
 * looks at all page tables.
 *
 * @param devmem  The device memory.
 * @param first   Number of the first page, from devmem->pfn_first on.
 * @param npages  How many pages.
 * @return How many of them held something; they are free now, unless something else took them. Or:
 *  - -EINVAL: devmem is not live, or these are not its pages;
 *  - -EDEADLK: called from inside a callback;
 *  - -EIO: the device cannot return one (the others came home);
 *  - -EBUSY: one did not come home in time.
 *
 * Context: any thread, but not inside a callback; may block; calls fault and free callbacks.
 * Source: the kernel's migrate_device_range(), from v6.1 on.
 */
long hmm_devmem_evict(struct hmm_devmem *devmem, unsigned long first, unsigned long npages);

/**
 * Stores one word of the driver's with a device page; it stays until the page is freed.
 *
 * @param page  A page of device memory.
 * @param data  The word.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not a page of live device
 * memory.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: hmm_devmem_page_set_drvdata() of kernels v4.14 to v5.2; promise 53.
 */
void hmm_devmem_page_set_drvdata(struct page *page, unsigned long data);

/**
 * Reads the word that the driver stored with a device page.
 *
 * @param page  A page of device memory.
 * @return The word; 0 when none was stored or it is not a page of live device memory.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: hmm_devmem_page_get_drvdata() of kernels v4.14 to v5.2; promise 53.
 */
unsigned long hmm_devmem_page_get_drvdata(const struct page *page);

/* ---------------------------------------------------------------------------------------------
 * Migration to and from device memory (hmm.txt, section 6)
 *
 * Never all or nothing: each page moves, or stays as it was. Private anonymous memory (malloc,
 * new, numpy arrays, mmap) can move to a device; everything else can be mirrored where it is.
 * ------------------------------------------------------------------------------------------ */

/**
 * Moves the pages of a range to where the driver's callbacks decide: to device memory, back, or
 * from device to device.
 *
 * The range is invalidated in all mirrors, the driver's own included; then pages that can be had
 * are taken from the CPU, and alloc_and_copy chooses and fills their destinations. Pages that
 * cannot be taken (pinned, shared, locked, in use by another migration) are left out and stay
 * as they are; so do pages for which the driver stores no destination. Then the new places become
 * visible, and finalize_and_map is told which pages moved. CPU accesses to pages under migration
 * sleep until it is over.
 *
 * With the vma that a fault callback received, only pages on devices are collected: what is home
 * stays there. The same holds for every migration while the address space is being closed.
 *
 * Afterwards src and dst of the whole range hold the final entries. They must not overlap. What did
 * not migrate says why: hmm_migrate_reason() of its entry of src, in words by hmm_stay_text().
 * Destination pages of device memory that were not used in the end are given back through free.
 *
 * @param ops           The driver's callbacks; copied.
 * @param vma           The mapping that holds all of the range; the address space is locked, or it
 *                      is a callback's vma.
 * @param mentries      Entries of src and of dst; at least one for each page.
 * @param start         First address; rounded down to its page.
 * @param end           First address behind the range; rounded down to its page.
 * @param src           One entry for each page, filled in: what is there now.
 * @param dst           One entry for each page, cleared before alloc_and_copy: where it goes.
 * @param private_data  For the callbacks.
 * @return 0, also when nothing moved, or:
 *  - -EINVAL: ops, a callback, src or dst is NULL or misaligned, vma is no live handle, start >=
 *    end, the range leaves the vma, mentries is too small, or the mapping is of a kind that never
 *    migrates (driver memory, hugetlbfs);
 *  - -EBUSY: too many migrations for 10 seconds;
 *  - -ENOMEM;
 *  - -EFAULT: the mapping is gone;
 *  - -EDEADLK: inside a callback that must not migrate;
 *  - -ENODEV: closed.
 *
 * On errors src and dst are not written.
 *
 * Context: a thread that holds the lock of the address space (either way), or a fault callback;
 * may block.
 * Source: hmm.txt section 6; promises 57 to 74. Without mentries: HMM_API_4_17.
 */
int migrate_vma(const struct migrate_vma_ops *ops,
                struct vm_area_struct *vma,
                unsigned long mentries,
                unsigned long start,
                unsigned long end,
                unsigned long *src,
                unsigned long *dst,
                void *private_data);

/**
 * migrate_vma() as the kernels merged it, without mentries; see HMM_API_4_17.
 *
 * @param ops           As for migrate_vma().
 * @param vma           As for migrate_vma().
 * @param start         As for migrate_vma().
 * @param end           As for migrate_vma().
 * @param src           As for migrate_vma().
 * @param dst           As for migrate_vma().
 * @param private_data  As for migrate_vma().
 * @return As migrate_vma().
 *
 * Context: as migrate_vma().
 * Source: migrate_vma() of kernels v4.14 to v5.3.
 */
int migrate_vma_4_17(const struct migrate_vma_ops *ops,
                     struct vm_area_struct *vma,
                     unsigned long start,
                     unsigned long end,
                     unsigned long *src,
                     unsigned long *dst,
                     void *private_data);

/**
 * Gets a page of system memory for a page that comes home, locked and writable at
 * hmm_page_to_virt().
 *
 * Each page that comes home has its system page reserved before alloc_and_copy is called, so this
 * cannot run out of memory half-way.
 *
 * @param vma   The vma that alloc_and_copy received.
 * @param addr  The address whose page it will be: one of the batch, with MIGRATE_PFN_DEVICE in its
 *              src.
 * @return The page, to be stored in dst as migrate_pfn(page_to_pfn(page)) | MIGRATE_PFN_LOCKED; a
 * page that is not stored goes back by itself. NULL with hmm_last_errno() -EINVAL: not inside
 * alloc_and_copy, not on its thread, no live vma, or not the address of a page that this batch
 * brings home.
 *
 * Context: inside alloc_and_copy, on the thread that it was called on; does not block for long.
 * Source: hmm_vma_alloc_locked_page() of kernels v4.14 to v5.2.
 */
struct page *hmm_vma_alloc_locked_page(struct vm_area_struct *vma, unsigned long addr);

/* ---------------------------------------------------------------------------------------------
 * Today's kernels: interval notifiers (v5.5 and later)
 *
 * From here on stand the names of the kernels that followed, on the same mechanism. A driver
 * subscribes to a range, and validates what it saw by numbers:
 *
 *     again:
 *       range.notifier_seq = mmu_interval_read_begin(range.notifier);
 *       hmm_mm_read_lock(mm);
 *       ret = hmm_range_fault(&range);
 *       hmm_mm_read_unlock(mm);
 *       if (ret == -EBUSY)
 *         goto again;
 *       if (ret)
 *         return ret;
 *       take_lock(driver->update);
 *       if (mmu_interval_read_retry(range.notifier, range.notifier_seq)) {
 *         release_lock(driver->update);
 *         goto again;
 *       }
 *       ... write the device's page table from range.hmm_pfns ...
 *       release_lock(driver->update);
 *
 * Bound the number of rounds, or their time: HMM_RANGE_DEFAULT_TIMEOUT.
 * ------------------------------------------------------------------------------------------ */

/**
 * Subscribes to the changes of a range: from its return on, ops->invalidate is called before the
 * CPU page table changes in it, in every part that a call of the library has looked at or migrated.
 *
 * Any number of subscriptions may overlap. 0 and ULONG_MAX & PAGE_MASK stand for the whole address
 * space. Unlike the kernel's, it does not take the lock of the address space.
 *
 * @param interval_sub  The driver's structure; filled in.
 * @param mm            The address space. No reference is taken: remove the subscription before
 *                      the last hmm_mm_put(), or after it; it hears of MMU_NOTIFY_RELEASE then.
 * @param start         First address; what changes in its page is told.
 * @param length        Bytes.
 * @param ops           The driver's callback; copied.
 * @return 0, or:
 *  - -EOVERFLOW: length is 0, or start + length - 1 is above ULONG_MAX;
 *  - -EINVAL: interval_sub, ops or ops->invalidate is NULL, a pointer is misaligned, mm is no live
 *    handle, or the range begins above the user address space;
 *  - -EBUSY: it is inserted already;
 *  - -EDEADLK: inside a callback;
 *  - -ENOMEM: more than 4096 subscriptions, mirrors and active ranges;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: mmu_interval_notifier_insert() of kernels v5.5 to v7.3.
 */
int mmu_interval_notifier_insert(struct mmu_interval_notifier *interval_sub,
                                 struct mm_struct *mm,
                                 unsigned long start,
                                 unsigned long length,
                                 const struct mmu_interval_notifier_ops *ops);

/**
 * mmu_interval_notifier_insert(), for callers that hold the lock of the address space for writing.
 *
 * @param interval_sub  As for mmu_interval_notifier_insert().
 * @param mm            The address space, locked by hmm_mm_write_lock() on this thread.
 * @param start         As for mmu_interval_notifier_insert().
 * @param length        As for mmu_interval_notifier_insert().
 * @param ops           As for mmu_interval_notifier_insert().
 * @return As mmu_interval_notifier_insert(), and -EINVAL when the lock is not held for writing by
 * this thread.
 *
 * Context: the thread that holds the lock; may block.
 * Source: mmu_interval_notifier_insert_locked() of kernels v5.5 to v7.3.
 */
int mmu_interval_notifier_insert_locked(struct mmu_interval_notifier *interval_sub,
                                        struct mm_struct *mm,
                                        unsigned long start,
                                        unsigned long length,
                                        const struct mmu_interval_notifier_ops *ops);

/**
 * Ends a subscription: once it returned, no callback of it runs or will run, and the structure may
 * be freed.
 *
 * Waits for callbacks that are running, at most 10 seconds. The driver's update lock must not be
 * held: a callback may be waiting for it. A structure that is not inserted is left alone.
 *
 * From inside a callback of the same address space it cannot wait for itself. Then it is switched
 * off at once (no further callback begins), hmm_last_errno() says -EDEADLK, and the structure must
 * stay until a second call, from outside, finished the work. The same holds for -EBUSY, when a
 * callback did not return in time.
 *
 * @param interval_sub  The subscription.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EDEADLK inside a callback; -EBUSY a
 * callback did not return.
 *
 * Context: any thread; blocks while callbacks run.
 * Source: mmu_interval_notifier_remove() of kernels v5.5 to v7.3.
 */
void mmu_interval_notifier_remove(struct mmu_interval_notifier *interval_sub);

/**
 * Begins a look at the range: its number now, once no invalidation of it is in progress.
 *
 * To be called before hmm_range_fault(), without the driver's update lock; the number goes into
 * range->notifier_seq, and mmu_interval_read_retry() tells later whether it still stands.
 *
 * @param interval_sub  The subscription.
 * @return The number. After an error a number that never stands, so that
 * mmu_interval_read_retry() is true; hmm_last_errno() tells: -EINVAL it is not inserted, -EBUSY an
 * invalidation did not end in 10 seconds, -EDEADLK inside a callback.
 *
 * Context: any thread, but not inside a callback, and without a lock that callbacks take; sleeps
 * while the range is being invalidated.
 * Source: mmu_interval_read_begin() of kernels v5.5 to v7.3.
 */
unsigned long mmu_interval_read_begin(struct mmu_interval_notifier *interval_sub);

/**
 * Ends a look at the range: whether it was invalidated since the number was read. Then what was
 * seen means nothing, and the driver starts over with mmu_interval_read_begin().
 *
 * To be called under the driver's update lock, the one that ops->invalidate takes. Then either the
 * invalidation already came (the result is true), or its callback waits for the lock and removes
 * afterwards what the driver writes now. It is about the whole subscription, not about pages.
 *
 * @param interval_sub  The subscription.
 * @param seq           What mmu_interval_read_begin() returned.
 * @return False when the look still stands. True when something was invalidated; also when it is
 * not inserted (hmm_last_errno() is -EINVAL then).
 *
 * Context: any thread, callbacks included; does not block.
 * Source: mmu_interval_read_retry() of kernels v5.5 to v7.3.
 */
bool mmu_interval_read_retry(struct mmu_interval_notifier *interval_sub, unsigned long seq);

/**
 * mmu_interval_read_retry() without the driver's lock: an early test between steps that cost time.
 * True can be relied on; false is a hint.
 *
 * @param interval_sub  The subscription.
 * @param seq           What mmu_interval_read_begin() returned.
 * @return As mmu_interval_read_retry().
 *
 * Context: any thread, callbacks included; does not block.
 * Source: mmu_interval_check_retry() of kernels v5.5 to v7.3.
 */
bool mmu_interval_check_retry(struct mmu_interval_notifier *interval_sub, unsigned long seq);

/**
 * Notes the number of an invalidation in interval_sub->invalidate_seq, under the driver's update
 * lock. The library counts by itself and does not need it; drivers may read it.
 *
 * @param interval_sub  The subscription.
 * @param cur_seq       What ops->invalidate received.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL it is not inserted (nothing is
 * changed).
 *
 * Context: inside ops->invalidate; does not block.
 * Source: mmu_interval_set_seq() of kernels v5.5 to v7.3.
 */
void mmu_interval_set_seq(struct mmu_interval_notifier *interval_sub, unsigned long cur_seq);

/* ---------------------------------------------------------------------------------------------
 * Today's kernels: looking at a range (with HMM_API_7_3)
 * ------------------------------------------------------------------------------------------ */

/**
 * Looks at the CPU page table of a range, and makes present and writable what the driver wants so.
 *
 * What is wanted of page i is `(hmm_pfns[i] & pfn_flags_mask) | default_flags`: HMM_PFN_REQ_FAULT,
 * the page is made present as if the CPU had touched it; with HMM_PFN_REQ_WRITE, writable, too
 * (copy-on-write is broken); none of them, it is only reported. The entry then says
 * HMM_PFN_VALID with the pfn in its low bits, HMM_PFN_WRITE when the page can be written now, and
 * the order of the mapping (hmm_pfn_to_map_order()); or HMM_PFN_ERROR, where nothing is mapped or
 * it cannot be had; or 0, nothing is there. HMM_PFN_DMA_MAPPED, HMM_PFN_P2PDMA and
 * HMM_PFN_P2PDMA_BUS stay as the driver set them.
 *
 * The range may span several mappings, and holes between them. After success every wish is
 * fulfilled, as of notifier_seq: the driver takes its update lock, and only if
 * mmu_interval_read_retry() is false there, the entries may go into the device's page table.
 *
 * @param range  All arguments; the address space is that of range->notifier, locked by the caller.
 * @return 0, or:
 *  - -EBUSY: the range was invalidated since notifier_seq: start over with
 *    mmu_interval_read_begin();
 *  - -EFAULT: a page that is wanted cannot be had, or nothing is mapped there;
 *  - -EPERM: a page is wanted writable in a mapping that is not;
 *  - -EINVAL: a pointer is NULL or misaligned, the notifier is not inserted, the bounds are not
 *    page aligned, empty or reversed, or the lock is not held;
 *  - -ENOMEM;
 *  - -EDEADLK: inside ops->invalidate;
 *  - -ENODEV: closed.
 *
 * After an error, entries before the page that failed are final, and those behind it are as they
 * were.
 *
 * Context: a thread that holds the lock of the address space, without a lock that callbacks take;
 * not inside a callback; may block; may call migrate_to_ram and fault.
 * Source: hmm_range_fault() of kernels v5.8 to v7.3.
 */
int hmm_range_fault(struct hmm_range_7_3 *range);

/**
 * hmm_range_fault() with all that belongs around it: reads the number of the subscription, takes the
 * lock of the address space, looks, releases the lock, and starts over when the range was
 * invalidated meanwhile.
 *
 * What is left to the driver is mmu_interval_read_retry() under its update lock, with
 * range->notifier_seq, which this call sets.
 *
 * @param range       As for hmm_range_fault(); notifier_seq is an output.
 * @param timeout_ms  No new round begins after so many milliseconds (the kernel counts jiffies);
 *                    HMM_RANGE_DEFAULT_TIMEOUT, or 0 for as many rounds as it takes.
 * @return As hmm_range_fault(), and -EBUSY when the time was over, or a page or the lock was not to
 * be had; -EDEADLK also when this thread holds the lock for writing.
 *
 * Context: any thread, without the lock of the address space and without locks that callbacks take;
 * not inside a callback; may block; may call migrate_to_ram and fault.
 * Source: hmm_range_fault_unlocked_timeout() of kernel v7.3.
 */
int hmm_range_fault_unlocked_timeout(struct hmm_range_7_3 *range,
                                     unsigned long timeout_ms);

/* ---------------------------------------------------------------------------------------------
 * Today's kernels: device memory, private and coherent
 *
 * hmm_devmem_page_set_drvdata() and hmm_devmem_page_get_drvdata() work for these pages, too: they
 * are page->zone_device_data.
 * ------------------------------------------------------------------------------------------ */

/**
 * Registers device memory and makes a descriptor for each of its pages.
 *
 * As with hmm_devmem_add(), the library never sees the memory itself, and all pages are free at
 * first and the driver's to hand out, as destinations of migrations. Coherent memory is the
 * exception in one respect: contents of a coherent page stay where they are mapped in the process,
 * so the device reads and writes them there, as it does with system memory. What changes is whose
 * page it is: it has a pfn of the device's, counts as device memory, and can be evicted.
 *
 * @param pgmap  What the driver describes; range is filled in.
 * @param nid    Not looked at.
 * @return A cookie that is range.start and no address; the driver may ignore it. On failure
 * ERR_PTR():
 *  - -EINVAL: pgmap or its ops is NULL or misaligned, page_free is NULL, or migrate_to_ram for
 *    private memory, owner is NULL, range is reversed or above 256 GiB, nr_range is above 1, or
 *    type is unknown;
 *  - -EOPNOTSUPP: another type of the kernel's;
 *  - -EBUSY: it is registered already;
 *  - -ENOMEM: no descriptors, or 64 devices exist already.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: memremap_pages() of kernels v5.3 to v7.3; page_free as up to v6.18.
 */
void *memremap_pages(struct dev_pagemap *pgmap, int nid);

/**
 * Removes device memory: brings its pages home (private ones through migrate_to_ram), waits until
 * every page is free, and forgets it.
 *
 * If that takes longer than the library waits (about 10 seconds), or a page cannot come home, the
 * device memory stays as it is: hmm_last_errno() says why, and the call can be made again. The
 * driver's update lock must not be held.
 *
 * @param pgmap  What was given to memremap_pages(); NULL does nothing.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not registered; -EBUSY; -EIO;
 * -EDEADLK called from inside a callback.
 *
 * Context: any thread, but not inside a callback; may block; calls migrate_to_ram and page_free.
 * Source: memunmap_pages() of kernels v5.3 to v7.3.
 */
void memunmap_pages(struct dev_pagemap *pgmap);

/**
 * The device memory that a page is of.
 *
 * @param page  Any page, or any pointer.
 * @return What was given to memremap_pages(); NULL for pages of system memory or of
 * hmm_devmem_add(), and for what is no page of live device memory.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: page_pgmap() of kernels v6.15 to v7.3; page->pgmap before.
 */
struct dev_pagemap *page_pgmap(const struct page *page);

/**
 * Whether a page is device memory that the CPU cannot address, of memremap_pages() or
 * hmm_devmem_add(). The header offers the kernel's name is_device_private_page() for it.
 *
 * @param page  Any page, or any pointer.
 * @return False also for pages of device memory that was removed.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: is_device_private_page() of kernels v4.14 to v7.3.
 */
bool hmm_page_is_device_private(const struct page *page);

/**
 * Whether a page is device memory that the CPU can address. The header offers the kernel's name
 * is_device_coherent_page() for it.
 *
 * @param page  Any page, or any pointer.
 * @return False also for pages of device memory that was removed.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: is_device_coherent_page() of kernels v6.0 to v7.3.
 */
bool hmm_page_is_device_coherent(const struct page *page);

/**
 * What a driver calls for a free page before it names it as a destination. The library does that
 * by itself when the migration commits, so this only looks whether it is a page that can be named.
 *
 * @param page  A page of device memory.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not a page of live device memory.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: zone_device_page_init() of kernels v6.1 to v7.3.
 */
void zone_device_page_init(struct page *page);

/* ---------------------------------------------------------------------------------------------
 * Today's kernels: migration in three calls
 * ------------------------------------------------------------------------------------------ */

/**
 * First of three calls: takes the pages of a range that can migrate from the CPU, after all
 * subscriptions to it were called with MMU_NOTIFY_MIGRATE and pgmap_owner.
 *
 * Entries of src with MIGRATE_PFN_MIGRATE were collected: with MIGRATE_PFN_VALID the page is
 * migrate_pfn_to_page(), and MIGRATE_PFN_WRITE says that it was writable; without, nothing was
 * there, and the destination is to be cleared. For other entries hmm_migrate_reason() tells why the
 * page stays. Then the driver
 *
 *  - chooses a destination for each, copies, and stores migrate_pfn(page_to_pfn(page)) in dst, or 0
 *    to leave the page where it is. A system page comes from hmm_migrate_alloc_page(). No copy is
 *    needed to or from coherent device memory: contents stay where they are mapped, and only a hole
 *    is cleared, by the library;
 *  - calls migrate_vma_pages(), which moves them;
 *  - updates its page table for entries of src that still have MIGRATE_PFN_MIGRATE;
 *  - calls migrate_vma_finalize().
 *
 * All of it on one thread, and soon: CPU accesses to the pages sleep until the end. Contents of
 * private memory are readable at hmm_page_to_virt() of their source page, not at their address. The
 * thread must not touch the range meanwhile, nor call what may wait for it. src, dst and args itself
 * are kept from migrating until the end. When nothing was collected (cpages is 0), nothing is held,
 * and the other calls may be left out.
 *
 * In a migrate_to_ram callback only pages on devices are collected, whatever flags says.
 *
 * @param args  The migration; cpages, npages, start and end are filled in, and src.
 * @return 0, also when nothing was collected, or:
 *  - -EINVAL: args, src or dst is NULL or misaligned, vma is no live handle, the range is empty, or
 *    larger than 1 GiB, or leaves the vma, the mapping is of a kind that never migrates, flags is
 *    unknown, or fault_page is not a device page that the CPU cannot address;
 *  - -EBUSY: src belongs to a migration that is not finalized, or too many migrations for 10
 *    seconds;
 *  - -ENOMEM;
 *  - -EFAULT: the mapping is gone;
 *  - -EDEADLK: inside a callback that must not migrate;
 *  - -ENODEV: closed.
 *
 * On errors nothing is written.
 *
 * Context: a thread that holds the lock of the address space (either way), or a migrate_to_ram
 * callback; without locks that invalidate callbacks take; may block.
 * Source: migrate_vma_setup() of kernels v5.4 to v7.3; flags and owners as since v5.9.
 */
int migrate_vma_setup(struct migrate_vma *args);

/**
 * Second of three calls: moves pages to where dst says.
 *
 * Afterwards entries of src that still have MIGRATE_PFN_MIGRATE moved, and only those; for others
 * hmm_migrate_reason() tells why not. Destination pages of device memory that were not used go
 * back through page_free.
 *
 * @param migrate  What was set up; dst is filled in by the driver.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL migrate or dst is NULL or
 * misaligned, it is not set up, or its pages were moved already; -ENOMEM. After an error nothing
 * has moved.
 *
 * Context: the thread that set it up, callbacks of device memory included; calls page_free.
 * Source: migrate_vma_pages() of kernels v5.4 to v7.3.
 */
void migrate_vma_pages(struct migrate_vma *migrate);

/**
 * Last of three calls: what moved is visible to the CPU, what did not is put back as it was, and
 * accesses that waited go on. Without migrate_vma_pages() before it, every page is put back.
 *
 * hmm_mm_put() does that for migrations that nobody finalized.
 *
 * @param migrate  What was set up.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL migrate is NULL or misaligned, or
 * it is not set up, or finalized already.
 *
 * Context: the thread that set it up, callbacks of device memory included; calls page_free.
 * Source: migrate_vma_finalize() of kernels v5.4 to v7.3.
 */
void migrate_vma_finalize(struct migrate_vma *migrate);

/**
 * First of three calls to empty a part of a device without knowing addresses: takes what the pages
 * hold, wherever they are mapped. Subscriptions are called with MMU_NOTIFY_CLEAR.
 *
 * `src_pfns[i]` belongs to page start + i, as entries of migrate_vma_setup() do. It is 0 where the
 * page is free, held by somebody else, or beyond what one call can hold: call again for those. As
 * there, system pages come from hmm_migrate_alloc_page(`&src_pfns[i]`).
 *
 * @param src_pfns  One entry for each page; filled in.
 * @param start     Pfn of the first page.
 * @param npages    How many pages.
 * @return 0, also when nothing was collected, or:
 *  - -EINVAL: src_pfns is NULL or misaligned, or these are not pages of one live device memory;
 *  - -EBUSY: src_pfns belongs to a migration that is not finalized;
 *  - -ENOMEM;
 *  - -EDEADLK: inside a callback.
 *
 * Context: any thread, but not inside a callback; without locks that invalidate callbacks take; may
 * block.
 * Source: migrate_device_range() of kernels v6.1 to v7.3.
 */
int migrate_device_range(unsigned long *src_pfns, unsigned long start, unsigned long npages);

/**
 * Second of three calls, as migrate_vma_pages().
 *
 * @param src_pfns  What migrate_device_range() filled in.
 * @param dst_pfns  Where the driver puts each page; 0 leaves it where it is. Must not lie in memory
 *                  that is on the device.
 * @param npages    As for migrate_device_range().
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): as migrate_vma_pages(), and -EINVAL for
 * another npages.
 *
 * Context: the thread that called migrate_device_range(); calls page_free.
 * Source: migrate_device_pages() of kernels v6.1 to v7.3.
 */
void migrate_device_pages(unsigned long *src_pfns, unsigned long *dst_pfns, unsigned long npages);

/**
 * Last of three calls, as migrate_vma_finalize().
 *
 * @param src_pfns  What migrate_device_range() filled in.
 * @param dst_pfns  Not looked at any more.
 * @param npages    Not looked at any more.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): as migrate_vma_finalize().
 *
 * Context: the thread that called migrate_device_range(); calls page_free.
 * Source: migrate_device_finalize() of kernels v6.1 to v7.3.
 */
void migrate_device_finalize(unsigned long *src_pfns,
                             unsigned long *dst_pfns,
                             unsigned long npages);

/**
 * The system page that is reserved for a page which comes home, where a kernel driver says
 * alloc_page(): reserved by setup, so that this cannot run out of memory half-way.
 *
 * The driver writes the contents to hmm_page_to_virt(page), except when the source is a coherent
 * page: its contents are there already. A page that is not stored in dst goes back by itself.
 *
 * @param entry  The page's entry, inside the array src of a migration: `&src[i]`.
 * @return The page, to be stored in `dst[i]` as migrate_pfn(page_to_pfn(page)). NULL with
 * hmm_last_errno() -EINVAL: entry is not inside the src of a migration between its first and second
 * call, or its page is not on a device.
 *
 * Context: between the first and the second call, callbacks of device memory included; does not
 * block for long.
 * Source: ours; alloc_page() in the drivers of kernels v5.4 to v7.3.
 */
struct page *hmm_migrate_alloc_page(const unsigned long *entry);

/* ---------------------------------------------------------------------------------------------
 * Today's kernels: exclusive access
 * ------------------------------------------------------------------------------------------ */
/**
 * Takes one page from the CPU, for the device alone: for atomic operations that the device cannot
 * make on memory which the CPU uses at the same time.
 *
 * The page is made present and writable first. Subscriptions are called with MMU_NOTIFY_EXCLUSIVE
 * and owner: a driver ignores its own. The contents are at hmm_page_to_virt(page), where the device
 * works on them. A touch by the CPU sleeps until the driver unlocks the page (folio_unlock(),
 * unlock_page(), hmm_page_unlock()); the first touch after that gives the page back to the CPU, and
 * subscriptions are called with MMU_NOTIFY_CLEAR before, so that the device ends its use of it.
 *
 * @param mm      The address space; the caller holds its lock.
 * @param addr    Any address in the page.
 * @param owner   For MMU_NOTIFY_EXCLUSIVE; may be NULL.
 * @param foliop  Receives the folio of the page, for folio_unlock() and folio_put().
 * @return The page, locked. On failure ERR_PTR():
 *  - -EINVAL: mm is no live handle, its lock is not held, or foliop is NULL or misaligned;
 *  - -EFAULT: nothing is mapped there, or the mapping is not readable and writable, or the page
 *    cannot be had;
 *  - -EOPNOTSUPP: not private anonymous memory;
 *  - -EBUSY: the page is pinned, shared, or in use by a migration for a second;
 *  - -ENOMEM: 65,536 pages are exclusive already, or no memory;
 *  - -EDEADLK: inside a callback;
 *  - -ENODEV: closed.
 *
 * Context: a thread that holds the lock of the address space, without locks that invalidate callbacks
 * take; not inside a callback; may block.
 * Source: make_device_exclusive() of kernels v6.15 to v7.3.
 */
struct page *make_device_exclusive(struct mm_struct *mm,
                                   unsigned long addr,
                                   void *owner,
                                   struct folio **foliop);

/**
 * make_device_exclusive() for the pages of a range, one after another.
 *
 * @param mm     As for make_device_exclusive().
 * @param start  First address, page aligned.
 * @param end    First address behind the range, page aligned.
 * @param pages  One place for each page: the page, locked, or NULL where it could not be made
 *               exclusive.
 * @param owner  As for make_device_exclusive().
 * @return How many places were filled in: fewer than the range has when a page cannot be had at all.
 * Or, when that is the first one, an error of make_device_exclusive(), or:
 *  - -EINVAL: also when pages is NULL or misaligned, or the bounds are not page aligned, empty or
 *    reversed.
 *
 * Context: as make_device_exclusive().
 * Source: make_device_exclusive_range() of kernels v5.14 to v6.14.
 */
int make_device_exclusive_range(struct mm_struct *mm,
                                unsigned long start,
                                unsigned long end,
                                struct page **pages,
                                void *owner);

/**
 * Unlocks a page that make_device_exclusive() returned: from now on a touch by the CPU takes it back.
 * Pages of migrations need no unlocking; for them this does nothing. The header offers the kernel's
 * names unlock_page() and folio_unlock() for it.
 *
 * @param page  The page.
 *
 * Returns nothing, as in the kernel. hmm_last_errno(): 0; -EINVAL not a page.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: unlock_page() of kernels v4.14 to v7.3.
 */
void hmm_page_unlock(struct page *page);

/* ---------------------------------------------------------------------------------------------
 * Accounting (hmm.txt, section 7)
 *
 * Pages count in the size of the process wherever they are, and who pays for a page does not
 * change when it migrates. Memory groups are cgroup v2's memory controller for what leaves for
 * devices: a page is charged to the group of its address space when it leaves for the first
 * time. The kernel's own cgroups go on as ever for system memory, and know of no device.
 * ------------------------------------------------------------------------------------------ */

/**
 * Makes a memory group without a limit of its own.
 *
 * @param parent  The group above, whose limit holds for the new one, too; NULL: the root group,
 * which has no limit and counts everything.
 * @return The group, to be given back with hmm_group_put(). On failure ERR_PTR():
 *  - -EINVAL: parent is no live handle;
 *  - -ENOMEM: 256 groups.
 *
 * Context: any thread; does not block for long.
 * Source: ours; cgroup v2's mkdir.
 */
struct hmm_group *hmm_group_create(struct hmm_group *parent);

/**
 * Gives a handle back. The group itself lives as long as an address space is in it, a group below
 * it lives, or something is charged to it.
 *
 * @param group  What hmm_group_create() returned.
 * @return 0, or:
 *  - -EINVAL: group is no live handle.
 *
 * Context: any thread; does not block for long.
 * Source: ours; cgroup v2's rmdir, which never fails here.
 */
int hmm_group_put(struct hmm_group *group);

/**
 * Sets the limit of a group.
 *
 * A limit keeps holes from being filled on a device: they stay holes, and are counted in
 * events_max. It never keeps a page with contents from leaving or from coming home, since that is
 * memory which the process has already. A limit below what is charged drops nothing.
 *
 * @param group  The group; not the root group.
 * @param max    Bytes, rounded down to whole pages; HMM_GROUP_NO_LIMIT for none.
 * @return 0, or:
 *  - -EINVAL: group is NULL or no live handle.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours; cgroup v2's memory.max.
 */
int hmm_group_set_max(struct hmm_group *group, uint64_t max);

/**
 * Reads what is charged to a group, and what happened to it.
 *
 * @param group  The group; NULL: the root group.
 * @param state  Its size member says how much the caller knows; the rest is filled in.
 * @return 0, or:
 *  - -EINVAL: group is no live handle, state is NULL or misaligned, or its size is below 4.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours; cgroup v2's memory.current, .peak, .max, .stat and .events.
 */
int hmm_group_read(const struct hmm_group *group, struct hmm_group_state *state);

/**
 * Moves an address space into a group: pages that leave for a device for the first time from now
 * on are charged there, and stay charged there on both sides until they are dropped.
 *
 * What is charged already stays where it is; hmm_mm_move_charges() moves it.
 *
 * @param mm     The address space; in the root group at first.
 * @param group  The group; NULL: the root group.
 * @return 0, or:
 *  - -EINVAL: mm or group is no live handle;
 *  - -ENODEV: closed.
 *
 * Context: any thread; does not block for long.
 * Source: ours; cgroup v2's cgroup.procs; promises 76 to 79.
 */
int hmm_mm_set_group(struct mm_struct *mm, struct hmm_group *group);

/**
 * Charges what is charged for an address space to the group that it is in now, as far as that
 * group has room.
 *
 * @param mm  The address space.
 * @return Pages that changed groups, or:
 *  - -EINVAL: mm is no live handle;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours; memory.move_charge_at_immigrate of cgroup v1.
 */
long hmm_mm_move_charges(struct mm_struct *mm);

/**
 * Ends the charges of pages at home that the program dropped or unmapped, where nobody reports
 * that: on engines without HMM_CAPABILITY_EVENTS. Elsewhere it does nothing.
 *
 * @param mm  The address space.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours.
 */
int hmm_mm_settle_charges(struct mm_struct *mm);

/**
 * Reads how much memory a process uses, whichever side it is on: what the kernel counts, without
 * the frames that the library holds, and with what is on devices counted as anonymous. It does not
 * change by migration.
 *
 * A page of a private file mapping that migrates is anonymous from then on. The memory in which a
 * simulated device keeps its pages is memory of the process, too. Walks page tables: milliseconds
 * for each GiB.
 *
 * @param mm   The address space.
 * @param rss  Its size member says how much the caller knows; the rest is filled in.
 * @return 0, or:
 *  - -EINVAL: mm is no live handle, rss is NULL or misaligned, or its size is below 4;
 *  - -EOPNOTSUPP, or another errno: /proc does not tell;
 *  - -ENODEV: closed.
 *
 * Context: any thread; may block.
 * Source: hmm.txt section 7; the kernel's rss_anon, rss_file, rss_shmem; promises 75 and 82.
 */
int hmm_mm_rss(const struct mm_struct *mm, struct hmm_mm_rss *rss);

/**
 * Compares what the library counts with its page table: the counters, the pages that each device
 * has in use, the charges of each group. For tests, and for whoever wonders. Only meaningful while
 * nothing is under way; waits a moment for what is about to end.
 *
 * @param mm  The address space.
 * @return 0, or:
 *  - -EUCLEAN: something differs, and hmm_last_error() says what;
 *  - -EINVAL: mm is no live handle;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block for a second.
 * Source: ours.
 */
int hmm_mm_check_accounts(const struct mm_struct *mm);

/**
 * What a reason means, and what to do about it.
 *
 * @param reason  Of hmm_migrate_reason().
 * @return A constant text of one line in English; for a number that this version does not know, one
 * that says so.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
const char *hmm_stay_text(unsigned long reason);

/**
 * Lets calls to the kernel, allocations and callbacks fail now and then, on real memory, for tests
 * of drivers and programs.
 *
 * The rules are those of the environment variable HMM_INJECT, such as "move=EBUSY/10,arena/100":
 * one UFFDIO_MOVE in ten says EBUSY, one allocation of the library in a hundred fails. An empty
 * text ends all failures. Pages stay where they are, or the call is tried again; no data is lost.
 *
 * @param rules  A NUL-terminated text; replaces all rules of the process.
 * @return 0, or (and then nothing was changed):
 *  - -EINVAL: rules is NULL.
 *  - -EOPNOTSUPP: a rule makes no sense; hmm_last_error() names it and lists the points.
 *
 * Context: any thread, but not inside a callback (it may allocate).
 * Source: ours; the kernel has CONFIG_FAULT_INJECTION for it.
 */
int hmm_inject(const char *rules);

/* ---------------------------------------------------------------------------------------------
 * The soft device
 *
 * A software accelerator with memory, a page table and threads of its own: to try the library
 * without hardware, and to test against. Its kernels take the process's own pointers, wherever
 * the pages are.
 * ------------------------------------------------------------------------------------------ */

/**
 * Makes a soft device on an address space.
 *
 * It has memory that the CPU is never given an address of, a page table that is filled by device
 * faults and kept in step by a mirror, a copy engine, and threads that run kernels on the
 * process's own pointers.
 *
 * @param mm      The address space.
 * @param config  What it shall be like; NULL for all defaults.
 * @return The device, to be given to hmm_soft_destroy(). On failure ERR_PTR():
 *  - -EINVAL: mm is no live handle, or a member of config is out of its bounds;
 *  - -ENOMEM;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours.
 */
struct hmm_soft_device *hmm_soft_create(struct mm_struct *mm, const struct hmm_soft_config *config);

/**
 * Takes a soft device down: lets its kernels end, brings all its pages home, frees it.
 *
 * @param device  The device.
 * @return 0, or:
 *  - -EINVAL: not a live device;
 *  - -EBUSY: a kernel or a page did not let go in time: the device stays, nothing is lost, try
 *    again.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours.
 */
int hmm_soft_destroy(struct hmm_soft_device *device);

/**
 * Moves the pages of a range to the device. May span mappings; pages that cannot migrate stay; a
 * full device takes what fits.
 *
 * @param device  The device.
 * @param addr    Anywhere in the first page.
 * @param length  Bytes; every page that they touch is meant.
 * @return Pages that moved, or:
 *  - -EINVAL: not a live device, or a bad range;
 *  - -EOPNOTSUPP: its policy is HMM_SOFT_NEVER;
 *  - -EFAULT: nothing is mapped there;
 *  - -EBUSY;
 *  - -ENOMEM;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours; policy is the driver's (promise 16).
 */
long hmm_soft_migrate(struct hmm_soft_device *device, const void *addr, size_t length);

/**
 * Moves this device's pages of a range back to system memory.
 *
 * @param device  The device.
 * @param addr    Anywhere in the first page.
 * @param length  Bytes; every page that they touch is meant.
 * @return Pages that moved, or:
 *  - -EINVAL: not a live device, or a bad range;
 *  - -EFAULT: nothing is mapped there;
 *  - -EBUSY;
 *  - -ENODEV: closed.
 *
 * Context: any thread, but not inside a callback; may block.
 * Source: ours; promise 74.
 */
long hmm_soft_bring_home(struct hmm_soft_device *device, const void *addr, size_t length);

/**
 * Reads the counters of a soft device.
 *
 * @param device    The device.
 * @param counters  Its size member says how much the caller knows; the rest is filled in.
 * @return 0, or:
 *  - -EINVAL: not a live device, counters is NULL or misaligned, or its size is below 4.
 *
 * Context: any thread, callbacks included; does not block.
 * Source: ours.
 */
int hmm_soft_counters(const struct hmm_soft_device *device, struct hmm_soft_counters *counters);

/**
 * Changes when pages move, from the next device fault on. Pages stay where they are.
 *
 * @param device  The device.
 * @param policy  HMM_SOFT_ON_REQUEST, HMM_SOFT_ON_TOUCH or HMM_SOFT_NEVER.
 * @return 0, or:
 *  - -EINVAL: not a live device, or an unknown policy.
 *
 * Context: any thread; does not block.
 * Source: ours.
 */
int hmm_soft_set_policy(struct hmm_soft_device *device, uint32_t policy);

/**
 * Changes how slow the device is.
 *
 * @param device      The device.
 * @param latency_ns  Added for each batch copied and each device fault, in nanoseconds.
 * @param bandwidth   Bytes per second of the copy engine; 0 means as fast as memory is.
 * @return 0, or:
 *  - -EINVAL: not a live device.
 *
 * Context: any thread; does not block.
 * Source: ours.
 */
int hmm_soft_set_speed(struct hmm_soft_device *device, uint64_t latency_ns, uint64_t bandwidth);

/**
 * The device sets bytes: `memset(dst, byte, length)`.
 *
 * @param device  The device.
 * @param dst     First byte; any address of the process.
 * @param length  Bytes.
 * @param byte    The value.
 * @return 0, or:
 *  - -EINVAL: not a live device, NULL, zero length or overflow (nothing was written);
 *  - -EFAULT: something is not mapped;
 *  - -EPERM: not writable;
 *  - -EBUSY: the device is stuck or its queue full;
 *  - -ENODEV: closed.
 *
 * After -EFAULT and -EPERM a part may be written.
 *
 * Context: any thread, but not inside a callback; blocks until the kernel is done.
 * Source: ours.
 */
int hmm_soft_fill(struct hmm_soft_device *device, void *dst, size_t length, uint8_t byte);

/**
 * The device copies bytes: `memcpy(dst, src, length)`.
 *
 * @param device  The device.
 * @param dst     First byte to write.
 * @param src     First byte to read.
 * @param length  Bytes; the two ranges must not overlap.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when the ranges overlap.
 *
 * Context: as hmm_soft_fill().
 * Source: ours.
 */
int hmm_soft_copy(struct hmm_soft_device *device, void *dst, const void *src, size_t length);

/**
 * The device computes `y[i] += a * x[i]`.
 *
 * @param device  The device.
 * @param a       The factor.
 * @param x       Elements to read.
 * @param y       Elements to change; the same as x, or apart from it.
 * @param count   Elements.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when a pointer is misaligned or the ranges overlap in part.
 *
 * Context: as hmm_soft_fill().
 * Source: ours.
 */
int hmm_soft_axpy_f64(struct hmm_soft_device *device,
                      double a,
                      const double *x,
                      double *y,
                      size_t count);

/**
 * The device adds up doubles, one after another.
 *
 * @param device  The device.
 * @param src     Elements.
 * @param count   How many.
 * @param result  Where the sum goes; written on success only.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when a pointer is misaligned or result is NULL.
 *
 * Context: as hmm_soft_fill().
 * Source: ours.
 */
int hmm_soft_sum_f64(struct hmm_soft_device *device,
                     const double *src,
                     size_t count,
                     double *result);

/**
 * The device adds up 64-bit words, modulo 2^64.
 *
 * @param device  The device.
 * @param src     Elements.
 * @param count   How many.
 * @param result  Where the sum goes; written on success only.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when a pointer is misaligned or result is NULL.
 *
 * Context: as hmm_soft_fill().
 * Source: ours.
 */
int hmm_soft_sum_u64(struct hmm_soft_device *device,
                     const uint64_t *src,
                     size_t count,
                     uint64_t *result);

/**
 * The device gathers: `dst[i] = src[index[i]]`.
 *
 * @param device  The device.
 * @param dst     Elements to write; apart from index.
 * @param src     Elements to choose from; the indices say how far it reaches.
 * @param index   Indices into src.
 * @param count   Elements of dst and index.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when a pointer is misaligned or dst overlaps index.
 *
 * Context: as hmm_soft_fill().
 * Source: ours.
 */
int hmm_soft_gather_u64(struct hmm_soft_device *device,
                        uint64_t *dst,
                        const uint64_t *src,
                        const uint64_t *index,
                        size_t count);

/**
 * The device follows a linked list by the process's own pointers, and counts its nodes.
 *
 * @param device       The device.
 * @param head         The first node.
 * @param next_offset  offsetof the pointer to the next node; NULL ends the list.
 * @param max_steps    Most nodes to visit.
 * @param visited      Where the number of nodes visited goes; written on success only.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when the link or visited is misaligned, or visited is NULL.
 *
 * Context: as hmm_soft_fill().
 * Source: ours; promise 2.
 */
int hmm_soft_chase(struct hmm_soft_device *device,
                   const void *head,
                   size_t next_offset,
                   uint64_t max_steps,
                   uint64_t *visited);

/**
 * The device follows a linked list and adds up one 64-bit word of each node, modulo 2^64.
 *
 * @param device        The device.
 * @param head          The first node.
 * @param next_offset   offsetof the pointer to the next node; NULL ends the list.
 * @param value_offset  offsetof the word.
 * @param max_steps     Most nodes to visit.
 * @param result        Where the sum goes; written on success only.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when the link, the word or result is misaligned, or result is NULL.
 *
 * Context: as hmm_soft_fill().
 * Source: ours; promise 2.
 */
int hmm_soft_chase_sum_u64(struct hmm_soft_device *device,
                           const void *head,
                           size_t next_offset,
                           size_t value_offset,
                           uint64_t max_steps,
                           uint64_t *result);

/**
 * The device adds to a 64-bit word, atomically towards all its kernels; the word's page migrates
 * first.
 *
 * @param device  The device.
 * @param addr    The word.
 * @param value   What to add, modulo 2^64.
 * @param old     Where the value before goes; NULL if it is not wanted. Written on success only.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when a pointer is misaligned;
 *  - -EOPNOTSUPP: the policy is HMM_SOFT_NEVER.
 *
 * Context: as hmm_soft_fill().
 * Source: ours.
 */
int hmm_soft_atomic_add_u64(struct hmm_soft_device *device,
                            uint64_t *addr,
                            uint64_t value,
                            uint64_t *old);

/**
 * The device adds to words at regular distances, by plain loads and stores.
 *
 * @param device  The device.
 * @param addr    The first word.
 * @param count   Words.
 * @param stride  Bytes from one word to the next: a multiple of 8, at least 8.
 * @param value   What to add to each, modulo 2^64.
 * @return As hmm_soft_fill(), or:
 *  - -EINVAL: also when addr is misaligned or stride is bad.
 *
 * Context: as hmm_soft_fill().
 * Source: ours.
 */
int hmm_soft_add_u64(struct hmm_soft_device *device,
                     uint64_t *addr,
                     size_t count,
                     size_t stride,
                     uint64_t value);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

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

#endif  /* HMM_H */
