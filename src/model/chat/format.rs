//! `'%5.2f' % x` and `'{:>5}'.format(x)`.

use super::limits::fits;
use super::lists;
use super::numbers::Number;
use super::python::{escaped, exponent_of_two_digits, float, python_str, repr};
use super::values::{Dict, Flavor, List};
use super::{invalid, kind};
use minijinja::Error;
use minijinja::value::Value;

/// How one value is written.
#[derive(Clone, Debug)]
struct Style {
    fill: char,
    /// `<`, `>`, `^`, `=`, or nothing.
    align: Option<char>,
    /// `+`, a space, or nothing but minus signs.
    sign: Option<char>,
    /// `#`.
    prefix: bool,
    width: usize,
    /// Between thousands.
    group: Option<char>,
    precision: Option<usize>,
    /// `d`, `f`, `s`, ...
    kind: Option<char>,
}

impl Default for Style {
    fn default() -> Self {
        Self {
            fill: ' ',
            align: None,
            sign: None,
            prefix: false,
            width: 0,
            group: None,
            precision: None,
            kind: None,
        }
    }
}

/// Digits that are written of a number, at most.
const MAX_PRECISION: usize = 10_000;

impl Style {
    /// `text` with a sign or prefix in front, as wide as it must be.
    fn padded(&self, front: &str, text: &str, align: char) -> Result<String, Error> {
        let len = front.chars().count() + text.chars().count();
        fits(self.width.saturating_mul(self.fill.len_utf8()))?;
        let missing = self.width.saturating_sub(len);
        let fill = |n: usize| self.fill.to_string().repeat(n);
        Ok(match self.align.unwrap_or(align) {
            '<' => format!("{front}{text}{}", fill(missing)),
            '^' => format!(
                "{}{front}{text}{}",
                fill(missing / 2),
                fill(missing - missing / 2)
            ),
            '=' => format!("{front}{}{text}", fill(missing)),
            _ => format!("{}{front}{text}", fill(missing)),
        })
    }

    fn front(&self, negative: bool) -> String {
        match (negative, self.sign) {
            (true, _) => "-".to_owned(),
            (false, Some(sign @ ('+' | ' '))) => sign.to_string(),
            _ => String::new(),
        }
    }

    fn text(&self, text: &str) -> Result<String, Error> {
        match self.precision {
            Some(most) => {
                let cut: String = text.chars().take(most).collect();
                self.padded("", &cut, '<')
            }
            None => self.padded("", text, '<'),
        }
    }

    fn int(&self, n: i128) -> Result<String, Error> {
        let size = n.unsigned_abs();
        let (prefix, mut digits) = match self.kind {
            Some('x') => ("0x", format!("{size:x}")),
            Some('X') => ("0X", format!("{size:X}")),
            Some('o') => ("0o", format!("{size:o}")),
            Some('b') => ("0b", format!("{size:b}")),
            _ => ("", size.to_string()),
        };
        if let Some(least) = self.precision {
            let missing = least.min(MAX_PRECISION).saturating_sub(digits.len());
            digits = "0".repeat(missing) + &digits;
        }
        let mut front = self.front(n < 0);
        if self.prefix {
            front.push_str(prefix);
        }
        let every = if prefix.is_empty() { 3 } else { 4 };
        self.padded(&front, &self.grouped(&digits, every), '>')
    }

    fn grouped(&self, digits: &str, every: usize) -> String {
        let Some(group) = self.group else {
            return digits.to_owned();
        };
        let (whole, rest) = digits.split_at(digits.find(['.', 'e']).unwrap_or(digits.len()));
        let mut out = String::new();
        for (i, c) in whole.chars().enumerate() {
            if i > 0 && (whole.len() - i).is_multiple_of(every) {
                out.push(group);
            }
            out.push(c);
        }
        out + rest
    }

    fn float(&self, x: f64) -> Result<String, Error> {
        let size = x.abs();
        let upper = self.kind.is_some_and(|k| k.is_ascii_uppercase());
        let precision = self.precision.map(|p| p.min(MAX_PRECISION));
        let mut digits = match self.kind.map(|k| k.to_ascii_lowercase()) {
            _ if !x.is_finite() => float(size),
            Some('e') => exponent_of_two_digits(&format!("{size:.*e}", precision.unwrap_or(6))),
            Some('f') => format!("{size:.*}", precision.unwrap_or(6)),
            Some('%') => format!("{:.*}%", precision.unwrap_or(6), size * 100.0),
            Some('g' | 'n') => general(size, precision.unwrap_or(6), self.prefix, false),
            _ => match precision {
                Some(precision) => general(size, precision, self.prefix, true),
                None => float(size),
            },
        };
        if upper {
            digits = digits.to_uppercase();
        }
        let front = self.front(x.is_sign_negative() && !x.is_nan());
        self.padded(&front, &self.grouped(&digits, 3), '>')
    }

