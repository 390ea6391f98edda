//! JSON's tokens, as QEMU's own lexer finds them (`qobject/json-lexer.c`).
//!
//! It takes more than JSON: strings in single quotes, any word of small letters. And it goes on behind
//! what is no token in a way that clients rely on, which put a byte that JSON has not, such as 0xff,
//! before a command so that it is read whatever came before (`docs/interop/qmp-spec.rst`).

use std::ops::Range;

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Token {
    /// One of `{}[],:`.
    Structure(u8),
    /// In quotes of either kind; escapes and encoding are not looked at.
    String,
    /// A number.
    Number,
    /// A word of small letters.
    Keyword,
    /// A byte that can't be there. What came before it of a token, and of a value, is lost with it.
    Stray,
}

/// What a byte does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It ends nothing.
    Goes,
    /// It ends this token.
    Ends(Token),
    /// This token ended before it. The byte is still to be taken.
    Ended(Token),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    /// Between tokens.
    #[default]
    Start,
    /// Behind a stray byte.
    Recovery,
    /// In a string with this quote.
    String(u8),
    /// There, behind a backslash.
    Escape(u8),
    /// Behind a minus.
    Sign,
    /// Behind a zero that begins a number.
    Zero,
    Digits,
    /// Behind a decimal point.
    Point,
    Fraction,
    /// Behind the `e`.
    Exponent,
    ExponentSign,
    ExponentDigits,
    Keyword,
}

/// Cuts bytes into tokens.
#[derive(Debug, Clone, Default)]
pub struct Lexer {
    state: State,
}

impl Lexer {
    /// Take a byte.
    pub fn step(&mut self, byte: u8) -> Step {
        use State as S;
        self.state = match (self.state, byte) {
            (S::Start, _) => return self.begin(byte),
            // The rest of what is no JSON is skipped up to where a value may begin or end.
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

    /// No token has begun.
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

/// The tokens of whole bytes, and where they are.
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
        // The last one may end with the bytes.
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
        // QEMU's zero has no exponent.
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
        // The skipped rest is no part of the next token.
        let skipped = lexed(b"A\tbc \xfe 1");
        assert_eq!(skipped, [stray(b"A"), stray(b"\xfe")]);
    }
}
