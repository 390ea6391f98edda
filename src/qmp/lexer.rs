//! JSON tokens, as QEMU's own lexer finds them (`qobject/json-lexer.c`).
//!
//! QEMU accepts more than JSON: strings in single quotes, and any word of lowercase letters.
//! Clients also rely on its error recovery: they send a byte that JSON does not have, such as 0xff,
//! before a command, so that it is read whatever preceded it (`docs/interop/qmp-spec.rst`).

use std::ops::Range;

/// The kind of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// One of `{}[],:`.
    Structure(u8),
    /// In quotes of either kind; escapes and encoding are not checked.
    String,
    /// A number.
    Number,
    /// A word of lowercase letters.
    Keyword,
    /// An invalid byte. The token and the value that it interrupts are lost.
    Stray,
}

/// The effect of a byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It ends no token.
    Goes,
    /// It ends this token.
    Ends(Token),
    /// This token ended before it. The byte must be processed again.
    Ended(Token),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Between tokens.
    #[default]
    Start,
    /// After a stray byte.
    Recovery,
    /// In a string with this quote.
    String(u8),
    /// In such a string, after a backslash.
    Escape(u8),
    /// After a minus sign.
    Sign,
    /// After a leading zero.
    Zero,
    Digits,
    /// After a decimal point.
    Point,
    Fraction,
    /// After the `e`.
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// Splits bytes into tokens.
#[derive(Debug, Clone, Default)]
pub struct Lexer {
    state: State,
}

impl Lexer {
    /// Process a byte.
    pub fn step(&mut self, byte: u8) -> Step {
        use State as S;
        self.state = match (self.state, byte) {
            (S::Start, _) => return self.begin(byte),
            // Skip invalid input up to where a value may begin or end.
            (S::Recovery, b'\t' | 0x20..=0xfd) if !b"[]{}:,".contains(&byte) => S::Recovery,
            (S::Recovery, _) => return self.begin(byte),
            (S::String(quote), _) if byte == quote => return self.end(Token::String),
            (S::String(quote), b'\\') => S::Escape(quote),
            (S::String(quote) | S::Escape(quote), 0x20..=0xfd) => S::String(quote),
            (S::Sign, b'0') => S::Zero,
            (S::Sign, b'1'..=b'9') | (S::Digits, b'0'..=b'9') => S::Digits,
            (S::Zero, b'0'..=b'9') => return self.stray(),
            (S::Zero | S::Digits, b'.') => S::Point,
            (S::Point | S::Fraction, b'0'..=b'9') => S::Fraction,
            (S::Digits | S::Fraction, b'e' | b'E') => S::Exponent,
            (S::Exponent, b'+' | b'-') => S::ExponentSign,
            (S::Exponent | S::ExponentSign | S::ExponentDigits, b'0'..=b'9') => S::ExponentDigits,
            (S::Zero | S::Digits | S::Fraction | S::ExponentDigits, _) => {
                return self.ended(Token::Number);
            }
            (S::Keyword, b'a'..=b'z') => S::Keyword,
            (S::Keyword, _) => return self.ended(Token::Keyword),
            _ => return self.stray(),
        };
        Step::Goes
    }

    /// Whether no token has begun.
    pub fn is_between(&self) -> bool {
        matches!(self.state, State::Start | State::Recovery)
    }

    fn begin(&mut self, byte: u8) -> Step {
        self.state = match byte {
            b' ' | b'\t' | b'\r' | b'\n' => State::Start,
            b'{' | b'}' | b'[' | b']' | b',' | b':' => return self.end(Token::Structure(byte)),
            b'"' | b'\'' => State::String(byte),
            b'-' => State::Sign,
            b'0' => State::Zero,
            b'1'..=b'9' => State::Digits,
            b'a'..=b'z' => State::Keyword,
            _ => return self.stray(),
        };
        Step::Goes
    }

    fn end(&mut self, token: Token) -> Step {
        self.state = State::Start;
        Step::Ends(token)
    }

    fn ended(&mut self, token: Token) -> Step {
        self.state = State::Start;
        Step::Ended(token)
    }

    fn stray(&mut self) -> Step {
        self.state = State::Recovery;
        Step::Ends(Token::Stray)
    }
}

/// The tokens of `bytes`, and their positions.
pub fn tokens(bytes: &[u8]) -> impl Iterator<Item = (Token, Range<usize>)> {
    let (mut lexer, mut at) = (Lexer::default(), 0);
    std::iter::from_fn(move || {
        let mut start = at;
        while let Some(&byte) = bytes.get(at) {
            match lexer.step(byte) {
                Step::Goes => {
                    at += 1;
                    if lexer.is_between() {
                        start = at;
                    }
                }
                Step::Ends(token) => {
                    at += 1;
                    return Some((token, start..at));
                }
                Step::Ended(token) => return Some((token, start..at)),
            }
        }
        // The last token may end with the input.
        if lexer.is_between() {
            return None;
        }
        match std::mem::take(&mut lexer).step(b'\n') {
            Step::Ended(token) | Step::Ends(token) => Some((token, start..at)),
            Step::Goes => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lexed(text: &[u8]) -> Vec<(Token, &[u8])> {
        tokens(text).map(|(token, range)| (token, &text[range])).collect()
    }

    #[test]
    fn tokens_are_qemus() {
        let text = br#" {"a\"}": 'b"\'', [-0.5e+7 ,10]:true}null"#;
        let texts: Vec<_> =
            lexed(text).iter().map(|(_, text)| str::from_utf8(text).unwrap()).collect();
        let expected = [
            "{",
            r#""a\"}""#,
            ":",
            r#"'b"\''"#,
            ",",
            "[",
            "-0.5e+7",
            ",",
            "10",
            "]",
            ":",
            "true",
            "}",
            "null",
        ];
        assert_eq!(texts, expected);
        assert_eq!(lexed(b"nul 5"), [(Token::Keyword, &b"nul"[..]), (Token::Number, b"5")]);
        // In QEMU a zero has no exponent.
        let zero = [(Token::Number, &b"0"[..]), (Token::Keyword, b"e"), (Token::Number, b"5")];
        assert_eq!(lexed(b"0e5"), zero);
    }

    #[test]
    fn what_is_no_token_ends_where_qemu_goes_on() {
        let stray = |text: &'static [u8]| (Token::Stray, text);
        for (text, expected) in [
            (&b"%p 'x' 7\n5"[..], vec![stray(b"%"), (Token::Number, b"5")]),
            (b"@ x{", vec![stray(b"@"), (Token::Structure(b'{'), b"{")]),
            (b"01,", vec![stray(b"01"), (Token::Structure(b','), b",")]),
            (b"'a\n1\n2", vec![stray(b"'a\n"), (Token::Number, b"2")]),
            (b"\"\xff\x01x", vec![stray(b"\"\xff"), stray(b"\x01")]),
            (b"-", vec![stray(b"-")]),
            (b"'unfinished", vec![stray(b"'unfinished")]),
        ] {
            assert_eq!(lexed(text), expected, "{}", text.escape_ascii());
        }
        // The skipped rest is not part of the next token.
        let skipped = lexed(b"A\tbc \xfe 1");
        assert_eq!(skipped, [stray(b"A"), stray(b"\xfe")]);
    }
}
