//! Scans JSON without interpreting its values.
//!
//! QEMU nests deeper than a recursive parser may go, and prints numbers that are not JSON. Relayed
//! data must pass all the same: no recursion here, and no limit but [`DEPTH_MAX`].

use std::{borrow::Cow, collections::HashSet};

use super::lexer::{Token, tokens};

/// Deepest nesting that QEMU accepts (`MAX_NESTING` of `qobject/json-streamer.c`).
pub const DEPTH_MAX: usize = 1 << 10;

/// The members of an object, with the bytes of their values; `None` if it is not an object.
///
/// Only the brackets of the values are checked.
pub fn members(object: &[u8]) -> Option<Vec<(String, &[u8])>> {
    let mut tokens = tokens(object);
    let (Token::Structure(b'{'), _) = tokens.next()? else { return None };
    let mut members = Vec::new();
    loop {
        let key = match tokens.next()? {
            (Token::String, range) => string(&object[range])?,
            (Token::Structure(b'}'), _) if members.is_empty() => break,
            _ => return None,
        };
        let (Token::Structure(b':'), colon) = tokens.next()? else { return None };
        let mut depth = 0_usize;
        let (last, end) = loop {
            let (token, range) = tokens.next()?;
            match token {
                Token::Structure(b'{' | b'[') => depth += 1,
                Token::Structure(end @ (b',' | b'}')) if depth == 0 => break (end, range.start),
                Token::Structure(b'}' | b']') => depth = depth.checked_sub(1)?,
                _ => {}
            }
        };
        members.push((key, object[colon.end..end].trim_ascii()));
        if last == b'}' {
            break;
        }
    }
    tokens.next().is_none().then_some(members)
}

/// What may follow in a value.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Expected {
    Value,
    /// A value, or the end of an array.
    FirstValue,
    Key,
    /// A key, or the end of an object.
    FirstKey,
    Colon,
    /// What follows a value.
    Behind,
}

/// Most members whose names are checked for duplicates.
const NAMES_MAX: usize = 1 << 16;

/// Whether it is one value of QEMU's grammar. QEMU executes nothing else.
pub fn is_value(bytes: &[u8]) -> bool {
    use Expected as E;
    // The closing bracket of each open value, and the names in it.
    let mut open = Vec::new();
    let mut names = 0;
    let mut expected = E::Value;
    for (token, range) in tokens(bytes) {
        let text = &bytes[range];
        expected = match (expected, token) {
            (E::Value | E::FirstValue, Token::Structure(b'[')) => {
                open.push((b']', HashSet::new()));
                E::FirstValue
            }
            (E::Value | E::FirstValue, Token::Structure(b'{')) => {
                open.push((b'}', HashSet::new()));
                E::FirstKey
            }
            (E::Value | E::FirstValue, Token::Number) => E::Behind,
            (E::Value | E::FirstValue, Token::Keyword)
                if [&b"true"[..], b"false", b"null"].contains(&text) =>
            {
                E::Behind
            }
            (E::Value | E::FirstValue, Token::String) if is_string(text) => E::Behind,
            (E::Key | E::FirstKey, Token::String) => {
                let (Some(key), Some((_, keys))) = (string(text), open.last_mut()) else {
                    return false;
                };
                names += 1;
                if names <= NAMES_MAX && !keys.insert(key) {
                    return false;
                }
                E::Colon
            }
            (E::Colon, Token::Structure(b':')) => E::Value,
            (E::Behind, Token::Structure(b',')) => match open.last() {
                Some((b'}', _)) => E::Key,
                Some(_) => E::Value,
                None => return false,
            },
            (E::Behind | E::FirstValue | E::FirstKey, Token::Structure(end))
                if open.pop().is_some_and(|(wanted, _)| wanted == end) =>
            {
                E::Behind
            }
            _ => return false,
        };
        if open.len() > DEPTH_MAX {
            return false;
        }
    }
    open.is_empty() && expected == E::Behind
}

fn is_string(token: &[u8]) -> bool {
    let is_plain = token.is_ascii() && !token.contains(&b'\\');
    is_plain || string(token).is_some()
}

/// Decode a string; `None` if QEMU rejects it too.
pub fn string(token: &[u8]) -> Option<String> {
    let string: String = serde_json::from_slice(&json(token)).ok()?;
    let is_noncharacter =
        |c: char| matches!(c, '\u{fdd0}'..='\u{fdef}') || u32::from(c) & 0xfffe == 0xfffe;
    (!string.contains(is_noncharacter)).then_some(string)
}

