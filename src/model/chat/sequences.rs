//! Filters of several values, as Jinja has them.

use super::arguments::{Arguments, split};
use super::filters::add;
use super::limits::{charged, fits, work};
use super::lists::{item, items};
use super::numbers::Number;
use super::operators;
use super::python::python_str;
use super::values::{Dict, Flavor, List, list, listed, tuple};
use super::{invalid, kind};
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};
use std::cmp::Ordering;
use std::collections::HashSet;

type Filter = fn(&State<'_, '_>, &Arguments) -> Result<Value, Error>;

const FILTERS: &[(&str, &str, Filter)] = &[
    ("batch", "value! linecount! fill_with", batch),
    ("dictsort", "value! case_sensitive by reverse", dictsort),
    ("first", "seq!", |_, a| {
        let value = a.value(0);
        Ok(items(value)?.into_iter().next().unwrap_or_default())
    }),
    (
        "groupby",
        "value! attribute! default case_sensitive",
        groupby,
    ),
    ("join", "value! d attribute", join),
    ("last", "seq!", |_, a| {
        let value = a.value(0);
        if value
            .downcast_object_ref::<List>()
            .is_some_and(|l| l.flavor == Flavor::Generator)
        {
            return Err(invalid(
                "what is computed on demand has no last item: make a list of it",
            ));
        }
        Ok(items(value)?.into_iter().next_back().unwrap_or_default())
    }),
    ("list", "value!", |_, a| list(items(a.value(0))?)),
    ("max", "value! case_sensitive attribute", |_, a| {
        extreme(a, Ordering::Greater)
    }),
    ("min", "value! case_sensitive attribute", |_, a| {
        extreme(a, Ordering::Less)
    }),
    ("reverse", "value!", reverse),
    ("slice", "value! slices! fill_with", slice),
    ("sort", "value! reverse case_sensitive attribute", |_, a| {
        if a.get(1).is_some_and(|v| Number::of(v).is_none()) {
            return Err(invalid("reverse must be true or false"));
        }
        list(sorted(items(a.value(0))?, a.get(3), !a.flag(2), a.flag(1))?)
    }),
    ("sum", "iterable! attribute start", sum),
    ("unique", "value! case_sensitive attribute", unique),
];

/// Whether there is a filter of this name here.
pub(super) fn has(name: &str) -> bool {
    matches!(
        name,
        "map" | "select" | "reject" | "selectattr" | "rejectattr"
    ) || FILTERS.iter().any(|(known, ..)| *known == name)
}

pub(super) fn register(env: &mut Environment<'_>) {
    add(env, FILTERS);
    env.add_filter("map", map);
    for (name, keeps, attribute) in [
        ("select", true, false),
        ("reject", false, false),
        ("selectattr", true, true),
        ("rejectattr", false, true),
    ] {
        env.add_filter(
            name,
            move |state: &State<'_, '_>, value: &Value, args: Rest<Value>| {
                charged(select(state, value, &args, keeps, attribute)?)
            },
        );
    }
}

/// `value.a.0.b` for the name `a.0.b`. What is not there becomes the default.
fn attribute(value: &Value, name: &Value, default: Option<&Value>) -> Result<Value, Error> {
    let default = default.filter(|d| !d.is_none());
    let or_default = |value: Value| match default {
        Some(default) if value.is_undefined() => default.clone(),
        _ => value,
    };
    let Some(path) = name.as_str() else {
        return Ok(or_default(item(value, name)?));
    };
    let mut value = value.clone();
    for part in path.split('.') {
        let number = part
            .parse::<i64>()
            .ok()
            .filter(|_| part.bytes().all(|b| b.is_ascii_digit()));
        let key = number.map_or_else(|| Value::from(part), Value::from);
        value = or_default(item(&value, &key)?);
    }
    Ok(value)
}

/// Without its case, if it is a text.
fn folded(value: Value, fold: bool) -> Value {
    match value.as_str() {
        Some(text) if fold => text.to_lowercase().into(),
        _ => value,
    }
}

/// By one attribute or, after each other, several between commas.
fn sorted(
    values: Vec<Value>,
    by: Option<&Value>,
    fold: bool,
    reverse: bool,
) -> Result<Vec<Value>, Error> {
    let by = by.filter(|by| !by.is_none());
    let names: Vec<Value> = match by.map(|by| (by, by.as_str())) {
        Some((_, Some(names))) => names.split(',').map(Value::from).collect(),
        Some((by, None)) => vec![by.clone()],
        None => Vec::new(),
    };
    let key = |value: &Value| {
        if names.is_empty() {
            return Ok(vec![folded(value.clone(), fold)]);
        }
        let keys = names
            .iter()
            .map(|name| Ok(folded(attribute(value, name, None)?, fold)));
        keys.collect::<Result<_, Error>>()
    };
    let keyed = values.into_iter().map(|value| Ok((key(&value)?, value)));
    sorted_by_key(keyed.collect::<Result<_, Error>>()?, reverse)
}

