//! `tojson` as Transformers gives it to templates: Python's `json.dumps`.

use super::arguments::Arguments;
use super::limits::{charged, fits};
use super::lists::items;
use super::operators::order;
use super::python::{is_namespace, number, python_str};
use super::values::{Dict, Flavor, List, MAX_NESTING};
use super::{invalid, kind};
use minijinja::Error;
use minijinja::value::{Rest, Value, ValueKind};
use std::cmp::Ordering;
use std::fmt::Write;

/// `json.dumps(value, ensure_ascii=False, indent, separators, sort_keys)`, as Transformers' filter does it.
pub(super) fn to_json(args: Rest<Value>) -> Result<Value, Error> {
    let parameters = "x! ensure_ascii indent separators sort_keys";
    let a = Arguments::bind("tojson", parameters, &args)?;
    let indent = match a.some(2) {
        Some(indent) if indent.as_str().is_some() => Some(a.text(2)?.to_owned()),
        Some(_) => Some(" ".repeat(a.int_or(2, 0)?.clamp(0, 64) as usize)),
        None => None,
    };
    let (item, key) = match a.some(3).map(items).transpose()?.as_deref() {
        Some([item, key]) => match (item.as_str(), key.as_str()) {
            (Some(item), Some(key)) => (item.to_owned(), key.to_owned()),
            _ => return Err(invalid("separators of JSON must be texts")),
        },
        Some(_) => return Err(invalid("JSON needs two separators")),
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
    };
    let style = JsonStyle {
        item,
        key,
        indent,
        sort: a.flag(4),
        ascii: a.flag(1),
    };
    let mut out = String::new();
    style.write(a.value(0), 0, &mut out)?;
    charged(out.into())
}

struct JsonStyle {
    item: String,
    key: String,
    indent: Option<String>,
    sort: bool,
    ascii: bool,
}

impl JsonStyle {
    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        fits(out.len())?;
        if depth > usize::from(MAX_NESTING) {
            return Err(invalid("the value is nested too deeply for JSON"));
        }
        if let Some(list) = value.downcast_object_ref::<List>()
            && matches!(list.flavor, Flavor::List | Flavor::Tuple | Flavor::Group)
        {
            return self.list('[', ']', list.items.len(), depth, out, |i, out| {
                self.write(&list.items[i], depth + 1, out)
            });
        }
        if let Some(dict) = value.downcast_object_ref::<Dict>() {
            return self.dict(dict, depth, out);
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => match &*number(value) {
                "nan" => out.push_str("NaN"),
                "inf" => out.push_str("Infinity"),
                "-inf" => out.push_str("-Infinity"),
                number => out.push_str(number),
            },
            ValueKind::String => self.quoted(value.as_str().unwrap_or_default(), out),
            _ => {
                let what = if is_namespace(value) {
                    "a namespace"
                } else {
                    kind(value)
                };
                return Err(invalid(format!("{what} is not JSON serializable")));
            }
        }
        Ok(())
    }

    fn dict(&self, dict: &Dict, depth: usize, out: &mut String) -> Result<(), Error> {
        let mut entries: Vec<_> = dict.entries().iter().collect();
        if self.sort {
            let mut wrong = None;
            entries.sort_by(|(a, _), (b, _)| match order(a, b) {
                Ok(order) => order.unwrap_or(Ordering::Equal),
                Err(e) => {
                    wrong = Some(e);
                    Ordering::Equal
                }
            });
            if let Some(e) = wrong {
                return Err(e);
            }
        }
        self.list('{', '}', entries.len(), depth, out, |i, out| {
            let (key, value) = entries[i];
            let name = match key.kind() {
                ValueKind::Bool | ValueKind::None | ValueKind::Number => {
                    let mut name = String::new();
                    self.write(key, depth + 1, &mut name)?;
                    name
                }
                ValueKind::String => python_str(key)?.into_owned(),
                _ => {
                    return Err(invalid(
                        "keys of JSON must be texts, numbers, booleans or none",
                    ));
                }
            };
            self.quoted(&name, out);
            out.push_str(&self.key);
            self.write(value, depth + 1, out)
        })
    }

    fn list(
        &self,
        open: char,
        close: char,
        len: usize,
        depth: usize,
        out: &mut String,
        mut each: impl FnMut(usize, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let line = |out: &mut String, depth| {
            if let Some(indent) = &self.indent {
                out.push('\n');
                out.extend(std::iter::repeat_n(indent.as_str(), depth));
            }
        };
        out.push(open);
        for i in 0..len {
            if i > 0 {
                out.push_str(&self.item);
            }
            line(out, depth + 1);
            each(i, out)?;
        }
        if len > 0 {
            line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn quoted(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || self.ascii && !(' '..='~').contains(&c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}
