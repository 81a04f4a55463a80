//! Methods of Python's texts.

use super::arguments::{Arguments, split, whole};
use super::format::{Fields, braces};
use super::limits::{charged, fits, work};
use super::python::{is_printable, is_space, lines};
use super::values::{Dict, Flavor, List, list, tuple};
use super::{invalid, kind, lists};
use minijinja::value::{Value, ValueKind};
use minijinja::{Error, State};

/// `value.name(args)`.
pub(super) fn call(
    state: &State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    work(std::slice::from_ref(value))?;
    let result = if let Some(text) = value.as_str() {
        text_method(text, name, args)
    } else if let Some(of) = value.downcast_object_ref::<List>() {
        lists::list_method(of, name, args)
    } else if let Some(of) = value.downcast_object_ref::<Dict>() {
        lists::dict_method(value, of, name, args)
    } else if let ("cycle" | "changed", ValueKind::Map) = (name, value.kind()) {
        // Each of a loop's. Without anything to choose from, minijinja panics; and what holds itself, it compares without end.
        match args {
            [] => Err(invalid(format!("{name} needs an argument"))),
            _ if name == "changed" && !args.iter().all(is_plain) => Err(invalid(
                "changed compares texts, numbers, lists and dictionaries of them",
            )),
            _ => value.call_method(state, name, args),
        }
    } else {
        match value.is_undefined() {
            true => Err(invalid(format!("{name} of what is not defined"))),
            false => value.call_method(state, name, args),
        }
    };
    charged(result?)
}

/// Whether it is a value of JSON, without what the template's own statements make.
fn is_plain(value: &Value) -> bool {
    if let Some(list) = value.downcast_object_ref::<List>() {
        return list.items.iter().all(is_plain);
    }
    match value.downcast_object_ref::<Dict>() {
        Some(dict) => dict.entries().iter().all(|(_, v)| is_plain(v)),
        None => value.as_object().is_none(),
    }
}

/// Names and parameters, as for [`Arguments::bind`].
const PARAMETERS: &[(&str, &str)] = &[
    ("capitalize", ""),
    ("casefold", ""),
    ("center", "_width! _fill"),
    ("count", "_part! _start _end"),
    ("endswith", "_part! _start _end"),
    ("expandtabs", "tabsize"),
    ("find", "_part! _start _end"),
    ("index", "_part! _start _end"),
    ("isalnum", ""),
    ("isalpha", ""),
    ("isascii", ""),
    ("isdecimal", ""),
    ("isdigit", ""),
    ("isidentifier", ""),
    ("islower", ""),
    ("isnumeric", ""),
    ("isprintable", ""),
    ("isspace", ""),
    ("istitle", ""),
    ("isupper", ""),
    ("join", "_items!"),
    ("ljust", "_width! _fill"),
    ("lower", ""),
    ("lstrip", "_chars"),
    ("partition", "_separator!"),
    ("removeprefix", "_prefix!"),
    ("removesuffix", "_suffix!"),
    ("replace", "_old! _new! count"),
    ("rfind", "_part! _start _end"),
    ("rindex", "_part! _start _end"),
    ("rjust", "_width! _fill"),
    ("rpartition", "_separator!"),
    ("rsplit", "sep maxsplit"),
    ("rstrip", "_chars"),
    ("split", "sep maxsplit"),
    ("splitlines", "keepends"),
    ("startswith", "_part! _start _end"),
    ("strip", "_chars"),
    ("swapcase", ""),
    ("title", ""),
    ("upper", ""),
    ("zfill", "_width!"),
];

/// Whether a text has a method of this name.
pub(super) fn is_text_method(name: &str) -> bool {
    name == "format" || name == "format_map" || PARAMETERS.iter().any(|(known, _)| *known == name)
}

