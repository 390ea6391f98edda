//! The seam between migration logic and transport.
//!
//! A fabric has the operations of a reliable connected queue pair: messages are sent and received,
//! memory is registered, and writes go from a local range to a remote address under a key, with
//! completions. What the messages mean is not its business.
//!
//! A connection is used by several threads: any may send through its [`SendHalf`], one owns its
//! [`RecvHalf`], and a [`Handle`] ends it from anywhere.

mod connection_group;
pub mod pending;
mod preflight;
pub mod tcp;
#[cfg(feature = "verbs")]
pub mod verbs;

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs as _},
    ops::Range,
    sync::Arc,
    time::Duration,
};

pub use preflight::{Finding, Guest, Question, Severity};

use crate::{address::Address, control::FabricKind, memory::Region, threads::Lost};

/// Longest control message, header included, in bytes (specification: control buffers of 512 KiB).
pub const MESSAGE_MAX: usize = 512 << 10;

/// Longest private data of a connection request in bytes (RDMA_PS_TCP, rdma_connect(3)).
pub const PRIVATE_DATA_MAX: usize = 56;

/// A failure of the transport.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// A host name has no address.
    #[error("Cannot resolve '{host}': {source}; check the name or give an address")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// No connection.
    #[error(
        "Cannot connect to {address}: {source}; is 'migrate-incoming' of the destination's helper \
         done, and the port open between the hosts?"
    )]
    Connect {
        /// Where to.
        address: Address,
        /// errno.
        source: io::Error,
    },
    /// Can't listen.
    #[error("Cannot listen on {address}: {source}; choose an address and a port of this host")]
    Listen {
        /// Where.
        address: Address,
        /// errno.
        source: io::Error,
    },
    /// RDMA can't be used.
    #[error("This host can't do RDMA: {0}")]
    Unavailable(String),
    /// The network leads nowhere.
    #[error(
        "No route leads to {address}: {source}; check the address, the route to it \
         ('ip route get'), and that its host is up"
    )]
    NoRoute {
        /// Where to.
        address: Address,
        /// errno.
        source: io::Error,
    },
    /// Memory can't be registered with the device.
    #[error("Cannot register {mib} MiB of {what}: {source}; {}", pin_hint(source))]
    Pin {
        /// The block, or another use.
        what: String,
        /// How much, in MiB.
        mib: u64,
        /// errno.
        source: io::Error,
    },
    /// A device can't be used by this process.
    #[error(
        "RDMA device {device}: it can't be opened ({source}); load the module ib_uverbs, and let \
         the helper's user read and write /dev/infiniband/uverbs*"
    )]
    Open {
        /// The device.
        device: String,
        /// errno.
        source: io::Error,
    },
    /// The device does not make what is needed.
    #[error(
        "The RDMA device can't make {what}: {source}; 'qemu-rdma-helper check' says what it lacks"
    )]
    Refused {
        /// What it is.
        what: String,
        /// errno.
        source: io::Error,
    },
    /// The peer's device acknowledges nothing.
    #[error("The peer's host does not answer for {} s; is it alive and the link up?", .0.as_secs())]
    Unreachable(Duration),
    /// The device says that a request failed.
    #[error(
        "The RDMA device failed a request (status {0} of ibv_poll_cq(3)); see the kernel's log"
    )]
    Device(u32),
    /// A system call failed.
    #[error("{call} failed: {source}")]
    Host {
        /// What was done.
        call: &'static str,
        /// errno.
        source: io::Error,
    },
    /// A thread of ours has ended before its time.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The peer closed the connection.
    #[error("The peer closed the connection; its helper's log says why")]
    Closed,
    /// The peer takes or sends nothing although something is due.
    #[error("The peer made no progress for {} s; is its host alive and the link up?", .0.as_secs())]
    Stalled(Duration),
    /// Bytes that are no frame.
    #[error("Malformed frame from the peer: {0}; is it a helper of this version?")]
    Malformed(String),
    /// A one-sided operation outside what was registered.
    #[error("The peer wrote where it may not: {0}")]
    RemoteAccess(String),
    /// Guest memory could not be read or written.
    #[error("RAM block '{block}': {source}")]
    Memory {
        /// The block.
        block: String,
        /// errno.
        source: io::Error,
    },
}

impl FabricError {
    /// It is about memory of this host: the peer can still be told.
    pub fn leaves_connection(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::Pin { .. } | Self::Lost(_))
    }
}

/// What helps when memory can't be registered.
fn pin_hint(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::OutOfMemory {
        "raise the memlock limit ('ulimit -l unlimited', LimitMEMLOCK=infinity in the service, \
         <hard_limit> in libvirt's domain)"
    } else {
        "'qemu-rdma-helper check' says what the device allows"
    }
}