/// Convert QEMU's extensions to JSON: strings in single quotes, and NUL in two bytes.
pub fn json(bytes: &[u8]) -> Cow<'_, [u8]> {
    if !bytes.iter().any(|byte| [b'\'', 0xc0].contains(byte)) {
        return Cow::Borrowed(bytes);
    }
    let mut normal = Vec::with_capacity(bytes.len());
    let mut quote = None;
    let mut escaped = false;
    for &byte in bytes {
        match quote {
            None if byte == b'\'' || byte == b'"' => {
                quote = Some(byte);
                normal.push(b'"');
            }
            Some(_) if escaped => {
                escaped = false;
                if byte == b'\'' {
                    // JSON has no such escape.
                    normal.pop();
                }
                normal.push(byte);
            }
            Some(open) if byte == open => {
                quote = None;
                normal.push(b'"');
            }
            Some(b'\'') if byte == b'"' => normal.extend_from_slice(b"\\\""),
            Some(_) if byte == 0x80 && normal.last() == Some(&0xc0) => {
                normal.pop();
                normal.extend_from_slice(b"\\u0000");
            }
            _ => {
                escaped = quote.is_some() && byte == b'\\';
                normal.push(byte);
            }
        }
    }
    Cow::Owned(normal)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn members_are_found_whatever_their_values_are() {
        let deep = format!("{}1{}", "[".repeat(5000), "]".repeat(5000));
        let line = format!(r#"{{"id": -inf, "return" :{deep} , "a": "}},", "b": {{"c": [1]}}}}"#);
        let found = members(line.as_bytes()).unwrap();
        let expected = [("id", "-inf"), ("return", &deep), ("a", "\"},\""), ("b", "{\"c\": [1]}")];
        assert_eq!(found, expected.map(|(key, value)| (key.to_owned(), value.as_bytes())));
        assert_eq!(members(b" {} "), Some(Vec::new()));
        for none in ["[]", "{", "{1: 2}", "{\"a\" 1}", "{\"a\": 1,}", "{\"a\": 1]}", "{} {}", "5"] {
            assert_eq!(members(none.as_bytes()), None, "{none}");
        }
    }

    #[test]
    fn values_are_by_qemus_grammar() {
        for value in [
            "{}",
            "[]",
            "{'a': [1, {\"b\": null}, -0.5e7], 'b': {'a': {'a': 1}}}",
            "'\\''",
            "\"\\ud83d\\ude00\"",
            "7",
        ] {
            assert!(is_value(value.as_bytes()), "{value}");
        }
        assert!(is_value(b"{'a': '\xc0\x80'}"));
        for none in [
            "",
            "{,}",
            "[1,]",
            "{'a': 1,}",
            "{'a' 1}",
            "{1: 2}",
            "[1 2]",
            "[}",
            "{]",
            "nul",
            "[0e5]",
            "'\\q'",
            "\"\\ud800\"",
            "'\u{fdd0}'",
            "{} {}",
            "[1],",
            "{'a': 1, \"\\u0061\": 2}",
            "[{'a': {}, 'b': 1, 'a': []}]",
            "[",
            "{\"a\":",
        ] {
            assert!(!is_value(none.as_bytes()), "{none}");
        }
        assert!(!is_value(b"['\xc3']"));
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(is_value(nested(DEPTH_MAX).as_bytes()));
        assert!(!is_value(nested(DEPTH_MAX + 1).as_bytes()));
    }

    #[test]
    fn strings_are_qemus() {
        assert_eq!(string(br#"'r"d\'ma'"#).unwrap(), "r\"d'ma");
        assert_eq!(string(b"\"\xc0\x80\"").unwrap(), "\0");
        assert_eq!(string(b"\"it's\"").unwrap(), "it's");
        assert_eq!(string(b"7"), None);
    }

    proptest! {
        /// Whatever serde_json writes is found as it was written.
        #[test]
        fn what_json_says_is_found(
            values in prop::collection::btree_map("[ -~é]{0,5}", any_value(), 0..5),
        ) {
            let line = json!(values).to_string();
            prop_assert!(is_value(line.as_bytes()));
            let found = members(line.as_bytes()).unwrap();
            prop_assert_eq!(found.len(), values.len());
            for ((key, value), (found_key, found_value)) in values.iter().zip(found) {
                prop_assert_eq!(key, &found_key);
                prop_assert_eq!(value, &serde_json::from_slice::<Value>(found_value).unwrap());
            }
        }

        /// What serde_json rejects is not a value here either, except for QEMU's extensions.
        #[test]
        fn no_bytes_are_taken_for_more_than_they_are(
            text in "[{}\\[\\]\"\\\\,:a-z0-9. +-]{0,40}",
        ) {
            if is_value(text.as_bytes()) {
                prop_assert!(serde_json::from_str::<IgnoredAny>(&text).is_ok());
                prop_assert_eq!(members(text.as_bytes()).is_some(), text.trim().starts_with('{'));
            }
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[ -~é]{0,8}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z'\"\\\\]{0,4}", inner, 0..4)
                    .prop_map(|map| json!(map)),
            ]
        })
    }
}
