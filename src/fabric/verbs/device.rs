//! What can be relied on with a device, which its transport decides.

use std::ptr::NonNull;

use rdma_sys::{ibv_context, ibv_transport_type};

/// What carries its packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// InfiniBand's, also over Ethernet (RoCE).
    InfiniBand,
    /// RDMA over TCP.
    Iwarp,
}

impl Transport {
    /// Of an open device.
    pub(super) fn of(context: NonNull<ibv_context>) -> Self {
        // SAFETY: the device is open, and so its record is there.
        Self::from(unsafe { (*context.as_ref().device).transport_type })
    }

    /// The peer's device has acknowledged what completes. Over iWARP a request is complete when the
    /// network will deliver its bytes (RFC 5041, 5.4).
    pub(super) fn acknowledges(self) -> bool {
        self == Self::InfiniBand
    }

    /// A completion lets go of the memory of unsignalled requests before it too. siw sends those from
    /// where they are, which TCP may do later (`siw_qp_prepare_tx` of Linux 6.12). It matters where
    /// memory gets another content for another place: what the guest writes is sent again.
    pub(super) fn releases_unsignalled(self) -> bool {
        self == Self::InfiniBand
    }

    /// A queue pair that is in use can be told to let nobody write through it. iWARP's access rights
    /// are those of memory: siw takes the word and goes on (`siw_qp_modify` of Linux 6.12).
    pub(super) fn guards_queue_pairs(self) -> bool {
        self == Self::InfiniBand
    }

    /// Writes of one queue pair take effect in their order (ibv_reg_mr(3) of rdma-core 56, at
    /// IBV_ACCESS_RELAXED_ORDERING). Over iWARP the bytes of a later one may be placed first (RFC 5040,
    /// 5.5).
    pub(super) fn orders_writes(self) -> bool {
        self == Self::InfiniBand
    }
}

impl From<ibv_transport_type::Type> for Transport {
    fn from(transport: ibv_transport_type::Type) -> Self {
        match transport {
            ibv_transport_type::IBV_TRANSPORT_IWARP => Self::Iwarp,
            _ => Self::InfiniBand,
        }
    }
}
