//! The worker of one migration: stream, memory and fabric in a process that may die.
//!
//! Owns the order of events of a migration (see `docs/architecture.md`, ordering rules). Knows
//! nothing of QMP: the relay tells it what QEMU and the client said, in [`messages`].

pub mod messages;
