//@ before hmm_version
/* ---------------------------------------------------------------------------------------------
 * Version and errors
 * ------------------------------------------------------------------------------------------ */

//@ before hmm_mm_current
/* ---------------------------------------------------------------------------------------------
 * The address space
 *
 * One address space is managed: that of the process itself. Everything below needs it, and
 * whoever needs it takes a reference of its own.
 * ------------------------------------------------------------------------------------------ */

//@ before hmm_find_vma
/* ---------------------------------------------------------------------------------------------
 * Mappings, and the lock of the address space
 * ------------------------------------------------------------------------------------------ */

//@ before hmm_mirror_register
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

//@ before hmm_device_new
/* ---------------------------------------------------------------------------------------------
 * Device memory (hmm.txt, section 5)
 *
 * Memory that only the device can reach, with one page descriptor for each of its pages. A page
 * of it that holds data of the process looks to the CPU like a page that was swapped out. Every
 * such page is charged and counted as the page that it replaced.
 * ------------------------------------------------------------------------------------------ */

//@ before migrate_vma
/* ---------------------------------------------------------------------------------------------
 * Migration to and from device memory (hmm.txt, section 6)
 *
 * Never all or nothing: each page moves, or stays as it was. Private anonymous memory (malloc,
 * new, numpy arrays, mmap) can move to a device; everything else can be mirrored where it is.
 * ------------------------------------------------------------------------------------------ */

//@ before hmm_group_create
/* ---------------------------------------------------------------------------------------------
 * Accounting (hmm.txt, section 7)
 *
 * Pages count in the size of the process wherever they are, and who pays for a page does not
 * change when it migrates. Memory groups are cgroup v2's memory controller for what leaves for
 * devices: a page is charged to the group of its address space when it leaves for the first
 * time. The kernel's own cgroups go on as ever for system memory, and know of no device.
 * ------------------------------------------------------------------------------------------ */

//@ before hmm_soft_create
/* ---------------------------------------------------------------------------------------------
 * The soft device
 *
 * A software accelerator with memory, a page table and threads of its own: to try the library
 * without hardware, and to test against. Its kernels take the process's own pointers, wherever
 * the pages are.
 * ------------------------------------------------------------------------------------------ */

//@ before mmu_interval_notifier_insert
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

//@ before hmm_range_fault
/* ---------------------------------------------------------------------------------------------
 * Today's kernels: looking at a range (with HMM_API_7_3)
 * ------------------------------------------------------------------------------------------ */

//@ before memremap_pages
/* ---------------------------------------------------------------------------------------------
 * Today's kernels: device memory, private and coherent
 *
 * hmm_devmem_page_set_drvdata() and hmm_devmem_page_get_drvdata() work for these pages, too: they
 * are page->zone_device_data.
 * ------------------------------------------------------------------------------------------ */

//@ before migrate_vma_setup
/* ---------------------------------------------------------------------------------------------
 * Today's kernels: migration in three calls
 * ------------------------------------------------------------------------------------------ */

//@ before make_device_exclusive
/* ---------------------------------------------------------------------------------------------
 * Today's kernels: exclusive access
 * ------------------------------------------------------------------------------------------ */
