//! Live migration of an unmodified QEMU over RDMA, by a helper process that speaks QMP.
//!
//! The modules, from the user inwards: [`relay`] is the long-lived process that management talks
//! to; [`qmp`] speaks to the attached QEMU, and [`qemu`] knows its internals; [`worker`] is the
//! process of one migration: it reads QEMU's [`stream`], speaks the [`wire`] protocol, and moves
//! guest [`memory`] over a [`fabric`].
#![deny(unsafe_code)]

pub mod address;
pub mod control;
pub mod fabric;
pub mod memory;
mod patience;
pub mod proto;
pub mod qemu;
pub mod qmp;
pub mod ram;
mod refusals;
pub mod relay;
pub mod sandbox;
pub mod stream;
pub mod text;
mod threads;
pub mod wire;
pub mod worker;
