//! Guarantees of a device, which depend on its transport.

use std::ptr::NonNull;

use rdma_sys::{ibv_context, ibv_transport_type};

/// Transport of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// InfiniBand's, also over Ethernet (RoCE).
    InfiniBand,
    /// RDMA over TCP.
    Iwarp,
}

impl Transport {
    /// The transport of an open device.
    pub(super) fn of(context: NonNull<ibv_context>) -> Self {
        // SAFETY: the device is open, so its record exists.
        Self::from(unsafe { (*context.as_ref().device).transport_type })
    }

    /// Whether a completion means that the peer's device has acknowledged the request. Over iWARP
    /// it only means that the network will deliver the bytes (RFC 5041, 5.4).
    pub(super) fn acknowledges(self) -> bool {
        self == Self::InfiniBand
    }

    /// Whether a completion also releases the memory of earlier unsignalled requests. siw sends
    /// that memory in place, which TCP may do later (`siw_qp_prepare_tx` of Linux 6.12). It matters
    /// for memory that is reused for another address; guest memory that changes is sent again.
    pub(super) fn releases_unsignalled(self) -> bool {
        self == Self::InfiniBand
    }

    /// Whether remote writes can be denied on a connected queue pair. iWARP has access rights for
    /// memory only: siw accepts the change and ignores it (`siw_qp_modify` of Linux 6.12).
    pub(super) fn guards_queue_pairs(self) -> bool {
        self == Self::InfiniBand
    }

    /// Whether writes of one queue pair take effect in order (ibv_reg_mr(3) of rdma-core 56, at
    /// IBV_ACCESS_RELAXED_ORDERING). Over iWARP the bytes of a later one may be placed first (RFC
    /// 5040, 5.5).
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