fn sorted_by_key(mut keyed: Vec<(Vec<Value>, Value)>, reverse: bool) -> Result<Vec<Value>, Error> {
    let mut wrong = None;
    keyed.sort_by(|(a, _), (b, _)| {
        for (a, b) in a.iter().zip(b) {
            match operators::order(a, b) {
                Ok(Some(Ordering::Equal)) | Ok(None) => {}
                Ok(Some(order)) => return if reverse { order.reverse() } else { order },
                Err(e) => {
                    wrong = Some(e);
                    return Ordering::Equal;
                }
            }
        }
        Ordering::Equal
    });
    match wrong {
        Some(e) => Err(e),
        None => Ok(keyed.into_iter().map(|(_, value)| value).collect()),
    }
}

fn dictsort(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let value = a.value(0);
    let dict = value.downcast_object_ref::<Dict>();
    let dict = dict.ok_or_else(|| invalid(format!("dictsort of {}", kind(value))))?;
    let by_value = match a.text_or(2, "key")? {
        "key" => false,
        "value" => true,
        by => {
            return Err(invalid(format!(
                "dictsort by {by:?}: it is by key or value"
            )));
        }
    };
    let keyed = dict.entries().iter().map(|(k, v)| {
        let key = folded(if by_value { v } else { k }.clone(), !a.flag(1));
        Ok((vec![key], tuple(vec![k.clone(), v.clone()])?))
    });
    list(sorted_by_key(
        keyed.collect::<Result<_, Error>>()?,
        a.flag(3),
    )?)
}

fn groupby(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let fold = !a.flag(3);
    let keyed = items(a.value(0))?.into_iter().map(|value| {
        let key = attribute(&value, a.value(1), a.get(2))?;
        Ok((vec![folded(key.clone(), fold)], tuple(vec![key, value])?))
    });
    let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
    for pair in sorted_by_key(keyed.collect::<Result<_, Error>>()?, false)? {
        let [key, value] = items(&pair)?.try_into().map_err(|_| invalid("no pair"))?;
        let compared = folded(key.clone(), fold);
        match groups.last_mut() {
            Some((last, _, members)) if operators::equal(last, &compared) => members.push(value),
            _ => groups.push((compared, key, vec![value])),
        }
    }
    let groups = groups
        .into_iter()
        .map(|(_, key, members)| listed(vec![key, list(members)?], Flavor::Group));
    list(groups.collect::<Result<_, _>>()?)
}

fn batch(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let size = usize::try_from(a.int_or(1, 0)?).unwrap_or(usize::MAX);
    let values = items(a.value(0))?;
    if size == 0 && !values.is_empty() {
        // Jinja begins a new batch where one has as many.
        return listed(vec![list(Vec::new())?, list(values)?], Flavor::Generator);
    }
    let size = size.max(1);
    let batches = values.chunks(size).map(|batch| {
        let mut batch = batch.to_vec();
        if let Some(fill) = a.some(2) {
            fits(size.saturating_mul(size_of::<Value>()))?;
            batch.resize(size, fill.clone());
        }
        list(batch)
    });
    listed(batches.collect::<Result<_, _>>()?, Flavor::Generator)
}

fn slice(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let values = items(a.value(0))?;
    let slices = usize::try_from(a.int_or(1, 0)?).unwrap_or(0);
    if slices == 0 {
        return Err(invalid("slice needs a number of slices"));
    }
    fits(slices.saturating_mul(size_of::<Value>()))?;
    let (each, extra) = (values.len() / slices, values.len() % slices);
    let mut rest = values.as_slice();
    let mut out = Vec::new();
    for i in 0..slices {
        let (slice, after) = rest.split_at(each + usize::from(i < extra));
        rest = after;
        let mut slice = slice.to_vec();
        if let Some(fill) = a.some(2).filter(|_| i >= extra) {
            slice.push(fill.clone());
        }
        out.push(list(slice)?);
    }
    listed(out, Flavor::Generator)
}

fn join(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let between = match a.get(1) {
        Some(between) => python_str(between)?,
        None => "".into(),
    };
    let mut out = String::new();
    for (i, value) in items(a.value(0))?.iter().enumerate() {
        let found = match a.some(2) {
            Some(name) => attribute(value, name, None)?,
            None => value.clone(),
        };
        let text = python_str(&found)?;
        fits(out.len() + between.len() + text.len())?;
        if i > 0 {
            out.push_str(&between);
        }
        out.push_str(&text);
    }
    Ok(out.into())
}

