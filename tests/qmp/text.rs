//! Sanitising of untrusted text, at each place where it enters the program.

use std::path::Path;

use proptest::prelude::*;
use qemu_rdma_helper::{
    control::{Order, Report},
    fabric::Finding,
    qmp::{QmpError, envelope::FromQemu, uri},
    stream::{ForwardSink, Forwarder, StreamBlock},
    text,
    wire::{ListedBlock, Message},
};
use serde_json::{Value, json};

/// Characters that a terminal interprets, or that change how a line reads.
const HOSTILE: &str = "a\u{1b}[2J\u{9b}31m\u{7}\r\n\0b\u{202e}c\u{2028}\u{2066}d\u{7f}";

/// An entry point of text. Returns what is left of `text`, or `None` if it is refused.
type Way = fn(text: &str) -> Option<String>;

/// Encode a message of the peer.
fn message(kind: u32, payload: &[u8]) -> Vec<u8> {
    let words = [payload.len() as u32, kind, 1, 0];
    let header = words.iter().flat_map(|word| word.to_be_bytes());
    header.chain(payload.iter().copied()).collect()
}

fn peers_words(text: &str) -> Option<String> {
    let bytes = message(0x101, &[b"\0", text.as_bytes()].concat());
    match Message::decode(&bytes) {
        Ok(Message::ErrorText { text, .. }) => Some(text.into_owned()),
        Ok(_) => panic!("another message"),
        Err(error) => Some(error.to_string()),
    }
}

fn name_in_a_block_list(name: &str) -> Option<String> {
    let head = [&[1][..], &4096_u64.to_be_bytes(), &[name.len() as u8]].concat();
    match Message::decode(&message(0x100, &[&head, name.as_bytes()].concat())) {
        Ok(Message::BlockList { blocks, .. }) => {
            Some(blocks.into_iter().map(|ListedBlock { name, .. }| name).collect())
        }
        Ok(_) => panic!("another message"),
        Err(_) => None,
    }
}

#[derive(Default)]
struct Names(String);

impl ForwardSink for Names {
    type Error = std::convert::Infallible;

    fn ram_blocks(&mut self, blocks: &[StreamBlock]) -> Result<(), Self::Error> {
        self.0.extend(blocks.iter().map(|block| block.name.as_str()));
        Ok(())
    }

    fn stream(&mut self, _: &[u8]) -> Result<(), Self::Error> {
        Ok(())
    }

    fn hook(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }

