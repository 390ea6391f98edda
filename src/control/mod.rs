//! What the relay and a worker tell each other: one JSON object a line over a socketpair. Orders are
//! in [`lines`] that have descriptors.

pub mod lines;

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{address::Address, text};

/// Longest line that either side accepts, in bytes.
///
/// The longest is [`Order::Outgoing`] with its block list: 16383 blocks (what one
/// RAM_BLOCKS_RESULT can name) of some 350 bytes.
pub const LINE_MAX: usize = 8 << 20;

/// One RAM block of the attached QEMU.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Block {
    /// QEMU's idstr, at most 255 bytes.
    pub name: String,
    /// Used length in bytes.
    pub length: u64,
    /// Page size of the backing in bytes (2 MiB for hugetlb).
    pub page_size: u64,
    /// Offset in the backing file at which the block begins; `None` if the worker gets no memory
    /// of it: its pages are copied from the stream, or stay in it. The files' descriptors are attached to
    /// the order, in the order of the blocks that have one.
    pub file_offset: Option<u64>,
    /// QEMU reads all of it in a migration.
    pub read_whole: bool,
}

/// What carries RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FabricKind {
    /// TCP.
    Tcp,
    /// RDMA.
    Verbs,
}

impl FabricKind {
    /// Memory that it reads or writes is pinned: pages that are discarded and come back are others.
    pub fn pins(self) -> bool {
        self == Self::Verbs
    }
}

/// A QMP socket, in a directory that may be others'.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct QmpSocket {
    /// Where it is, or was.
    pub path: PathBuf,
    /// Who serves there. Another QEMU at this path is not meant.
    pub pid: u32,
}

/// A QMP command.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Command {
    /// Its name.
    pub execute: String,
    /// Its arguments, an object.
    pub arguments: Value,
}

/// What the client set that matters to the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Options {
    /// Capability `rdma-pin-all`.
    pub pin_all: bool,
    /// Capability `return-path`.
    pub return_path: bool,
    /// Seconds without any progress of a transfer that is due, after which the peer counts as lost.
    pub stall_timeout: u64,
    /// Seconds without any sign of life of the peer's RDMA device.
    pub peer_timeout: u64,
    /// Connections, or queue pairs, that carry RAM between two helpers.
    pub connections: u16,
    /// Multifd channels that QEMU should send RAM to the helper through; 0 for none.
    pub channels: u16,
    /// Bytes of guest RAM that may be pinned at a time; `None`: all of it.
    pub pin_limit: Option<u64>,
    /// Bytes of the chunks by which a stock QEMU registers memory: parameter `x-rdma-chunk-size`.
    pub chunk_size: u64,
    /// Processors that the worker may use; none: all.
    pub cpus: Vec<u16>,
    /// What carries RAM.
    pub fabric: FabricKind,
}

impl Options {
    /// Keys to whole blocks come with the list of blocks. Else they are asked for range by range.
    pub fn whole_keys(&self) -> bool {
        self.pin_all || self.fabric == FabricKind::Tcp
    }

    /// How much longer than usual the agreement may take because both sides register `bytes` of
    /// memory first: 64 MiB a second are possible even in an emulated machine.
    pub fn pinning(&self, bytes: u64) -> Duration {
        let pins = self.pin_all && self.fabric.pins();
        Duration::from_secs(if pins { bytes >> 26 } else { 0 })
    }
}

