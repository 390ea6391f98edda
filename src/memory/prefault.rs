//! Huge pages in place of holes that QEMU is about to read.
//!
//! Reading shared memory that does not exist yet allocates it, small page by small page. That takes
//! many times as long as the search for nonzero pages.

use std::{ops::Range, os::fd::OwnedFd};

use rustix::fs::{SeekFrom, seek};
use tracing::debug;

use super::huge_pages::make;
use crate::ram::HUGE_PAGE;

/// Huge pages per request: each request waits for all CPUs once, whatever its size. Until it
/// completes, its pages count as the process's memory.
const TOGETHER: u64 = 8;

/// How far ahead of the reader to work, in bytes: a request for a page that is being read is
/// refused, and takes long.
const LEAD: u64 = 64 << 20;

/// Refusals to tolerate, and how many granted requests offset another refusal.
const REFUSED_MAX: u64 = 8;
const GRANTED_FOR_REFUSED: u64 = 4;

/// Replace the holes in `part` of `file` with huge pages, as long as `wants` returns true. The
/// reader has started at the beginning of the part.
pub(super) fn fill(file: &OwnedFd, part: Range<u64>, wants: impl Fn() -> bool) {
    let (mut granted, mut refused) = (0, 0);
    let mut at = part.start.next_multiple_of(HUGE_PAGE).saturating_add(LEAD);
    while at + HUGE_PAGE <= part.end && wants() {
        let pages = (hole(file, at..part.end) / HUGE_PAGE).min(TOGETHER);
        if pages == 0 {
            at += HUGE_PAGE;
            continue;
        }
        match make(file, at, pages) {
            Ok(()) => {
                granted += 1;
                at += pages * HUGE_PAGE;
            }
            Err(error) => {
                refused += 1;
                if refused > REFUSED_MAX + granted / GRANTED_FOR_REFUSED {
                    debug!(%error, granted, refused, "stopped requesting huge pages");
                    return;
                }
                at += LEAD;
            }
        }
    }
}

/// Return the length of the hole at the start of `part`, within `part`.
fn hole(file: &OwnedFd, part: Range<u64>) -> u64 {
    match seek(file, SeekFrom::Data(part.start)) {
        Ok(data) => data.min(part.end) - part.start,
        // A hole up to the end of the file. Other errors will recur in the request.
        Err(_) => part.end - part.start,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::huge_pages::tests::{HUGE_PAGES_AVAILABLE, allocated, block};

    #[test]
    fn holes_become_large_pages_and_the_rest_stays() {
        let length = 512 << 20;
        let (region, file) = block(HUGE_PAGE / 2, length);
        let (data, small) = (LEAD + 9 * HUGE_PAGE, 4096);
        region.write_at(&vec![7; small as usize], data).unwrap();
        region.fill_holes(|| false);
        assert_eq!(allocated(&file), small);
        region.fill_holes(|| true);
        // All but the lead, half a page at each end, and the page with data.
        let most = length - LEAD - 2 * HUGE_PAGE + small;
        let allocated = allocated(&file);
        assert!(allocated <= most, "{allocated} of {most}");
        assert_eq!(allocated >= most / 2, *HUGE_PAGES_AVAILABLE, "{allocated} of {most}");
        let mut bytes = vec![1; length as usize];
        region.read_at(&mut bytes, 0).unwrap();
        let data = data as usize..(data + small) as usize;
        assert!(bytes[data.clone()].iter().all(|byte| *byte == 7));
        bytes[data].fill(0);
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_short_block_is_left_alone() {
        let (region, file) = block(0, LEAD + HUGE_PAGE - 1);
        region.fill_holes(|| true);
        assert_eq!(allocated(&file), 0);
    }
}