/// Names of the host's RDMA devices, from sysfs: no library is needed to see them.
pub fn devices() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten();
    let mut names: Vec<_> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// What carries RAM by default: RDMA where this host and this build can do it, else TCP.
pub fn auto() -> FabricKind {
    if cfg!(feature = "verbs") && !devices().is_empty() {
        FabricKind::Verbs
    } else {
        FabricKind::Tcp
    }
}

/// The addresses of a host and port.
fn resolve(address: &Address) -> Result<Vec<SocketAddr>> {
    let failed = |source| FabricError::Resolve { host: address.host.clone(), source };
    let found: Vec<_> = if address.host.is_empty() {
        // QEMU's "any address"; a host without IPv6 has only the second.
        let any = [IpAddr::from(Ipv6Addr::UNSPECIFIED), IpAddr::from(Ipv4Addr::UNSPECIFIED)];
        any.map(|ip| SocketAddr::new(ip, address.port)).to_vec()
    } else {
        (address.host.as_str(), address.port).to_socket_addrs().map_err(failed)?.collect()
    };
    if found.is_empty() {
        return Err(failed(io::Error::new(io::ErrorKind::NotFound, "no address")));
    }
    Ok(found)
}

/// Result of a fabric operation.
pub type Result<T> = std::result::Result<T, FabricError>;

/// What a peer must know to write into a region: the address of its first byte, and the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteKey {
    /// Address of the region's first byte in the owner's terms.
    pub address: u64,
    /// 0 means "not registered yet" (specification, REGISTER_RESULT).
    pub rkey: u32,
}

/// A way to reach a peer.
pub trait Fabric: Send + Sync {
    /// Its name in messages to people and programs.
    fn name(&self) -> &'static str;

    /// Listen on `address`; port 0 takes a free one.
    ///
    /// # Errors
    /// When the address can't be resolved or bound.
    fn listen(&self, address: &Address) -> Result<Box<dyn Listener>>;

    /// Connect and exchange private data within `timeout`; returns the peer's.
    ///
    /// # Errors
    /// When the peer can't be reached or does not answer as one.
    fn connect(
        &self,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(Vec<u8>, Box<dyn Connection>)>;
}

/// Waits for peers.
pub trait Listener: Send {
    /// The bound address.
    fn address(&self) -> &Address;

    /// The next peer that presented itself properly. Others are turned away, with a log line.
    ///
    /// # Errors
    /// When the listening socket fails, or was closed by [`Handle::close`].
    fn accept(&mut self) -> Result<Box<dyn Request>>;

    /// Ends a blocked [`Listener::accept`].
    fn handle(&self) -> Handle;
}

/// A peer that asks to connect. Dropping it turns the peer away.
pub trait Request: Send {
    /// Its private data.
    fn private_data(&self) -> &[u8];

    /// Who it is.
    fn peer(&self) -> SocketAddr;

    /// Ends it: a blocked [`Request::accept`] returns an error.
    fn handle(&self) -> Handle;

    /// Let it in.
    ///
    /// # Errors
    /// When it went away.
    fn accept(self: Box<Self>, private_data: &[u8]) -> Result<Box<dyn Connection>>;
}

/// An established connection.
pub trait Connection: Send {
    /// Take the two halves.
    fn split(self: Box<Self>) -> (Arc<dyn SendHalf>, Box<dyn RecvHalf>);

    /// Ends the connection from any thread.
    fn handle(&self) -> Handle;
}

/// Pinned memory, and what it has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pinned {
    /// Bytes that are pinned now.
    pub bytes: u64,
    /// Time that registering and releasing have taken so far.
    pub time: Duration,
}

/// The half that sends, from any number of threads at once.
///
/// Messages arrive in their order. So do writes of one kind to one chunk of a region
/// ([`CHUNK`](crate::ram::CHUNK)), which no write leaves, if the device [keeps
/// it](SendHalf::orders_writes). Between all else order holds only where [`SendHalf::drain`] and
/// [`SendHalf::send_behind_writes`] make it.
pub trait SendHalf: Send + Sync {
    /// Send one control message, header and payload, at most [`MESSAGE_MAX`] bytes together.
    /// It may overtake writes that were posted before, and be overtaken by later ones.
    ///
    /// # Errors
    /// When the connection is lost.
    fn send(&self, header: &[u8], payload: &[u8]) -> Result<()>;

    /// Send one that proves something of writes: the peer's [`RecvHalf::await_writes`] returns when those
    /// have landed that [`SendHalf::drain`] has waited for. Where a device writes, also when those have that
    /// were posted and not waited for; over tcp the proof is `drain`'s alone. So whoever relies on it
    /// drains first, while nobody else writes. A message that is sent so beside others' writes, as the end
    /// of a section is beside channels, proves nothing of them.
    ///
    /// # Errors
    /// When the connection is lost.
    fn send_behind_writes(&self, header: &[u8], payload: &[u8]) -> Result<()>;

