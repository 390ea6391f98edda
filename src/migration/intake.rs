//! The source's data thread: takes QEMU's stream, writes RAM, forwards the rest.
//!
//! One thread does it all: it reads no faster than the fabric takes RAM, and that is what keeps
//! QEMU's bandwidth estimate, and with it `downtime-limit`, true.

use std::{os::unix::net::UnixStream, sync::atomic::Ordering::Relaxed};

use rustix::{
    io::Errno,
    net::{RecvFlags, recv},
};

use super::{
    Result, agreement::Source, error::MigrationError, link::Link, statistics::Statistics,
    targets::Targets,
};
use crate::{
    stream::{BlockRange, Limits, Outlet, PushError, Rewriter, StreamBlock, Travel},
    wire::{Message, PAYLOAD_MAX},
};

/// Bytes asked of QEMU's socket at once. The payload of RAM records is read and dropped, so it
/// should fit into the cache.
const READ: usize = 256 << 10;

/// Stream bytes that are gathered before they are sent.
const BATCH: usize = 128 << 10;

/// Take QEMU's stream to its end. `pass_ram` is asked before the first byte behind the last RAM
/// section leaves; false ends the stream there.
pub fn take(
    qemu: &UnixStream,
    link: &Link,
    targets: Targets,
    statistics: &Statistics,
    pass_ram: impl FnOnce() -> bool,
) -> Result<()> {
    let mut pass_ram = Some(pass_ram);
    let mut rewriter = Rewriter::new(Limits::default());
    let mut outbound =
        Outbound { link, statistics, targets, zeros: None, batch: Vec::new(), staged: Vec::new() };
    let mut buffer = vec![0; READ];
    loop {
        let received = match recv(qemu, &mut *buffer, RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {
                // Nothing more is ready: what is gathered may be what somebody waits for.
                rewriter.flush(&mut outbound).map_err(rewriting)?;
                outbound.send_batch()?;
                outbound.tally();
                recv(qemu, &mut *buffer, RecvFlags::empty())
            }
            other => other,
        };
        let received = received.map_err(|errno| MigrationError::QemuSocket(errno.into()))?.0;
        if received == 0 {
            break;
        }
        rewriter.push(&buffer[..received], &mut outbound).map_err(rewriting)?;
        if rewriter.ram_ended() && pass_ram.take().is_some_and(|pass_ram| !pass_ram()) {
            return Err(MigrationError::Aborted("The migration has failed already".into()));
        }
        if outbound.batch.len() >= BATCH {
            outbound.send_batch()?;
        }
        outbound.tally();
    }
    rewriter
        .finish()
        .map_err(|cut| MigrationError::Qemu(format!("ended its migration stream early ({cut})")))?;
    outbound.send_batch()?;
    outbound.tally();
    Ok(())
}

fn rewriting(error: PushError<MigrationError>) -> MigrationError {
    match error {
        PushError::Stream(error) => MigrationError::Stream(error.to_string()),
        PushError::Taker(error) => error,
    }
}

/// Where the rewritten stream goes.
struct Outbound<'a> {
    link: &'a Link,
    statistics: &'a Statistics,
    targets: Targets,
    /// Messages up to the end of the last RAM section, if it had zero ranges.
    zeros: Option<u64>,
    /// Stream bytes that were not sent yet. At most a read's worth and what the rewriter held.
    batch: Vec<u8>,
    /// Bytes of the next staged write: at most a chunk of them.
    staged: Vec<u8>,
}

impl Outbound<'_> {
    fn send_batch(&mut self) -> Result<()> {
        for piece in self.batch.chunks(PAYLOAD_MAX) {
            self.link.send(&Message::QemuFile(piece))?;
        }
        self.statistics.stream_bytes.fetch_add(self.batch.len() as u64, Relaxed);
        self.batch.clear();
        Ok(())
    }

    fn tally(&self) {
        let (posted, landed) = self.link.written();
        self.statistics.ram_posted.store(posted, Relaxed);
        self.statistics.ram_landed.store(landed, Relaxed);
    }
}

impl Outlet for Outbound<'_> {
    type Error = MigrationError;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<Vec<Travel>> {
        self.targets.name(blocks)
    }

    fn stream(&mut self, bytes: &[u8]) -> Result<()> {
        self.batch.extend_from_slice(bytes);
        Ok(())
    }

    fn hook(&mut self) -> Result<()> {
        self.send_batch()?;
        // A page of this section may have been zero in the last one. A device writes it when it
        // likes; the processor that makes zero ranges must have done so before.
        self.zeros.take().map_or(Ok(()), |messages| self.link.await_consumed(messages))
    }

    fn write(&mut self, range: BlockRange) -> Result<()> {
        let (source, remote) = self.targets.key(self.link, range.block, range.offset)?;
        let Source::Mapped(region) = source else {
            let why = format!("RAM block {} is not mapped", range.block);
            return Err(MigrationError::Stream(why));
        };
        self.link.write(region, range.offset, range.length, remote)
    }

    fn stage(&mut self, bytes: &[u8]) -> Result<()> {
        self.staged.extend_from_slice(bytes);
        Ok(())
    }

    fn write_staged(&mut self, range: BlockRange) -> Result<()> {
        let (_, remote) = self.targets.key(self.link, range.block, range.offset)?;
        self.link.write_bytes(&self.staged, range.offset, remote)?;
        self.staged.clear();
        Ok(())
    }

    fn zero(&mut self, range: BlockRange) -> Result<()> {
        let block = self.targets.block(range.block)?;
        self.link.send(&block.compress(range.offset, range.length))?;
        self.zeros = Some(self.link.messages());
        self.statistics.zero_bytes.fetch_add(range.length, Relaxed);
        Ok(())
    }

    fn finished(&mut self) -> Result<()> {
        self.targets.exchange(self.link)?;
        self.link.drain()?;
        self.link.send(&Message::RegisterFinished)?;
        self.zeros = self.zeros.map(|_| self.link.messages());
        Ok(())
    }
}
