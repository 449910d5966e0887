//! Frames: real memory of the process, since drivers copy to and from it by address, and which slots hold a page.

use crate::addr::{AddrRange, LEAF_SIZE, PAGE_SIZE, VirtAddr};
use crate::engine::Present;
use crate::engine::model::pages::Bytes;
use crate::error::{Error, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

/// What a slot holds after its page was moved away: whoever reads an empty frame is found out.
const STALE: u8 = 0x5a;

/// One reserved area: a real mapping, freed when dropped.
#[derive(Debug)]
struct Area {
    /// The whole mapping, with what alignment cost.
    mapped: (usize, usize),
    range: AddrRange,
    slots: Vec<Present>,
}

/// All frames.
#[derive(Debug, Default)]
pub(super) struct Frames {
    areas: Vec<Area>,
}

impl Frames {
    /// Reserves `bytes` (rounded up to pages), 2 MiB aligned.
    pub(super) fn reserve(&mut self, bytes: u64) -> Result<AddrRange> {
        let area = Area::map(bytes)?;
        let range = area.range;
        self.areas.push(area);
        Ok(range)
    }

    /// Whether some frame lies in `range`.
    pub(super) fn overlap(&self, range: AddrRange) -> bool {
        self.areas.iter().any(|area| area.range.overlaps(range))
    }

    /// What a slot holds; `None` when the address is no frame's. A zero page that a driver wrote to in the meantime
    /// still counts as one: the model does not see drivers.
    pub(super) fn present(&self, frame: VirtAddr) -> Option<Present> {
        let area = self.areas.iter().find(|area| area.range.contains(frame))?;
        area.slots.get(area.range.index_of(frame)).copied()
    }

    /// Slots with a page of their own.
    pub(super) fn resident(&self) -> u64 {
        let slots = self.areas.iter().flat_map(|area| &area.slots);
        slots.filter(|slot| **slot == Present::Page).count() as u64
    }

    /// Puts a page into an empty slot. False when the slot is no frame, or is not empty.
    pub(super) fn fill(&mut self, frame: VirtAddr, bytes: &Bytes, what: Present) -> bool {
        let Some((area, index)) = self.find(frame) else { return false };
        if area.slots[index] != Present::None {
            return false;
        }
        area.store(index, bytes);
        area.slots[index] = what;
        true
    }

    /// The page in a slot; an empty one reads as zeros. `None` when there is no such frame.
    pub(super) fn copy_out(&mut self, frame: VirtAddr) -> Option<Box<Bytes>> {
        let (area, index) = self.find(frame)?;
        let mut bytes = Box::new([0; PAGE_SIZE]);
        if area.slots[index] != Present::None {
            area.load(index, &mut bytes);
        }
        Some(bytes)
    }

    /// The slot's page was moved away.
    pub(super) fn moved_out(&mut self, frame: VirtAddr) {
        if let Some((area, index)) = self.find(frame) {
            area.store(index, &[STALE; PAGE_SIZE]);
            area.slots[index] = Present::None;
        }
    }

    /// Frees the memory of the slots.
    pub(super) fn empty(&mut self, frames: AddrRange) {
        for area in &mut self.areas {
            if let Some(part) = area.range.intersect(frames) {
                area.release(part);
            }
        }
    }

    fn find(&mut self, frame: VirtAddr) -> Option<(&mut Area, usize)> {
        let area = self.areas.iter_mut().find(|area| area.range.contains(frame))?;
        let index = area.range.index_of(frame);
        Some((area, index))
    }
}

impl Area {
    fn map(bytes: u64) -> Result<Self> {
        let pages = bytes.div_ceil(PAGE_SIZE as u64);
        let size = pages * PAGE_SIZE as u64;
        let length = usize::try_from(size + LEAF_SIZE)
            .map_err(|_| Error::NoMemory { what: "address space for frames" })?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: no address is asked for, so that the kernel picks one where nothing is mapped.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), length, protection, flags) }
            .map_err(|errno| Error::os("mmap", VirtAddr::new(0), errno))?;
        let start = (base.expose_provenance() as u64).next_multiple_of(LEAF_SIZE);
        let range = AddrRange::new(start, start + size)?;
        Ok(Self { mapped: (base.addr(), length), range, slots: vec![Present::None; range.pages()] })
    }

    fn store(&self, index: usize, bytes: &Bytes) {
        let slot = self.range.page_at(index).as_ptr();
        // SAFETY: slot `index` is a whole page of this area's own mapping, which lives as long as the area; drivers
        // touch only frames that the mm has lent them, and the mm moves a frame's page only when it has it back.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), slot, PAGE_SIZE) }
    }

    fn load(&self, index: usize, bytes: &mut Bytes) {
        let slot = self.range.page_at(index).as_ptr();
        // SAFETY: as in `store`, with the direction turned round.
        unsafe { std::ptr::copy_nonoverlapping(slot, bytes.as_mut_ptr(), PAGE_SIZE) }
    }

    fn release(&mut self, part: AddrRange) {
        let (first, length) = (self.range.index_of(part.start()), part.len() as usize);
        // SAFETY: `part` lies inside this area's own mapping, and the mm gives only frames it has back.
        let released =
            unsafe { madvise(part.start().as_ptr().cast(), length, Advice::LinuxDontNeed) };
        debug_assert!(released.is_ok(), "DONTNEED of our own private memory cannot fail");
        self.slots[first..first + part.pages()].fill(Present::None);
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let (base, length) = self.mapped;
        // SAFETY: exactly the mapping that `map` made; the engine is gone, and with it everyone who was lent a frame.
        let unmapped = unsafe { munmap(std::ptr::with_exposed_provenance_mut(base), length) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping cannot fail");
    }
}
