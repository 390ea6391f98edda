//! What a migration requires of a device and of the memlock limit.
//!
//! All of it follows from what the fabric does, so the numbers come from the fabric's constants.

use super::super::{
    connection::{completions, depth},
    queue_pair::{Depth, SGES},
    sending::SEND_BUFFERS,
    staging_ring,
};
use crate::{
    fabric::{Guest, MESSAGE_MAX},
    ram::{CHUNK, RANGE_MAX},
};

/// Registrations per connection: send buffers, receive buffers, staging ring.
const REGISTRATIONS: u64 = 3;

/// Device attributes, named as in ibv_query_device(3): either available or required.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Queue pairs.
    pub max_qp: u64,
    /// Work requests of one kind per queue pair.
    pub max_qp_wr: u64,
    /// Memory ranges per work request.
    pub max_sge: u64,
    /// Completions per queue.
    pub max_cqe: u64,
    /// Registrations.
    pub max_mr: u64,
    /// Bytes per registration.
    pub max_mr_size: u64,
}

impl Attributes {
    /// The attributes with their names.
    pub(super) fn named(&self) -> [(&'static str, u64); 6] {
        [
            ("max_qp", self.max_qp),
            ("max_qp_wr", self.max_qp_wr),
            ("max_sge", self.max_sge),
            ("max_cqe", self.max_cqe),
            ("max_mr", self.max_mr),
            ("max_mr_size", self.max_mr_size),
        ]
    }
}

impl Guest {
    /// Bytes of guest memory registered once all of it has been written.
    pub(super) fn registered(&self) -> u64 {
        let all = self.blocks.iter().sum();
        // With `rdma-pin-all` the limit does not apply: whole blocks are registered, or the
        // migration is refused.
        match self.pin_limit {
            Some(limit) if !self.pin_all => limit.min(all),
            _ => all,
        }
    }

    /// Number of registrations in the worst case, which depends on the order of writes.
    pub(super) fn registrations(&self) -> u64 {
        let of_block = |length: &u64| if self.pin_all { 1 } else { length.div_ceil(CHUNK) };
        self.blocks.iter().map(of_block).sum()
    }

    /// Size in bytes of the largest registration if RAM blocks are registered as they are written.
    pub(super) fn largest_range(&self) -> u64 {
        self.blocks.iter().copied().max().unwrap_or(0).min(RANGE_MAX)
    }

    /// Size in bytes of the largest registration.
    fn largest(&self) -> u64 {
        if self.pin_all {
            self.blocks.iter().copied().max().unwrap_or(0)
        } else {
            self.largest_range()
        }
    }
}

/// Size in bytes of message buffers.
fn bytes(buffers: usize) -> u64 {
    (buffers * MESSAGE_MAX) as u64
}

/// Bytes that a connection registers for messages, whatever the guest; `window` as in
/// [`super::super::Verbs`].
pub(super) fn message_bytes(window: u16) -> u64 {
    bytes(SEND_BUFFERS + depth(window).receive as usize)
}

/// Most bytes registered with the device, which count against the memlock limit.
pub(super) fn locked_bytes(window: u16, guest: &Guest) -> u64 {
    let ring = if guest.staged { staging_ring::SIZE as u64 } else { 0 };
    message_bytes(window) + ring + guest.registered()
}

/// The attributes that a device needs for `guest`, or for any guest; `window` and `lanes` as in
/// [`super::super::Verbs`].
pub(super) fn attributes(window: u16, lanes: u16, guest: Option<&Guest>) -> Attributes {
    let (Depth { send, receive }, completions) = (depth(window), completions(window, lanes));
    let buffers = bytes(receive as usize).max(bytes(SEND_BUFFERS)).max(staging_ring::SIZE as u64);
    Attributes {
        // A stock source has no further queue pairs for RAM, but a second connection for its return
        // path.
        max_qp: 1 + u64::from(lanes.max(1)),
        max_qp_wr: send.max(receive).into(),
        max_sge: SGES.into(),
        max_cqe: completions.send.max(completions.receive).into(),
        max_mr: REGISTRATIONS + guest.map_or(1, |guest| guest.blocks.len() as u64),
        max_mr_size: guest.map_or(RANGE_MAX, Guest::largest).max(buffers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn guest(pin_all: bool, staged: bool) -> Guest {
        Guest { blocks: vec![4096 * MIB, 100], pin_all, pin_limit: None, staged }
    }

    #[test]
    fn what_is_registered_depends_on_the_guest() {
        assert_eq!(message_bytes(16), 16 * MIB);
        assert_eq!(locked_bytes(16, &guest(false, false)), 4112 * MIB + 100);
        assert_eq!(locked_bytes(16, &guest(false, true)), 4120 * MIB + 100);
        let limited = |pin_all| Guest { pin_limit: Some(64 * MIB), ..guest(pin_all, false) };
        assert_eq!(locked_bytes(16, &limited(false)), 80 * MIB);
        assert_eq!(locked_bytes(16, &limited(true)), 4112 * MIB + 100);
        assert_eq!(guest(true, false).registrations(), 2);
        assert_eq!(guest(false, false).registrations(), 4097);
        let size = |guest| attributes(16, 1, Some(&guest)).max_mr_size;
        assert_eq!(size(guest(true, false)), 4096 * MIB);
        assert_eq!(size(guest(false, false)), 64 * MIB);
        let lanes = |lanes| attributes(16, lanes, None);
        assert_eq!([0, 1, 4].map(|count| lanes(count).max_qp), [2, 2, 5]);
        assert_eq!([0, 1, 4].map(|count| lanes(count).max_cqe), [512, 1024, 2560]);
    }
}
