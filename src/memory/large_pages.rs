//! Large pages for memory that is being filled.
//!
//! Finding and entering a new page of 4 KiB for every 4 KiB that arrives takes longer than copying
//! them. Linux gives a memfd large pages by itself only where its administrator says so
//! (`shmem_enabled`); where a process asks for them, it does unless that says `deny`.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    fs::{FallocateFlags, SeekFrom, fallocate, seek},
    io::Errno,
};
use tracing::debug;

use super::mapping::Mapping;

/// A large page, in bytes (`PMD_SIZE`).
const LARGE: u64 = 2 << 20;

/// Shortest write that says that what is around it will be written too.
const DENSE: u64 = 128 << 10;

/// Memory that a block may be given before it is written, as a part of what was written to it: a
/// guest with little memory in use, or with many holes in it, keeps them.
const AHEAD_PART: u64 = 32;

/// How long a page may take. Where free memory is in pieces the kernel looks for long.
const TIME_MAX: Duration = Duration::from_millis(10);

/// So many requests in vain are tried, and one more for so many that were not.
const FAILURES_MAX: u64 = 8;
const FAILURES_PART: u64 = 4;

/// In place of the bytes that a page lacks: nobody has asked for it yet, and it is not a large one.
const UNKNOWN: u32 = u32::MAX;
const SMALL: u32 = u32::MAX - 1;

/// What is known of one block's large pages.
#[derive(Debug)]
pub(super) struct LargePages {
    /// Bytes of each that were not written yet. What is written twice counts twice, so it is exact in
    /// the first pass.
    left: Box<[AtomicU32]>,
    /// Their sum.
    ahead: AtomicU64,
    /// Bytes that came in dense writes.
    dense: AtomicU64,
    /// Taken where a page is densely written for the first time.
    requests: Mutex<Requests>,
}

/// How requests went.
#[derive(Debug, Default)]
struct Requests {
    granted: u64,
    failed: u64,
}

/// The place of a write in a region; see [`Region::make_room`](super::Region::make_room).
#[derive(Debug, Default)]
pub struct Room {
    /// A large page, and where it begins in the file.
    page: Option<(u64, Mapping)>,
}

impl Room {
    /// Receive some of `length` bytes to `at` of the file, if that is in the page.
    pub(super) fn receive_from(
        &self,
        socket: BorrowedFd<'_>,
        at: u64,
        length: usize,
    ) -> Option<io::Result<usize>> {
        let (start, mapping) = self.page.as_ref()?;
        let within = at.checked_sub(*start).filter(|within| *within < LARGE)?;
        let length = length.min((LARGE - within) as usize);
        Some(mapping.receive_from(socket, within, length))
    }
}

impl LargePages {
    /// For a file's part that ends at `end`.
    pub(super) fn new(end: u64) -> Self {
        Self {
            left: (0..end / LARGE).map(|_| AtomicU32::new(UNKNOWN)).collect(),
            ahead: AtomicU64::new(0),
            dense: AtomicU64::new(0),
            requests: Mutex::default(),
        }
    }

    /// For `length` bytes at `at` of `file`, of which the block's part begins at `first`.
    pub(super) fn make_room(&self, file: &OwnedFd, first: u64, at: u64, length: u64) -> Room {
        let dense = length >= DENSE;
        if dense {
            self.dense.fetch_add(length, Ordering::Relaxed);
        }
        let (mut room, mut from, end) = (Room::default(), at, at + length);
        while from < end {
            let page = from / LARGE;
            let next = ((page + 1) * LARGE).min(end);
            // The last one is not whole.
            let Some(left) = self.left.get(page as usize) else { break };
            if dense && page * LARGE >= first {
                room = self.room(left, file, page * LARGE);
            }
            self.written(left, next - from);
            from = next;
        }
        room
    }

    /// Room in the page at `start`.
    fn room(&self, left: &AtomicU32, file: &OwnedFd, start: u64) -> Room {
        match left.load(Ordering::Relaxed) {
            SMALL => Room::default(),
            UNKNOWN if self.allowed() < LARGE => Room::default(),
            UNKNOWN => self.request(left, file, start),
            // Without it, it lands as anywhere else.
            _ => Room { page: map(file, start).ok().map(|mapping| (start, mapping)) },
        }
    }

