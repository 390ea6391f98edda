//! Where the writes of a connection land: the part of a block's file that it has mapped.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use super::{
    large_pages::{LARGE, LargePages},
    mapping::Mapping,
};

/// Large pages that one connection maps at once, and all of them together: what is mapped counts as the
/// process's memory. To map each for each write of a part of it was a quarter of the landing.
const WINDOW_MAX: u64 = 4;
const WINDOWS_MAX: u64 = 16;

/// The place of one connection's writes, one after another; see
/// [`Region::make_room`](super::Region::make_room).
#[derive(Debug)]
pub struct Room {
    /// Length of a window in bytes.
    length: u64,
    window: Option<Window>,
    /// Where the large page of the present write begins in the file; it is in the window.
    page: Option<u64>,
}

/// A part of a block's file that is mapped. Only large pages of it are touched.
#[derive(Debug)]
struct Window {
    of: Arc<LargePages>,
    start: u64,
    mapping: Mapping,
}

impl Default for Room {
    fn default() -> Self {
        Self::new(1)
    }
}

impl Room {
    /// For each of so many connections.
    pub fn new(connections: usize) -> Self {
        let pages = (WINDOWS_MAX / connections.max(1) as u64).clamp(1, WINDOW_MAX);
        Self { length: pages * LARGE, window: None, page: None }
    }

    /// Receive some of `length` bytes to `at` of the file, if that is in the page.
    pub(super) fn receive_from(
        &self,
        socket: BorrowedFd<'_>,
        at: u64,
        length: usize,
    ) -> Option<io::Result<usize>> {
        let (page, window) = (self.page?, self.window.as_ref()?);
        let left = (page + LARGE).checked_sub(at).filter(|left| (1..=LARGE).contains(left))?;
        let within = at.checked_sub(window.start)?;
        Some(window.mapping.receive_from(socket, within, length.min(left as usize)))
    }

    /// The present write goes to the page at `start` of `file`.
    pub(super) fn enter(
        &mut self,
        of: &Arc<LargePages>,
        file: &OwnedFd,
        start: u64,
    ) -> io::Result<()> {
        self.page = None;
        let begin = start / self.length * self.length;
        let is_it = |window: &Window| Arc::ptr_eq(&window.of, of) && window.start == begin;
        if !self.window.as_ref().is_some_and(is_it) {
            // First: what is mapped should not be more for a moment.
            self.window = None;
            let mapping =
                Mapping::aligned(file.as_fd(), begin, self.length as usize, LARGE as usize)?;
            self.window = Some(Window { of: of.clone(), start: begin, mapping });
        }
        self.page = Some(start);
        Ok(())
    }

    /// It goes to no large page.
    pub(super) fn leave(&mut self) {
        self.page = None;
    }

    /// Make the page a large one.
    pub(super) fn collapse(&self) -> io::Result<()> {
        match (self.page, &self.window) {
            (Some(page), Some(window)) => {
                window.mapping.collapse(page - window.start, LARGE as usize)
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}
