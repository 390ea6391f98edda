//! The worker's end of the socket to its relay.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Mutex, PoisonError},
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::{Errno, retry_on_intr},
    net::{SendFlags, send},
};

use crate::{
    control::{Order, Report, lines::Lines},
    qmp::socket,
};

/// Reads the relay's orders.
#[derive(Debug)]
pub struct Orders {
    socket: UnixStream,
    lines: Lines,
}

impl Orders {
    /// Read orders from `socket`.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, lines: Lines::default() }
    }

    /// Return the next order with its descriptors; `None` when the relay is gone.
    ///
    /// # Errors
    /// An I/O error from the system; `InvalidData` for a line that is not an order.
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
pub struct Reports {
    socket: UnixStream,
    /// What the relay has not taken yet. Stays small: figures are not added to it.
    backlog: Mutex<Vec<u8>>,
}

impl Reports {
    /// Send reports to `socket`.
    pub fn new(socket: UnixStream) -> Self {
        Self { socket, backlog: Mutex::default() }
    }

    /// Send a report without blocking. What a busy relay does not take is sent with the next report
    /// or by [`Reports::flush`]; figures are dropped instead. The thread that reads orders notices
    /// when the relay is gone.
    pub fn send(&self, report: &Report) {
        let Ok(mut line) = serde_json::to_vec(report) else { return };
        line.push(b'\n');
        let mut backlog = self.backlog.lock().unwrap_or_else(PoisonError::into_inner);
        let is_busy = !self.push(&mut backlog);
        if is_busy && matches!(report, Report::Progress(_)) {
            return;
        }
        backlog.append(&mut line);
        self.push(&mut backlog);
    }

    /// Send what a busy relay has not taken, as far as it takes it now.
    pub fn resend(&self) {
        self.push(&mut self.backlog.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Send a report, and wait until the relay has taken all reports. Not for the state machine.
    pub fn deliver(&self, report: &Report) {
        self.send(report);
        self.flush();
    }

    /// Wait until the relay has taken all reports, or is gone.
    pub fn flush(&self) {
        loop {
            if self.push(&mut self.backlog.lock().unwrap_or_else(PoisonError::into_inner)) {
                return;
            }
            // Not under the lock. If it fails, the next send finds out why.
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], None);
        }
    }

    /// Send what the socket takes now; true if nothing is left.
    fn push(&self, backlog: &mut Vec<u8>) -> bool {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        while !backlog.is_empty() {
            match retry_on_intr(|| send(&self.socket, backlog, flags)) {
                Ok(sent) => drop(backlog.drain(..sent)),
                Err(Errno::AGAIN) => return false,
                // The relay is gone.
                Err(_) => backlog.clear(),
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};

    use super::*;
    use crate::control::Progress;

    /// A stopped relay must not stop the state machine. When it continues, it gets all reports but
    /// figures, in order.
    #[test]
    fn a_busy_relay_holds_nobody_and_misses_nothing() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reports = Reports::new(ours);
        let figures = Report::Progress(Progress::default());
        let is_busy = || !reports.backlog.lock().unwrap().is_empty();
        while !is_busy() {
            reports.send(&figures);
        }
        for _ in 0..1000 {
            reports.send(&figures);
            reports.send(&Report::StreamEnded);
        }
        let heard = std::thread::scope(|scope| {
            let relay = scope.spawn(|| {
                let lines = BufReader::new(theirs)
                    .lines()
                    .map(|line| serde_json::from_str::<Report>(&line.unwrap()).unwrap());
                lines.collect::<Vec<_>>()
            });
            reports.deliver(&Report::PastRam);
            assert!(!is_busy());
            reports.socket.shutdown(std::net::Shutdown::Both).unwrap();
            relay.join().unwrap()
        });
        let (last, before) = heard.split_last().unwrap();
        assert_eq!(*last, Report::PastRam);
        let ends = before.iter().filter(|report| **report == Report::StreamEnded).count();
        assert_eq!(ends, 1000);
    }

    #[test]
    fn a_relay_that_is_gone_is_not_waited_for() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let reports = Reports::new(ours);
        drop(theirs);
        reports.deliver(&Report::PastRam);
        reports.send(&Report::StreamEnded);
        assert!(reports.backlog.lock().unwrap().is_empty());
    }
}
