//! Arguments of filters and methods, by place or by name.

use super::limits::work;
use super::numbers::Number;
use super::{invalid, kind};
use minijinja::Error;
use minijinja::value::{Kwargs, Value};

/// Arguments with their names.
type Named = Vec<(String, Value)>;

/// The arguments without names, and those with names.
pub(super) fn split(args: &[Value]) -> Result<(&[Value], Named), Error> {
    let Some((last, rest)) = args.split_last().filter(|(last, _)| last.is_kwargs()) else {
        return Ok((args, Vec::new()));
    };
    let named = Kwargs::try_from(last.clone())?;
    let names = named
        .args()
        .map(|name| Ok((name.to_owned(), named.peek::<Value>(name)?)));
    Ok((rest, names.collect::<Result<_, Error>>()?))
}

/// Arguments in the order of the parameters.
pub(super) struct Arguments(Vec<Option<Value>>);

impl Arguments {
    /// `parameters`: names between spaces. `!` ends one that must be given, `_` begins one that has no name.
    pub(super) fn bind(name: &str, parameters: &str, args: &[Value]) -> Result<Self, Error> {
        work(args)?;
        let (placed, named) = split(args)?;
        let parameters: Vec<&str> = parameters.split_whitespace().collect();
        if placed.len() > parameters.len() {
            return Err(invalid(format!(
                "{name} takes at most {} arguments",
                parameters.len()
            )));
        }
        let mut values: Vec<Option<Value>> = placed.iter().cloned().map(Some).collect();
        values.resize(parameters.len(), None);
        for (key, value) in named {
            let at = parameters
                .iter()
                .position(|p| p.trim_end_matches('!') == key);
            match at {
                Some(at) if values[at].is_none() => values[at] = Some(value),
                Some(_) => return Err(invalid(format!("{name} was given {key} twice"))),
                None => return Err(invalid(format!("{name} has no argument {key}"))),
            }
        }
        for (parameter, value) in parameters.iter().zip(&values) {
            if parameter.ends_with('!') && value.is_none() {
                let parameter = parameter.trim_matches(['!', '_']);
                return Err(invalid(format!("{name} needs an argument, {parameter}")));
            }
        }
        Ok(Self(values))
    }

    pub(super) fn get(&self, at: usize) -> Option<&Value> {
        self.0.get(at)?.as_ref()
    }

    /// As [`Arguments::get`], but Python's None is as nothing.
    pub(super) fn some(&self, at: usize) -> Option<&Value> {
        self.get(at).filter(|value| !value.is_none())
    }

    /// One that must be given.
    pub(super) fn value(&self, at: usize) -> &Value {
        self.get(at).unwrap_or(&Value::UNDEFINED)
    }

    /// One that must be a text.
    pub(super) fn text(&self, at: usize) -> Result<&str, Error> {
        let value = self.value(at);
        value
            .as_str()
            .ok_or_else(|| invalid(format!("a text is needed, not {}", kind(value))))
    }

    pub(super) fn text_or<'a>(&'a self, at: usize, default: &'a str) -> Result<&'a str, Error> {
        match self.get(at) {
            None => Ok(default),
            Some(_) => self.text(at),
        }
    }

    /// A whole number, within what 64 bits hold.
    pub(super) fn int_or(&self, at: usize, default: i64) -> Result<i64, Error> {
        match self.get(at) {
            None => Ok(default),
            Some(value) => whole(value),
        }
    }

    pub(super) fn flag(&self, at: usize) -> bool {
        self.get(at).is_some_and(Value::is_true)
    }
}

/// `value` as a whole number; larger ones than 64 bits hold are as large as these get.
pub(super) fn whole(value: &Value) -> Result<i64, Error> {
    match Number::of(value) {
        Some(Number::Int(n)) => Ok(n.clamp(i64::MIN.into(), i64::MAX.into()) as i64),
        _ => Err(invalid(format!(
            "a whole number is needed, not {}",
            kind(value)
        ))),
    }
}