fn extreme(a: &Arguments, wanted: Ordering) -> Result<Value, Error> {
    let key = |value: &Value| {
        let key = match a.some(2) {
            Some(name) => attribute(value, name, None)?,
            None => value.clone(),
        };
        Ok::<_, Error>(folded(key, !a.flag(1)))
    };
    let mut best: Option<(Value, Value)> = None;
    for value in items(a.value(0))? {
        let new = key(&value)?;
        let better = match &best {
            Some((old, _)) => operators::order(&new, old)? == Some(wanted),
            None => true,
        };
        if better {
            best = Some((new, value));
        }
    }
    Ok(best.map_or(Value::UNDEFINED, |(_, value)| value))
}

fn reverse(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let value = a.value(0);
    if let Some(text) = value.as_str() {
        return Ok(text.chars().rev().collect::<String>().into());
    }
    let mut values = items(value)?;
    values.reverse();
    // A list of what cannot be walked backwards.
    let forward = value
        .downcast_object_ref::<List>()
        .is_some_and(|l| l.flavor == Flavor::Generator);
    let flavor = if forward || value.is_undefined() {
        Flavor::List
    } else {
        Flavor::Generator
    };
    listed(values, flavor)
}

fn sum(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let mut sum = a.get(2).cloned().unwrap_or_else(|| Value::from(0));
    if sum.as_str().is_some() {
        return Err(invalid("texts are joined, not summed"));
    }
    for value in items(a.value(0))? {
        let value = match a.some(1) {
            Some(name) => attribute(&value, name, None)?,
            None => value,
        };
        sum = operators::add(&sum, &value)?;
    }
    Ok(sum)
}

fn unique(_: &State<'_, '_>, a: &Arguments) -> Result<Value, Error> {
    let mut texts: HashSet<String> = HashSet::new();
    let mut others: Vec<Value> = Vec::new();
    let mut out = Vec::new();
    for value in items(a.value(0))? {
        let key = match a.some(2) {
            Some(name) => attribute(&value, name, None)?,
            None => value.clone(),
        };
        if !super::values::is_hashable(&key) {
            return Err(invalid("a list or dictionary cannot be compared by unique"));
        }
        let key = folded(key, !a.flag(1));
        // Texts are many, and others are compared as Python does.
        let new = match key.as_str() {
            Some(text) => texts.insert(text.to_owned()),
            None => !others.iter().any(|k| operators::equal(k, &key)),
        };
        if new {
            if key.as_str().is_none() {
                others.push(key);
            }
            out.push(value);
        }
    }
    listed(out, Flavor::Generator)
}

/// What `map` and `select` take for nothing at all.
fn is_nothing(value: &Value) -> bool {
    !value.is_true() || matches!(value.kind(), ValueKind::Undefined | ValueKind::None)
}

fn map(state: &State<'_, '_>, value: &Value, args: Rest<Value>) -> Result<Value, Error> {
    if is_nothing(value) {
        return listed(Vec::new(), Flavor::Generator);
    }
    work(std::slice::from_ref(value))?;
    let (placed, named) = split(&args)?;
    let values = items(value)?;
    let mapped: Result<Vec<_>, Error> = match placed.split_first() {
        None => {
            let a = Arguments::bind(
                "map",
                "_ attribute! default",
                &[&[Value::UNDEFINED], &args[..]].concat(),
            )?;
            drop(named);
            values
                .iter()
                .map(|value| attribute(value, a.value(1), a.get(2)))
                .collect()
        }
        Some((filter, _)) => {
            let filter = filter
                .as_str()
                .ok_or_else(|| invalid("map needs the name of a filter"))?;
            let mapped = values.into_iter().map(|value| {
                let args = [&[value], &args[1..]].concat();
                state.apply_filter(filter, &args)
            });
            mapped.collect()
        }
    };
    charged(listed(mapped?, Flavor::Generator)?)
}

fn select(
    state: &State<'_, '_>,
    value: &Value,
    args: &[Value],
    keeps: bool,
    by_attribute: bool,
) -> Result<Value, Error> {
    if is_nothing(value) {
        return listed(Vec::new(), Flavor::Generator);
    }
    work(std::slice::from_ref(value))?;
    let (name, args) = match args.split_first() {
        Some((name, rest)) if by_attribute => (Some(name), rest),
        None if by_attribute => return Err(invalid("the name of an attribute is missing")),
        _ => (None, args),
    };
    let mut out = Vec::new();
    for value in items(value)? {
        let asked = match name {
            Some(name) => attribute(&value, name, None)?,
            None => value.clone(),
        };
        let holds = match args.split_first() {
            Some((test, rest)) => {
                let test = test
                    .as_str()
                    .ok_or_else(|| invalid("the name of a test must be a text"))?;
                state.perform_test(test, &[&[asked], rest].concat())?
            }
            None => asked.is_true(),
        };
        if holds == keeps {
            out.push(value);
        }
    }
    listed(out, Flavor::Generator)
}