    fn ram_end(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// Return the block names that the stream's reader finds, or its error.
fn read(stream: &[u8]) -> String {
    let mut names = Names::default();
    match Forwarder::default().push(stream, &mut names) {
        Ok(()) => names.0,
        Err(qemu_rdma_helper::stream::PushError::Stream(error)) => error.to_string(),
        Err(qemu_rdma_helper::stream::PushError::Handler(never)) => match never {},
    }
}

const HEAD: &[u8] = b"QEVM\0\0\0\x03\x07\0\0\0\x02pc";

fn name_in_a_streams_block_list(name: &str) -> Option<String> {
    let ram = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x04";
    let block = [&[name.len() as u8], name.as_bytes(), &4096_u64.to_be_bytes()].concat();
    Some(read(&[HEAD, ram, &block].concat()))
}

fn name_of_a_section(name: &str) -> Option<String> {
    let section = [b"\x01\0\0\0\x02", &[name.len() as u8][..], name.as_bytes(), &[0; 8]].concat();
    Some(read(&[HEAD, &section].concat()))
}

fn name_of_a_pages_block(name: &str) -> Option<String> {
    let ram = b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\x10\x04\x01x\0\0\0\0\0\0\x10\0";
    let end = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02";
    let part = [b"\x02\0\0\0\x02\0\0\0\0\0\0\0\x08", &[name.len() as u8][..], name.as_bytes()];
    Some(read(&[HEAD, ram, end, &part.concat(), &[0; 4096]].concat()))
}

fn from_qemu(line: &Value) -> FromQemu {
    FromQemu::read(line.to_string().as_bytes()).unwrap()
}

fn qemus_error(text: &str) -> Option<String> {
    match from_qemu(&json!({ "error": { "class": text, "desc": text } })) {
        FromQemu::Reply { result: Err(QmpError { class, desc }), .. } => Some(class + &desc),
        other => panic!("{other:?}"),
    }
}

fn in_qemus_reply(text: &str) -> Option<String> {
    match from_qemu(&json!({ "return": { "status": "failed", "error-desc": [text], text: 1 } })) {
        FromQemu::Reply { result: Ok(value), .. } => Some(all(&value)),
        other => panic!("{other:?}"),
    }
}

fn in_qemus_event(text: &str) -> Option<String> {
    match from_qemu(&json!({ "event": text, "data": { "device": text } })) {
        FromQemu::Event { name, data } => Some(name + &all(&data)),
        other => panic!("{other:?}"),
    }
}

fn in_qemus_greeting(text: &str) -> Option<String> {
    match from_qemu(&json!({ "QMP": { "version": { "package": text } } })) {
        FromQemu::Other(value) => Some(all(&value)),
        other => panic!("{other:?}"),
    }
}

/// Output of the human monitor may have tabs and line ends; the rest is as strict.
fn from_the_monitor(text: &str) -> Option<String> {
    match from_qemu(&json!({ "return": text })) {
        FromQemu::Reply { result: Ok(Value::String(text)), .. } => {
            Some(text.replace("\r\n", "").replace(['\t', '\n'], ""))
        }
        other => panic!("{other:?}"),
    }
}

fn workers_reason(text: &str) -> Option<String> {
    let report = json!({
        "report": "failed", "reason": text, "guest_never_ran": true, "by_qemu": false,
        "progress": {
            "ram-bytes": 0, "zero-bytes": 0, "stream-bytes": 0, "in-flight": 0, "setup-ms": 0,
            "elapsed-ms": 0, "pinned": 0, "pin-ms": 0, "fabric": "tcp", "connections": 1,
        },
    });
    match serde_json::from_value(report) {
        Ok(Report::Failed { reason, .. }) => Some(reason),
        other => panic!("{other:?}"),
    }
}

fn relays_reason(text: &str) -> Option<String> {
    match serde_json::from_value(json!({ "order": "abort", "reason": text })) {
        Ok(Order::Abort { reason }) => Some(reason),
        other => panic!("{other:?}"),
    }
}

fn error_of_ours(text: &str) -> Option<String> {
    let path = Path::new(text);
    Some(QmpError::generic(format!("{} is not the file", path.display())).desc)
}

fn finding(text: &str) -> Option<String> {
    let Finding { text, hint, .. } = Finding::fatal(text, text);
    Some(text + &hint)
}

fn host_of_an_address(text: &str) -> Option<String> {
    match uri::parse(&format!("rdma:{text}:4444")) {
        Ok(target) => Some(format!("{target:?}")),
        Err(error) => Some(error.desc),
    }
}

fn log(text: &str) -> Option<String> {
    let line = String::from_utf8(text::logged(format!("{text}\n").as_bytes(), false)).unwrap();
    Some(line.strip_suffix('\n').unwrap().to_owned())
}

/// Return all keys and strings of `value`, concatenated.
fn all(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(values) => values.iter().map(all).collect(),
        Value::Object(members) => {
            members.iter().map(|(key, value)| key.clone() + &all(value)).collect()
        }
        _ => String::new(),
    }
}

const WAYS: [(&str, Way); 17] = [
    ("the peer's error", peers_words),
    ("a name in BLOCK_LIST", name_in_a_block_list),
    ("a name in the stream's block list", name_in_a_streams_block_list),
    ("the name of a section", name_of_a_section),
    ("the name of a page's block", name_of_a_pages_block),
    ("QEMU's error", qemus_error),
    ("QEMU's reply", in_qemus_reply),
    ("QEMU's event", in_qemus_event),
    ("QEMU's greeting", in_qemus_greeting),
    ("QEMU's human monitor", from_the_monitor),
    ("a worker's reason", workers_reason),
    ("a relay's reason", relays_reason),
    ("an error of ours, with a path", error_of_ours),
    ("what check finds", finding),
    ("the host of an address", host_of_an_address),
    ("the log", log),
    ("an error at a terminal", |text| Some(text::line(text).into_owned())),
];

fn refused_or_plain(text: &str) -> Result<(), String> {
    for (name, way) in WAYS {
        if let Some(left) = way(text)
            && let Some(bad) = left.chars().find(|it| !text::is_plain(*it))
        {
            return Err(format!("{name} lets {bad:?} pass: {left:?}"));
        }
    }
    Ok(())
}

#[test]
fn no_way_in_lets_a_control_character_pass() {
    refused_or_plain(HOSTILE).unwrap();
    for character in HOSTILE.chars().filter(|it| !text::is_plain(*it)) {
        refused_or_plain(&format!("x{character}y")).unwrap();
    }
}

#[test]
fn every_way_in_lets_plain_text_pass() {
    for (name, way) in WAYS {
        let left = way("plain-größe");
        assert!(left.is_some_and(|left| left.contains("plain-größe")), "{name}");
    }
}

proptest! {
    #[test]
    fn whatever_the_text(text in "(?s:.{1,60})") {
        // The length field of a name on the wire has one byte.
        let text = &text[..text.floor_char_boundary(250)];
        prop_assert_eq!(refused_or_plain(text), Ok(()));
    }
}

/// A client gets a reply's content exactly as QEMU wrote it, however long.
#[test]
fn what_is_handed_on_is_as_it_was() {
    let value = json!({ "exec": ["/bin/sh", "a\nb \t\u{1b}"], "long": "x".repeat(10_000) });
    let line = json!({ "return": value }).to_string();
    match FromQemu::read_verbatim(line.as_bytes()).unwrap() {
        FromQemu::Reply { result: Ok(read), .. } => assert_eq!(read, value),
        other => panic!("{other:?}"),
    }
    // Errors reach logs and terminals, so they are sanitised all the same.
    let line = json!({ "error": { "class": "GenericError", "desc": HOSTILE } }).to_string();
    match FromQemu::read_verbatim(line.as_bytes()).unwrap() {
        FromQemu::Reply { result: Err(error), .. } => {
            assert!(error.desc.chars().all(text::is_plain))
        }
        other => panic!("{other:?}"),
    }
}