    /// An older write never lands on top of a newer one to the same place. Else a page may be
    /// written again only when the peer has said that the older write has landed.
    fn orders_writes(&self) -> bool;

    /// Write `length` bytes from `offset` of `region` to `offset` of the region that `remote`
    /// names. Blocks while too much is in flight.
    ///
    /// # Errors
    /// When the connection is lost.
    fn write(
        &self,
        region: &Arc<Region>,
        offset: u64,
        length: u64,
        remote: RemoteKey,
    ) -> Result<()>;

    /// Write `bytes`, 1 MiB at the most, to `offset` of the region that `remote` names. They may
    /// change when this has returned. Blocks while too much is in flight.
    ///
    /// # Errors
    /// When the connection is lost.
    fn write_bytes(&self, bytes: &[u8], offset: u64, remote: RemoteKey) -> Result<()>;

    /// Get `range` of `region` ready to be written from, where the fabric pins memory: only then
    /// may [`SendHalf::write`] name bytes of it. No write crosses the ends of a range, and ranges do
    /// not overlap.
    ///
    /// # Errors
    /// When the device can't register it.
    fn pin(&self, region: &Arc<Region>, range: Range<u64>) -> Result<()>;

    /// Release a range; no write from it is on its way.
    fn unpin(&self, region: &Arc<Region>, range: Range<u64>);

    /// Guest memory that is pinned on this side, for sending and for receiving.
    fn pinned(&self) -> Pinned;

    /// Wait until nothing is to be done here for any write that was posted before: its memory may
    /// be released. Whether it has landed only the peer knows, see [`SendHalf::send_behind_writes`]. Nor does
    /// what that sent beside a message need the peer any more: it may end access to its memory.
    ///
    /// # Errors
    /// When the connection is lost.
    fn drain(&self) -> Result<()>;

    /// From here on a peer that takes nothing is waited for as long as the connection stands. There is
    /// nothing to do where a device acknowledges what comes, however busy the peer is.
    fn be_patient(&self) {}

    /// Nothing more will be sent: let what was sent arrive, as far as that takes a moment only.
    fn finish(&self);

    /// Connections, or queue pairs, that carry RAM.
    fn connections(&self) -> u32;

    /// Bytes of writes posted so far.
    fn posted(&self) -> u64;

    /// Bytes of writes that have landed, as far as this side can tell: what a device has completed
    /// may be on its way still.
    fn landed(&self) -> u64;
}

/// The half that receives. Over tcp the peer's writes of the first connection land while
/// [`RecvHalf::receive`] waits.
pub trait RecvHalf: Send {
    /// The next control message, header and payload, at most [`MESSAGE_MAX`] bytes.
    ///
    /// # Errors
    /// [`FabricError::Closed`] at the peer's orderly end; any error ends the connection.
    fn receive(&mut self, message: &mut Vec<u8>) -> Result<()>;

    /// The message that was received last was sent by [`SendHalf::send_behind_writes`]: wait until the
    /// writes before it have landed. To be called for each such message.
    ///
    /// # Errors
    /// As for [`RecvHalf::receive`].
    fn await_writes(&mut self) -> Result<()>;

    /// Bytes of the peer's writes that have landed here; 0 where a device does it unseen.
    fn landed(&self) -> u64;

    /// Ask `may_land` before the first write lands that processors of this host carry out; if it says
    /// no, none ever does, and the connection ends. Called before any region is named.
    fn guard(&mut self, may_land: Guard);

    /// Name `region` to the peer: where its first byte is, and the key to all of it where the
    /// fabric need not pin it. Else the key is 0 until [`RecvHalf::register`].
    ///
    /// # Errors
    /// When it can't be mapped.
    fn announce(&mut self, region: &Arc<Region>) -> Result<RemoteKey>;

    /// Allow the peer to write into `range` of `region`. The address is still that of the region's
    /// first byte.
    ///
    /// # Errors
    /// When the device can't register it.
    fn register(&mut self, region: &Arc<Region>, range: Range<u64>) -> Result<RemoteKey>;

    /// Withdraw the peer's access to a range that was registered, as it was.
    fn unregister(&mut self, region: &Arc<Region>, range: Range<u64>);

    /// Withdraw the peer's access to every registered region (ordering rule 5). When it returns,
    /// no write can land any more.
    fn revoke(&mut self);
}

/// Whether writes may land. It may take as long as it has to.
pub type Guard = Arc<dyn Fn() -> bool + Send + Sync>;

/// Ends a connection or a listener from any thread: whoever waits on it gets an error.
#[derive(Clone)]
pub struct Handle(Arc<dyn Fn() + Send + Sync>);

impl Handle {
    /// A handle that calls `close`.
    pub fn new(close: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(close))
    }

    /// End it. Harmless when it has ended.
    pub fn close(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle")
    }
}
