//! QEMU's grammar of a line: a command's name, and its arguments by the list of their types
//! (`monitor_parse_command` and `monitor_parse_arguments` of `monitor/hmp.c`).

/// Longest word that QEMU reads, in bytes. QEMU truncates longer ones.
const WORD_MAX: usize = 1023;

/// C's `isspace`.
fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t'..='\r')
}

fn skip_spaces(text: &str) -> &str {
    text.trim_start_matches(is_space)
}

/// The name at the beginning of a line, and the rest. The name need not end with a space.
pub fn command(line: &str) -> (&str, &str) {
    let line = skip_spaces(line);
    line.split_at(line.find(|c| is_space(c) || c == '/').unwrap_or(line.len()))
}

/// The first word, which may be in quotes, and the rest (`get_str`); `None` if there is none, or
/// its quotes are wrong.
fn word(text: &str) -> Option<(String, &str)> {
    let text = skip_spaces(text);
    let Some(quoted) = text.strip_prefix('"') else {
        let (word, rest) = text.split_at(text.find(is_space).unwrap_or(text.len()));
        return Some((shortened(word.to_owned()), rest)).filter(|_| !word.is_empty());
    };
    let mut word = String::new();
    let mut chars = quoted.char_indices();
    loop {
        match chars.next()? {
            (end, '"') => return Some((shortened(word), &quoted[end + 1..])),
            (_, '\\') => word.push(match chars.next()?.1 {
                'n' => '\n',
                'r' => '\r',
                c @ ('\\' | '\'' | '"') => c,
                _ => return None,
            }),
            (_, c) => word.push(c),
        }
    }
}

fn shortened(word: String) -> String {
    match word.as_bytes().get(..WORD_MAX) {
        Some(start) => String::from_utf8_lossy(start).into_owned(),
        None => word,
    }
}

/// `on` or `off`, and the rest.
fn on_off(text: &str) -> Option<(bool, &str)> {
    let text = skip_spaces(text);
    let (word, rest) =
        text.split_at(text.find(|c: char| !c.is_ascii_graphic()).unwrap_or(text.len()));
    match word {
        "on" => Some((true, rest)),
        "off" => Some((false, rest)),
        _ => None,
    }
}

/// The value of an argument.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    OnOff(bool),
    Text(String),
}

/// The arguments of a line, by name.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments(Vec<(&'static str, Value)>);

impl Arguments {
    /// Parse `text`, which follows a command's name, by QEMU's list of types for the command.
    /// Supports the types of the helper's commands: `-x` (a flag), `b` (on or off), `s` (a word),
    /// `s?` (an optional word), `S` (the rest).
    ///
    /// `None` if QEMU rejects the line instead of running the command.
    pub fn read(types: &'static str, text: &str) -> Option<Self> {
        let mut found = Self::default();
        let mut rest = text;
        let mut types = types;
        while let Some((key, after)) = types.split_once(':') {
            let (kind, after) = after.split_once(',').unwrap_or((after, ""));
            types = after;
            rest = skip_spaces(rest);
            let value;
            (value, rest) = match (kind.as_bytes(), rest) {
                ([b'-', letter], _) => {
                    let (given, rest) = flag(*letter, types, rest)?;
                    (Value::OnOff(given), rest)
                }
                (b"b", _) => {
                    let (value, rest) = on_off(rest)?;
                    (Value::OnOff(value), rest)
                }
                (b"s?", "") => continue,
                (b"S", "") => return None,
                (b"S", _) => (Value::Text(rest.to_owned()), ""),
                _ => {
                    let (word, rest) = word(rest)?;
                    (Value::Text(word), rest)
                }
            };
            found.0.push((key, value));
        }
        // Nothing may remain.
        skip_spaces(rest).is_empty().then_some(found)
    }

    /// Whether this flag is given, or this argument is on.
    pub fn is_on(&self, key: &str) -> bool {
        self.0.iter().any(|(name, value)| *name == key && *value == Value::OnOff(true))
    }

    /// Take this argument's word; empty if it is missing.
    pub fn take(&mut self, key: &str) -> String {
        let text = self.0.iter_mut().find_map(|(name, value)| match value {
            Value::Text(text) if *name == key => Some(std::mem::take(text)),
            _ => None,
        });
        text.unwrap_or_default()
    }
}

/// Whether `flag` is given at the beginning of `text`, and the rest. It is not if a flag listed in
/// `later` is there; any other flag is invalid. So flags have a fixed order, and need no space
/// after them.
fn flag<'a>(flag: u8, later: &str, text: &'a str) -> Option<(bool, &'a str)> {
    let Some(behind) = text.strip_prefix('-') else { return Some((false, text)) };
    if let Some(rest) = behind.strip_prefix(char::from(flag)) {
        return Some((true, rest));
    }
    let other = behind.chars().next().map_or("-".to_owned(), |other| format!("-{other}"));
    later.contains(&other).then_some((false, text))
}

