//! The interface between migration logic and transport.
//!
//! A fabric offers the operations of a reliable connected queue pair: send and receive messages,
//! register memory, and write from a local range to a remote address under a key, with completions.
//! It does not interpret messages.
//!
//! Several threads share a connection: any may send through its [`SendHalf`], one owns its
//! [`RecvHalf`], and a [`Handle`] closes it from any thread.

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

/// A transport error.
#[derive(Debug, thiserror::Error)]
pub enum FabricError {
    /// A host name cannot be resolved.
    #[error("Cannot resolve '{host}': {source}; check the name or give an address")]
    Resolve {
        /// The host name.
        host: String,
        /// Error from the resolver.
        source: io::Error,
    },
    /// The connection cannot be established.
    #[error(
        "Cannot connect to {address}: {source}; is 'migrate-incoming' of the destination's helper \
         done, and the port open between the hosts?"
    )]
    Connect {
        /// The peer's address.
        address: Address,
        /// errno.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("Cannot listen on {address}: {source}; choose an address and a port of this host")]
    Listen {
        /// The requested address.
        address: Address,
        /// errno.
        source: io::Error,
    },
    /// RDMA is unavailable on this host.
    #[error("This host can't do RDMA: {0}")]
    Unavailable(String),
    /// No route to the address.
    #[error(
        "No route leads to {address}: {source}; check the address, the route to it \
         ('ip route get'), and that its host is up"
    )]
    NoRoute {
        /// The peer's address.
        address: Address,
        /// errno.
        source: io::Error,
    },
    /// Memory cannot be registered with the device.
    #[error("Cannot register {mib} MiB of {what}: {source}; {}", pin_hint(source))]
    Pin {
        /// The RAM block, or another purpose.
        what: String,
        /// Size in MiB.
        mib: u64,
        /// errno.
        source: io::Error,
    },
    /// This process cannot open the device.
    #[error(
        "RDMA device {device}: it can't be opened ({source}); load the module ib_uverbs, and let \
         the helper's user read and write /dev/infiniband/uverbs*"
    )]
    Open {
        /// Name of the device.
        device: String,
        /// errno.
        source: io::Error,
    },
    /// The device refuses to create an object.
    #[error(
        "The RDMA device can't make {what}: {source}; 'qemu-rdma-helper check' says what it lacks"
    )]
    Refused {
        /// The object.
        what: String,
        /// errno.
        source: io::Error,
    },
    /// The peer's device does not acknowledge requests.
    #[error("The peer's host does not answer for {} s; is it alive and the link up?", .0.as_secs())]
    Unreachable(Duration),
    /// The device reports a failed request.
    #[error(
        "The RDMA device failed a request (status {0} of ibv_poll_cq(3)); see the kernel's log"
    )]
    Device(u32),
    /// A system call failed.
    #[error("{call} failed: {source}")]
    Host {
        /// Name of the call.
        call: &'static str,
        /// errno.
        source: io::Error,
    },
    /// A thread of this process ended unexpectedly.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The peer closed the connection.
    #[error("The peer closed the connection; its helper's log says why")]
    Closed,
    /// The peer made no progress although a transfer was due.
    #[error("The peer made no progress for {} s; is its host alive and the link up?", .0.as_secs())]
    Stalled(Duration),
    /// Received bytes are not a valid frame.
    #[error("Malformed frame from the peer: {0}; is it a helper of this version?")]
    Malformed(String),
    /// A one-sided operation outside the registered memory.
    #[error("The peer wrote where it may not: {0}")]
    RemoteAccess(String),
    /// Guest memory could not be read or written.
    #[error("RAM block '{block}': {source}")]
    Memory {
        /// The RAM block.
        block: String,
        /// errno.
        source: io::Error,
    },
}

impl FabricError {
    /// Whether the error concerns this host only, so that the peer can still be told.
    pub fn leaves_connection(&self) -> bool {
        matches!(self, Self::Memory { .. } | Self::Pin { .. } | Self::Lost(_))
    }
}

/// Hint for a failed registration.
fn pin_hint(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::OutOfMemory {
        "raise the memlock limit ('ulimit -l unlimited', LimitMEMLOCK=infinity in the service, \
         <hard_limit> in libvirt's domain)"
    } else {
        "'qemu-rdma-helper check' says what the device allows"
    }
}