    /// As `format(value, style)`.
    fn value(&self, value: &Value) -> Result<String, Error> {
        let unknown = || {
            let style = self.kind.unwrap_or(' ');
            Err(invalid(format!(
                "unknown format {style:?} for {}",
                kind(value)
            )))
        };
        if let Some(text) = value.as_str() {
            let fits = self.sign.is_none()
                && !self.prefix
                && self.group.is_none()
                && self.align != Some('=');
            return match self.kind {
                None | Some('s') if fits => self.text(text),
                _ => unknown(),
            };
        }
        match (Number::of(value), self.kind) {
            (Some(Number::Int(_)), None) if !value.is_integer() => {
                // A boolean without a style of its own.
                let plain = self.width == 0 && self.align.is_none();
                match plain {
                    true => Ok(python_str(value)?.into_owned()),
                    false => self.int(i128::from(value.is_true())),
                }
            }
            (Some(Number::Int(n)), None | Some('d' | 'n' | 'x' | 'X' | 'o' | 'b')) => {
                match self.precision {
                    None => self.int(n),
                    Some(_) => Err(invalid("a precision for a whole number")),
                }
            }
            (Some(Number::Int(n)), Some('c')) => self.padded("", &character(n)?, '<'),
            (Some(n), Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')) => self.float(n.float()),
            (Some(Number::Float(x)), None | Some('n')) => self.float(x),
            (Some(_), _) => unknown(),
            (None, None) if self.width == 0 && self.align.is_none() && self.precision.is_none() => {
                Ok(python_str(value)?.into_owned())
            }
            (None, _) => Err(invalid(format!("{} has no such format", kind(value)))),
        }
    }
}

fn character(n: i128) -> Result<String, Error> {
    let c = u32::try_from(n).ok().and_then(char::from_u32);
    Ok(c.ok_or_else(|| invalid("no character has this number"))?
        .to_string())
}

/// `%g`: so many digits, in exponential form for the very large and small.
fn general(x: f64, precision: usize, keep_zeros: bool, with_fraction: bool) -> String {
    let precision = precision.max(1);
    let scientific = format!("{x:.*e}", precision - 1);
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i64 = exponent.parse().unwrap_or(0);
    let trimmed = |digits: &str| match digits.contains('.') && !keep_zeros {
        true => digits
            .trim_end_matches('0')
            .trim_end_matches('.')
            .to_owned(),
        false => digits.to_owned(),
    };
    // Without a letter for the style, a number keeps one digit of its fraction.
    let most = precision as i64 - i64::from(with_fraction && precision > 1);
    if exponent < -4 || exponent >= most.max(1) && (exponent >= precision as i64 || with_fraction) {
        return exponent_of_two_digits(&format!("{}e{exponent}", trimmed(digits)));
    }
    let places = usize::try_from(precision as i64 - 1 - exponent).unwrap_or(0);
    let text = trimmed(&format!("{x:.places$}"));
    match with_fraction && !text.contains('.') {
        true => text + ".0",
        false => text,
    }
}

/// `repr(value)` with what is not ASCII escaped.
fn ascii(value: &Value) -> Result<String, Error> {
    let mut text = String::new();
    repr(value, &mut text)?;
    let mut out = String::new();
    for c in text.chars() {
        match c.is_ascii() {
            true => out.push(c),
            false => escaped(c, &mut out),
        }
    }
    Ok(out)
}

/// `format % values`.
pub(super) fn percent(format: &str, values: &Value) -> Result<String, Error> {
    let tuple = values
        .downcast_object_ref::<List>()
        .filter(|l| matches!(l.flavor, Flavor::Tuple | Flavor::Group));
    let items = tuple.map_or(std::slice::from_ref(values), |l| &l.items);
    let mut items = items.iter();
    let mut named = false;
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    while let Some(c) = chars.next() {
        fits(out.len())?;
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut value = None;
        if chars.peek() == Some(&'(') {
            let name: String = chars.by_ref().skip(1).take_while(|&c| c != ')').collect();
            let dict = values
                .downcast_object_ref::<Dict>()
                .ok_or_else(|| invalid("format requires a mapping"))?;
            let found = dict.get(&Value::from(name.as_str()));
            value = Some(
                found
                    .cloned()
                    .ok_or_else(|| invalid(format!("no value for {name:?}")))?,
            );
            named = true;
        }
        let mut next = || {
            items
                .next()
                .cloned()
                .ok_or_else(|| invalid("not enough arguments for format string"))
        };
        let mut style = Style::default();
        while let Some(flag) = chars.next_if(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => style.align = Some('<'),
                '+' => style.sign = Some('+'),
                ' ' => style.sign = style.sign.or(Some(' ')),
                '#' => style.prefix = true,
                _ => style.fill = '0',
            }
        }
        let mut number = |chars: &mut std::iter::Peekable<std::str::Chars>| {
            if chars.next_if_eq(&'*').is_some() {
                return next().and_then(|v| super::arguments::whole(&v));
            }
            let mut n = 0_i64;
            while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
                chars.next();
                n = n.saturating_mul(10).saturating_add(digit.into());
            }
            Ok(n)
        };
        let width = number(&mut chars)?;
        if width < 0 {
            style.align = Some('<');
        }
        style.width = usize::try_from(width.unsigned_abs()).unwrap_or(usize::MAX);
        if chars.next_if_eq(&'.').is_some() {
            style.precision = Some(usize::try_from(number(&mut chars)?).unwrap_or(0));
        }
        while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
        let letter = chars.next().ok_or_else(|| invalid("incomplete format"))?;
        if letter == '%' {
            out.push('%');
            continue;
        }
        let value = match value {
            Some(value) => value,
            None => next()?,
        };
        out.push_str(&converted(style, letter, &value)?);
    }
    let mapping = values.is_undefined()
        || values.downcast_object_ref::<Dict>().is_some()
        || values
            .downcast_object_ref::<List>()
            .is_some_and(|l| l.flavor == Flavor::List);
    match items.next() {
        Some(_) if !named && !mapping => Err(invalid(
            "not all arguments converted during string formatting",
        )),
        _ => Ok(out),
    }
}