    /// How many bytes more may be given ahead.
    fn allowed(&self) -> u64 {
        let allowed = self.dense.load(Ordering::Relaxed) / AHEAD_PART;
        allowed.saturating_sub(self.ahead.load(Ordering::Relaxed))
    }

    /// Account for `length` bytes that come into a page.
    fn written(&self, left: &AtomicU32, length: u64) {
        let less = |left| match left {
            UNKNOWN | SMALL | 0 => None,
            left => Some(u64::from(left).saturating_sub(length) as u32),
        };
        if let Ok(before) = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
            self.ahead.fetch_sub(length.min(before.into()), Ordering::Relaxed);
        }
    }

    /// Have the page at `start` be a large one, if nothing of it exists yet.
    fn request(&self, left: &AtomicU32, file: &OwnedFd, start: u64) -> Room {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        if left.load(Ordering::Relaxed) != UNKNOWN {
            // Another thread was faster.
            return Room::default();
        }
        if !requests.are_in_vain() && is_hole(file, start) {
            let begun = Instant::now();
            let made = make(file, start);
            requests.note(made.as_ref().err(), begun.elapsed());
            if let Ok(mapping) = made {
                self.ahead.fetch_add(LARGE, Ordering::Relaxed);
                left.store(LARGE as u32, Ordering::Relaxed);
                return Room { page: Some((start, mapping)) };
            }
        }
        left.store(SMALL, Ordering::Relaxed);
        Room::default()
    }
}

impl Requests {
    fn are_in_vain(&self) -> bool {
        self.failed > FAILURES_MAX + self.granted / FAILURES_PART
    }

    fn note(&mut self, error: Option<&io::Error>, took: Duration) {
        if error.is_none() && took <= TIME_MAX {
            self.granted += 1;
            return;
        }
        self.failed += 1;
        if self.are_in_vain() {
            debug!(?error, ?took, granted = self.granted, "no large pages are asked for any more");
        }
    }
}

fn map(file: &OwnedFd, start: u64) -> io::Result<Mapping> {
    Mapping::aligned(file.as_fd(), start, LARGE as usize, LARGE as usize)
}

/// Does nothing exist of the page at `start`?
fn is_hole(file: &OwnedFd, start: u64) -> bool {
    match seek(file, SeekFrom::Data(start)) {
        Ok(data) => data >= start + LARGE,
        Err(error) => error == Errno::NXIO,
    }
}

