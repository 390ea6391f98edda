//! The long-lived process between management and QEMU.
mod schema;
