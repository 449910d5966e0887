//! What happens to devices when the whole mm is closed. Alone in its file: the mm is the process's only one.

mod common;

use common::{Region, device, mm, sum_of};
use hmm_core::Mm;
use hmm_soft::Policy;

#[test]
fn an_mm_that_closes_first_takes_its_pages_home() {
    let mm = mm();
    let device = device(&mm, 64, Policy::OnRequest);
    let region = Region::counting(32, 1);
    assert_eq!(device.migrate(region.range()).unwrap(), 32);
    mm.close().unwrap();
    assert!(region.all_words().iter().enumerate().all(|(at, word)| *word == at as u64 + 1));
    assert_eq!(device.run(sum_of(&region)).unwrap_err().errno(), libc::ENODEV);
    assert_eq!(device.migrate(region.range()).unwrap_err().errno(), libc::ENODEV);
    device.close().unwrap();
    // The next look opens a new one.
    let again = Mm::current().unwrap();
    let device = common::device(&again, 64, Policy::OnRequest);
    assert_eq!(device.migrate(region.range()).unwrap(), 32);
    device.close().unwrap();
}
