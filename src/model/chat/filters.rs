//! Filters of single values, as Jinja has them.

use super::arguments::{Arguments, whole};
use super::limits::{charged, fits};
use super::lists::{attribute, items, length};
use super::methods::{self, capitalized, replaced};
use super::numbers::{self, Number};
use super::python::{is_space, lines, python_str};
use super::values::{Dict, Flavor, listed, tuple};
use super::{format, invalid, kind, numbers::int};
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};

type Filter = fn(&State<'_, '_>, &Arguments) -> Result<Value, Error>;

/// Names, parameters (as for [`Arguments::bind`]) and what they do.
const FILTERS: &[(&str, &str, Filter)] = &[
    ("abs", "x!", |_, a| match Number::of(a.value(0)) {
        Some(Number::Int(n)) => Ok(int(n.checked_abs().ok_or_else(|| invalid("too large"))?)),
        Some(Number::Float(x)) => Ok(Value::from(x.abs())),
        None => Err(invalid(format!(
            "no absolute value of {}",
            kind(a.value(0))
        ))),
    }),
    ("attr", "obj! name!", |_, a| {
        match a.value(0).downcast_object_ref::<Dict>() {
            // Keys are no attributes.
            Some(dict)
                if dict.get(a.value(1)).is_some() && !super::pieces::is_method(a.text(1)?) =>
            {
                Ok(Value::UNDEFINED)
            }
            _ => attribute(a.value(0), a.text(1)?),
        }
    }),
    ("capitalize", "s!", |_, a| {
        Ok(capitalized(&python_str(a.value(0))?).into())
    }),
    ("center", "value! width", |s, a| {
        let text = Value::from(python_str(a.value(0))?.as_ref());
        methods::call(s, &text, "center", &[Value::from(a.int_or(1, 80)?)])
    }),
    ("count", "obj!", |_, a| Ok(Value::from(length(a.value(0))?))),
    ("length", "obj!", |_, a| {
        Ok(Value::from(length(a.value(0))?))
    }),
    ("d", "value! default_value boolean", default),
    ("default", "value! default_value boolean", default),
    ("e", "s!", |_, a| escape(a, false)),
    ("escape", "s!", |_, a| escape(a, false)),
    ("float", "value! default", float),
    ("forceescape", "s!", |_, a| escape(a, true)),
    ("indent", "s! width first blank", indent),
    ("int", "value! default base", integer),
    ("items", "value!", |s, a| match a.value(0).is_undefined() {
        true => listed(Vec::new(), Flavor::Generator),
        false if a.value(0).downcast_object_ref::<Dict>().is_none() => {
            Err(invalid(format!("items of {}", kind(a.value(0)))))
        }
        false => listed(
            items(&methods::call(s, a.value(0), "items", &[])?)?,
            Flavor::Generator,
        ),
    }),
    ("lower", "s!", |_, a| {
        Ok(python_str(a.value(0))?.to_lowercase().into())
    }),
    ("replace", "s! old! new! count", |_, a| {
        let most = if a.some(3).is_some() {
            a.int_or(3, -1)?
        } else {
            -1
        };
        let (old, new) = (python_str(a.value(1))?, python_str(a.value(2))?);
        Ok(replaced(&python_str(a.value(0))?, &old, &new, most)?.into())
    }),
    ("round", "value! precision method", round),
    ("safe", "value!", |_, a| {
        Ok(Value::from_safe_string(
            python_str(a.value(0))?.into_owned(),
        ))
    }),
    ("string", "object!", |_, a| {
        Ok(python_str(a.value(0))?.as_ref().into())
    }),
    ("title", "s!", |_, a| {
        Ok(title(&python_str(a.value(0))?).into())
    }),
    ("trim", "value! chars", |_, a| {
        let text = python_str(a.value(0))?;
        Ok(match a.some(1) {
            Some(_) => {
                let chars = a.text(1)?;
                text.trim_matches(|c| chars.contains(c)).into()
            }
            None => text.trim_matches(is_space).into(),
        })
    }),
    ("truncate", "s! length killwords end leeway", truncate),
    ("upper", "s!", |_, a| {
        Ok(python_str(a.value(0))?.to_uppercase().into())
    }),
    ("wordcount", "s!", |_, a| {
        let text = python_str(a.value(0))?;
        let words = text.split(|c: char| c != '_' && !c.is_alphanumeric());
        Ok(Value::from(words.filter(|w| !w.is_empty()).count()))
    }),
];

/// Whether there is a filter of this name here.
pub(super) fn has(name: &str) -> bool {
    name == "format" || FILTERS.iter().any(|(known, ..)| *known == name)
}

pub(super) fn register(env: &mut Environment<'_>) {
    // minijinja's own, which Jinja does not have.
    for name in ["bool", "chain", "lines", "pprint", "split", "zip"] {
        env.remove_filter(name);
    }
    add(env, FILTERS);
    env.add_filter("format", |text: &Value, args: Rest<Value>| {
        let (placed, named) = super::arguments::split(&args)?;
        let values = match (placed, named.is_empty()) {
            (_, true) => tuple(placed.to_vec())?,
            ([], false) => {
                super::values::dict(named.into_iter().map(|(k, v)| (Value::from(k), v)))?
            }
            _ => {
                return Err(invalid(
                    "format takes values with names or without, not both",
                ));
            }
        };
        charged(format::percent(&python_str(text)?, &values)?.into())
    });
}

