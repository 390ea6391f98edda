//! Splits a client's bytes into commands.
//!
//! Like QEMU it counts brackets, not lines (`qobject/json-streamer.c`), so several commands on one
//! line and one command over many lines both work. QEMU answers each piece that is cut here once.
//! No piece leaves QEMU in the middle of a value, so other commands can be sent between any two.

use super::{
    ITEM_MAX,
    lexer::{Lexer, Step, Token},
    scan::DEPTH_MAX,
};

/// A piece of a client's input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Framed {
    /// A value in brackets.
    Value(Vec<u8>),
    /// Input that QEMU rejects as it is: a token outside brackets, mismatched brackets, or
    /// everything up to a byte that JSON does not have.
    Malformed(Vec<u8>),
    /// A value longer than [`ITEM_MAX`], or with more tokens than QEMU's limit. It is dropped up to
    /// the end of a line or a byte that JSON does not have.
    TooLong,
    /// A value of more than [`DEPTH_MAX`] nested brackets, dropped in the same way.
    TooDeep,
}

/// Most tokens in a value (`MAX_TOKEN_COUNT` of `qobject/json-streamer.c`).
const TOKENS_MAX: usize = 2 << 20;

/// Splits bytes into commands.
#[derive(Debug, Default)]
pub struct Framer {
    buffer: Vec<u8>,
    /// Index in `buffer` of the value that is being read.
    start: usize,
    scanned: usize,
    lexer: Lexer,
    /// How many are open. QEMU counts each kind separately.
    braces: isize,
    brackets: isize,
    tokens: usize,
    /// What is being dropped, if anything.
    dropping: Option<Framed>,
}

impl Framer {
    /// Append bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next complete command.
    pub fn take(&mut self) -> Option<Framed> {
        while let Some(&byte) = self.buffer.get(self.scanned) {
            let framed = if self.dropping.is_some() { self.skip(byte) } else { self.step(byte) };
            if framed.is_some() {
                return framed;
            }
        }
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        None
    }

    /// Scan one byte, or leave it for the next token.
    fn step(&mut self, byte: u8) -> Option<Framed> {
        let step = self.lexer.step(byte);
        self.scanned += usize::from(!matches!(step, Step::Ended(_)));
        match step {
            Step::Goes if self.tokens == 0 && self.lexer.is_between() => self.start = self.scanned,
            Step::Goes => {}
            Step::Ends(token) | Step::Ended(token) => return self.token(token),
        }
        if self.scanned - self.start > ITEM_MAX {
            self.drop_as(Framed::TooLong);
        }
        None
    }

    fn token(&mut self, token: Token) -> Option<Framed> {
        self.tokens += 1;
        match token {
            Token::Structure(b'{') => self.braces += 1,
            Token::Structure(b'}') => self.braces -= 1,
            Token::Structure(b'[') => self.brackets += 1,
            Token::Structure(b']') => self.brackets -= 1,
            _ => {}
        }
        let open = (self.braces, self.brackets);
        if token == Token::Stray || open.0 < 0 || open.1 < 0 {
            return Some(Framed::Malformed(self.cut()));
        }
        if open == (0, 0) {
            let in_brackets = self.tokens > 1;
            let bytes = self.cut();
            return Some(if in_brackets { Framed::Value(bytes) } else { Framed::Malformed(bytes) });
        }
        if (open.0 + open.1).unsigned_abs() > DEPTH_MAX {
            self.drop_as(Framed::TooDeep);
        } else if self.tokens > TOKENS_MAX {
            self.drop_as(Framed::TooLong);
        }
        None
    }

    /// Remove the scanned bytes, and start over.
    fn cut(&mut self) -> Vec<u8> {
        let bytes = self.buffer[self.start..self.scanned].to_vec();
        self.begin();
        bytes
    }

    fn begin(&mut self) {
        self.start = self.scanned;
        (self.braces, self.brackets, self.tokens) = (0, 0, 0);
    }

    fn drop_as(&mut self, what: Framed) {
        self.begin();
        self.lexer = Lexer::default();
        self.dropping = Some(what);
    }

    fn skip(&mut self, byte: u8) -> Option<Framed> {
        self.scanned += 1;
        self.start = self.scanned;
        let goes_on = matches!(byte, b'\t' | b'\r' | 0x20..=0xfd);
        if goes_on { None } else { self.dropping.take() }
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

    fn malformed(bytes: &[u8]) -> Framed {
        Framed::Malformed(bytes.to_vec())
    }

    #[test]
    fn a_line_is_a_command() {
        let text = "{\"execute\": \"query-status\"}";
        assert_eq!(frame(&[b"\r\n ", text.as_bytes(), b"\r\n"]), [value(text)]);
    }

    #[test]
    fn brackets_decide_not_lines() {
        let text = "{\"a\": 1}{'b}': '\\'{'} \n{\n \"c\": [\"]\"]\n}\n";
        let expected =
            [value("{\"a\": 1}"), value("{'b}': '\\'{'}"), value("{\n \"c\": [\"]\"]\n}")];
        assert_eq!(frame(&[text.as_bytes()]), expected);
    }

    #[test]
    fn a_command_without_an_end_of_line_is_complete() {
        assert_eq!(frame(&[b"{}"]), [value("{}")]);
        assert_eq!(frame(&[b"{}", b"\n", b"{}\n"]), [value("{}"), value("{}")]);
    }

    /// QEMU answers each piece with one error.
    #[test]
    fn what_is_wrong_ends_where_qemu_answers_it() {
        for (text, expected) in [
            (
                &b"foo 5 {\n}'x'"[..],
                vec![malformed(b"foo"), malformed(b"5"), value("{\n}"), malformed(b"'x'")],
            ),
            (b"{]}", vec![malformed(b"{]"), malformed(b"}")]),
            (b"{[}]", vec![value("{[}]")]),
            (b",:", vec![malformed(b","), malformed(b":")]),
            (b"{'a\xff{}", vec![malformed(b"{'a\xff"), value("{}")]),
            (b"\x01\xff {}", vec![malformed(b"\x01"), malformed(b"\xff"), value("{}")]),
            (b"@ rest of it {}", vec![malformed(b"@"), value("{}")]),
            (b"{'execute': '\n{}", vec![malformed(b"{'execute': '\n"), value("{}")]),
            (b"null", vec![]),
        ] {
            assert_eq!(frame(&[text]), expected, "{}", text.escape_ascii());
        }
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
        assert_eq!(framer.take().unwrap(), value("{}"));
        assert_eq!(framer.take(), None);
    }

    #[test]
    fn qemus_limits_are_kept() {
        let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        let deepest = nested(DEPTH_MAX);
        let text = format!("{deepest}{}\n{{}}", nested(DEPTH_MAX + 1));
        assert_eq!(frame(&[text.as_bytes()]), [value(&deepest), Framed::TooDeep, value("{}")]);
        let many = format!("[{}0]\u{1}{{}}", "0,".repeat(TOKENS_MAX / 2));
        assert_eq!(frame(&[many.as_bytes()]), [Framed::TooLong, value("{}")]);
    }

    proptest! {
        #[test]
        fn cuts_do_not_matter(
            text in "[{}\\[\\]\"'\\\\,:a1. \n\u{1}é]{0,60}\n",
            cut in any::<prop::sample::Index>(),
        ) {
            let bytes = text.as_bytes();
            let cut = cut.index(bytes.len());
            prop_assert_eq!(frame(&[&bytes[..cut], &bytes[cut..]]), frame(&[bytes]));
        }
    }
}
