//! Values as Python writes them.

use super::invalid;
use super::limits::fits;
use super::values::{Dict, Flavor, List, MAX_NESTING};
use minijinja::Error;
use minijinja::value::{Value, ValueKind};
use std::borrow::Cow;
use std::fmt::Write;

/// What Python's `str.strip` removes.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// What Python's `str.splitlines` cuts at.
fn ends_line(c: char) -> bool {
    matches!(
        c,
        '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
    )
}

/// `text.splitlines(keep_ends)`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(ends_line).unwrap_or(rest.len());
        let len = match rest[end..].strip_prefix("\r\n") {
            Some(_) => 2,
            None => rest[end..].chars().next().map_or(0, char::len_utf8),
        };
        out.push(&rest[..if keep_ends { end + len } else { end }]);
        rest = &rest[end + len..];
    }
    out
}

/// `str(value)`.
pub(super) fn python_str(value: &Value) -> Result<Cow<'_, str>, Error> {
    match value.as_str() {
        Some(text) => Ok(text.into()),
        None if value.is_undefined() => Ok("".into()),
        None => {
            let mut out = String::new();
            repr(value, &mut out)?;
            Ok(out.into())
        }
    }
}

/// `repr(value)`, to the end of `out`.
pub(super) fn repr(value: &Value, out: &mut String) -> Result<(), Error> {
    repr_at(value, out, 0)
}

fn repr_at(value: &Value, out: &mut String, depth: u16) -> Result<(), Error> {
    fits(out.len())?;
    if depth > 2 * MAX_NESTING {
        return Err(invalid("values are nested too deeply"));
    }
    if let Some(list) = value.downcast_object_ref::<List>() {
        return repr_list(list, out, depth);
    }
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Undefined => out.push_str("Undefined"),
        _ => match value.downcast_object_ref::<Dict>() {
            Some(dict) => repr_dict(dict.entries(), out, depth)?,
            None => repr_object(value, out, depth)?,
        },
    }
    Ok(())
}

fn repr_list(list: &List, out: &mut String, depth: u16) -> Result<(), Error> {
    let (begin, end) = match list.flavor {
        Flavor::List => ("[", "]"),
        Flavor::Tuple | Flavor::Group => ("(", ")"),
        Flavor::Keys => ("dict_keys([", "])"),
        Flavor::Values => ("dict_values([", "])"),
        Flavor::Items => ("dict_items([", "])"),
        Flavor::Generator => {
            return Err(invalid(
                "what is computed on demand has no text: make a list of it",
            ));
        }
        Flavor::Range(start, stop, step) => {
            let _ = match step {
                1 => write!(out, "range({start}, {stop})"),
                _ => write!(out, "range({start}, {stop}, {step})"),
            };
            return Ok(());
        }
    };
    out.push_str(begin);
    for (i, item) in list.items.iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        repr_at(item, out, depth + 1)?;
    }
    if begin == "(" && list.items.len() == 1 {
        out.push(',');
    }
    out.push_str(end);
    Ok(())
}

fn repr_dict(entries: &[(Value, Value)], out: &mut String, depth: u16) -> Result<(), Error> {
    out.push('{');
    for (i, (key, value)) in entries.iter().enumerate() {
        if i > 0 {
            out.push_str(", ");
        }
        repr_at(key, out, depth + 1)?;
        out.push_str(": ");
        repr_at(value, out, depth + 1)?;
    }
    out.push('}');
    Ok(())
}

/// What the template's own statements make.
fn repr_object(value: &Value, out: &mut String, depth: u16) -> Result<(), Error> {
    if is_namespace(value) {
        out.push_str("<Namespace ");
        let keys: Vec<_> = value.try_iter()?.collect();
        let entries = keys
            .into_iter()
            .map(|key| (key.clone(), value.get_item(&key).unwrap_or_default()));
        repr_dict(&entries.collect::<Vec<_>>(), out, depth + 1)?;
        out.push('>');
        return Ok(());
    }
    let text = value.to_string();
    if let Some(name) = text
        .strip_prefix("<macro ")
        .and_then(|t| t.strip_suffix('>'))
    {
        let _ = write!(out, "<Macro '{name}'>");
    } else if let Some(place) = text
        .strip_prefix("<loop ")
        .and_then(|t| t.strip_suffix('>'))
    {
        // Counted from 1.
        let (at, of) = place.split_once('/').unwrap_or((place, ""));
        let at = at.parse::<usize>().unwrap_or_default() + 1;
        let _ = write!(out, "<LoopContext {at}/{of}>");
    } else {
        out.push_str(&text);
    }
    Ok(())
}

/// Whether `value` is what `namespace()` made.
pub(super) fn is_namespace(value: &Value) -> bool {
    value
        .as_object()
        .is_some_and(|o| o.type_name().ends_with("::Namespace"))
}

fn quoted(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => escaped(c, out),
        }
    }
    out.push(quote);
}

/// `\x1f`, `\u200b`, `\U000e0001`.
pub(super) fn escaped(c: char, out: &mut String) {
    let code = u32::from(c);
    let _ = match code {
        0..0x100 => write!(out, "\\x{code:02x}"),
        0x100..0x10000 => write!(out, "\\u{code:04x}"),
        _ => write!(out, "\\U{code:08x}"),
    };
}

/// `c.isprintable()`, for what texts have. Python escapes private characters, too: here some of them mark control tokens in messages,
/// and must come out as they went in.
pub(super) fn is_printable(c: char) -> bool {
    match c {
        ' ' => true,
        c if c.is_whitespace() || c.is_control() => false,
        '\u{f0000}'..='\u{10ffff}' => false,
        c => {
            !matches!(u32::from(c), 0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x180e | 0x200b..=0x200f | 0x202a..=0x202e
            | 0x2060..=0x206f | 0xfeff | 0xfff9..=0xfffb | 0xe0000..=0xe007f)
        }
    }
}

/// `repr(value)` of a number.
pub(super) fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(x) => float(x),
        Err(_) => value.to_string(),
    }
}

/// `repr(x)`: the shortest digits, in exponential form outside of 1e-4 to 1e16.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let size = x.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        return exponent_of_two_digits(&format!("{x:e}"));
    }
    let text = format!("{x}");
    if text.contains('.') {
        text
    } else {
        text + ".0"
    }
}

/// Rust's `1.5e3` as Python's `1.5e+03`.
pub(super) fn exponent_of_two_digits(text: &str) -> String {
    let (digits, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent),
    };
    format!("{digits}e{sign}{exponent:0>2}")
}
