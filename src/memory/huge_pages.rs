//! Huge pages for memory that is being filled.
//!
//! Allocating and mapping a new page of 4 KiB for every 4 KiB received takes longer than copying
//! them. By itself Linux gives a memfd huge pages only if the administrator allows it
//! (`shmem_enabled`); to a process that asks for them it does, unless that setting is `deny`.

use std::{
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::Errno,
};
use tracing::debug;

use super::{
    mapping::Mapping,
    write_window::{Identity, WriteWindow},
};
use crate::ram::HUGE_PAGE;

/// Size of a small page in bytes.
const PAGE: u64 = 4096;

/// Part of a huge page that is accounted for separately, in bytes.
const PIECE: u64 = 64 << 10;

/// Shortest write that implies that the memory around it will be written too, in bytes.
const DENSE: u64 = 2 * PIECE;

/// A block may have one byte of unwritten huge pages for this many written bytes. So a guest with
/// little memory in use, or with many holes in it, keeps its holes.
const AHEAD_PART: u64 = 32;

/// Mean time budget per huge page. One saves about 0.6 ms, but collapsing waits for busy CPUs.
const TIME_EACH: Duration = Duration::from_millis(2);

/// Time budget beyond that. If a hypervisor has taken free memory back, the first pages, huge or
/// small, cost several times as much.
const TIME_SLACK: Duration = Duration::from_secs(2);

/// How many requests may be refused, and how many granted ones offset another refusal: if free
/// memory is fragmented, the kernel searches for a long time.
const REFUSED_MAX: u32 = 10;
const GRANTED_FOR_REFUSED: u32 = 10;

/// State of a huge page. The bits below these tell which of its pieces were written.
const IS_LARGE: u64 = 1 << 32;
const STAYS_SMALL: u64 = 1 << 33;
const PIECES: u64 = IS_LARGE - 1;

/// State of one block's huge pages.
#[derive(Debug)]
pub(super) struct HugePages {
    /// Tells this block from others.
    identity: Identity,
    pages: Box<[AtomicU64]>,
    /// Bytes of huge pages that are not written yet, in whole pieces.
    ahead: AtomicU64,
    /// Bytes written at least once, in whole pieces.
    written: AtomicU64,
    /// Locked for the first dense write to a page. `ahead` grows only under this lock.
    requests: Mutex<Requests>,
}

/// Results of the requests for huge pages.
#[derive(Debug, Default)]
struct Requests {
    granted: u32,
    refused: u32,
    spent: Duration,
}

impl HugePages {
    /// Track the part of a file that ends at `end`.
    pub(super) fn new(end: u64) -> Arc<Self> {
        Arc::new(Self {
            identity: Identity::default(),
            pages: (0..end / HUGE_PAGE).map(|_| AtomicU64::new(0)).collect(),
            ahead: AtomicU64::new(0),
            written: AtomicU64::new(0),
            requests: Mutex::default(),
        })
    }

    /// Prepare a write of `length` bytes at `at` of `file`, in which the block begins at `first`.
    pub(super) fn prepare_write(
        self: &Arc<Self>,
        window: &mut WriteWindow,
        file: &OwnedFd,
        first: u64,
        at: u64,
        length: u64,
    ) {
        let (mut from, end) = (at, at + length);
        window.leave();
        while from < end {
            let start = from / HUGE_PAGE * HUGE_PAGE;
            let next = (start + HUGE_PAGE).min(end);
            // A partial page at the end is not tracked.
            let Some(page) = self.pages.get((start / HUGE_PAGE) as usize) else { break };
            if length >= DENSE && start >= first {
                self.enter(window, page, file, start);
            }
            self.account(page, from - start, next - start);
            from = next;
        }
    }

    /// Enter the page at `start` if it is, or can be made, a huge page.
    fn enter(
        self: &Arc<Self>,
        window: &mut WriteWindow,
        page: &AtomicU64,
        file: &OwnedFd,
        start: u64,
    ) {
        let state = page.load(Ordering::Relaxed);
        let may_be = state & STAYS_SMALL == 0 && self.allowed() >= HUGE_PAGE;
        if state & IS_LARGE != 0 || (may_be && self.request(window, page, file, start)) {
            // On failure the data is received without the window.
            let _ = window.enter(&self.identity, file, start);
        }
    }