/// One `%` with its letter.
fn converted(mut style: Style, letter: char, value: &Value) -> Result<String, Error> {
    // Zeros stand between the sign and the digits, and only where there is room on the left.
    let zeros = style.fill == '0';
    style.fill = ' ';
    let zeros = |mut style: Style| {
        if zeros && style.align.is_none() {
            (style.fill, style.align) = ('0', Some('='));
        }
        style.align = style.align.or(Some('>'));
        style
    };
    let number =
        || Number::of(value).ok_or_else(|| invalid(format!("%{letter} of {}", kind(value))));
    style.kind = Some(letter);
    match letter {
        's' | 'r' | 'a' => {
            let mut text = String::new();
            match letter {
                's' => text.push_str(&python_str(value)?),
                'r' => repr(value, &mut text)?,
                _ => text = ascii(value)?,
            }
            style.align = style.align.or(Some('>'));
            style.text(&text)
        }
        'c' => {
            let text = match value.as_str() {
                Some(text) if text.chars().count() == 1 => text.to_owned(),
                Some(_) => return Err(invalid("%c requires one character")),
                None => match number()? {
                    Number::Int(n) => character(n)?,
                    Number::Float(_) => return Err(invalid("%c requires a whole number")),
                },
            };
            style.align = style.align.or(Some('>'));
            style.padded("", &text, '>')
        }
        'd' | 'i' | 'u' => match number()? {
            Number::Int(n) => zeros(style).int(n),
            Number::Float(x) if x.is_finite() => zeros(style).int(x as i128),
            Number::Float(_) => Err(invalid("no whole number")),
        },
        'x' | 'X' | 'o' => match number()? {
            Number::Int(n) => zeros(style).int(n),
            Number::Float(_) => Err(invalid(format!("%{letter} of a fraction"))),
        },
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => zeros(style).float(number()?.float()),
        _ => Err(invalid(format!("unsupported format character {letter:?}"))),
    }
}

/// Values of `text.format(...)`.
pub(super) struct Fields<'a> {
    pub(super) placed: &'a [Value],
    pub(super) named: &'a [(String, Value)],
}

/// `text.format(...)`.
pub(super) fn braces(text: &str, fields: &Fields<'_>) -> Result<String, Error> {
    let mut next = Some(0);
    written(text, fields, &mut next, 2)
}

