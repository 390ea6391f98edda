//! The destination's second data thread: QEMU's return path, back to the source.

use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, recv};

use super::link::Link;
use crate::wire::Message;

/// Forward until QEMU closes its end, or the connection is lost: whoever feeds QEMU notices that.
pub fn forward(qemu: &UnixStream, link: &Link) {
    let mut buffer = [0; 4096];
    while let Ok((received @ 1.., _)) = recv(qemu, &mut buffer, RecvFlags::empty()) {
        if link.send(&Message::QemuFile(&buffer[..received])).is_err() {
            return;
        }
    }
}
