//! Migrations that succeed, and what clients see of them.

#[path = "../support/streams.rs"]
mod streams;
#[path = "../support/mod.rs"]
mod support;

mod as_tcp;
mod channels;
mod fallback;
mod guest_states;
mod precopy;
mod recorded_channels;
mod recorded_streams;
mod snapshots;
