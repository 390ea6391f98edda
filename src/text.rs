//! Untrusted text: from a peer, from QEMU, or in file names.
//!
//! Such text ends up in logs, `error-desc` and terminals. There it must be one line of bounded
//! length, without anything that a terminal interprets or that changes how adjacent text reads.
//! This module sanitises it where it enters; `tests/qmp/text.rs` lists these places.

use std::borrow::Cow;

use serde::{Deserialize as _, Deserializer};
use serde_json::{Map, Value};

/// Longest line in bytes.
pub const LINE_MAX: usize = 4096;

/// Whether `character` is neither a control character nor one that breaks lines or changes the
/// writing direction (Unicode's Bidi_Control).
pub fn is_plain(character: char) -> bool {
    let obeyed = matches!(
        character,
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
    );
    !character.is_control() && !obeyed
}

/// Replace a character that is not plain.
fn plain(character: char) -> char {
    match character {
        '\n' | '\r' | '\t' | '\u{2028}' | '\u{2029}' => ' ',
        other if is_plain(other) => other,
        _ => '?',
    }
}

/// Return one plain line of at most [`LINE_MAX`] bytes.
pub fn line(text: &str) -> Cow<'_, str> {
    let text = &text[..text.floor_char_boundary(LINE_MAX)];
    if text.chars().all(is_plain) {
        return Cow::Borrowed(text.trim_end());
    }
    // No replacement is longer than its character.
    let line: String = text.chars().map(plain).collect();
    Cow::Owned(line.trim_end().to_owned())
}

/// Return all lines with their ends, for output of the human monitor.
pub fn lines(text: &str) -> String {
    let mut rest = text.chars().peekable();
    let mut lines = String::with_capacity(text.len());
    while let Some(character) = rest.next() {
        let kept = match character {
            '\n' | '\t' => true,
            // A lone CR would let a line be overwritten.
            '\r' => rest.peek() == Some(&'\n'),
            _ => false,
        };
        lines.push(if kept { character } else { plain(character) });
    }
    lines
}

/// Return a log message as one line of at most [`LINE_MAX`] bytes, newline included. `message` may
/// end with a newline. With `colours` it has escape sequences: the caller must have sanitised those
/// in values.
pub fn logged(message: &[u8], colours: bool) -> Vec<u8> {
    let text = String::from_utf8_lossy(message);
    let line = text.strip_suffix('\n').unwrap_or(&text);
    let keep = |character| colours && character == '\u{1b}';
    let mut shown: String = line.chars().map(|it| if keep(it) { it } else { plain(it) }).collect();
    let end = if colours { "\u{1b}[0m\n" } else { "\n" };
    if shown.len() + 1 > LINE_MAX {
        shown.truncate(shown.floor_char_boundary(LINE_MAX - end.len()));
        shown.push_str(end);
    } else {
        shown.push('\n');
    }
    shown.into_bytes()
}

/// Key of the human monitor's text in QEMU's replies that are objects (HumanReadableText of
/// `qapi/common.json`).
const MONITORS_TEXT: &str = "human-readable-text";

/// Sanitise every string in JSON. The human monitor's text may have several lines.
pub fn reply(value: Value) -> Value {
    match value {
        Value::String(text) => lines(&text).into(),
        other => within(other),
    }
}

fn within(value: Value) -> Value {
    match value {
        Value::String(text) => line(&text).into(),
        Value::Array(values) => values.into_iter().map(within).collect(),
        Value::Object(members) => {
            let clean = |(key, member): (String, _)| match key == MONITORS_TEXT {
                true => (key, reply(member)),
                false => (line(&key).into_owned(), within(member)),
            };
            Value::Object(members.into_iter().map(clean).collect::<Map<_, _>>())
        }
        other => other,
    }
}

/// Deserialize a string, as one line.
///
/// # Errors
/// If the value is not a string.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    String::deserialize(deserializer).map(|text| line(&text).into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_is_what_was_meant() {
        assert_eq!(line("RAM block 'pc.ram' is gone"), "RAM block 'pc.ram' is gone");
        assert_eq!(line("a\r\nb\tc\n"), "a  b c");
        assert_eq!(line("\u{1b}[2J\u{9b}1mred\u{7}"), "?[2J?1mred?");
        assert_eq!(line("evil\u{202e}txt.exe\u{2066}"), "evil?txt.exe?");
        assert_eq!(line("größe 大き"), "größe 大き");
    }

    #[test]
    fn a_logged_line_that_is_cut_has_its_end() {
        for length in LINE_MAX - 8..LINE_MAX + 8 {
            let text = "ö".repeat(length / 2) + &"x".repeat(length % 2);
            let line = String::from_utf8(logged(text.as_bytes(), false)).unwrap();
            let kept = line.strip_suffix('\n').unwrap();
            assert!(text.starts_with(kept) && line.len() <= LINE_MAX, "{length}");
            assert!(kept.len() == text.len() || line.len() >= LINE_MAX - 1, "{length}");
            let coloured = String::from_utf8(logged(text.as_bytes(), true)).unwrap();
            assert!(kept.len() == text.len() || coloured.ends_with("\u{1b}[0m\n"), "{length}");
        }
    }

    #[test]
    fn the_monitors_lines_are_kept() {
        assert_eq!(lines("a:\tb\r\nc\n\u{1b}c\rd\r\n"), "a:\tb\r\nc\n?c d\r\n");
        let answer = json!({ "human-readable-text": "a\nb\u{1b}", "other": "a\nb" });
        let shown = json!({ "human-readable-text": "a\nb?", "other": "a b" });
        assert_eq!(reply(answer), shown);
    }

    #[test]
    fn numbers_and_order_are_kept() {
        let json = json!({ "z": [1, 2.5, null, true], "a\n": { "b": "c\u{1b}" } });
        assert_eq!(reply(json).to_string(), r#"{"z":[1,2.5,null,true],"a":{"b":"c?"}}"#);
        assert_eq!(reply(json!("x\r\ny")), json!("x\r\ny"));
    }

    proptest! {
        #[test]
        fn a_line_is_one_plain_line_in_bounds(text in "\\PC{0,20}|.{0,40}|(?s:.{0,2000})|a{0,3}(?s:.{4080,4100})") {
            let shown = line(&text);
            prop_assert!(shown.chars().all(is_plain));
            prop_assert!(shown.len() <= LINE_MAX);
            prop_assert_eq!(line(&shown), shown.clone());
            for logged in [logged(text.as_bytes(), false), logged(text.as_bytes(), true)] {
                prop_assert!(logged.len() <= LINE_MAX);
                let logged = String::from_utf8(logged).unwrap();
                let mut line = logged.strip_suffix('\n').unwrap().chars();
                let escape = '\u{1b}';
                prop_assert!(line.all(|it| is_plain(it) || it == escape));
            }
            let lines = lines(&text);
            prop_assert!(lines.replace("\r\n", "").chars().all(|it| it == '\n' || it == '\t' || is_plain(it)));
        }
    }
}
