//! QEMU under `run`.

#[path = "../support/mod.rs"]
mod support;

mod run;
