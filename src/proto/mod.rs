//! What a migration's two ends agree on and decide, without I/O.

pub mod coverage;
pub mod ram_ack;
pub mod rkeys;
pub mod switchover;
