//! Any bytes on the socket between relay and worker: each line is an order or ends the orders,
//! however it is split, and what is parsed round-trips.
#![no_main]

use std::{io::Write as _, os::unix::net::UnixStream};

use libfuzzer_sys::fuzz_target;
use qemu_rdma_helper::{
    control::{
        Order, Report,
        lines::{self, Lines},
    },
    worker::relay_socket::Orders,
};
use serde::{Serialize, de::DeserializeOwned};

/// Return the order of a line, if it is one. No descriptors arrive with it.
fn order(line: &[u8]) -> Option<Order> {
    let take = |line: &[u8]| {
        let mut lines = Lines::default();
        lines.push(line, Vec::new());
        Some(lines.take::<Order>().ok()??.0)
    };
    let order = take(line)?;
    let again = lines::line(&order, 0).expect("it can be said");
    assert_eq!(take(&again).expect("it can be read"), order);
    Some(order)
}

/// Return the content of a line, if it has any.
fn read<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(line: &[u8]) -> Option<T> {
    let read: T = serde_json::from_slice(line).ok()?;
    let again = serde_json::to_vec(&read).expect("it can be said");
    assert_eq!(serde_json::from_slice::<T>(&again).expect("it can be read"), read);
    Some(read)
}

/// Return the orders on a socket that ends, up to the first that is invalid.
fn orders(input: &[u8], size: usize) -> Vec<Order> {
    let (mut relay, worker) = UnixStream::pair().expect("sockets");
    // This much fits into a socket that nobody reads.
    for piece in input.chunks(size) {
        relay.write_all(piece).expect("room");
    }
    drop(relay);
    let mut orders = Orders::new(worker);
    let next = || orders.receive().ok().flatten().map(|(order, _)| order);
    std::iter::from_fn(next).collect()
}

fuzz_target!(|input: &[u8]| {
    let [size, input @ ..] = input else { return };
    let lines = input.split_inclusive(|byte| *byte == b'\n').filter(|it| it.ends_with(b"\n"));
    let expected: Vec<_> = lines.map_while(order).collect();
    // Few pieces: for each the kernel counts more than its bytes.
    let size = (usize::from(*size) + 1).max(input.len() / 64 + 1);
    assert_eq!(orders(input, size), expected);
    input.split(|byte| *byte == b'\n').for_each(|line| drop(read::<Report>(line)));
});