fn written(
    text: &str,
    fields: &Fields<'_>,
    next: &mut Option<usize>,
    levels: u8,
) -> Result<String, Error> {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        fits(out.len())?;
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = after;
            continue;
        }
        if brace == "}" {
            return Err(invalid("single '}' in a format"));
        }
        let mut depth = 1;
        let end = rest.char_indices().find(|&(_, c)| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            depth == 0
        });
        let (end, _) = end.ok_or_else(|| invalid("single '{' in a format"))?;
        let field = &rest[..end];
        rest = &rest[end + 1..];
        // A colon within an index is no end of it.
        let open = |at: usize| {
            field[..at]
                .rfind('[')
                .is_some_and(|b| !field[b..at].contains(']'))
        };
        let cut = field
            .char_indices()
            .find(|&(at, c)| matches!(c, ':' | '!') && !open(at));
        let (name, style) = cut.map_or((field, ""), |(at, _)| field.split_at(at));
        let value = field_value(name, fields, next)?;
        let (conversion, style) = match style.strip_prefix('!') {
            Some(rest) => {
                let (conversion, style) = rest.split_at(rest.find(':').unwrap_or(rest.len()));
                (Some(conversion), style)
            }
            None => (None, style),
        };
        let value = match conversion {
            None => value,
            Some("s") => Value::from(python_str(&value)?.as_ref()),
            Some("a") => ascii(&value)?.into(),
            Some("r") => {
                let mut text = String::new();
                repr(&value, &mut text)?;
                text.into()
            }
            Some(other) => return Err(invalid(format!("unknown conversion {other:?}"))),
        };
        let style = style.strip_prefix(':').unwrap_or("");
        let style = match levels {
            0 => return Err(invalid("fields within fields within fields")),
            _ => written(style, fields, next, levels - 1)?,
        };
        out.push_str(&style_of(&style)?.value(&value)?);
    }
    Ok(out + rest)
}

/// `0.name[key]` of the fields.
fn field_value(name: &str, fields: &Fields<'_>, next: &mut Option<usize>) -> Result<Value, Error> {
    let first = &name[..name.find(['.', '[']).unwrap_or(name.len())];
    let missing = || invalid(format!("no value for the field {first:?}"));
    let place = match (first, &next) {
        ("", Some(at)) => {
            let at = *at;
            *next = Some(at + 1);
            Some(at)
        }
        ("", None) => return Err(invalid("fields with and without numbers")),
        _ => first.parse::<usize>().ok(),
    };
    if place.is_some() && !first.is_empty() {
        if next.is_some_and(|n| n > 0) {
            return Err(invalid("fields with and without numbers"));
        }
        *next = None;
    }
    let mut value = match place {
        Some(at) => fields.placed.get(at).cloned().ok_or_else(missing)?,
        None => {
            let found = fields.named.iter().find(|(key, _)| key == first);
            found.map(|(_, value)| value.clone()).ok_or_else(missing)?
        }
    };
    let mut rest = &name[first.len()..];
    while !rest.is_empty() {
        let (found, after) = if let Some(inside) = rest.strip_prefix('[') {
            let (key, after) = inside
                .split_once(']')
                .ok_or_else(|| invalid("missing ']' in a format"))?;
            let key = key
                .parse::<u32>()
                .map_or_else(|_| Value::from(key), Value::from);
            (lists::item(&value, &key)?, after)
        } else {
            let inside = rest.strip_prefix('.').ok_or_else(missing)?;
            let (key, after) = inside.split_at(inside.find(['.', '[']).unwrap_or(inside.len()));
            (lists::attribute(&value, key)?, after)
        };
        value = found;
        rest = after;
    }
    Ok(value)
}

/// `[[fill]align][sign][#][0][width][group][.precision][type]`.
fn style_of(text: &str) -> Result<Style, Error> {
    let mut style = Style::default();
    let mut chars: Vec<char> = text.chars().rev().collect();
    let align = |c: Option<&char>| c.copied().filter(|c| "<>^=".contains(*c));
    if let [.., second, first] = chars[..]
        && align(Some(&second)).is_some()
    {
        (style.fill, style.align) = (first, Some(second));
        chars.truncate(chars.len() - 2);
    } else if let Some(found) = align(chars.last()) {
        style.align = Some(found);
        chars.pop();
    }
    style.sign = chars.pop_if(|c| "+- ".contains(*c));
    style.prefix = chars.pop_if(|c| *c == '#').is_some();
    if chars.pop_if(|c| *c == '0').is_some() && style.align.is_none() {
        (style.fill, style.align) = ('0', Some('='));
    }
    let number = |chars: &mut Vec<char>| {
        let mut n = None;
        while let Some(digit) = chars.pop_if(|c| c.is_ascii_digit()) {
            let digit = digit.to_digit(10).unwrap_or(0) as usize;
            n = Some(
                n.unwrap_or(0_usize)
                    .saturating_mul(10)
                    .saturating_add(digit),
            );
        }
        n
    };
    style.width = number(&mut chars).unwrap_or(0);
    style.group = chars.pop_if(|c| matches!(c, ',' | '_'));
    if chars.pop_if(|c| *c == '.').is_some() {
        let precision = number(&mut chars);
        style.precision =
            Some(precision.ok_or_else(|| invalid("format specifier missing precision"))?);
    }
    style.kind = chars.pop();
    match chars.is_empty() {
        true => Ok(style),
        false => Err(invalid(format!("invalid format specifier {text:?}"))),
    }
}