fn text_method(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == "format" || name == "format_map" {
        return formatted(text, name, args);
    }
    let Some((_, parameters)) = PARAMETERS.iter().find(|(known, _)| *known == name) else {
        return Err(invalid(format!("a text has no method {name}")));
    };
    let a = &Arguments::bind(name, parameters, args)?;
    match name {
        "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => {
            searched(text, name, a)
        }
        "strip" | "lstrip" | "rstrip" => stripped(text, name, a),
        "split" | "rsplit" => {
            let most = a.int_or(1, -1)?;
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            let parts = match (a.some(0), name) {
                (Some(_), _) if a.text(0)?.is_empty() => return Err(invalid("empty separator")),
                (Some(_), "split") => text.splitn(most.saturating_add(1), a.text(0)?).collect(),
                (Some(_), _) => from_right(text.rsplitn(most.saturating_add(1), a.text(0)?)),
                (None, "split") => words(text, most),
                (None, _) => words_from_right(text, most),
            };
            texts(parts)
        }
        "splitlines" => texts(lines(text, a.flag(0))),
        "partition" | "rpartition" => {
            let separator = a.text(0)?;
            let found = match (separator, name) {
                ("", _) => return Err(invalid("empty separator")),
                (_, "partition") => text.split_once(separator).ok_or([text, "", ""]),
                _ => text.rsplit_once(separator).ok_or(["", "", text]),
            };
            let parts =
                found.map_or_else(|whole| whole, |(before, after)| [before, separator, after]);
            tuple(parts.into_iter().map(Value::from).collect())
        }
        "replace" => Ok(replaced(text, a.text(0)?, a.text(1)?, a.int_or(2, -1)?)?.into()),
        "removeprefix" => Ok(text.strip_prefix(a.text(0)?).unwrap_or(text).into()),
        "removesuffix" => Ok(text.strip_suffix(a.text(0)?).unwrap_or(text).into()),
        "join" => {
            let mut out = String::new();
            for (i, item) in lists::items(a.value(0))?.iter().enumerate() {
                let item = item.as_str();
                let item = item.ok_or_else(|| invalid("join needs texts: map them with string"))?;
                fits(out.len() + text.len() + item.len())?;
                if i > 0 {
                    out.push_str(text);
                }
                out.push_str(item);
            }
            Ok(out.into())
        }
        "center" | "ljust" | "rjust" | "zfill" | "expandtabs" => Ok(widened(text, name, a)?.into()),
        _ if name.starts_with("is") => Ok(Value::from(is(text, name))),
        _ => Ok(cased(text, name).into()),
    }
}

fn texts(parts: Vec<&str>) -> Result<Value, Error> {
    list(parts.into_iter().map(Value::from).collect())
}

fn from_right<'a>(parts: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
    let mut parts: Vec<_> = parts.collect();
    parts.reverse();
    parts
}

/// `text.split(None, most)`.
fn words(text: &str, most: usize) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = rest.find(is_space).unwrap_or(rest.len());
        if out.len() == most {
            out.push(rest);
            break;
        }
        out.push(&rest[..end]);
        rest = rest[end..].trim_start_matches(is_space);
    }
    out
}

fn words_from_right(text: &str, most: usize) -> Vec<&str> {
    let mut out = Vec::new();
    let mut rest = text.trim_end_matches(is_space);
    while !rest.is_empty() {
        if out.len() == most {
            out.push(rest);
            break;
        }
        let last = rest.char_indices().rev().find(|&(_, c)| is_space(c));
        let begin = last.map_or(0, |(at, c)| at + c.len_utf8());
        out.push(&rest[begin..]);
        rest = rest[..begin].trim_end_matches(is_space);
    }
    from_right(out.into_iter())
}

fn stripped(text: &str, name: &str, a: &Arguments) -> Result<Value, Error> {
    let chars = match a.some(0) {
        Some(_) => Some(a.text(0)?),
        None => None,
    };
    let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    Ok(match name {
        "lstrip" => text.trim_start_matches(strips),
        "rstrip" => text.trim_end_matches(strips),
        _ => text.trim_matches(strips),
    }
    .into())
}