/// Parse all of a text as a number, as QEMU does (`strtoull` with base 0).
pub fn number(text: &str) -> Option<u64> {
    let text = skip_spaces(text);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let hexadecimal = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X"));
    let (digits, radix) = match hexadecimal {
        Some(digits) => (digits, 16),
        None if digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    if digits.starts_with('+') {
        return None;
    }
    let number = u64::from_str_radix(digits, radix).ok()?;
    // C wraps negative numbers.
    Some(if negative { number.wrapping_neg() } else { number })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIGRATE: &str = "detach:-d,blk:-b,inc:-i,resume:-r,uri:s";

    fn migrate(text: &str) -> Option<(String, String)> {
        let mut found = Arguments::read(MIGRATE, text)?;
        let flags = ["detach", "blk", "inc", "resume"];
        let given = flags.iter().filter(|flag| found.is_on(flag)).map(|flag| &flag[..1]).collect();
        Some((given, found.take("uri")))
    }

    #[test]
    fn flags_are_read_in_their_order() {
        for (text, flags, uri) in [
            (" u:1", "", "u:1"),
            (" -d u:1 ", "d", "u:1"),
            (" -du:1", "d", "u:1"),
            ("\t-d-b-i-r\u{b}\u{c}u:1", "dbir", "u:1"),
            (" -d -ru:1", "dr", "u:1"),
            (" -i\"u:1\"", "i", "u:1"),
            ("/u:1", "", "/u:1"),
            (" -du", "d", "u"),
        ] {
            assert_eq!(migrate(text), Some((flags.into(), uri.into())), "{text}");
        }
        for text in [
            "",
            " ",
            " -d",
            " -r -d u:1",
            " -d -d u:1",
            " -x u:1",
            " -D u:1",
            " -- u:1",
            " -",
            " - u:1",
            " \"-d\" u:1",
            " u:1 -d",
            " u:1 x",
            " \"u:1",
            " \"u:\\x\"",
            " \"u:1\"x",
            " -\u{e4} u:1",
        ] {
            assert_eq!(migrate(text), None, "{text}");
        }
    }

    #[test]
    fn words_are_qemus() {
        let word = |text: &str| Arguments::read("w:s", text).map(|mut found| found.take("w"));
        for (text, expected) in [
            ("a", "a"),
            (" \"a b\" ", "a b"),
            ("\"\\\"\\\\\\'\\n\\r\"", "\"\\'\n\r"),
            ("\"\"", ""),
            ("'a'", "'a'"),
            ("a\"b\"", "a\"b\""),
            // Not a space to C.
            ("a\u{a0}b", "a\u{a0}b"),
        ] {
            assert_eq!(word(text), Some(expected.to_owned()), "{text}");
        }
        assert_eq!(word(&"x".repeat(5000)).unwrap().len(), WORD_MAX);
        assert_eq!(Arguments::read("w:s?", " ").unwrap(), Arguments::default());
    }

    #[test]
    fn the_rest_and_on_or_off() {
        let both = |text: &str| {
            let mut found = Arguments::read("name:s,value:S", text)?;
            Some((found.take("name"), found.take("value")))
        };
        assert_eq!(both("a  \"b\" c "), Some(("a".into(), "\"b\" c ".into())));
        assert_eq!(both("\"a\"b"), Some(("a".into(), "b".into())));
        assert_eq!(both("a "), None);
        let state = |text: &str| {
            Arguments::read("capability:s,state:b", text).map(|found| found.is_on("state"))
        };
        assert_eq!((state("a on"), state("\"a\"off ")), (Some(true), Some(false)));
        for text in ["a ON", "a \"on\"", "a", "a onx", "a on x", "a on\u{e9}"] {
            assert_eq!(state(text), None, "{text}");
        }
    }

    #[test]
    fn a_command_ends_at_a_slash() {
        assert_eq!(command("\u{b}migrate/x y"), ("migrate", "/x y"));
        assert_eq!(command("  "), ("", ""));
        assert_eq!(command("migrate\u{a0}x"), ("migrate\u{a0}x", ""));
    }

    #[test]
    fn numbers_are_what_they_are_to_c() {
        for (text, expected) in [
            ("5", 5_u64),
            (" +5", 5),
            ("0x1F", 31),
            ("010", 8),
            ("0", 0),
            ("-1", u64::MAX),
            ("-18446744073709551615", 1),
        ] {
            assert_eq!(number(text), Some(expected), "{text}");
        }
        for text in ["", "-", "0x", "08", "5 ", "1k", "0b1", "++5", "-+5", "18446744073709551616"] {
            assert_eq!(number(text), None, "{text}");
        }
    }
}
