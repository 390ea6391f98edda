//! Who is confined, and which capabilities each keeps.

use rustix::thread::CapabilitySet;

/// What all keep, if it was there: `IPC_LOCK` lets a worker pin guest memory beyond its limit, and
/// `SYS_RESOURCE` have pipes beyond its user's.
const KEPT: CapabilitySet = CapabilitySet::IPC_LOCK.union(CapabilitySet::SYS_RESOURCE);

/// Who is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The relay beside a QEMU that it found running.
    Attached,
    /// The relay of a QEMU that was started behind it.
    Started,
    /// The worker of a source, which starts no process.
    Source,
    /// The worker of a destination; neither does it.
    Destination,
}

impl Role {
    /// Capabilities that are kept, if they were there. What leads to other processes and their files the
    /// relay has alone: a worker reads what comes from the network, and gets descriptors.
    pub(super) fn capabilities(self) -> CapabilitySet {
        match self {
            // The memory of a QEMU that is another user's, or has more capabilities than we.
            Self::Started => KEPT | CapabilitySet::SYS_PTRACE,
            // QEMU's socket and files may be another user's.
            Self::Attached => {
                let files = CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
                KEPT | CapabilitySet::SYS_PTRACE | files | CapabilitySet::NET_BIND_SERVICE
            }
            // Without its relay it has to reach QEMU's socket itself.
            Self::Source => KEPT | CapabilitySet::DAC_OVERRIDE,
            // At any port.
            Self::Destination => KEPT | CapabilitySet::NET_BIND_SERVICE,
        }
    }

    /// What a process that is started from here may have without being root.
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
