//! Any bytes of a client or of QEMU: splits change no command, commands are parsed as written, and
//! every answer is one line of JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_rdma_helper::{
    qmp::{
        QmpError, Version,
        envelope::{self, Command, FromQemu, Kind, OutOfBand},
        framer::{Framed, Framer},
        hmp, scan, uri,
    },
    text,
};
use serde_json::{Value, json};

/// Return the commands in `pieces`.
fn frame<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Vec<Framed> {
    let (mut framer, mut all) = (Framer::default(), Vec::new());
    for piece in pieces {
        framer.push(piece);
        while let Some(framed) = framer.take() {
            all.push(framed);
        }
    }
    all
}

/// Check a client's command.
fn command(bytes: &[u8]) {
    let Ok(command) = Command::read(bytes, true) else { return };
    for result in [Ok(json!({ "a": 1 })), Err(QmpError::generic(&command.name))] {
        let line = envelope::reply(&result, command.id.as_ref());
        answer(&line, command.id.is_some());
        let line = envelope::with_id(b"{\"return\": 1, \"id\": \"a\"}\r\n", command.id.as_ref());
        answer(&line, command.id.is_some());
    }
    if let Some(hurried) = OutOfBand::read(bytes) {
        let again = Command::read(&hurried.under("a"), true).expect("a command");
        assert!(again.out_of_band && again.name == command.name);
        assert_eq!(again.arguments().ok(), command.arguments().ok());
    }
    let Ok(arguments) = command.arguments() else { return };
    let _ = uri::target(&arguments);
    if let Some(line) = arguments.get("command-line").and_then(Value::as_str) {
        monitor_line(line);
    }
}

/// Check that an answer to a client is one value, whatever its id is.
fn answer(line: &[u8], has_id: bool) {
    assert!(line.ends_with(b"\r\n") && scan::is_value(line));
    let id = match Kind::of(line) {
        Some(Kind::Reply(id)) => id,
        other => panic!("{other:?}"),
    };
    assert_eq!(id.is_some(), has_id);
}

/// Check a line of the human monitor, with the grammars of several QEMU versions.
fn monitor_line(line: &str) {
    for (major, minor) in [(7, 2), (10, 0), (11, 1)] {
        match hmp::parse(line, Version { major, minor, micro: 0 }) {
            hmp::Line::Wrong(error) => assert!(error.desc.chars().all(text::is_plain)),
            hmp::Line::Unread(asked) => assert!(!asked.contains(uri::SCHEME)),
            _ => {}
        }
    }
    let text = hmp::with_values(line, &[("Status", "active".into())]);
    assert_eq!(text.lines().count(), line.lines().count());
}

/// Check a line from QEMU.
fn from_qemu(bytes: &[u8]) {
    match FromQemu::read(bytes) {
        Some(FromQemu::Event { name, data }) => {
            assert!(name.chars().all(text::is_plain));
            let line = envelope::event(&name, &data);
            assert_eq!(Kind::of(&line), Some(Kind::Event));
        }
        Some(FromQemu::Reply { result: Err(QmpError { class, desc }) }) => {
            assert!([class, desc].iter().all(|it| it.chars().all(text::is_plain)));
        }
        _ => {}
    }
}

fuzz_target!(|input: &[u8]| {
    let [size, input @ ..] = input else { return };
    let whole = frame(std::iter::once(input));
    assert_eq!(whole, frame(input.chunks(usize::from(*size) + 1)));
    for framed in &whole {
        match framed {
            Framed::Value(bytes) => command(bytes),
            // What is passed on for QEMU to refuse is malformed.
            Framed::Malformed(bytes) => assert!(Command::read(bytes, true).is_err()),
            Framed::TooLong | Framed::TooDeep => {}
        }
    }
    input.split(|byte| *byte == b'\n').for_each(from_qemu);
    if let Ok(line) = std::str::from_utf8(input) {
        monitor_line(line);
        let _ = uri::parse(line);
    }
});
