//! The worker's end of the socket to its relay.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Mutex, PoisonError},
};

use rustix::net::SendFlags;

use super::{
    lines::Lines,
    messages::{Order, Report},
};
use crate::qmp::socket;

/// Reads the orders of the relay.
#[derive(Debug)]
pub struct Orders {
    socket: UnixStream,
    lines: Lines,
}

impl Orders {
    /// Orders that arrive on `socket`.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, lines: Lines::default() }
    }

    /// The next order, with its descriptors; `None` when the relay is gone.
    ///
    /// # Errors
    /// The system's; `InvalidData` for a line that is no order.
    pub fn receive(&mut self) -> io::Result<Option<(Order, Vec<OwnedFd>)>> {
        loop {
            if let Some(order) = self.lines.take()? {
                return Ok(Some(order));
            }
            let (mut piece, mut fds) = ([0; 16384], Vec::new());
            let received = match socket::recv(&self.socket, &mut piece, &mut fds) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
                other => other?,
            };
            if received == 0 {
                return Ok(None);
            }
            self.lines.push(&piece[..received], fds);
        }
    }
}

/// Sends reports to the relay.
#[derive(Debug)]
pub struct Reports(Mutex<UnixStream>);

impl Reports {
    /// Reports that go out on `socket`.
    pub fn new(socket: UnixStream) -> Self {
        Self(Mutex::new(socket))
    }

    /// Send one. A relay that is gone is noticed where orders are read. Figures are dropped while
    /// the relay is too busy to take them: the state machine must not wait for it.
    pub fn send(&self, report: &Report) {
        let Ok(mut line) = serde_json::to_vec(report) else { return };
        line.push(b'\n');
        let socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = line.as_slice();
        if matches!(report, Report::Progress(_)) {
            match rustix::net::send(&*socket, rest, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => rest = &rest[sent..],
                Err(_) => return,
            }
        }
        while !rest.is_empty() {
            match socket::send(&*socket, rest, &[]) {
                Ok(sent) => rest = &rest[sent..],
                Err(_) => return,
            }
        }
    }
}
