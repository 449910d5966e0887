//! hmm.txt section 7: who pays for device memory, and its end.

use crate::common::{filled, is_whole};
use crate::driver::Card;
use hmm_tests::mm_or_skip;
use std::sync::atomic::Ordering;

#[test]
fn promise_81_the_end_of_an_address_space_frees_all_device_memory() {
    let mm = mm_or_skip!();
    let (card, region) = (Card::new(&mm, 64), filled(64));
    assert_eq!(card.all_to_device(region.range()), 64);
    mm.close().unwrap();
    assert_eq!((card.devmem.in_use(), card.driver.free_pages()), (0, 64));
    assert_eq!(card.driver.frees.load(Ordering::SeqCst), 64);
    assert!(is_whole(&region));
}
