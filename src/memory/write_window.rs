//! Where the writes of a connection land: the part of a block's file that it has mapped.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use super::mapping::Mapping;
use crate::ram::HUGE_PAGE;

/// Large pages that one connection maps at once, and all of them together: what is mapped counts as the
/// process's memory. To map each for each write of a part of it was a quarter of the landing.
const WINDOW_MAX: u64 = 4;
const WINDOWS_MAX: u64 = 16;

/// The place of one connection's writes, one after another; see
/// [`Region::prepare_write`](super::Region::prepare_write).
#[derive(Debug)]
pub struct WriteWindow {
    /// Length of a window in bytes.
    length: u64,
    window: Option<Window>,
    /// Where the large page of the present write begins in the file; it is in the window.
    page: Option<u64>,
}

/// Tells blocks apart, whatever becomes of their addresses and descriptors.
#[derive(Debug, Clone, Default)]
pub(super) struct Identity(Arc<()>);

impl Identity {
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A part of a block's file that is mapped. Only large pages of it are touched.
#[derive(Debug)]
struct Window {
    of: Identity,
    start: u64,
    mapping: Mapping,
}

impl Default for WriteWindow {
    fn default() -> Self {
        Self::new(1)
    }
}

impl WriteWindow {
    /// For each of so many connections.
    pub fn new(connections: usize) -> Self {
        let pages = (WINDOWS_MAX / connections.max(1) as u64).clamp(1, WINDOW_MAX);
        Self { length: pages * HUGE_PAGE, window: None, page: None }
    }

    /// Receive some of `length` bytes to `at` of the file, if that is in the page.
    pub(super) fn receive_from(
        &self,
        socket: BorrowedFd<'_>,
        at: u64,
        length: usize,
    ) -> Option<io::Result<usize>> {
        let (page, window) = (self.page?, self.window.as_ref()?);
        let left =
            (page + HUGE_PAGE).checked_sub(at).filter(|left| (1..=HUGE_PAGE).contains(left))?;
        let within = at.checked_sub(window.start)?;
        Some(window.mapping.receive_from(socket, within, length.min(left as usize)))
    }

    /// The present write goes to the page at `start` of `file`.
    pub(super) fn enter(&mut self, of: &Identity, file: &OwnedFd, start: u64) -> io::Result<()> {
        self.page = None;
        let begin = start / self.length * self.length;
        let is_it = |window: &Window| window.of.is(of) && window.start == begin;
        if !self.window.as_ref().is_some_and(is_it) {
            // First: what is mapped should not be more for a moment.
            self.window = None;
            let mapping =
                Mapping::aligned(file.as_fd(), begin, self.length as usize, HUGE_PAGE as usize)?;
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
                window.mapping.collapse(page - window.start, HUGE_PAGE as usize)
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}