    /// Return how many more bytes may be allocated ahead.
    fn allowed(&self) -> u64 {
        let allowed = self.written.load(Ordering::Relaxed) / AHEAD_PART;
        allowed.saturating_sub(self.ahead.load(Ordering::Relaxed))
    }

    /// Account for a write to bytes `from` to `to` of a page.
    fn account(&self, page: &AtomicU64, from: u64, to: u64) {
        let (first, last) = (from.div_ceil(PIECE), to / PIECE);
        if first >= last {
            return;
        }
        let bits = (1 << last) - (1 << first);
        let before = page.fetch_or(bits, Ordering::Relaxed);
        let new = bytes(bits & !before);
        self.written.fetch_add(new, Ordering::Relaxed);
        if before & IS_LARGE != 0 {
            self.ahead.fetch_sub(new, Ordering::Relaxed);
        }
    }

    /// Make the page at `start` a huge page if it is a hole. Return whether it is a huge page.
    fn request(
        self: &Arc<Self>,
        window: &mut WriteWindow,
        page: &AtomicU64,
        file: &OwnedFd,
        start: u64,
    ) -> bool {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let state = page.load(Ordering::Relaxed);
        if state & (IS_LARGE | STAYS_SMALL) != 0 || self.allowed() < HUGE_PAGE {
            // Another thread was faster.
            return state & IS_LARGE != 0;
        }
        if !requests.are_in_vain() && is_hole(file, start) {
            let begun = Instant::now();
            let entered = window.enter(&self.identity, file, start);
            let made =
                entered.and_then(|()| put_small(file, start)).and_then(|()| window.collapse());
            requests.note(made.as_ref().err(), begun.elapsed());
            if made.is_ok() {
                // Add first: others subtract from it as soon as they see the bit.
                self.ahead.fetch_add(HUGE_PAGE, Ordering::Relaxed);
                let before = page.fetch_or(IS_LARGE, Ordering::AcqRel);
                self.ahead.fetch_sub(bytes(before & PIECES), Ordering::Relaxed);
                return true;
            }
            window.leave();
        }
        page.fetch_or(STAYS_SMALL, Ordering::Relaxed);
        false
    }
}

impl Requests {
    fn are_in_vain(&self) -> bool {
        self.refused > REFUSED_MAX + self.granted / GRANTED_FOR_REFUSED
            || self.spent > TIME_SLACK + TIME_EACH.saturating_mul(self.granted)
    }

    fn note(&mut self, error: Option<&io::Error>, took: Duration) {
        self.spent += took;
        let count = if error.is_some() { &mut self.refused } else { &mut self.granted };
        *count = count.saturating_add(1);
        if self.are_in_vain() {
            debug!(?error, ?self, "stopped requesting huge pages");
        }
    }
}

/// Bytes of the pieces whose bits are set.
fn bytes(pieces: u64) -> u64 {
    u64::from(pieces.count_ones()) * PIECE
}

/// Whether nothing of the page at `start` is allocated.
fn is_hole(file: &OwnedFd, start: u64) -> bool {
    match seek(file, SeekFrom::Data(start)) {
        Ok(data) => data >= start + HUGE_PAGE,
        Err(error) => error == Errno::NXIO,
    }
}

/// Replace a hole with `pages` huge pages of zeroes. On failure, 4 KiB of each may be allocated.
pub(super) fn make(file: &OwnedFd, start: u64, pages: u64) -> io::Result<()> {
    for page in 0..pages {
        put_small(file, start + page * HUGE_PAGE)?;
    }
    let length = (pages * HUGE_PAGE) as usize;
    Mapping::aligned(file.as_fd(), start, length, HUGE_PAGE as usize)?.collapse(0, length)
}

/// Allocate a small page: the kernel collapses small pages into a huge one, on their node, and so
/// needs at least one. It is not written, because another thread may just have done so. If memory
/// is interleaved, the node depends on the index of the small page.
fn put_small(file: &OwnedFd, start: u64) -> io::Result<()> {
    let small = start + start / HUGE_PAGE % (HUGE_PAGE / PAGE) * PAGE;
    Ok(fallocate(file, FallocateFlags::KEEP_SIZE, small, PAGE)?)
}

#[cfg(test)]
pub(super) mod tests {
    use std::{io::Write as _, os::unix::net::UnixStream, sync::LazyLock, thread};

