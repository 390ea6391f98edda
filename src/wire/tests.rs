//! Messages compared with bytes taken from the specification, not from the encoder.

use proptest::prelude::*;

use super::*;

/// Header: length, type, repeat, padding.
fn message(length: u32, kind: u32, repeat: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [length, kind, repeat, 0] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// Every message, with its bytes.
fn samples() -> Vec<(Message<'static>, Vec<u8>)> {
    let register = [
        0, 0, 0, 0, 0x40, 0x10, 0, 0, // key
        0, 0, 0, 2, 0, 0, 0, 0, // index, padding
        0, 0, 0, 0, 0, 0, 3, 0xff, // chunks
    ];
    let entry = [
        0, 0, 0x7f, 0, 0, 0x20, 0, 0, // remote_host_addr
        0, 0, 0, 0, 0x40, 0, 0, 0, // offset
        0, 0, 0, 0, 0, 0x10, 0, 0, // length
        0, 0, 0x12, 0x34, 0, 0, 0, 0, // rkey, padding
    ];
    let compress = [
        0, 0, 0, 0, 0, 0, 0, 1, // value, block_idx
        0, 0, 0, 0, 0x40, 0, 0x10, 0, // offset
        0, 0, 0, 0, 0, 0, 0x20, 0, // length
    ];
    let request = Register {
        key: 0x4010_0000.into(),
        index: 2.into(),
        padding: 0.into(),
        chunks: 0x3ff.into(),
    };
    let block = RamBlockEntry {
        remote_host_addr: 0x7f00_0020_0000.into(),
        offset: 0x4000_0000.into(),
        length: 0x10_0000.into(),
        remote_rkey: 0x1234.into(),
        padding: 0.into(),
    };
    let zero = Compress {
        value: 0.into(),
        block_idx: 1.into(),
        offset: 0x4000_1000.into(),
        length: 0x2000.into(),
    };
    let result = RegisterResult { rkey: 9.into(), padding: 0.into(), host_addr: 0x1000.into() };
    let list = vec![ListedBlock { name: "pc.ram".into(), length: 0x4000_0000 }];
    vec![
        (Message::Error, message(0, 1, 1, &[])),
        (Message::Ready(1), message(0, 2, 1, &[])),
        (Message::QemuFile(b"QEVM"), message(4, 3, 0, b"QEVM")),
        (Message::RamBlocksRequest, message(0, 4, 1, &[])),
        (Message::RamBlocksResult(vec![block]), message(32, 5, 1, &entry)),
        (Message::Compress(zero), message(24, 6, 1, &compress)),
        (
            Message::RegisterRequest(vec![request; 2]),
            message(48, 7, 2, &[register, register].concat()),
        ),
        (
            Message::RegisterResult(result),
            message(16, 8, 1, &[0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x10, 0]),
        ),
        (Message::RegisterFinished, message(0, 9, 1, &[])),
        (Message::UnregisterRequest(vec![request]), message(24, 10, 1, &register)),
        (Message::UnregisterFinished, message(0, 11, 1, &[])),
        (
            Message::BlockList { blocks: list, last: true },
            message(16, 0x100, 1, b"\x01\0\0\0\0\x40\0\0\0\x06pc.ram"),
        ),
        (
            Message::ErrorText { text: "no".into(), guest_never_ran: true },
            message(3, 0x101, 1, b"\x01no"),
        ),
        (Message::StreamEnd { bytes: 258 }, message(8, 0x102, 1, &[0, 0, 0, 0, 0, 0, 1, 2])),
        (Message::FinalAck, message(0, 0x103, 1, &[])),
    ]
}

#[test]
fn messages_are_the_specifications_bytes() {
    for (value, bytes) in samples() {
        let mut scratch = Vec::new();
        let (header, payload) = value.encode(&mut scratch);
        assert_eq!([&header, payload].concat(), bytes, "{value:?}");
        assert_eq!(Message::decode(&bytes).unwrap(), value);
    }
}

#[test]
fn cut_and_overlong_messages_are_refused() {
    for (value, mut bytes) in samples() {
        for end in 0..bytes.len() {
            assert!(Message::decode(&bytes[..end]).is_err(), "{value:?} cut at {end}");
        }
        bytes.push(0);
        assert!(Message::decode(&bytes).is_err(), "{value:?} with a byte too many");
        let length = bytes.len() as u32 - 16;
        bytes[..4].copy_from_slice(&length.to_be_bytes());
        let grows = matches!(value, Message::QemuFile(_) | Message::ErrorText { .. });
        assert_eq!(Message::decode(&bytes).is_ok(), grows, "{value:?} with a longer payload");
    }
}

#[test]
fn the_stream_message_of_an_old_qemu_has_garbage_as_repeat() {
    let bytes = message(1, 3, 3_638_950_032, b"Q");
    assert_eq!(Message::decode(&bytes).unwrap(), Message::QemuFile(b"Q"));
}

#[test]
fn counts_that_lie_are_refused() {
    let request = [0; 24];
    for (repeat, payload) in [(0, &request[..]), (2, &request), (u32::MAX, &request), (0, &[])] {
        let bytes = message(payload.len() as u32, 7, repeat, payload);
        assert!(Message::decode(&bytes).is_err(), "repeat {repeat}");
    }
    let many = vec![0; 24 * (REQUESTS_MAX as usize + 1)];
    assert!(Message::decode(&message(many.len() as u32, 7, REQUESTS_MAX + 1, &many)).is_err());
    assert!(Message::decode(&message(0, 0, 1, &[])).is_err());
    assert!(Message::decode(&message(0, 12, 1, &[])).is_err());
    assert!(Message::decode(&message(u32::MAX, 3, 1, b"Q")).is_err());
    assert!(Message::decode(&message(10, 0x100, 1, b"\x01\0\0\0\0\0\0\0\x10\0")).is_err());
}

#[test]
fn private_data_is_the_specifications_bytes() {
    let stock = PrivateData { pin_all: true, extension: None };
    assert_eq!(stock.encode(), [0, 0, 0, 1, 0, 0, 0, 1]);
    assert_eq!(PrivateData::decode(&stock.encode()).unwrap(), stock);
    let extension = Some(Extension { version: 1, window: 64, pin_limit: 512 });
    let helper = PrivateData { pin_all: false, extension };
    assert_eq!(helper.encode(), *b"\0\0\0\x01\0\0\0\0QRH1\0\x01\0\x40\0\0\x02\0");
    assert_eq!(PrivateData::decode(&helper.encode()).unwrap(), helper);
    // Unknown flags, and bytes after those that this version knows.
    let later = [&helper.encode()[..4], &[0xff; 4], &helper.encode()[8..], &[7; 40]].concat();
    assert_eq!(PrivateData::decode(&later).unwrap(), PrivateData { pin_all: true, extension });
    assert!(PrivateData::decode(&[0, 0, 0, 1, 0, 0, 0]).is_err());
    assert!(PrivateData::decode(b"\0\0\0\x01\0\0\0\0QRH1\0\x01\0\0\0\0\0\0").is_err());
    let error = PrivateData::decode(&[0, 0, 0, 2, 0, 0, 0, 0]).unwrap_err();
    assert!(error.to_string().contains("version 2"), "{error}");
}

/// As many blocks as fit into a message, which is also the limit that is accepted.
#[test]
fn the_longest_list_of_blocks_fits_into_a_message() {
    let entry = RamBlockEntry {
        remote_host_addr: 1.into(),
        offset: 2.into(),
        length: (16_u64 << 40).into(),
        remote_rkey: 3.into(),
        padding: 0.into(),
    };
    let result = Message::RamBlocksResult(vec![entry; crate::ram::BLOCKS_MAX]);
    let mut scratch = Vec::new();
    let (header, payload) = result.encode(&mut scratch);
    let bytes = [&header, payload].concat();
    assert!(bytes.len() <= crate::fabric::MESSAGE_MAX);
    assert!(bytes.len() + size_of::<RamBlockEntry>() > crate::fabric::MESSAGE_MAX);
    assert_eq!(Message::decode(&bytes).unwrap(), result);
}

#[test]
fn an_overlong_text_is_cut_between_characters() {
    let text = "é".repeat(TEXT_MAX);
    let message = Message::ErrorText { text: text.as_str().into(), guest_never_ran: false };
    let mut scratch = Vec::new();
    let (header, payload) = message.encode(&mut scratch);
    assert_eq!(payload.len(), 1 + TEXT_MAX);
    Message::decode(&[&header, payload].concat()).unwrap();
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = PrivateData::decode(&bytes);
        let _ = Message::decode(&bytes);
    }

    #[test]
    fn what_decodes_encodes_to_itself(
        kind in prop_oneof![0..12_u32, 0x100..0x104_u32],
        repeat in 0..3_u32,
        payload in prop::collection::vec(prop_oneof![Just(0_u8), Just(1), any::<u8>()], 0..100),
    ) {
        let bytes = message(payload.len() as u32, kind, repeat, &payload);
        if let Ok(decoded) = Message::decode(&bytes) {
            let mut scratch = Vec::new();
            let (header, payload) = decoded.encode(&mut scratch);
            let again = [&header, payload].concat();
            prop_assert_eq!(Message::decode(&again).unwrap(), decoded);
        }
    }
}
