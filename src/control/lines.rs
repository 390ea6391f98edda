//! Messages with file descriptors over a socket: one JSON object per line, with the number of its
//! descriptors.
//!
//! One read may return several lines, and then the kernel delivers the descriptors of the last line
//! with the first. So the reader assigns descriptors by these numbers.

use std::{collections::VecDeque, io, os::fd::OwnedFd};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::LINE_MAX;

/// Most descriptors that wait for their line: one for each block that can be named, and for each
/// channel that QEMU can have.
const FDS_MAX: usize = (16 << 10) + 256;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Line<T> {
    descriptors: usize,
    message: T,
}

/// The line of `message`, to which that many `descriptors` are attached.
///
/// # Errors
/// If it can't be written as JSON.
pub fn line(message: &impl Serialize, descriptors: usize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(&Line { descriptors, message })?;
    line.push(b'\n');
    Ok(line)
}

/// Lines that arrive in pieces, and their descriptors.
#[derive(Debug, Default)]
pub struct Lines {
    buffer: Vec<u8>,
    /// Leading bytes of `buffer` without an end of line.
    scanned: usize,
    /// Descriptors arrive in the order of their lines, and none after the first byte of its line.
    fds: VecDeque<OwnedFd>,
}

impl Lines {
    /// Append the result of a read.
    pub fn push(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) {
        self.buffer.extend_from_slice(bytes);
        self.fds.extend(fds);
    }

    /// Take the next complete message, and its descriptors.
    ///
    /// # Errors
    /// `InvalidData` for a line that is invalid, too long, or lacks descriptors that it names.
    pub fn take<T: DeserializeOwned>(&mut self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        if self.fds.len() > FDS_MAX {
            return Err(wrong("too many descriptors come with it"));
        }
        let end = self.buffer[self.scanned..].iter().position(|byte| *byte == b'\n');
        let Some(end) = end else {
            self.scanned = self.buffer.len();
            return if self.scanned > LINE_MAX { Err(wrong("it is too long")) } else { Ok(None) };
        };
        let line: Vec<u8> = self.buffer.drain(..=self.scanned + end).collect();
        self.scanned = 0;
        let Line { descriptors, message } = serde_json::from_slice(&line)?;
        if descriptors > self.fds.len() {
            return Err(wrong("descriptors are missing"));
        }
        let fds = self.fds.drain(..descriptors).collect();
        if self.buffer.is_empty() && !self.fds.is_empty() {
            return Err(wrong("more descriptors came than it names"));
        }
        Ok(Some((message, fds)))
    }
}

fn wrong(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("invalid control message: {why}"))
}

#[cfg(test)]
mod tests {
    use std::{
        fs::File,
        os::{fd::AsFd as _, unix::net::UnixStream},
    };

    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, fstat, memfd_create};

    use super::*;
    use crate::qmp::socket;

    fn file() -> OwnedFd {
        memfd_create("line", MemfdFlags::CLOEXEC).unwrap()
    }

    fn identities<'a>(fds: impl IntoIterator<Item = &'a OwnedFd>) -> Vec<u64> {
        fds.into_iter().map(|fd| fstat(fd).unwrap().st_ino).collect()
    }

    /// All that `reader` gets, in reads of `sizes` bytes, repeated.
    fn read(reader: &UnixStream, sizes: &[usize]) -> io::Result<Vec<(String, Vec<OwnedFd>)>> {
        let (mut lines, mut got) = (Lines::default(), Vec::new());
        for size in sizes.iter().cycle() {
            let (mut piece, mut fds) = (vec![0; *size], Vec::new());
            let received = socket::recv(reader, &mut piece, &mut fds)?;
            if received == 0 {
                break;
            }
            lines.push(&piece[..received], fds);
            while let Some(message) = lines.take()? {
                got.push(message);
            }
        }
        Ok(got)
    }

    proptest! {
        /// However lines are merged and split in transit, each has its own descriptors.
        #[test]
        fn each_line_has_its_own_descriptors(
            messages in prop::collection::vec(("[a-z]{0,40}", 0..4_usize), 1..12),
            sizes in prop::collection::vec(1..200_usize, 1..8),
        ) {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let mut expected = Vec::new();
            for (text, count) in messages {
                let files: Vec<_> = (0..count).map(|_| file()).collect();
                let borrowed: Vec<_> = files.iter().map(|fd| fd.as_fd()).collect();
                socket::send_all(&ours, &line(&text, count).unwrap(), &borrowed).unwrap();
                expected.push((text, identities(&files)));
            }
            drop(ours);
            let got = read(&theirs, &sizes).unwrap();
            let got: Vec<_> = got.iter().map(|(text, fds)| (text.clone(), identities(fds))).collect();
            prop_assert_eq!(got, expected);
        }
    }

    /// More than one `sendmsg` can carry, as for a guest with that many blocks.
    #[test]
    fn many_descriptors_pass() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = file();
        for count in [socket::FDS_MAX, socket::FDS_MAX + 1, 300] {
            let borrowed = vec![file.as_fd(); count];
            socket::send_all(&ours, &line(&"many", count).unwrap(), &borrowed).unwrap();
        }
        drop(ours);
        let got = read(&theirs, &[4096]).unwrap();
        let counts: Vec<_> = got.iter().map(|(_, fds)| fds.len()).collect();
        assert_eq!(counts, [socket::FDS_MAX, socket::FDS_MAX + 1, 300]);
    }

    #[test]
    fn wrong_numbers_are_errors() {
        for (sent, named) in [(1, 2), (2, 1), (0, 1), (1, 0)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let files: Vec<_> = (0..sent).map(|_| file()).collect();
            let borrowed: Vec<_> = files.iter().map(|fd| fd.as_fd()).collect();
            socket::send_all(&ours, &line(&"it", named).unwrap(), &borrowed).unwrap();
            drop(ours);
            assert_eq!(read(&theirs, &[4096]).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn nothing_grows_without_bounds() {
        let mut lines = Lines::default();
        lines.push(&vec![b' '; LINE_MAX + 1], Vec::new());
        assert!(lines.take::<String>().is_err());
    }

    #[test]
    fn garbage_is_an_error() {
        for garbage in ["\n", "{}\n", "\"x\"\n", "{\"descriptors\": -1, \"message\": \"\"}\n"] {
            let mut lines = Lines::default();
            lines.push(garbage.as_bytes(), Vec::new());
            assert!(lines.take::<String>().is_err(), "{garbage}");
        }
    }

    /// Descriptors that are not taken are closed with the reader.
    #[test]
    fn what_is_not_taken_is_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut lines = Lines::default();
        lines.push(b"", vec![theirs.into()]);
        drop(lines);
        let mut rest = Vec::new();
        assert_eq!(
            io::Read::read_to_end(&mut File::from(OwnedFd::from(ours)), &mut rest).unwrap(),
            0
        );
    }
}