    use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};

    use super::*;
    use crate::memory::{Pipe, Region};

    /// Length of a long write.
    const WRITE: u64 = 512 << 10;

    /// Any single request may be refused: try this many pages.
    const TRIES: u64 = 8;

    /// Whether this host's kernel provides huge pages at all.
    pub(in crate::memory) static HUGE_PAGES_AVAILABLE: LazyLock<bool> = LazyLock::new(|| {
        let (_, file) = block(0, TRIES * HUGE_PAGE);
        (0..TRIES).any(|page| make(&file, page * HUGE_PAGE, 1).is_ok())
    });

    /// A block in a file of its own, and that file.
    pub(in crate::memory) fn block(offset: u64, length: u64) -> (Region, OwnedFd) {
        let file = memfd_create("block", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, offset + length).unwrap();
        let other = file.try_clone().unwrap();
        (Region::new("block", file, offset, length).unwrap(), other)
    }

    pub(in crate::memory) fn allocated(file: &OwnedFd) -> u64 {
        fstat(file).unwrap().st_blocks.cast_unsigned() * 512
    }

    fn write(region: &Region, at: u64, length: u64) {
        region.prepare_write(&mut WriteWindow::default(), at, length);
        region.write_at(&vec![1; length as usize], at).unwrap();
    }

    /// Write as much as is necessary before huge pages are made. Return where that ends.
    fn fill(region: &Region) -> u64 {
        let length = HUGE_PAGE * AHEAD_PART;
        (0..length).step_by(WRITE as usize).for_each(|at| write(region, at, WRITE));
        length
    }

    #[test]
    fn a_long_write_gets_a_large_page_and_a_short_one_none() {
        let (region, file) = block(0, 1 << 30);
        let first = fill(&region);
        let before = allocated(&file);
        region.prepare_write(&mut WriteWindow::default(), first + HUGE_PAGE, DENSE - 1);
        assert_eq!(allocated(&file), before);
        let is_given = (1..=TRIES).any(|page| {
            let before = allocated(&file);
            region.prepare_write(&mut WriteWindow::default(), first + page * HUGE_PAGE, DENSE);
            allocated(&file) == before + HUGE_PAGE
        });
        assert_eq!(is_given, *HUGE_PAGES_AVAILABLE);
        // The huge page is zero.
        let mut bytes = vec![1; ((TRIES + 1) * HUGE_PAGE) as usize];
        region.read_at(&mut bytes, first).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_exists_and_what_is_no_whole_page_is_left_alone() {
        // The block begins in the middle of one huge page and ends in the middle of another.
        let length = 128 * HUGE_PAGE;
        let (region, file) = block(HUGE_PAGE / 2, length);
        let middle = 32 * HUGE_PAGE;
        for at in (middle..middle + 2 * HUGE_PAGE * AHEAD_PART).step_by(WRITE as usize) {
            write(&region, at, WRITE);
        }
        region.write_at(&[7; 4096], length - 3 * HUGE_PAGE).unwrap();
        let before = allocated(&file);
        region.prepare_write(&mut WriteWindow::default(), 0, WRITE);
        region.prepare_write(&mut WriteWindow::default(), length - WRITE, WRITE);
        region.prepare_write(&mut WriteWindow::default(), length - 3 * HUGE_PAGE, WRITE);
        // Nothing beyond the block.
        region.prepare_write(&mut WriteWindow::default(), length, WRITE);
        region.prepare_write(&mut WriteWindow::default(), u64::MAX, WRITE);
        assert_eq!(allocated(&file), before);
        // Any other page would have become a huge one.
        region.prepare_write(&mut WriteWindow::default(), 4 * HUGE_PAGE, WRITE);
        assert_eq!(allocated(&file) > before, *HUGE_PAGES_AVAILABLE);
    }

    #[test]
    fn a_full_block_is_made_of_them() {
        let length = 256 << 20;
        let (region, file) = block(0, length);
        let mut given = 0;
        for at in (fill(&region)..length).step_by(WRITE as usize) {
            let before = allocated(&file);
            region.prepare_write(&mut WriteWindow::default(), at, WRITE);
            given += u64::from(allocated(&file) == before + HUGE_PAGE);
            region.write_at(&vec![1; WRITE as usize], at).unwrap();
        }
        assert_eq!(given >= TRIES, *HUGE_PAGES_AVAILABLE, "{given}");
        assert_eq!(allocated(&file), length);
    }

    /// Whichever threads write the block, and however often.
    #[test]
    fn a_block_with_holes_keeps_them() {
        let length = 512 << 20;
        let (region, file) = block(0, length);
        let written = length / HUGE_PAGE * WRITE;
        for pass in 0..3 {
            thread::scope(|scope| {
                for thread in 0..4 {
                    let region = &region;
                    scope.spawn(move || {
                        for page in (thread..length / HUGE_PAGE).step_by(4) {
                            write(region, page * HUGE_PAGE, WRITE);
                        }
                    });
                }
            });
            let (all, most) = (allocated(&file), written + written / AHEAD_PART);
            assert!((written..=most).contains(&all), "pass {pass}: {all} of {most}");
        }
        let given = allocated(&file) - written;
        assert_eq!(given >= HUGE_PAGE - WRITE, *HUGE_PAGES_AVAILABLE, "{given}");
    }

    /// Receive a write full of `byte` at `at`.
    fn receive(region: &Region, (pipe, window): &mut (Pipe, WriteWindow), at: u64, byte: u8) {
        let (mut there, here) = UnixStream::pair().unwrap();
        region.prepare_write(window, at, WRITE);
        let mut landed = 0;
        while landed < WRITE {
            there.write_all(&[byte; 4096]).unwrap();
            let mut left = 4096;
            while left > 0 {
                let at = at + landed;
                let got = region.receive_from(here.as_fd(), pipe, window, at, left).unwrap();
                left -= got;
                landed += got as u64;
            }
        }
    }

    /// A write crosses the end of a page and of the window, in a block that is not aligned to the
    /// pages of its file.
    #[test]
    fn a_write_into_two_pages_lands_in_both() {
        let (region, _file) = block(PAGE, 256 << 20);
        let mut place = (Pipe::new().unwrap(), WriteWindow::default());
        for boundary in (fill(&region) + HUGE_PAGE..240 << 20).step_by(4 * HUGE_PAGE as usize) {
            let end = boundary.next_multiple_of(4 * HUGE_PAGE) - PAGE;
            // The second page is not a hole.
            region.write_at(&[7; 4096], end + WRITE).unwrap();
            receive(&region, &mut place, end - WRITE / 2, 9);
            let mut bytes = vec![0; WRITE as usize];
            region.read_at(&mut bytes, end - WRITE / 2).unwrap();
            assert!(bytes.iter().all(|byte| *byte == 9));
            region.read_at(&mut bytes[..4096], end + WRITE).unwrap();
            assert!(bytes[..4096].iter().all(|byte| *byte == 7));
        }
    }

    /// Two connections share a page: received data stays, whichever of them requests the huge page.
    #[test]
    fn what_was_received_meanwhile_stays() {
        let length = 256 << 20;
        let (region, _file) = block(0, length);
        let first = fill(&region);
        thread::scope(|scope| {
            for half in 0..2 {
                let region = &region;
                scope.spawn(move || {
                    let mut place = (Pipe::new().unwrap(), WriteWindow::default());
                    for at in (first + half * HUGE_PAGE / 2..length).step_by(HUGE_PAGE as usize) {
                        for at in [at, at + WRITE] {
                            receive(region, &mut place, at, 1 + (at / WRITE % 251) as u8);
                        }
                    }
                });
            }
        });
        let mut bytes = vec![0; WRITE as usize];
        for at in (first..length).step_by(WRITE as usize) {
            region.read_at(&mut bytes, at).unwrap();
            let byte = 1 + (at / WRITE % 251) as u8;
            assert!(bytes.iter().all(|it| *it == byte), "at {at:#x}");
        }
    }

    /// If huge pages are unavailable or slow, requests stop after some attempts.
    #[test]
    fn requests_in_vain_end() {
        let refused = io::Error::from(io::ErrorKind::OutOfMemory);
        let mut requests = Requests::default();
        (0..REFUSED_MAX).for_each(|_| requests.note(Some(&refused), Duration::ZERO));
        assert!(!requests.are_in_vain());
        requests.note(Some(&refused), Duration::ZERO);
        assert!(requests.are_in_vain());
        (0..GRANTED_FOR_REFUSED).for_each(|_| requests.note(None, TIME_EACH));
        assert!(!requests.are_in_vain());

        let mut requests = Requests::default();
        (0..200).for_each(|_| requests.note(None, TIME_EACH));
        assert!(!requests.are_in_vain());
        let most = TIME_SLACK.div_duration_f32(TIME_EACH) as u32;
        (0..=most).for_each(|_| requests.note(None, 2 * TIME_EACH));
        assert!(requests.are_in_vain());
    }
}