/// Registers filters, each of which answers for the memory of its result.
pub(super) fn add(env: &mut Environment<'_>, filters: &'static [(&str, &str, Filter)]) {
    for &(name, parameters, filter) in filters {
        env.add_filter(name, move |state: &State<'_, '_>, args: Rest<Value>| {
            charged(filter(state, &Arguments::bind(name, parameters, &args)?)?)
        });
    }
}

fn default(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let value = a.value(0);
    Ok(
        match value.is_undefined() || a.flag(2) && !value.is_true() {
            true => a.get(1).cloned().unwrap_or_else(|| Value::from("")),
            false => value.clone(),
        },
    )
}

/// For HTML. What is safe stays as it is, unless `always`.
fn escape(a: &Arguments, always: bool) -> Result<Value, Error> {
    let value = a.value(0);
    if value.is_safe() && !always {
        return Ok(value.clone());
    }
    Ok(Value::from_safe_string(html(&python_str(value)?)?))
}

/// `text` with the signs of HTML escaped.
pub(super) fn html(text: &str) -> Result<String, Error> {
    fits(text.len().saturating_mul(5))?;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    Ok(out)
}

/// What Jinja would turn into a number, though it is nothing.
fn defined(value: &Value) -> Result<&Value, Error> {
    match value.is_undefined() {
        true => Err(invalid("a number of what is not defined")),
        false => Ok(value),
    }
}

fn integer(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let value = defined(a.value(0))?;
    let base = a.int_or(2, 10)?;
    let n = match value.as_str() {
        Some(text) => match numbers::parse_int(text, base) {
            Some(n) => Some(Number::Int(n)),
            None => numbers::parse_float(text).map(Number::Float),
        },
        None => Number::of(value),
    };
    match n {
        Some(Number::Int(n)) => Ok(int(n)),
        Some(Number::Float(x)) if x.is_finite() => match x.abs() < 1.7e38 {
            true => Ok(int(x as i128)),
            false => Err(invalid("a number is larger than 128 bits")),
        },
        _ => Ok(a.get(1).cloned().unwrap_or_else(|| Value::from(0))),
    }
}

fn float(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let value = defined(a.value(0))?;
    let x = match value.as_str() {
        Some(text) => numbers::parse_float(text),
        None => Number::of(value).map(Number::float),
    };
    Ok(match x {
        Some(x) => Value::from(x),
        None => a.get(1).cloned().unwrap_or_else(|| Value::from(0.0)),
    })
}

fn round(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let value = a.value(0);
    let n = Number::of(value).ok_or_else(|| invalid(format!("round of {}", kind(value))))?;
    let digits = a.int_or(1, 0)?;
    let cut: fn(f64) -> f64 = match a.text_or(2, "common")? {
        "common" => return numbers::rounded(n, digits),
        "ceil" => f64::ceil,
        "floor" => f64::floor,
        method => {
            return Err(invalid(format!(
                "round has no method {method:?}: common, ceil or floor"
            )));
        }
    };
    let unit = 10_f64.powi(digits.clamp(-400, 400) as i32);
    Ok(Value::from(cut(n.float() * unit) / unit))
}

fn title(text: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for c in text.chars() {
        match inside {
            true => out.extend(c.to_lowercase()),
            false => out.extend(c.to_uppercase()),
        }
        inside = !(matches!(c, '-' | '(' | '{' | '[' | '<') || is_space(c));
    }
    out
}

fn indent(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let text = a.text(0)?.to_owned() + "\n";
    let spaces;
    let by = match a.get(1) {
        None => "    ",
        Some(width) if width.as_str().is_some() => a.text(1)?,
        Some(width) => {
            spaces = " ".repeat(fits(usize::try_from(whole(width)?).unwrap_or(0))?);
            &spaces
        }
    };
    let lines = lines(&text, false);
    fits(
        text.len()
            .saturating_add(by.len().saturating_mul(lines.len() + 1)),
    )?;
    let mut out = String::new();
    for (i, line) in lines.into_iter().enumerate() {
        let indented = match i {
            0 => a.flag(2),
            _ => a.flag(3) || !line.is_empty(),
        };
        if i > 0 {
            out.push('\n');
        }
        if indented {
            out.push_str(by);
        }
        out.push_str(line);
    }
    Ok(out.into())
}

fn truncate(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let value = a.value(0);
    let end = a.text_or(3, "...")?;
    let length = a.int_or(1, 255)?;
    let leeway = if a.some(4).is_some() {
        a.int_or(4, 5)?
    } else {
        5
    };
    let ends = end.chars().count() as i64;
    if length < ends || leeway < 0 {
        return Err(invalid(format!(
            "truncate to {length} characters, which {end:?} alone has"
        )));
    }
    let Some(text) = value.as_str() else {
        return match length_of(value)? <= length.saturating_add(leeway) {
            true => Ok(value.clone()),
            false => Err(invalid(format!("truncate of {}", kind(value)))),
        };
    };
    if text.chars().count() as i64 <= length.saturating_add(leeway) {
        return Ok(text.into());
    }
    let cut: String = text.chars().take((length - ends) as usize).collect();
    let kept = match a.flag(2) {
        true => cut.as_str(),
        false => cut
            .rsplit_once(' ')
            .map_or(cut.as_str(), |(words, _)| words),
    };
    Ok(format!("{kept}{end}").into())
}

fn length_of(value: &Value) -> Result<i64, Error> {
    match value.kind() {
        ValueKind::Number | ValueKind::Bool | ValueKind::None => {
            Err(invalid(format!("truncate of {}", kind(value))))
        }
        _ => Ok(length(value)? as i64),
    }
}
