//! The 82 promises in our words.

/// How many there are.
pub(super) const COUNT: u8 = 82;

/// First and last number, and title.
pub(super) const SECTIONS: &[(u8, u8, &str)] = &[
    (1, 5, "Ordinary memory on devices (hmm.txt 1)"),
    (6, 10, "What may not be assumed of hardware (hmm.txt 2)"),
    (11, 17, "One address space, and migration (hmm.txt 3)"),
    (18, 46, "Mirrors and ranges (hmm.txt 4)"),
    (47, 56, "Device memory (hmm.txt 5)"),
    (57, 74, "Migration (hmm.txt 6)"),
    (75, 82, "Who pays for device memory (hmm.txt 7)"),
];

/// The text of a promise.
pub(super) fn text_of(number: u8) -> &'static str {
    TEXTS.get(usize::from(number).saturating_sub(1)).copied().unwrap_or_default()
}

const TEXTS: [&str; COUNT as usize] = [
    // 1
    "Whatever an allocator hands out can go to a device by its pointer: malloc, private and shared mappings, files.",
    "Lists, trees and graphs that the CPU built are walked by a device with the pointers as they are.",
    "Memory that one library gave another can go to a device; the giver needs to know of none.",
    "What a device wrote stands where the CPU looks for it; the program keeps no second copy.",
    "The same calls serve memory wherever it is; there are none for device memory and others for host memory.",
    // 6
    "Device memory need not have an address at which the CPU could reach it.",
    "The core relies on no cache coherence: mirrors' callbacks and migration are where memory is brought in step.",
    "A device without atomic operations on system memory is enough; the library's protocol uses none.",
    "What a device may use may migrate while it uses it; CPU accesses wait meanwhile, and do not fail.",
    "A range of many pages migrates in one call, so that a slow transfer is set up once.",
    // 11
    "For every address the device's page table names the page that the CPU's names.",
    "Only the driver writes the device's page table, in its callbacks; the core never does.",
    "Each page of device memory has a descriptor; to the CPU what is there is as if swapped out.",
    "The CPU's page table never maps a page of device memory.",
    "Any access of the CPU, by any thread, to what is on a device brings it home, and finds the right data.",
    "The driver decides what goes to its device and when; the core sends nothing there by itself.",
    "A mirror works without device memory, and device memory without a mirror.",
    // 18
    "Looking at a range needs a registered mirror; without one it is refused.",
    "A mirror can be registered by a caller that holds the address space's lock for writing, and by one that does not.",
    "Of several mirrors of one address space each hears of every invalidation.",
    "Whatever changes the CPU's page table in a mirrored range is told to its mirrors.",
    "What is told covers the change; it may be more, never less, and its end is exclusive.",
    "Whoever changes the CPU's side goes on only when every mirror's callback has returned.",
    "CPU and device agree, or one of them has nothing while the other has the old page: never new here and old there.",
    "Once a callback has returned, the device uses no translation from before it.",
    "A look without faulting reports what is there, and changes nothing in the CPU's page table.",
    "A look with faulting makes missing pages present as an access would: zeros, copies, files, swap.",
    "Asked for writing, it makes a page that may be written an own, writable one; asked for reading, it leaves it.",
    "Asked for writing where the mapping forbids it, it fails, and nothing is written.",
    "Where the mapping forbids reading it fails, and the entries are empty.",
    "Entry i is page i of the range, and there are as many entries as pages.",
    "What is empty, special, broken or on a device is known by its flags.",
    "Driver memory and hugetlbfs are reported as special and refused; they are never mirrored.",
    "Device pages are reported as such, with the permission to write; a look does not bring them home.",
    "The shared page of zeros is reported readable only, and is replaced by an own page when a write is asked for.",
    "From a successful look until its end, any change inside the range makes its result false.",
    "A change before the look, or outside its range, does not.",
    "A look is ended once for each success, and never after a failure.",
    "Look, lock, ask, write, unlock, with the callback under the same lock: no interleaving leaves a stale entry.",
    "Entries of what changed are cleared in the driver's array, so that it cannot map them by mistake.",
    "Several devices may be updated at the same time, and awaited one after the other.",
    "Once a mirror is unregistered none of its callbacks runs or will; its memory may be used again.",
    "When the address space ends each mirror is told once, and makes no new mappings afterwards.",
    "A fault may give up the address space's lock if it was allowed to, and says so; otherwise it still holds it.",
    "Success of a fault speaks for the call; each entry speaks for itself.",
    "A fault that fails marks the entry at which it failed, and returns an error.",
    // 47
    "Device memory is registered by its size and gets numbers and descriptors; no memory of the CPU's is behind them.",
    "The driver's `free` runs exactly once for a page, when its last reference is gone; then the driver may reuse it.",
    "The driver's `fault` is called whenever the CPU accesses a page that is on its device, and brings it home.",
    "It may bring neighbours along, but serves the page that faulted.",
    "The page that it is told is a hint; if another migration was faster, the access simply goes on.",
    "What it cannot do reaches the access: SIGBUS for lost data, another try without memory. Other pages are unharmed.",
    "A driver can leave a word with each device page; it is there until the page is freed.",
    "Removing device memory empties it first; afterwards none of its descriptors is used.",
    "Of several accesses to one device page at once, one brings it home, and all see the data.",
    "In `free` the page is the driver's alone: nobody else has a reference.",
    // 57
    "One call migrates any number of pages of a mapping.",
    "Pages that cannot go (pinned, held, special) are left out, and the call succeeds.",
    "A migration fails for bad arguments only.",
    "A page for which the driver names no destination stays as it was: contents, place, permissions.",
    "While pages are copied they are out of everybody's reach: what they contain stands still.",
    "After the copy a page may still fail to move; the driver is told exactly which moved.",
    "When the driver is told, the pages are still locked, so that it can write its page table.",
    "Neither side changes what the other wrote into the arrays.",
    "Addresses without contents can be filled on the device: the driver clears a page, and that is what is there.",
    "Pages that somebody pinned do not migrate, and keep contents and place.",
    "Shared memory and shared files are refused page by page.",
    "What was writable is writable after migration, both ways; what was not is not.",
    "A page that several processes share after a fork can migrate, and all of them find it.",
    "CPU accesses to a page that migrates wait until that is over, and succeed then.",
    "Overlapping migrations end; each page goes with one of them at most.",
    "Destinations of pages that did not move go back to the driver; nothing leaks.",
    "All mirrors, the driver's own included, have let go before anything is copied.",
    "A driver does not skip a homecoming, unless the data is beyond recovery.",
    // 75
    "A device page counts as resident memory of its process as the page that it replaced did, in its kind.",
    "Who is charged for a page stays charged through migration both ways, and with the same amount.",
    "A limit of a memory group never stops a page from coming home.",
    "A hole that is filled on the device is charged and counted; if the charge fails, so does that.",
    "After a fork both processes count what they share; each count goes with its unmapping or its process.",
    "Nothing can pin a page while it is on a device: who wants to, gets it home first.",
    "All device memory that a process used is free when it has ended, however it ended.",
    "Device memory counts towards the size of a process, also for whoever looks for a large one to end.",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_have_every_number_once() {
        let mut next = 1;
        for (first, last, _) in SECTIONS {
            assert_eq!(*first, next);
            next = last + 1;
        }
        assert_eq!(next, COUNT + 1);
        assert!(TEXTS.iter().all(|text| !text.contains('|') && text.ends_with('.')));
    }
}
