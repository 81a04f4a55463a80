//! Values as Python writes them, and the methods that Python's values have.

use super::source::SLICE;
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind, State};
use std::fmt::Write;

/// What Python's `str.strip` removes.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Methods of Python's values: minijinja-contrib's, and those that it lacks or that do something else.
pub(super) fn method(
    state: &State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    if name == SLICE {
        return slice(value, args);
    }
    if let Some(text) = value.as_str()
        && let Some(result) = text_method(text, name, args)
    {
        return result;
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn invalid(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// `None`: the method is not one of those that need care.
fn text_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let argument = match args {
        [] => None,
        [one] => one.as_str(),
        _ => return None,
    };
    // Characters, where Rust counts bytes.
    let position = |at: usize| Value::from(text[..at].chars().count());
    let found = |at: Option<usize>| match at {
        Some(at) => Ok(position(at)),
        None if name.ends_with("find") => Ok(Value::from(-1)),
        None => Err(invalid("substring not found")),
    };
    Some(match (name, argument) {
        ("strip", None) if args.is_empty() => Ok(text.trim_matches(is_space).into()),
        ("lstrip", None) if args.is_empty() => Ok(text.trim_start_matches(is_space).into()),
        ("rstrip", None) if args.is_empty() => Ok(text.trim_end_matches(is_space).into()),
        ("removeprefix", Some(prefix)) => Ok(text.strip_prefix(prefix).unwrap_or(text).into()),
        ("removesuffix", Some(suffix)) => Ok(text.strip_suffix(suffix).unwrap_or(text).into()),
        ("find" | "index", Some(part)) => found(text.find(part)),
        ("rfind" | "rindex", Some(part)) => found(text.rfind(part)),
        ("count", Some(part)) => Ok(text.matches(part).count().into()),
        _ => return None,
    })
}

/// `value[start:stop:step]` of Python, for texts and lists.
fn slice(value: &Value, args: &[Value]) -> Result<Value, Error> {
    let bound = |i: usize| match args.get(i) {
        None => Ok(None),
        Some(bound) if bound.is_none() => Ok(None),
        Some(bound) => i64::try_from(bound.clone())
            .map(Some)
            .map_err(|_| invalid("slice indices must be integers or none")),
    };
    let (start, stop, step) = (bound(0)?, bound(1)?, bound(2)?.unwrap_or(1));
    if step == 0 || args.len() > 3 {
        return Err(invalid("slice step cannot be zero"));
    }
    Ok(match value.kind() {
        ValueKind::String => {
            let chars: Vec<char> = value.as_str().unwrap_or_default().chars().collect();
            let picked = indices(chars.len(), start, stop, step).map(|i| chars[i]);
            picked.collect::<String>().into()
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            let picked = indices(items.len(), start, stop, step).map(|i| items[i].clone());
            picked.collect::<Vec<_>>().into()
        }
        kind => return Err(invalid(format!("{kind} cannot be sliced"))),
    })
}

/// The positions that a slice of `len` items takes, `step` not 0.
fn indices(
    len: usize,
    start: Option<i64>,
    stop: Option<i64>,
    step: i64,
) -> impl Iterator<Item = usize> {
    let len = len as i64;
    // Backwards, -1 is the place before the first.
    let (lowest, highest) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let clamp = |at: i64| {
        let at = if at < 0 { at.saturating_add(len) } else { at };
        at.clamp(lowest, highest)
    };
    let (first, last) = if step > 0 {
        (lowest, highest)
    } else {
        (highest, lowest)
    };
    let (start, stop) = (start.map_or(first, clamp), stop.map_or(last, clamp));
    let inside = move |&at: &i64| if step > 0 { at < stop } else { at > stop };
    std::iter::successors(Some(start), move |at| at.checked_add(step))
        .take_while(inside)
        .map(|at| at as usize)
}

/// `str(value)`.
pub(super) fn python_str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => {
            let mut out = String::new();
            repr(value, &mut out);
            out
        }
    }
}

/// `repr(value)`.
fn repr(value: &Value, out: &mut String) {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => quoted(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr(&item, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr(&key, out);
                out.push_str(": ");
                repr(&value.get_item(&key).unwrap_or_default(), out);
            }
            out.push('}');
        }
        ValueKind::Undefined => out.push_str("Undefined"),
        _ => out.push_str(&value.to_string()),
    }
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
            c if c.is_ascii_control() => {
                let _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

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
fn float(x: f64) -> String {
    if x.is_nan() {
        return "nan".to_owned();
    }
    if x.is_infinite() {
        return if x > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let size = x.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').expect("exponential form");
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(exponent) => ('-', exponent),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    let text = format!("{x}");
    if text.contains('.') {
        text
    } else {
        text + ".0"
    }
}
