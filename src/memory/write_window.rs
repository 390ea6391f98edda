//! The part of a block's file that a connection has mapped for its writes.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
};

use super::mapping::Mapping;
use crate::ram::HUGE_PAGE;

/// Huge pages that one connection maps at once, and all of them together: what is mapped counts as
/// the process's memory. Mapping per write cost 25 % of receive time.
const WINDOW_MAX: u64 = 4;
const WINDOWS_MAX: u64 = 16;

/// Mapping for one connection's writes, one after another; see
/// [`Region::prepare_write`](super::Region::prepare_write).
#[derive(Debug)]
pub struct WriteWindow {
    /// Length of a window in bytes.
    length: u64,
    window: Option<Window>,
    /// Offset in the file of the current write's huge page, which is in the window.
    page: Option<u64>,
}

/// Identifies a block, even if its address or descriptor is reused.
#[derive(Debug, Clone, Default)]
pub(super) struct Identity(Arc<()>);

impl Identity {
    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// A mapped part of a block's file. Only its huge pages are touched.
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
    /// Create the window of one of `connections` connections.
    pub fn new(connections: usize) -> Self {
        let pages = (WINDOWS_MAX / connections.max(1) as u64).clamp(1, WINDOW_MAX);
        Self { length: pages * HUGE_PAGE, window: None, page: None }
    }

    /// Receive some of `length` bytes to `at` of the file; `None` if that is not in the huge page.
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

    /// Use the page at `start` of `file` for the current write.
    pub(super) fn enter(&mut self, of: &Identity, file: &OwnedFd, start: u64) -> io::Result<()> {
        self.page = None;
        let begin = start / self.length * self.length;
        let is_it = |window: &Window| window.of.is(of) && window.start == begin;
        if !self.window.as_ref().is_some_and(is_it) {
            // Unmap first, so that two windows are never mapped at once.
            self.window = None;
            let mapping =
                Mapping::aligned(file.as_fd(), begin, self.length as usize, HUGE_PAGE as usize)?;
            self.window = Some(Window { of: of.clone(), start: begin, mapping });
        }
        self.page = Some(start);
        Ok(())
    }

    /// Use no huge page for the current write.
    pub(super) fn leave(&mut self) {
        self.page = None;
    }

    /// Make the page a huge one.
    pub(super) fn collapse(&self) -> io::Result<()> {
        match (self.page, &self.window) {
            (Some(page), Some(window)) => {
                window.mapping.collapse(page - window.start, HUGE_PAGE as usize)
            }
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }
}
