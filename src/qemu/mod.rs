//! (qemu)