/// Names of the host's RDMA devices. They come from sysfs, which needs no library.
pub fn devices() -> Vec<String> {
    let entries = std::fs::read_dir("/sys/class/infiniband").into_iter().flatten();
    let mut names: Vec<_> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// The default fabric: RDMA if this host and this build support it, else TCP.
pub fn auto() -> FabricKind {
    if cfg!(feature = "verbs") && !devices().is_empty() {
        FabricKind::Verbs
    } else {
        FabricKind::Tcp
    }
}

/// Resolve a host and port.
fn resolve(address: &Address) -> Result<Vec<SocketAddr>> {
    let failed = |source| FabricError::Resolve { host: address.host.clone(), source };
    let found: Vec<_> = if address.host.is_empty() {
        // QEMU's "any address". A host without IPv6 has only the second.
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

/// What a peer needs to write into a region: the address of its first byte, and the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RemoteKey {
    /// Address of the region's first byte, as defined by its owner.
    pub address: u64,
    /// 0 means "not registered yet" (specification, REGISTER_RESULT).
    pub rkey: u32,
}

/// A transport to a peer.
pub trait Fabric: Send + Sync {
    /// Name shown to users and programs.
    fn name(&self) -> &'static str;

    /// Listen on `address`; port 0 selects a free port.
    ///
    /// # Errors
    /// If the address can't be resolved or bound.
    fn listen(&self, address: &Address) -> Result<Box<dyn Listener>>;

    /// Connect and exchange private data within `timeout`. Return the peer's private data.
    ///
    /// # Errors
    /// If the peer can't be reached or does not answer as a helper or QEMU.
    fn connect(
        &self,
        address: &Address,
        private_data: &[u8],
        timeout: Duration,
    ) -> Result<(Vec<u8>, Box<dyn Connection>)>;
}

/// Accepts connection requests.
pub trait Listener: Send {
    /// The bound address.
    fn address(&self) -> &Address;

    /// Wait for the next valid connection request. Others are rejected and logged.
    ///
    /// # Errors
    /// If the listening socket fails, or [`Handle::close`] was called.
    fn accept(&mut self) -> Result<Box<dyn Request>>;

    /// A handle that ends a blocked [`Listener::accept`].
    fn handle(&self) -> Handle;
}

/// A connection request. Dropping it rejects the peer.
pub trait Request: Send {
    /// The peer's private data.
    fn private_data(&self) -> &[u8];

    /// The peer's address.
    fn peer(&self) -> SocketAddr;

    /// A handle that closes the request: a blocked [`Request::accept`] returns an error.
    fn handle(&self) -> Handle;

    /// Accept the peer.
    ///
    /// # Errors
    /// If the peer has disconnected.
    fn accept(self: Box<Self>, private_data: &[u8]) -> Result<Box<dyn Connection>>;
}

/// An established connection.
pub trait Connection: Send {
    /// Split the connection into its two halves.
    fn split(self: Box<Self>) -> (Arc<dyn SendHalf>, Box<dyn RecvHalf>);

    /// A handle that closes the connection from any thread.
    fn handle(&self) -> Handle;
}

/// Amount of pinned memory, and the time spent on pinning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pinned {
    /// Bytes currently pinned.
    pub bytes: u64,
    /// Total time of registrations and deregistrations so far.
    pub time: Duration,
}

/// The sending half; any number of threads may use it at once.
///
/// Messages arrive in order. So do writes of the same kind to the same chunk of a region
/// ([`CHUNK`](crate::ram::CHUNK)), if the device [orders them](SendHalf::orders_writes); no write
/// crosses a chunk boundary. Otherwise only [`SendHalf::drain`] and
/// [`SendHalf::send_after_writes`] establish an order.
pub trait SendHalf: Send + Sync {
    /// Send one control message; header and payload together have at most [`MESSAGE_MAX`] bytes. It
    /// may overtake writes posted before it, and be overtaken by later ones.
    ///
    /// # Errors
    /// If the connection is lost.
    fn send(&self, header: &[u8], payload: &[u8]) -> Result<()>;

    /// Send a control message that proves completion of writes: the peer's
    /// [`RecvHalf::await_writes`] returns once all writes that [`SendHalf::drain`] has waited for
    /// have landed. Over RDMA, it also covers writes posted but not drained; over tcp only `drain`
    /// gives the proof. A caller that relies on the proof must drain first, while no other thread
    /// writes. A message sent while other threads write, such as the end of a section beside
    /// multifd channels, proves nothing about their writes.
    ///
    /// # Errors
    /// If the connection is lost.
    fn send_after_writes(&self, header: &[u8], payload: &[u8]) -> Result<()>;

    /// Whether an older write never overwrites a newer one to the same place. If false, a page may
    /// only be written again after the peer has confirmed the older write.
    fn orders_writes(&self) -> bool;

    /// Write `length` bytes from `offset` of `region` to `offset` of the region that `remote`
    /// names. Block while too many bytes are in flight.
    ///
    /// # Errors
    /// If the connection is lost.
    fn write(
        &self,
        region: &Arc<Region>,
        offset: u64,
        length: u64,
        remote: RemoteKey,
    ) -> Result<()>;

    /// Write `bytes`, at most 1 MiB, to `offset` of the region that `remote` names. The caller may
    /// reuse the buffer on return. Block while too many bytes are in flight.
    ///
    /// # Errors
    /// If the connection is lost.
    fn write_bytes(&self, bytes: &[u8], offset: u64, remote: RemoteKey) -> Result<()>;

    /// Register `range` of `region` as a source of writes, if the fabric pins memory. Required
    /// before [`SendHalf::write`]. No write crosses the ends of a range, and ranges do not overlap.
    ///
    /// # Errors
    /// If the device can't register it.
    fn pin(&self, region: &Arc<Region>, range: Range<u64>) -> Result<()>;

    /// Deregister a range. No write from it may be in flight.
    fn unpin(&self, region: &Arc<Region>, range: Range<u64>);

    /// Guest memory pinned on this side, for sending and for receiving.
    fn pinned(&self) -> Pinned;

    /// Wait until all writes posted before have completed locally: their memory may be released.
    /// Only the peer knows whether they have landed, see [`SendHalf::send_after_writes`]. What
    /// that method sent besides the message has completed too: the peer may end access to its
    /// memory.
    ///
    /// # Errors
    /// If the connection is lost.
    fn drain(&self) -> Result<()>;

    /// From now on wait for a peer that receives nothing for as long as the connection exists. A
    /// no-op for RDMA, whose devices acknowledge data however busy the peer is.
    fn be_patient(&self) {}

    /// Announce that nothing more will be sent, and wait briefly for sent data to arrive.
    fn finish(&self);

    /// Number of connections, or queue pairs, that carry RAM.
    fn connections(&self) -> u32;

    /// Bytes of writes posted so far.
    fn posted(&self) -> u64;

    /// Bytes of writes that have landed, as far as this side can tell: writes that a device reports
    /// as complete may still be in flight.
    fn landed(&self) -> u64;
}

/// The receiving half. Over tcp, [`RecvHalf::receive`] also processes the peer's writes of the
/// first connection.
pub trait RecvHalf: Send {
    /// Receive the next control message; header and payload together have at most [`MESSAGE_MAX`]
    /// bytes.
    ///
    /// # Errors
    /// [`FabricError::Closed`] if the peer closed the connection. Any error ends the connection.
    fn receive(&mut self, message: &mut Vec<u8>) -> Result<()>;

    /// Wait until the writes before the last message have landed. Must be called exactly once for
    /// each message sent by [`SendHalf::send_after_writes`], after it is received.
    ///
    /// # Errors
    /// As for [`RecvHalf::receive`].
    fn await_writes(&mut self) -> Result<()>;

    /// Bytes of the peer's writes that have landed here; 0 if a device writes without the CPU's
    /// knowledge.
    fn landed(&self) -> u64;

    /// Call `may_land` before the first write that this host's CPUs carry out. If it returns false,
    /// no write ever lands and the connection ends. Must be called before any region is announced.
    fn guard(&mut self, may_land: Guard);

    /// The address of the region's first byte, and the key to the whole region if the fabric need
    /// not pin it. Otherwise the key is 0 until [`RecvHalf::register`].
    ///
    /// # Errors
    /// If it can't be mapped.
    fn announce(&mut self, region: &Arc<Region>) -> Result<RemoteKey>;

    /// Allow the peer to write into `range` of `region`. The returned address is still that of the
    /// region's first byte.
    ///
    /// # Errors
    /// If the device can't register it.
    fn register(&mut self, region: &Arc<Region>, range: Range<u64>) -> Result<RemoteKey>;

    /// Revoke the peer's access to a range, exactly as it was registered.
    fn unregister(&mut self, region: &Arc<Region>, range: Range<u64>);

    /// Revoke the peer's access to all registered regions (ordering rule 5). After it returns, no
    /// write can land.
    fn revoke(&mut self);
}

/// Whether writes may land. May block.
pub type Guard = Arc<dyn Fn() -> bool + Send + Sync>;

/// Closes a connection or a listener from any thread: blocked calls on it return an error.
#[derive(Clone)]
pub struct Handle(Arc<dyn Fn() + Send + Sync>);

impl Handle {
    /// A handle that calls `close`.
    pub fn new(close: impl Fn() + Send + Sync + 'static) -> Self {
        Self(Arc::new(close))
    }

    /// Close it. Does nothing if already closed.
    pub fn close(&self) {
        (self.0)();
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Handle")
    }
}
