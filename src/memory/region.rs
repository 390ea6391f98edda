//! One RAM block's memory: a range of a file that QEMU maps shared.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, OnceLock},
};

use rustix::{
    fs::{MemfdFlags, SeekFrom, fstat, fstatfs, ftruncate, memfd_create, seek, sendfile},
    io::{Errno, pread, pwrite},
};

use super::{
    huge_pages::HugePages,
    hugetlb::HugetlbMapping,
    mapping::Mapping,
    pipe::Pipe,
    prefault,
    shortage::{HUGETLBFS_MAGIC, explain},
    write_window::WriteWindow,
};

/// Page size of guest RAM in bytes.
const PAGE: u64 = 4096;

/// Zero detection works in pieces of this size, in bytes.
const PIECE: usize = 64 << 10;

/// Overwrites nonzero data.
static ZEROES: [u8; PIECE] = [0; PIECE];

/// Why a file can't serve as a RAM block's memory.
#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    /// The file is shorter than the block's end.
    #[error(
        "RAM block '{name}': its file has {size} bytes, less than the {end} that the block needs; \
         was it truncated?"
    )]
    TooShort {
        /// The block.
        name: String,
        /// The file's size.
        size: u64,
        /// The block's end in the file.
        end: u64,
    },
    /// A system call failed.
    #[error("RAM block '{name}': {call} failed: {source}")]
    Host {
        /// The block.
        name: String,
        /// The system call.
        call: &'static str,
        /// errno.
        source: io::Error,
    },
}

/// How memory is accessed.
#[derive(Debug)]
enum Access {
    /// Through the file: writing a whole page needs neither a fault nor the zeroing of a new
    /// page, and `sendfile` copies nothing.
    File,
    /// Through a mapping: hugetlbfs has neither write(2) nor splice.
    Mapping(HugetlbMapping),
}

/// The memory of one RAM block.
#[derive(Debug)]
pub struct Region {
    name: String,
    file: OwnedFd,
    offset: u64,
    length: u64,
    access: Access,
    /// For devices; created on first use.
    mapping: OnceLock<Mapping>,
    /// For a block that is being filled.
    huge_pages: OnceLock<Arc<HugePages>>,
}

impl Region {
    /// Take `length` bytes of `file` from `offset` as RAM block `name`.
    ///
    /// # Errors
    /// If the file is shorter, or can't be mapped where that is necessary.
    pub fn new(name: &str, file: OwnedFd, offset: u64, length: u64) -> Result<Self, RegionError> {
        let host = |call| {
            let name = name.to_owned();
            move |source: Errno| RegionError::Host { name, call, source: source.into() }
        };
        let size = fstat(&file).map_err(host("fstat"))?.st_size.cast_unsigned();
        let end = offset.saturating_add(length);
        if end > size {
            return Err(RegionError::TooShort { name: name.to_owned(), size, end });
        }
        let file_system = fstatfs(&file).map_err(host("fstatfs"))?;
        let access = if file_system.f_type.cast_unsigned() == HUGETLBFS_MAGIC {
            let page = file_system.f_bsize.cast_unsigned();
            let pages = HugetlbMapping::new(&file, offset, length, page);
            let name = || name.to_owned();
            let failed = |source| RegionError::Host { name: name(), call: "mmap", source };
            Access::Mapping(pages.map_err(failed)?)
        } else {
            Access::File
        };
        let (name, mapping, huge_pages) = (name.to_owned(), OnceLock::new(), OnceLock::new());
        Ok(Self { name, file, offset, length, access, mapping, huge_pages })
    }

    /// Return where `length` bytes at `offset` are mapped, and how many they are. Valid as long as
    /// this region exists. For devices that move bytes by themselves.
    ///
    /// # Errors
    /// If the bytes are beyond the block, or the file can't be mapped.
    pub fn mapped(&self, offset: u64, length: u64) -> io::Result<(NonNull<u8>, usize)> {
        let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.at(offset, length)?;
        let mapping = match (&self.access, self.mapping.get()) {
            (Access::Mapping(pages), _) => pages.mapping(),
            (Access::File, Some(mapping)) => mapping,
            (Access::File, None) => {
                let mapping = map(&self.file, self.offset, self.length)?;
                self.mapping.get_or_init(|| mapping)
            }
        };
        Ok((mapping.pointer(offset, length)?, length))
    }

