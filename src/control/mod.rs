//! Messages between relay and worker: one JSON object per line over a socketpair. Orders may carry
//! descriptors, so they are encoded by [`lines`].

pub mod lines;

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{address::Address, text};

/// Longest line that either side accepts, in bytes.
///
/// The longest is [`Order::Outgoing`] with its block list: 16383 blocks (what one RAM_BLOCKS_RESULT
/// can name) of about 350 bytes.
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
    /// Offset of the block in the backing file; `None` if the worker can't map it, so that its
    /// pages are copied from the stream, or stay in it. The files' descriptors are attached to the
    /// order, in the order of the blocks that have one.
    pub file_offset: Option<u64>,
    /// Whether QEMU reads all of it in a migration.
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
    /// Whether it pins memory that it accesses. Discarded pages then return as different ones.
    pub fn pins(self) -> bool {
        self == Self::Verbs
    }
}

/// A QMP socket, in a directory that may belong to others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct QmpSocket {
    /// Its path, or former path.
    pub path: PathBuf,
    /// PID of the server. Another QEMU at this path is not meant.
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

/// The client's settings that matter to the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Options {
    /// Capability `rdma-pin-all`.
    pub pin_all: bool,
    /// Capability `return-path`.
    pub return_path: bool,
    /// Seconds without progress of a pending transfer, after which the peer counts as lost.
    pub stall_timeout: u64,
    /// Seconds without a sign of life from the peer's RDMA device.
    pub peer_timeout: u64,
    /// Connections, or queue pairs, that carry RAM between two helpers.
    pub connections: u16,
    /// Multifd channels through which QEMU should send RAM to the helper; 0 for none.
    pub channels: u16,
    /// Bytes of guest RAM that may be pinned at a time; `None` for all.
    pub pin_limit: Option<u64>,
    /// Size in bytes of the chunks that stock QEMU registers: parameter `x-rdma-chunk-size`.
    pub chunk_size: u64,
    /// CPUs that the worker may use; empty for all.
    pub cpus: Vec<u16>,
    /// What carries RAM.
    pub fabric: FabricKind,
}

impl Options {
    /// Whether keys for whole blocks arrive with the block list. Else each range needs a request.
    pub fn whole_keys(&self) -> bool {
        self.pin_all || self.fabric == FabricKind::Tcp
    }

    /// Extra time for the handshake, because both sides first register `bytes` of memory. Even an
    /// emulated machine achieves 64 MiB per second.
    pub fn pinning(&self, bytes: u64) -> Duration {
        let pins = self.pin_all && self.fabric.pins();
        Duration::from_secs(if pins { bytes >> 26 } else { 0 })
    }
}

/// Relay to worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Order {
    /// Prepare for a migration over this fabric. One of the following orders comes next.
    Prepare {
        /// What will carry RAM.
        fabric: FabricKind,
    },
    /// Act as the source's worker. Descriptors: the blocks' files.
    Outgoing {
        /// The destination's helper.
        address: Address,
        /// QEMU's QMP socket, for a worker that lost its relay; `None` if only the relay has one.
        qemu_qmp: Option<QmpSocket>,
        /// QEMU's RAM blocks.
        blocks: Vec<Block>,
        /// Options.
        options: Options,
    },
    /// Source, after [`Report::Agreed`]: read QEMU's stream. Descriptors: the worker's end of its
    /// socket, then those of QEMU's multifd channels, if any.
    StartStream,
    /// Source: how a worker that lost its relay restores QEMU's settings. Sent before any setting
    /// is changed, and whenever the commands change.
    SetRestore {
        /// The commands; empty when the settings are restored.
        commands: Vec<Command>,
    },
    /// Source: whether the guest runs, not counting the switchover. A guest that does is resumed
    /// after a failure that QEMU took for a success.
    SetGuestRunning {
        /// Whether it runs.
        runs: bool,
    },
    /// Source: the relay can't reach QEMU any more. The worker finishes the work, as if the relay
    /// itself were gone.
    Detach {
        /// The reason, for the peer.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
    },
    /// Source: the relay has finished its work after QEMU's migration. A worker that has taken
    /// QEMU's stream waits for this.
    Finish,
    /// Source: limit the rate of RAM writes.
    SetRateLimit {
        /// Bytes per second; `None` for no limit.
        rate: Option<u64>,
    },
    /// Act as the destination's worker. Descriptor: the worker's end of QEMU's migration socket.
    Incoming {
        /// Where to listen.
        address: Address,
        /// Options.
        options: Options,
    },
    /// Destination, after [`Report::SourceConnected`]. Descriptors: the blocks' files.
    Blocks {
        /// The number of that report.
        number: u64,
        /// QEMU's RAM blocks.
        blocks: Vec<Block>,
    },
    /// Instead of `Blocks`, if the blocks can't be determined.
    NoBlocks {
        /// The number of that report.
        number: u64,
        /// One sentence, told to the source.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
    },
    /// Destination: its QEMU reported `completed` over QMP.
    QemuCompleted,
    /// Destination: its QEMU failed to load the stream, or is gone.
    QemuFailed {
        /// What is known, in one sentence.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
        /// True only if the guest certainly never ran there.
        guest_never_ran: bool,
    },
    /// Fail the migration: release everything, tell the peer, exit. If the guest may run at the
    /// destination, its QEMU decides, and nothing keeps the guest from it.
    Abort {
        /// One sentence, told to the peer.
        #[serde(deserialize_with = "text::deserialize")]
        reason: String,
    },
    /// Source: the same, but a destination that lacks part of the guest gets no more of it.
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
    /// Guest RAM that is currently pinned on this side.
    pub pinned: u64,
    /// Milliseconds spent on pinning and releasing.
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
    /// Multifd channels to use; 0 for none.
    pub channels: u16,
    /// Blocks that it may announce without content (`qemu-patches/`).
    pub announceable: usize,
    /// Whether the destination forwards a return path.
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
    SourceConnected {
        /// Identifies the answer.
        number: u64,
    },
    /// Outgoing: connected, and block lists agree. Incoming: a source connected, and they agree.
    /// The source's relay starts QEMU's migration on this.
    Agreed(Agreed),
    /// Sent about four times a second as a sign of life, and whenever the state changes.
    Progress(Progress),
    /// Outgoing: sent before the first byte after the last RAM section leaves. From here on the
    /// guest may run at the destination.
    PastRam,
    /// Outgoing: the guest's state before the switchover, as QEMU tells the destination. A guest
    /// that did not run is not resumed when QEMU takes a failure for a success.
    GuestBefore {
        /// As in `query-status`.
        status: String,
    },
    /// Incoming: QEMU has every byte of the stream, all RAM has arrived and remote access is
    /// revoked. The relay watches QEMU for `completed` and answers with [`Order::QemuCompleted`] or
    /// [`Order::QemuFailed`].
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
        /// Whether the QEMU on this side ended the migration, and may give the reason.
        by_qemu: bool,
        /// Figures at the end.
        progress: Progress,
    },
}