/// `text.replace(old, new, most)`.
pub(super) fn replaced(text: &str, old: &str, new: &str, most: i64) -> Result<String, Error> {
    let most = usize::try_from(most).unwrap_or(usize::MAX);
    let found = text.matches(old).take(most).count();
    fits(text.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(text.replacen(old, new, most))
}

/// Where the character number `at` begins; behind the last, `None`.
fn byte_of(text: &str, at: usize) -> Option<usize> {
    match at {
        0 => Some(0),
        _ => text
            .char_indices()
            .map(|(b, _)| b)
            .chain([text.len()])
            .nth(at),
    }
}

/// What looks for a part of the text between two bounds.
fn searched(text: &str, name: &str, a: &Arguments) -> Result<Value, Error> {
    let bounded = a.some(1).is_some() || a.some(2).is_some();
    let len = if bounded {
        text.chars().count() as i64
    } else {
        0
    };
    let bound = |at: usize, default: i64| match a.some(at) {
        None => Ok(default),
        Some(value) => whole(value).map(|n| {
            if n < 0 {
                n.saturating_add(len).max(0)
            } else {
                n
            }
        }),
    };
    let (start, end) = (bound(1, 0)?, bound(2, len)?.min(len));
    let begin = match bounded {
        false => 0,
        true if start > end => text.len() + 1,
        true => byte_of(text, start as usize).unwrap_or(text.len() + 1),
    };
    let finish = if bounded {
        byte_of(text, end as usize).unwrap_or(text.len())
    } else {
        text.len()
    };
    // `None`: the bounds leave not even an empty text.
    let inside = text.get(begin..finish.max(begin.min(text.len())));
    let part = a.value(0);
    if matches!(name, "startswith" | "endswith") {
        let tuple = part
            .downcast_object_ref::<List>()
            .filter(|l| l.flavor == Flavor::Tuple);
        let parts = tuple.map_or(std::slice::from_ref(part), |l| &l.items);
        for part in parts {
            let part = part.as_str();
            let part =
                part.ok_or_else(|| invalid(format!("{name} needs a text or a tuple of texts")))?;
            let found = inside.is_some_and(|inside| match name {
                "startswith" => inside.starts_with(part),
                _ => inside.ends_with(part),
            });
            if found {
                return Ok(Value::from(true));
            }
        }
        return Ok(Value::from(false));
    }
    let part = a.text(0)?;
    if name == "count" {
        return Ok(Value::from(
            inside.map_or(0, |inside| inside.matches(part).count()),
        ));
    }
    let found = inside.and_then(|inside| match name.starts_with('r') {
        true => inside.rfind(part),
        false => inside.find(part),
    });
    // Characters, where Rust counts bytes.
    match found {
        Some(at) => Ok(Value::from(text[..begin + at].chars().count())),
        None if name.ends_with("find") => Ok(Value::from(-1)),
        None => Err(invalid("substring not found")),
    }
}

fn widened(text: &str, name: &str, a: &Arguments) -> Result<String, Error> {
    let len = text.chars().count();
    if name == "expandtabs" {
        return expanded(text, a.int_or(0, 8)?);
    }
    let width = usize::try_from(a.int_or(0, 0)?).unwrap_or(0);
    fits(width.saturating_mul(4))?;
    let missing = width.saturating_sub(len);
    if name == "zfill" {
        let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
        return Ok(format!("{sign}{}{digits}", "0".repeat(missing)));
    }
    let fill = a.text_or(1, " ")?;
    if fill.chars().count() != 1 {
        return Err(invalid("the fill must be exactly one character"));
    }
    let left = match name {
        "ljust" => 0,
        "rjust" => missing,
        // As Python puts the odd one.
        _ => missing / 2 + (missing & width & 1),
    };
    Ok(format!(
        "{}{text}{}",
        fill.repeat(left),
        fill.repeat(missing - left)
    ))
}

fn expanded(text: &str, size: i64) -> Result<String, Error> {
    let size = usize::try_from(size).unwrap_or(0);
    let mut out = String::new();
    let mut column = 0;
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let n = size - column % size;
                fits(out.len().saturating_add(n))?;
                out.extend(std::iter::repeat_n(' ', n));
                column += n;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    Ok(out)
}

/// Whether a letter has a small and a large form.
fn is_cased(c: char) -> bool {
    c.is_lowercase() || c.is_uppercase() || is_title(c)
}

/// Letters such as Dž, which are large in front only.
fn is_title(c: char) -> bool {
    matches!(c, '\u{1c5}' | '\u{1c8}' | '\u{1cb}' | '\u{1f2}')
}

/// The first letter of a word.
fn title_case(c: char, out: &mut String) {
    match c {
        '\u{1c4}'..='\u{1c6}' => out.push('\u{1c5}'),
        '\u{1c7}'..='\u{1c9}' => out.push('\u{1c8}'),
        '\u{1ca}'..='\u{1cc}' => out.push('\u{1cb}'),
        '\u{1f1}'..='\u{1f3}' => out.push('\u{1f2}'),
        'ß' => out.push_str("Ss"),
        c => out.extend(c.to_uppercase()),
    }
}

/// `text.capitalize()`.
pub(super) fn capitalized(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    if let Some(first) = chars.next() {
        title_case(first, &mut out);
    }
    out + &chars.as_str().to_lowercase()
}

fn cased(text: &str, name: &str) -> String {
    match name {
        "upper" => text.to_uppercase(),
        "lower" => text.to_lowercase(),
        "casefold" => text.to_lowercase().replace('ß', "ss").replace('ς', "σ"),
        "capitalize" => capitalized(text),
        "swapcase" => {
            let mut out = String::new();
            for c in text.chars() {
                match c.is_lowercase() {
                    true => out.extend(c.to_uppercase()),
                    false => out.extend(c.to_lowercase()),
                }
            }
            out
        }
        _ => {
            let mut out = String::new();
            let mut inside = false;
            for c in text.chars() {
                match inside {
                    true => out.extend(c.to_lowercase()),
                    false => title_case(c, &mut out),
                }
                inside = is_cased(c);
            }
            out
        }
    }
}

/// Superscripts and the like: digits to Python, though no decimal ones.
fn is_small_digit(c: char) -> bool {
    matches!(c, '²' | '³' | '¹' | '\u{2070}' | '\u{2074}'..='\u{2079}' | '\u{2080}'..='\u{2089}' | '\u{2460}'..='\u{2468}')
}

fn is_decimal(c: char) -> bool {
    c.is_numeric() && !is_small_digit(c) && (c.is_ascii_digit() || is_foreign_decimal(c))
}

/// Decimal digits of other scripts, which come in tens.
fn is_foreign_decimal(c: char) -> bool {
    const ZEROS: [u32; 20] = [
        0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6,
        0xe50, 0xed0, 0xf20, 0x1040, 0x17e0, 0x1810, 0xff10,
    ];
    ZEROS
        .iter()
        .any(|zero| (*zero..zero + 10).contains(&u32::from(c)))
}

fn is(text: &str, name: &str) -> bool {
    let all = |holds: fn(char) -> bool| !text.is_empty() && text.chars().all(holds);
    match name {
        "isascii" => text.is_ascii(),
        "isprintable" => text.chars().all(is_printable),
        "isspace" => all(is_space),
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isdecimal" => all(is_decimal),
        "isdigit" => all(|c| is_decimal(c) || is_small_digit(c)),
        "isnumeric" => all(char::is_numeric),
        "isidentifier" => {
            all(|c| c == '_' || c.is_alphanumeric()) && !text.starts_with(char::is_numeric)
        }
        "isupper" => {
            text.chars().any(char::is_uppercase)
                && !text.chars().any(|c| c.is_lowercase() || is_title(c))
        }
        "islower" => {
            text.chars().any(char::is_lowercase)
                && !text.chars().any(|c| c.is_uppercase() || is_title(c))
        }
        _ => {
            // Large letters begin words, and small ones go on with them.
            let mut inside = false;
            let mut any = false;
            for c in text.chars() {
                let large = c.is_uppercase() || is_title(c);
                if large && inside || c.is_lowercase() && !inside {
                    return false;
                }
                inside = is_cased(c);
                any |= inside;
            }
            any
        }
    }
}

/// Whether the text has letters and all are small, or all large.
pub(super) fn is_in_case(text: &str, upper: bool) -> bool {
    is(text, if upper { "isupper" } else { "islower" })
}

fn formatted(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let (placed, mut named) = split(args)?;
    let mut placed = placed;
    if name == "format_map" {
        let [map] = placed else {
            return Err(invalid("format_map needs a dictionary"));
        };
        let dict = map.downcast_object_ref::<Dict>();
        let dict = dict.ok_or_else(|| invalid(format!("format_map of {}", kind(map))))?;
        let entries = dict
            .entries()
            .iter()
            .filter_map(|(k, v)| Some((k.as_str()?.to_owned(), v.clone())));
        named = entries.collect();
        placed = &[];
    }
    let fields = Fields {
        placed,
        named: &named,
    };
    Ok(braces(text, &fields)?.into())
}