/// Make a hole one large page of zeroes.
fn make(file: &OwnedFd, start: u64) -> io::Result<Mapping> {
    // The kernel makes it of small ones: there has to be one. It is not written, because another
    // thread may just have done so.
    fallocate(file, FallocateFlags::KEEP_SIZE, start, 4096)?;
    let mapping = map(file, start)?;
    mapping.collapse()?;
    Ok(mapping)
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::net::UnixStream, thread};

    use rustix::fs::{MemfdFlags, fstat, ftruncate, memfd_create};

    use super::*;
    use crate::memory::{Pipe, Region};

    const PIECE: u64 = 512 << 10;

    /// A block in a file of its own, and that file.
    fn block(offset: u64, length: u64) -> (Region, OwnedFd) {
        let file = memfd_create("block", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, offset + length).unwrap();
        let other = file.try_clone().unwrap();
        (Region::new("block", file, offset, length).unwrap(), other)
    }

    fn allocated(file: &OwnedFd) -> u64 {
        fstat(file).unwrap().st_blocks.cast_unsigned() * 512
    }

    /// Does this host's kernel have them at all?
    fn kernel_has_them() -> bool {
        let (_, file) = block(0, LARGE);
        make(&file, 0).is_ok()
    }

    /// Write as much as has to be before any are given; returns where that ends.
    fn fill(region: &Region) -> u64 {
        let length = LARGE * AHEAD_PART;
        for at in (0..length).step_by(PIECE as usize) {
            region.make_room(at, PIECE);
            region.write_at(&vec![1; PIECE as usize], at).unwrap();
        }
        length
    }

    #[test]
    fn a_dense_write_gets_large_pages_and_a_short_one_none() {
        let (region, file) = block(0, 1 << 30);
        let first = fill(&region);
        let before = allocated(&file);
        region.make_room(first + LARGE, 4096);
        assert_eq!(allocated(&file), before);
        region.make_room(first + LARGE, PIECE);
        let expected = if kernel_has_them() { LARGE } else { 0 };
        assert_eq!(allocated(&file) - before, expected);
        // It is full of zeroes.
        let mut bytes = vec![1; 2 * LARGE as usize];
        region.read_at(&mut bytes, first).unwrap();
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn what_exists_and_what_is_no_whole_page_is_left_alone() {
        // The block begins in the midst of one page and ends in the midst of another.
        let length = 128 * LARGE;
        let (region, file) = block(LARGE / 2, length);
        fill(&region);
        region.write_at(&[7; 4096], length - 3 * LARGE).unwrap();
        let before = allocated(&file);
        region.make_room(length - PIECE, PIECE);
        region.make_room(length - 3 * LARGE, PIECE);
        // Nothing beyond the block.
        region.make_room(length, PIECE);
        region.make_room(u64::MAX, PIECE);
        assert_eq!(allocated(&file), before);
    }

    #[test]
    fn a_block_with_holes_keeps_them() {
        let length = 512 << 20;
        let (region, file) = block(0, length);
        let mut written = 0;
        for at in (0..length).step_by(LARGE as usize) {
            region.make_room(at, PIECE);
            region.write_at(&vec![1; PIECE as usize], at).unwrap();
            written += PIECE;
        }
        let most = written + written / AHEAD_PART;
        assert!((written..=most).contains(&allocated(&file)), "{} of {most}", allocated(&file));
    }

    #[test]
    fn a_full_block_consists_of_them() {
        let length = 256 << 20;
        let (region, file) = block(0, length);
        for at in (0..length).step_by(PIECE as usize) {
            region.make_room(at, PIECE);
            if at >= LARGE * AHEAD_PART && kernel_has_them() {
                assert!(allocated(&file) >= (at + PIECE).next_multiple_of(LARGE), "at {at:#x}");
            }
            region.write_at(&vec![1; PIECE as usize], at).unwrap();
        }
        assert_eq!(allocated(&file), length);
    }

    /// Receive a piece full of `byte` at `at`.
    fn receive(region: &Region, pipe: &mut Pipe, at: u64, byte: u8) {
        let (mut there, here) = UnixStream::pair().unwrap();
        let room = region.make_room(at, PIECE);
        let mut landed = 0;
        while landed < PIECE {
            there.write_all(&[byte; 4096]).unwrap();
            let mut left = 4096;
            while left > 0 {
                let at = at + landed;
                let got = region.receive_from(here.as_fd(), pipe, &room, at, left).unwrap();
                left -= got;
                landed += got as u64;
            }
        }
    }

    /// Two connections share a page: what one has received is there, whoever asks for the page.
    #[test]
    fn what_was_received_meanwhile_stays() {
        let length = 256 << 20;
        let (region, _file) = block(0, length);
        thread::scope(|scope| {
            for half in 0..2 {
                let region = &region;
                scope.spawn(move || {
                    let mut pipe = Pipe::new().unwrap();
                    for at in (half * LARGE / 2..length).step_by(LARGE as usize) {
                        for at in [at, at + PIECE] {
                            receive(region, &mut pipe, at, 1 + (at / PIECE % 251) as u8);
                        }
                    }
                });
            }
        });
        let mut bytes = vec![0; PIECE as usize];
        for at in (0..length).step_by(PIECE as usize) {
            region.read_at(&mut bytes, at).unwrap();
            let byte = 1 + (at / PIECE % 251) as u8;
            assert!(bytes.iter().all(|it| *it == byte), "at {at:#x}");
        }
    }

    /// Where none are to be had, that is tried some times and not for ever.
    #[test]
    fn requests_in_vain_end() {
        let mut requests = Requests::default();
        let refused = io::ErrorKind::OutOfMemory.into();
        (0..FAILURES_MAX).for_each(|_| requests.note(Some(&refused), Duration::ZERO));
        assert!(!requests.are_in_vain());
        (0..FAILURES_PART).for_each(|_| requests.note(None, Duration::ZERO));
        requests.note(Some(&refused), Duration::ZERO);
        assert!(!requests.are_in_vain());
        requests.note(None, TIME_MAX * 2);
        assert!(requests.are_in_vain());
    }
}
