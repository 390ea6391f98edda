//! Where one command of a client ends and the next begins.
//!
//! QEMU goes by the balance of brackets, not by lines (`qobject/json-streamer.c`), so several
//! commands on a line and one over many lines both work, and strings may be in single quotes.

use super::ITEM_MAX;

/// What a client sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Framed {
    /// A JSON value in brackets, up to and including the end of its line if nothing else is on it.
    Value(Vec<u8>),
    /// A line that begins with no bracket.
    Malformed,
    /// A value or a line longer than [`ITEM_MAX`], or one beyond QEMU's own limits; it was dropped
    /// up to the end of a line.
    TooLong,
}

/// Most commas, colons and brackets in a value. QEMU takes 2^21 tokens (`MAX_TOKEN_COUNT` of
/// `qobject/json-streamer.c`), values included, and answers what follows with an error a token.
const PUNCTUATION_MAX: usize = 1 << 20;

/// Most brackets in brackets (`MAX_NESTING` there).
const DEPTH_MAX: usize = 1 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Between values.
    Between,
    /// In a value, this deep, in a string with this quote, behind a backslash.
    Value { depth: usize, punctuation: usize, quote: Option<u8>, escaped: bool },
    /// Behind a value: the end of its line belongs to it.
    Behind,
    /// In a line that is no value.
    Garbage,
    /// In something that is too long.
    Dropping,
}

/// Cuts bytes into commands.
#[derive(Debug)]
pub struct Framer {
    buffer: Vec<u8>,
    scanned: usize,
    state: State,
}

impl Default for Framer {
    fn default() -> Self {
        Self { buffer: Vec::new(), scanned: 0, state: State::Between }
    }
}

impl Framer {
    /// Take bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next command that is complete.
    pub fn take(&mut self) -> Option<Framed> {
        while let Some(&byte) = self.buffer.get(self.scanned) {
            if let Some(framed) = self.step(byte) {
                return Some(framed);
            }
            let beyond = match self.state {
                State::Value { depth, punctuation, .. } => {
                    depth > DEPTH_MAX || punctuation > PUNCTUATION_MAX
                }
                _ => false,
            };
            if beyond || self.scanned > ITEM_MAX {
                self.cut();
                self.state = State::Dropping;
            }
        }
        // A value whose line has not ended is complete nevertheless.
        if self.state == State::Behind {
            self.state = State::Between;
            return Some(Framed::Value(self.cut()));
        }
        if self.state == State::Dropping || self.state == State::Between {
            self.cut();
        }
        None
    }

    /// Remove what was scanned.
    fn cut(&mut self) -> Vec<u8> {
        let item = self.buffer.drain(..self.scanned).collect();
        self.scanned = 0;
        item
    }

    /// Scan one byte, or leave it to the next state.
    fn step(&mut self, byte: u8) -> Option<Framed> {
        let end_of_line = byte == b'\n';
        match &mut self.state {
            State::Between if byte.is_ascii_whitespace() => {}
            State::Between => {
                self.cut();
                self.state = match byte {
                    b'{' | b'[' => {
                        State::Value { depth: 1, punctuation: 1, quote: None, escaped: false }
                    }
                    _ => State::Garbage,
                };
            }
            State::Value { escaped: escaped @ true, .. } => *escaped = false,
            State::Value { quote: quote @ Some(_), escaped, .. } => {
                if byte == b'\\' {
                    *escaped = true;
                } else if Some(byte) == *quote {
                    *quote = None;
                }
            }
            State::Value { depth, punctuation, quote, .. } => {
                *punctuation += usize::from(b",:{}[]".contains(&byte));
                match byte {
                    b'"' | b'\'' => *quote = Some(byte),
                    b'{' | b'[' => *depth += 1,
                    b'}' | b']' if *depth == 1 => self.state = State::Behind,
                    b'}' | b']' => *depth -= 1,
                    _ => {}
                }
            }
            State::Behind => {
                let blank = byte == b' ' || byte == b'\r' || byte == b'\t';
                if blank {
                    self.scanned += 1;
                    return None;
                }
                self.scanned += usize::from(end_of_line);
                self.state = State::Between;
                return Some(Framed::Value(self.cut()));
            }
            State::Garbage | State::Dropping if end_of_line => {
                self.scanned += 1;
                self.cut();
                let dropped = self.state == State::Dropping;
                self.state = State::Between;
                return Some(if dropped { Framed::TooLong } else { Framed::Malformed });
            }
            State::Garbage | State::Dropping => {}
        }
        self.scanned += 1;
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(pieces: &[&[u8]]) -> Vec<Framed> {
        let mut framer = Framer::default();
        let mut all = Vec::new();
        for piece in pieces {
            framer.push(piece);
            while let Some(framed) = framer.take() {
                all.push(framed);
            }
        }
        all
    }

    fn value(text: &str) -> Framed {
        Framed::Value(text.as_bytes().to_vec())
    }

    #[test]
    fn a_line_is_a_command() {
        let text = "{\"execute\": \"query-status\"}\r\n";
        assert_eq!(frame(&[text.as_bytes()]), [value(text)]);
    }

    #[test]
    fn brackets_decide_not_lines() {
        let text = "{\"a\": 1}{'b}': '\\'{'} \n{\n \"c\": [\"]\"]\n}\n";
        let expected =
            [value("{\"a\": 1}"), value("{'b}': '\\'{'} \n"), value("{\n \"c\": [\"]\"]\n}\n")];
        assert_eq!(frame(&[text.as_bytes()]), expected);
    }

    #[test]
    fn a_command_without_an_end_of_line_is_complete() {
        assert_eq!(frame(&[b"{}"]), [value("{}")]);
        assert_eq!(frame(&[b"{}", b"\n", b"{}\n"]), [value("{}"), value("{}\n")]);
    }

    #[test]
    fn garbage_ends_with_its_line() {
        assert_eq!(
            frame(&[b"foo {\nbar", b"\n{}\n"]),
            [Framed::Malformed, Framed::Malformed, value("{}\n")]
        );
    }

    #[test]
    fn half_a_command_is_none() {
        assert_eq!(frame(&[b"{\"execute\": \"qu"]), []);
    }

    #[test]
    fn an_endless_command_is_dropped_in_bounds() {
        let mut framer = Framer::default();
        framer.push(b"{\"");
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..64 {
            framer.push(&piece);
            assert_eq!(framer.take(), None);
            assert!(framer.buffer.len() <= ITEM_MAX + piece.len());
        }
        framer.push(b"\"}\n{}\n");
        assert_eq!(framer.take().unwrap(), Framed::TooLong);
        assert_eq!(framer.take().unwrap(), value("{}\n"));
        assert_eq!(framer.take(), None);
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            text in "[{}\\[\\]\"'\\\\a \n]{0,60}\n",
            cut in any::<prop::sample::Index>(),
        ) {
            let bytes = text.as_bytes();
            let cut = cut.index(bytes.len());
            let trimmed = |framed: Vec<Framed>| -> Vec<Framed> {
                framed.into_iter().map(|framed| match framed {
                    Framed::Value(bytes) => Framed::Value(bytes.trim_ascii().to_vec()),
                    other => other,
                }).collect()
            };
            let whole = trimmed(frame(&[bytes]));
            prop_assert_eq!(trimmed(frame(&[&bytes[..cut], &bytes[cut..]])), whole);
        }
    }
}
