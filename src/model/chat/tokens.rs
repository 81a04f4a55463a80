//! Words of the expressions in a template's tags.

use super::source::Unreadable;

/// One word of an expression.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Name(String),
    Text(String),
    Int(i128),
    Float(f64),
    /// An operator, bracket, comma, ...
    Sign(&'static str),
}

impl Token {
    pub(super) fn is_name(&self, name: &str) -> bool {
        matches!(self, Token::Name(n) if n == name)
    }

    pub(super) fn is_sign(&self, sign: &str) -> bool {
        matches!(self, Token::Sign(s) if *s == sign)
    }
}

/// Longer ones before those that they begin with.
const SIGNS: [&str; 28] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";", "!", "?",
];

/// The words of a tag.
pub(super) struct Tag {
    pub(super) tokens: Vec<Token>,
    /// Bytes up to the end of the tag, which is included.
    pub(super) len: usize,
    /// The sign before the end, for white space: `-`, `+` or nothing.
    pub(super) control: &'static str,
}

/// Reads the words at the start of `text` up to `end`, which ends the tag where no bracket is open.
pub(super) fn tag(text: &str, end: &str) -> Result<Tag, Unreadable> {
    let mut tokens = Vec::new();
    let mut open: Vec<char> = Vec::new();
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        if open.is_empty() {
            for (control, len) in [("", 0), ("-", 1), ("+", 1)] {
                // Only blocks have a plus here.
                let known = control != "+" || end == "%}";
                if known && rest.starts_with(control) && rest[len..].starts_with(end) {
                    let len = at + len + end.len();
                    return Ok(Tag {
                        tokens,
                        len,
                        control,
                    });
                }
            }
        }
        at += match c {
            c if c.is_whitespace() => c.len_utf8(),
            '\'' | '"' => {
                let (value, len) = string(rest, c)?;
                tokens.push(Token::Text(value));
                len
            }
            '0'..='9' => {
                let after_dot = tokens.last().is_some_and(|t| t.is_sign("."));
                let (token, len) = number(rest, after_dot)?;
                tokens.push(token);
                len
            }
            c if c == '_' || c.is_alphanumeric() => {
                let ends = |c: char| c != '_' && !c.is_alphanumeric();
                let len = rest.find(ends).unwrap_or(rest.len());
                tokens.push(Token::Name(rest[..len].to_owned()));
                len
            }
            _ => {
                let sign = SIGNS.iter().find(|s| rest.starts_with(**s));
                let sign = *sign.ok_or_else(|| Unreadable(format!("unexpected {c:?}")))?;
                match sign {
                    "(" | "[" | "{" => open.push(c),
                    ")" | "]" | "}" => {
                        let opened = open.pop();
                        if !matches!(
                            (opened, c),
                            (Some('('), ')') | (Some('['), ']') | (Some('{'), '}')
                        ) {
                            return Err(Unreadable(format!("unexpected {c:?}")));
                        }
                    }
                    _ => {}
                }
                tokens.push(Token::Sign(sign));
                sign.len()
            }
        };
    }
    Err(Unreadable(format!("a tag has no end, {end:?}")))
}

/// A number, and its length. Behind a dot a number is an index, so that it has no fraction.
fn number(text: &str, after_dot: bool) -> Result<(Token, usize), Unreadable> {
    let wrong = || {
        Unreadable(format!(
            "no number: {:?}",
            text.chars().take(20).collect::<String>()
        ))
    };
    for (prefix, radix) in [("0b", 2), ("0o", 8), ("0x", 16)] {
        if text
            .get(..2)
            .is_some_and(|p| p.eq_ignore_ascii_case(prefix))
        {
            let digits = |c: char| c != '_' && !c.is_digit(radix);
            let len = text[2..].find(digits).map_or(text.len(), |n| n + 2);
            let value = i128::from_str_radix(&text[2..len].replace('_', ""), radix);
            return Ok((Token::Int(value.map_err(|_| wrong())?), len));
        }
    }
    let whole = digits(text);
    let mut len = whole;
    if !after_dot {
        if text[len..].starts_with('.') && digits(&text[len + 1..]) > 0 {
            len += 1 + digits(&text[len + 1..]);
        }
        if text[len..].starts_with(['e', 'E']) {
            let sign = usize::from(text[len + 1..].starts_with(['+', '-']));
            let exponent = digits(&text[len + 1 + sign..]);
            if exponent > 0 {
                len += 1 + sign + exponent;
            }
        }
    }
    let plain = text[..len].replace('_', "");
    if len > whole {
        return Ok((Token::Float(plain.parse().map_err(|_| wrong())?), len));
    }
    if plain.len() > 1 && plain.starts_with('0') && !plain.trim_start_matches('0').is_empty() {
        return Err(wrong());
    }
    Ok((Token::Int(plain.parse().map_err(|_| wrong())?), len))
}

/// Length of digits with single underscores between them.
fn digits(text: &str) -> usize {
    let bytes = text.as_bytes();
    let digit = |i: usize| bytes.get(i).is_some_and(u8::is_ascii_digit);
    let mut len = 0;
    while digit(len) || len > 0 && bytes.get(len) == Some(&b'_') && digit(len - 1) && digit(len + 1)
    {
        len += 1;
    }
    len
}

/// A string literal of Python, and its length with both quotes.
fn string(text: &str, quote: char) -> Result<(String, usize), Unreadable> {
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = chars.next() {
        if c == quote {
            return Ok((out, at + 1));
        }
        if c != '\\' {
            out.push(c);
            continue;
        }
        let Some((at, c)) = chars.next() else { break };
        let hex = |len: usize| {
            let digits = text.get(at + 1..at + 1 + len);
            let code = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
            let c = code.and_then(char::from_u32);
            c.ok_or_else(|| {
                Unreadable(
                    "no character: \\".to_owned() + &text[at..].chars().take(9).collect::<String>(),
                )
            })
        };
        let (decoded, skipped) = match c {
            '\n' => continue,
            '\\' | '\'' | '"' => (c, 0),
            'a' => ('\u{7}', 0),
            'b' => ('\u{8}', 0),
            'f' => ('\u{c}', 0),
            'n' => ('\n', 0),
            'r' => ('\r', 0),
            't' => ('\t', 0),
            'v' => ('\u{b}', 0),
            'x' => (hex(2)?, 2),
            'u' => (hex(4)?, 4),
            'U' => (hex(8)?, 8),
            '0'..='7' => {
                let octal = text[at..]
                    .bytes()
                    .take(3)
                    .take_while(|b| (b'0'..=b'7').contains(b));
                let code = octal.clone().fold(0, |n, b| n * 8 + u32::from(b - b'0'));
                (char::from_u32(code).unwrap_or_default(), octal.count() - 1)
            }
            'N' => {
                return Err(Unreadable(
                    "names of characters, \\N{...}, are not known".to_owned(),
                ));
            }
            c => {
                out.push('\\');
                (c, 0)
            }
        };
        out.push(decoded);
        for _ in 0..skipped {
            chars.next();
        }
    }
    Err(Unreadable(format!("a text has no end, {quote}")))
}