    /// Like [`Self::mapped`], for a device that is about to pin the range. On hugetlbfs its pages
    /// are allocated first, because the host may lack memory for them.
    ///
    /// # Errors
    /// As for [`Self::mapped`], or if there is no memory for the range.
    pub fn populated(&self, offset: u64, length: u64) -> io::Result<(NonNull<u8>, usize)> {
        let mapped = self.mapped(offset, length)?;
        if let Access::Mapping(pages) = &self.access {
            let populated = pages.populated(&self.file, offset, length);
            populated.map_err(|error| explain(&self.file, error))?;
        }
        Ok(mapped)
    }

    /// Create a region with memory of its own, for a block whose memory can't be accessed.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub fn stand_in(name: &str, length: u64) -> Result<Self, RegionError> {
        let host = |call| {
            let name = name.to_owned();
            move |source: Errno| RegionError::Host { name, call, source: source.into() }
        };
        let file = memfd_create(name, MemfdFlags::CLOEXEC).map_err(host("memfd_create"))?;
        ftruncate(&file, length).map_err(host("ftruncate"))?;
        Self::new(name, file, 0, length)
    }

    /// The RAM block's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Length in bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Return the offset in the file of `length` bytes at `offset` of the block, if they are in it.
    fn at(&self, offset: u64, length: usize) -> io::Result<u64> {
        match offset.checked_add(length as u64) {
            Some(end) if end <= self.length => Ok(self.offset + offset),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{length} bytes at {offset:#x} are beyond RAM block '{}'", self.name),
            )),
        }
    }

    /// Send some of `length` bytes at `offset` on a stream socket; return how many.
    ///
    /// The pages themselves are queued, not copies, so what arrives may be newer than this call.
    ///
    /// # Errors
    /// An I/O error from the system; `UnexpectedEof` if the file was truncated.
    pub fn send_to(&self, socket: BorrowedFd<'_>, offset: u64, length: usize) -> io::Result<usize> {
        let mut at = self.at(offset, length)?;
        let sent = match &self.access {
            Access::File => sendfile(socket, &self.file, Some(&mut at), length).map_err(Into::into),
            Access::Mapping(pages) => pages.mapping().send_to(socket, offset, length),
        };
        let sent = sent.map_err(|error| explain(&self.file, error))?;
        if sent == 0 && length > 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the file of RAM block '{}' was truncated", self.name),
            ));
        }
        Ok(sent)
    }

    /// Prepare `window` for a write of `length` bytes at `offset`. A long write to memory that does
    /// not exist yet gets huge pages, which halves its time. At most a 32nd of what was written is
    /// allocated in that way without having been written.
    ///
    /// If no huge pages are available, small ones are used.
    pub fn prepare_write(&self, window: &mut WriteWindow, offset: u64, length: u64) {
        let end = offset.checked_add(length);
        if matches!(self.access, Access::Mapping(_)) || end.is_none_or(|end| end > self.length) {
            window.leave();
            return;
        }
        let huge_pages = self.huge_pages.get_or_init(|| HugePages::new(self.offset + self.length));
        huge_pages.prepare_write(window, &self.file, self.offset, self.offset + offset, length);
    }

    /// Replace holes with huge pages of zeroes, as long as `wants` returns true. For a reader that
    /// reads everything from the start: it would allocate the memory anyway, and more slowly.
    pub fn fill_holes(&self, wants: impl Fn() -> bool) {
        if matches!(self.access, Access::File) {
            prefault::fill(&self.file, self.offset..self.offset + self.length, wants);
        }
    }

    /// Receive some of `length` bytes from a stream socket to `offset`, through `window` if it
    /// covers `offset`; return how many, 0 at end of stream.
    ///
    /// # Errors
    /// An I/O error from the system, with a hint if the host is out of memory.
    pub fn receive_from(
        &self,
        socket: BorrowedFd<'_>,
        pipe: &mut Pipe,
        window: &WriteWindow,
        offset: u64,
        length: usize,
    ) -> io::Result<usize> {
        let at = self.at(offset, length)?;
        let received = match &self.access {
            Access::File => window
                .receive_from(socket, at, length)
                .unwrap_or_else(|| pipe.splice(socket, self.file.as_fd(), at, length)),
            Access::Mapping(pages) => pages
                .populated(&self.file, offset, length as u64)
                .and_then(|mapping| mapping.receive_from(socket, offset, length)),
        };
        received.map_err(|error| explain(&self.file, error))
    }

    /// Fill `bytes` from `offset`.
    ///
    /// # Errors
    /// An I/O error from the system; `UnexpectedEof` if the file was truncated.
    pub fn read_at(&self, mut bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let mut at = self.at(offset, bytes.len())?;
        while !bytes.is_empty() {
            let read = pread(&self.file, &mut *bytes, at);
            let read = read.map_err(|error| explain(&self.file, error.into()))?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            bytes = &mut bytes[read..];
            at += read as u64;
        }
        Ok(())
    }

    /// Write `bytes` at `offset`.
    ///
    /// # Errors
    /// An I/O error from the system, with a hint if the host is out of memory.
    pub fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let at = self.at(offset, bytes.len())?;
        let written = match &self.access {
            Access::File => self.write_file(bytes, at),
            Access::Mapping(pages) => pages
                .populated(&self.file, offset, bytes.len() as u64)
                .and_then(|mapping| mapping.write_at(bytes, offset)),
        };
        written.map_err(|error| explain(&self.file, error))
    }

    fn write_file(&self, mut bytes: &[u8], mut at: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = pwrite(&self.file, bytes, at)?;
            bytes = &bytes[written..];
            at += written as u64;
        }
        Ok(())
    }

    /// Find the first data of the block at or after `offset`, in whole pages; the block's end if
    /// there is none. What is before it was never touched, or was discarded. Nothing is read.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub fn next_data(&self, offset: u64) -> io::Result<u64> {
        let data = self.seek(offset, SeekFrom::Data)?;
        Ok(if data < self.length { (data / PAGE * PAGE).max(offset) } else { data })
    }

    /// Find the first hole of the block at or after `offset`, in whole pages; the block's end if
    /// there is none. Nothing is read.
    ///
    /// Takes time in proportion to the data before the hole: callers should keep the result.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub fn next_hole(&self, offset: u64) -> io::Result<u64> {
        let hole = self.seek(offset, SeekFrom::Hole)?;
        Ok(hole.next_multiple_of(PAGE).min(self.length))
    }

    fn seek(&self, offset: u64, what: impl Fn(u64) -> SeekFrom) -> io::Result<u64> {
        self.at(offset, 0)?;
        let position = what(self.offset + offset);
        if matches!(self.access, Access::Mapping(_)) {
            // hugetlbfs reports everything as data.
            return Ok(if matches!(position, SeekFrom::Data(_)) { offset } else { self.length });
        }
        match seek(&self.file, position) {
            Ok(found) => Ok((found - self.offset).min(self.length)),
            Err(Errno::NXIO) => Ok(self.length),
            Err(error) => Err(error.into()),
        }
    }

    /// Zero `length` bytes at `offset`. Holes stay holes.
    ///
    /// # Errors
    /// An I/O error from the system.
    pub fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let fits = offset.checked_add(length).is_some_and(|end| end <= self.length);
        if !fits {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{length} bytes at {offset:#x} are beyond RAM block '{}'", self.name),
            ));
        }
        match &self.access {
            // Most zero ranges were never touched. SEEK_DATA detects that without allocating them.
            Access::File => match seek(&self.file, SeekFrom::Data(self.offset + offset)) {
                Ok(data) => {
                    let hole = (data - self.offset - offset).min(length);
                    self.zero_data(offset + hole, length - hole)
                }
                Err(Errno::NXIO) => Ok(()),
                Err(error) => Err(error.into()),
            },
            Access::Mapping(_) => self.zero_data(offset, length),
        }
    }

    /// Overwrite nonzero data. Nothing is released: the memory may have been allocated on purpose.
    /// read(2) of a hole allocates nothing; a read through a mapping would.
    fn zero_data(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut piece = [0; PIECE];
        let mut done = 0;
        while done < length {
            let want = usize::try_from(length - done).map_or(PIECE, |left| left.min(PIECE));
            let got = pread(&self.file, &mut piece[..want], self.offset + offset + done);
            let got = got.map_err(|error| explain(&self.file, error.into()))?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if piece[..got].iter().any(|byte| *byte != 0) {
                match &self.access {
                    Access::File => self.write_at(&ZEROES[..got], offset + done)?,
                    // Nonzero data is allocated.
                    Access::Mapping(pages) => pages.mapping().zero(offset + done, got)?,
                }
            }
            done += got as u64;
        }
        Ok(())
    }
}

