//! Functions that Jinja and Transformers give to templates.

use super::arguments::{split, whole};
use super::limits::{charge_namespace, charged};
use super::lists::items;
use super::python::python_str;
use super::values::{Dict, Flavor, dict, listed};
use super::{date, invalid, kind};
use minijinja::value::{Rest, Value};
use minijinja::{Environment, Error, ErrorKind, State};

/// The text of `raise_exception`, inside the error that carries it through the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// Items of the longest range: Jinja's sandbox allows as many.
const MAX_RANGE: i64 = 100_000;

pub(super) fn register(env: &mut Environment<'_>) {
    let minijinjas = env
        .globals()
        .find(|(name, _)| *name == "namespace")
        .map(|(_, value)| value);
    env.remove_global("debug");
    env.add_function("range", range);
    env.add_function("dict", |args: Rest<Value>| charged(entries(&args)?));
    env.add_function(
        "namespace",
        move |state: &State<'_, '_>, args: Rest<Value>| {
            charge_namespace()?;
            let make = minijinjas
                .as_ref()
                .ok_or_else(|| invalid("there are no namespaces"))?;
            make.call(state, &[entries(&args)?])
        },
    );
    env.add_function("raise_exception", |reason: &Value| {
        let reason = Raised(python_str(reason)?.into_owned());
        Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, "refused").with_source(reason))
    });
    env.add_function("strftime_now", |format: &Value| {
        let text = format.as_str();
        text.map(date::now)
            .ok_or_else(|| invalid(format!("{} is no format of a date", kind(format))))
    });
}

/// `dict(...)`: a dictionary or pairs, and names.
fn entries(args: &[Value]) -> Result<Value, Error> {
    let (placed, named) = split(args)?;
    let mut all = Vec::new();
    match placed {
        [] => {}
        [one] => match one.downcast_object_ref::<Dict>() {
            Some(dict) => all.extend(dict.entries().iter().cloned()),
            None => {
                for pair in items(one)? {
                    let pair: [Value; 2] = items(&pair)?
                        .try_into()
                        .map_err(|_| invalid("an entry needs a key and a value"))?;
                    let [key, value] = pair;
                    all.push((key, value));
                }
            }
        },
        _ => return Err(invalid("a dictionary is made of one value and names")),
    }
    dict(
        all.into_iter().chain(
            named
                .into_iter()
                .map(|(key, value)| (Value::from(key), value)),
        ),
    )
}

fn range(args: Rest<Value>) -> Result<Value, Error> {
    let bounds: Vec<i64> = args.iter().map(whole).collect::<Result<_, _>>()?;
    let (start, stop, step) = match bounds[..] {
        [stop] => (0, stop, 1),
        [start, stop] => (start, stop, 1),
        [start, stop, step] => (start, stop, step),
        _ => return Err(invalid("range takes one to three numbers")),
    };
    let span = match step {
        0 => return Err(invalid("range() arg 3 must not be zero")),
        1.. => i128::from(stop) - i128::from(start),
        _ => i128::from(start) - i128::from(stop),
    };
    let by = i128::from(step).abs();
    let len = if span <= 0 { 0 } else { (span + by - 1) / by };
    if len > MAX_RANGE.into() {
        return Err(invalid(format!("range too big: at most {MAX_RANGE} items")));
    }
    let values = (0..len as i64).map(|i| Value::from(start + i * step));
    charged(listed(values.collect(), Flavor::Range(start, stop, step))?)
}
