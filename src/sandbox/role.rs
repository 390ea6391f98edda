//! The confined roles, and the capabilities that each keeps.

use rustix::thread::CapabilitySet;

/// What all roles keep, if present: `IPC_LOCK` lets a worker pin guest memory beyond its limit, and
/// `SYS_RESOURCE` lets it have pipes beyond its user's limit.
const KEPT: CapabilitySet = CapabilitySet::IPC_LOCK.union(CapabilitySet::SYS_RESOURCE);

/// A confined process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The relay of a QEMU that was already running.
    Attached,
    /// The relay of a QEMU that starts after it.
    Started,
    /// The worker of a source. It starts no processes.
    Source,
    /// The worker of a destination. It starts no processes either.
    Destination,
}

impl Role {
    /// Capabilities that are kept, if present. Only the relay has those that give access to other
    /// processes and their files: a worker reads data from the network, and is given descriptors.
    pub(super) fn capabilities(self) -> CapabilitySet {
        match self {
            // For the memory of a QEMU of another user, or with more capabilities than the helper.
            Self::Started => KEPT | CapabilitySet::SYS_PTRACE,
            // QEMU's socket and files may be another user's.
            Self::Attached => {
                let files = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
                KEPT | CapabilitySet::SYS_PTRACE | files | CapabilitySet::NET_BIND_SERVICE
            }
            // Without its relay it has to connect to QEMU's socket itself.
            Self::Source => KEPT | CapabilitySet::DAC_OVERRIDE,
            // To listen on any port.
            Self::Destination => KEPT | CapabilitySet::NET_BIND_SERVICE,
        }
    }

    /// Capabilities that a child process may have without being root.
    pub(super) fn inherited(self) -> CapabilitySet {
        match self {
            Self::Attached | Self::Started => {
                self.capabilities()
                    & (Self::Source.capabilities() | Self::Destination.capabilities())
            }
            Self::Source | Self::Destination => CapabilitySet::empty(),
        }
    }
}