fn map(file: &OwnedFd, offset: u64, length: u64) -> io::Result<Mapping> {
    let length = usize::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
    Mapping::new(file.as_fd(), offset, length)
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Write as _, os::unix::net::UnixStream};

    use super::*;

    fn memfd(length: u64) -> OwnedFd {
        let fd = memfd_create("region", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, length).unwrap();
        fd
    }

    fn allocated(region: &Region) -> i64 {
        fstat(&region.file).unwrap().st_blocks * 512
    }

    #[test]
    fn moves_bytes_from_region_to_region() {
        let from = Region::new("from", memfd(1 << 20), 4096, 64 << 10).unwrap();
        let to = Region::new("to", memfd(1 << 20), 8192, 64 << 10).unwrap();
        from.write_at(&[7; 8192], 4096).unwrap();
        let (here, there) = UnixStream::pair().unwrap();
        let mut sent = 0;
        while sent < 8192 {
            sent += from.send_to(here.as_fd(), 4096 + sent as u64, 8192 - sent).unwrap();
        }
        let mut window = WriteWindow::default();
        let mut pipe = Pipe::new().unwrap();
        let mut landed = 0;
        while landed < 8192 {
            let at = landed as u64;
            to.prepare_write(&mut window, at, 8192);
            landed +=
                to.receive_from(there.as_fd(), &mut pipe, &window, at, 8192 - landed).unwrap();
        }
        let mut bytes = vec![0; 3 * 4096];
        pread(&to.file, &mut bytes, 8192).unwrap();
        assert_eq!(bytes, [vec![7; 8192], vec![0; 4096]].concat());
    }

    #[test]
    fn data_and_holes_are_found_within_the_block() {
        // Data before and after the block does not belong to it.
        let file = memfd(8 * PAGE);
        for page in [0, 3, 4, 7] {
            pwrite(&file, &[1; PAGE as usize], page * PAGE).unwrap();
        }
        let region = Region::new("ram", file, PAGE, 6 * PAGE).unwrap();
        assert_eq!(region.next_data(0).unwrap(), 2 * PAGE);
        assert_eq!(region.next_data(2 * PAGE + 1).unwrap(), 2 * PAGE + 1);
        assert_eq!(region.next_hole(2 * PAGE).unwrap(), 4 * PAGE);
        assert_eq!(region.next_hole(PAGE).unwrap(), PAGE);
        assert_eq!(region.next_data(4 * PAGE).unwrap(), 6 * PAGE);
        assert_eq!(region.next_data(6 * PAGE).unwrap(), 6 * PAGE);
        assert!(region.next_data(6 * PAGE + 1).is_err());
        assert!(region.next_hole(6 * PAGE + 1).is_err());
    }

    #[test]
    fn zero_keeps_holes_and_what_was_allocated() {
        let region = Region::new("ram", memfd(1 << 20), 0, 1 << 20).unwrap();
        region.zero(0, 1 << 20).unwrap();
        assert_eq!(allocated(&region), 0);
        region.write_at(&[1; 16384], 65536).unwrap();
        region.zero(65536 + 4096, 8192).unwrap();
        assert_eq!(allocated(&region), 16384);
        // Beyond the data there is nothing to zero.
        region.zero(0, 1 << 16).unwrap();
        assert_eq!(allocated(&region), 16384);
        let mut bytes = vec![9; 16384];
        pread(&region.file, &mut bytes, 65536).unwrap();
        assert_eq!(bytes, [vec![1; 4096], vec![0; 8192], vec![1; 4096]].concat());
    }

    #[test]
    fn refuses_what_is_beyond_the_block() {
        let region = Region::new("ram", memfd(1 << 20), 0, 8192).unwrap();
        assert!(region.write_at(&[0; 2], 8191).is_err());
        assert!(region.zero(0, 8193).is_err());
        assert!(region.zero(u64::MAX, 2).is_err());
        let mut end = File::from(memfd(1));
        assert!(region.send_to(end.as_fd(), 8192, 1).is_err());
        end.write_all(b"x").unwrap();
    }

    #[test]
    fn refuses_a_file_that_is_too_short() {
        let error = Region::new("ram", memfd(4096), 4096, 4096).unwrap_err();
        assert!(error.to_string().contains("'ram'"), "{error}");
    }
}