/// Relay to worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Order {
    /// Get ready for a migration with this fabric: what it is comes next, in one of the following.
    Prepare {
        /// What will carry RAM.
        fabric: FabricKind,
    },
    /// Be the source's worker. Descriptors: the blocks' files.
    Outgoing {
        /// The destination's helper.
        address: Address,
        /// QEMU's QMP socket, for a worker whose relay is gone; `None` if only the relay has one.
        qemu_qmp: Option<QmpSocket>,
        /// QEMU's RAM blocks.
        blocks: Vec<Block>,
        /// Options.
        options: Options,
    },
    /// Source, after [`Report::Agreed`]: take QEMU's stream. Descriptors: the worker's end of its
    /// socket, then those of QEMU's multifd channels, if it is to use any.
    StartStream,
    /// Source: what a worker whose relay is gone has to set QEMU back with. Sent before QEMU is set to
    /// anything, and whenever it changes.
    SetRestore {
        /// The commands; none when it is done.
        commands: Vec<Command>,
    },
    /// Source: whether the guest runs, but for the switchover. One that does is to run again after a
    /// failure that QEMU took for a success.
    SetGuestRunning {
        /// It does.
        runs: bool,
    },
    /// Source: the relay can't reach QEMU any more. The worker does what is left to do, as if the relay
    /// itself were gone.
    Detach {
        /// Why, for the peer.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
    },
    /// Source: the relay has done all that there is to do behind QEMU's migration. A worker that has
    /// taken its stream waits for it.
    Finish,
    /// Source: write no more RAM than this.
    SetRateLimit {
        /// Bytes per second; `None`: any number.
        rate: Option<u64>,
    },
    /// Be the destination's worker. Descriptor: the worker's end of QEMU's migration socket.
    Incoming {
        /// Where to listen.
        address: Address,
        /// Options.
        options: Options,
    },
    /// Destination, after [`Report::SourceComes`]. Descriptors: the blocks' files.
    Blocks {
        /// The report's.
        number: u64,
        /// QEMU's RAM blocks.
        blocks: Vec<Block>,
    },
    /// The same, if they can't be known.
    NoBlocks {
        /// The report's.
        number: u64,
        /// One sentence, told to the source.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
    },
    /// Destination: its QEMU said `completed` over QMP.
    QemuCompleted,
    /// Destination: its QEMU failed to load the stream, or is gone.
    QemuFailed {
        /// What is known, one sentence.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
        /// True only if the guest certainly never ran there.
        guest_never_ran: bool,
    },
    /// End the migration as failed: release everything, tell the peer, exit. If the guest may come to
    /// run at the destination, its QEMU decides, and nobody keeps it from it.
    Abort {
        /// One sentence, told to the peer.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
    },
    /// Source: the same, but a destination that has not got all of the guest gets no more of it.
    Cancel {
        /// One sentence, told to the peer.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
    },
}

/// Figures of a migration so far. Bytes, unless the name says otherwise.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// RAM written to the destination and acknowledged by it.
    pub ram_bytes: u64,
    /// RAM that was announced as zero and not sent.
    pub zero_bytes: u64,
    /// Bytes of the stream without RAM.
    pub stream_bytes: u64,
    /// RAM posted and not yet acknowledged.
    pub in_flight: u64,
    /// Milliseconds from the order to the agreed block lists.
    pub setup_ms: u64,
    /// Milliseconds since the order.
    pub elapsed_ms: u64,
    /// Guest RAM that is pinned on this side now.
    pub pinned: u64,
    /// Milliseconds that pinning and releasing have taken.
    pub pin_ms: u64,
    /// The fabric in use: `tcp` or `verbs`.
    pub fabric: String,
    /// Connections (queue pairs) that carry RAM.
    pub connections: u32,
}

/// How the source's QEMU may migrate.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Agreed {
    /// Multifd channels that it should use; 0 for none.
    pub channels: u16,
    /// Blocks that it may announce without content (`qemu-patches/`).
    pub announceable: usize,
    /// The destination forwards a return path.
    pub return_path: bool,
}

/// Worker to relay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum Report {
    /// Incoming: listening; a source may connect now.
    Listening {
        /// The bound address.
        address: Address,
    },
    /// Incoming: a source has named its blocks. The relay answers with [`Order::Blocks`] or
    /// [`Order::NoBlocks`].
    SourceComes {
        /// Tells the answers apart.
        number: u64,
    },
    /// Outgoing: connected, block lists agree. Incoming: a source connected and they agree.
    /// The source's relay starts QEMU's migration on this.
    Agreed(Agreed),
    /// Sent about four times a second, and whenever the state changes: also the sign of life.
    Progress(Progress),
    /// Outgoing, sent before the first byte behind the last RAM section leaves: from here on the
    /// guest may come to run at the destination.
    PastRam,
    /// Outgoing: what the guest did before the switchover, as QEMU tells the destination. A guest that
    /// did not run is not let run when QEMU takes a failure for a success.
    GuestBefore {
        /// As in `query-status`.
        status: String,
    },
    /// Incoming: every byte of the stream was handed to QEMU, all RAM has landed and remote access
    /// is revoked. The relay watches QEMU for `completed` and answers with
    /// [`Order::QemuCompleted`] or [`Order::QemuFailed`].
    StreamEnded,
    /// The migration succeeded: the destination's QEMU completed and the source knows it.
    Done(Progress),
    /// The migration failed; the worker exits after this.
    Failed {
        /// One sentence: what, where, hint.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
        /// True only if the guest certainly never ran at the destination, so that the source
        /// guest may run again even after its QEMU completed.
        guest_never_ran: bool,
        /// It was the QEMU on this side that ended it, and may say why.
        by_qemu: bool,
        /// Figures at the end.
        progress: Progress,
    },
}
