//! Items, slices and methods of lists and dictionaries.

use super::arguments::{Arguments, whole};
use super::limits::{charged, work};
use super::operators::equal;
use super::values::{Dict, Flavor, List, Method, dict, is_hashable, list, listed, tuple};
use super::{invalid, kind, methods};
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};

pub(super) fn register(env: &mut Environment<'_>) {
    env.add_filter("__list__", |_: &Value, items: Rest<Value>| {
        charged(list(items.0)?)
    });
    env.add_filter("__tuple__", |_: &Value, items: Rest<Value>| {
        charged(tuple(items.0)?)
    });
    env.add_filter("__dict__", |_: &Value, items: Rest<Value>| {
        let pairs = items
            .chunks(2)
            .filter_map(|pair| Some((pair.first()?.clone(), pair.get(1)?.clone())));
        charged(dict(pairs)?)
    });
    env.add_filter("__set__", |value: &Value, _: &Value| value.clone());
    env.add_filter("__item__", |value: &Value, key: &Value| {
        if value.as_str().is_some() {
            work(std::slice::from_ref(value))?;
        }
        item(value, key)
    });
    env.add_filter("__attr__", |value: &Value, name: &str| {
        attribute(value, name)
    });
    env.add_filter(
        "__call__",
        |state: &State<'_, '_>, value: &Value, name: &str, args: Rest<Value>| {
            methods::call(state, value, name, &args)
        },
    );
    env.add_filter("__slice__", |value: &Value, bounds: Rest<Value>| {
        charged(slice(value, &bounds)?)
    });
    env.add_filter("__iter__", |value: &Value| match value.kind() {
        ValueKind::String => list(items(value)?),
        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
            Err(invalid(format!("{} cannot be iterated over", kind(value))))
        }
        _ => Ok(value.clone()),
    });
}

/// `iter(value)`.
pub(super) fn items(value: &Value) -> Result<Vec<Value>, Error> {
    if let Some(list) = value.downcast_object_ref::<List>() {
        return Ok(list.items.clone());
    }
    match value.kind() {
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let mut buffer = [0; 4];
            Ok(text
                .chars()
                .map(|c| Value::from(&*c.encode_utf8(&mut buffer)))
                .collect())
        }
        ValueKind::Undefined => Ok(Vec::new()),
        ValueKind::Map | ValueKind::Seq | ValueKind::Iterable => Ok(value.try_iter()?.collect()),
        _ => Err(invalid(format!("{} cannot be iterated over", kind(value)))),
    }
}

/// `len(value)`.
pub(super) fn length(value: &Value) -> Result<usize, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.chars().count());
    }
    if let Some(list) = value.downcast_object_ref::<List>() {
        return match list.flavor {
            Flavor::Generator => Err(invalid(
                "what is computed on demand has no length: make a list of it",
            )),
            _ => Ok(list.items.len()),
        };
    }
    match (value.downcast_object_ref::<Dict>(), value.kind()) {
        (Some(dict), _) => Ok(dict.entries().len()),
        (None, ValueKind::Undefined) => Ok(0),
        (None, ValueKind::Seq) => Ok(value.len().unwrap_or(0)),
        _ => Err(invalid(format!("{} has no length", kind(value)))),
    }
}

/// Whether Python has a method `name` for a value of this kind.
fn has_method(value: &Value, name: &str) -> bool {
    if value.as_str().is_some() {
        return methods::is_text_method(name);
    }
    if let Some(list) = value.downcast_object_ref::<List>() {
        return matches!(name, "index" | "count") && list.has_index()
            || name == "copy" && list.flavor == Flavor::List;
    }
    value.downcast_object_ref::<Dict>().is_some()
        && matches!(
            name,
            "items" | "keys" | "values" | "get" | "copy" | "fromkeys"
        )
}

/// What Jinja gives for `value.name`: a method before an item.
pub(super) fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(invalid(format!("{name} of what is not defined")));
    }
    if has_method(value, name) {
        return Ok(method(value, name));
    }
    value.get_attr(name)
}

fn method(value: &Value, name: &str) -> Value {
    Value::from_object(Method {
        owner: value.clone(),
        name: name.to_owned(),
    })
}

/// What Jinja gives for `value[key]`: an item before a method.
pub(super) fn item(value: &Value, key: &Value) -> Result<Value, Error> {
    if value.is_undefined() {
        let key = key.as_str().unwrap_or("an item");
        return Err(invalid(format!("{key} of what is not defined")));
    }
    let at = || {
        let len = length(value).ok()? as i64;
        let at = whole(key).ok()?;
        usize::try_from(if at < 0 { at + len } else { at }).ok()
    };
    let found = if let Some(text) = value.as_str() {
        at().and_then(|at| text.chars().nth(at))
            .map(|c| Value::from(c.to_string()))
    } else if let Some(list) = value.downcast_object_ref::<List>() {
        match list.has_index() {
            true => at().and_then(|at| list.items.get(at).cloned()),
            false => None,
        }
    } else if let Some(dict) = value.downcast_object_ref::<Dict>() {
        // A key equals another as values do: 1 and 1.0.
        let found = dict.get(key).filter(|_| is_hashable(key));
        let equal = || {
            dict.entries()
                .iter()
                .find(|(k, _)| equal(k, key))
                .map(|(_, v)| v)
        };
        match key.as_str() {
            Some(_) => found.cloned(),
            None => found.or_else(equal).cloned(),
        }
    } else {
        let found = value.get_item(key)?;
        Some(found).filter(|v| !v.is_undefined())
    };
    Ok(match (found, key.as_str()) {
        (Some(found), _) => found,
        (None, Some(name)) => attribute_of_missing(value, name)?,
        (None, None) => Value::UNDEFINED,
    })
}

fn attribute_of_missing(value: &Value, name: &str) -> Result<Value, Error> {
    match has_method(value, name) {
        true => Ok(method(value, name)),
        false => value.get_attr(name),
    }
}

/// `value[start:stop:step]`.
fn slice(value: &Value, bounds: &[Value]) -> Result<Value, Error> {
    work(std::slice::from_ref(value))?;
    let bound = |at: usize| match bounds.get(at).filter(|b| !b.is_none()) {
        Some(bound) => whole(bound).map(Some),
        None => Ok(None),
    };
    let (start, stop, step) = (bound(0)?, bound(1)?, bound(2)?.unwrap_or(1));
    if step == 0 {
        return Err(invalid("slice step cannot be zero"));
    }
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        let picked = indices(chars.len(), start, stop, step).map(|i| chars[i]);
        return Ok(picked.collect::<String>().into());
    }
    match value.downcast_object_ref::<List>() {
        Some(list) if list.has_index() => {
            let picked =
                indices(list.items.len(), start, stop, step).map(|i| list.items[i].clone());
            let picked: Vec<_> = picked.collect();
            match list.flavor {
                Flavor::Group => tuple(picked),
                Flavor::Range(first, _, by) => {
                    // A range of what is left.
                    let (from, by) = (picked.first(), by.saturating_mul(step));
                    let from = from.and_then(|v| whole(v).ok()).unwrap_or(first);
                    let to = from.saturating_add(by.saturating_mul(picked.len() as i64));
                    listed(picked, Flavor::Range(from, to, by))
                }
                flavor => listed(picked, flavor),
            }
        }
        _ if value.is_undefined() => Err(invalid("a slice of what is not defined")),
        _ => Err(invalid(format!("{} cannot be sliced", kind(value)))),
    }
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

/// The sandbox of Transformers lets nothing be changed.
fn refused(name: &str) -> Error {
    invalid(format!(
        "{name} would change a value, which a chat template may not"
    ))
}

pub(super) fn list_method(list: &List, name: &str, args: &[Value]) -> Result<Value, Error> {
    if !list.has_index() {
        return Err(invalid(format!("no method {name}")));
    }
    let changes = matches!(
        name,
        "append" | "clear" | "extend" | "insert" | "pop" | "remove" | "reverse" | "sort"
    );
    match name {
        _ if changes && list.flavor == Flavor::List => Err(refused(name)),
        "count" => {
            let a = Arguments::bind(name, "_item!", args)?;
            Ok(Value::from(
                list.items.iter().filter(|v| equal(v, a.value(0))).count(),
            ))
        }
        "index" => {
            let a = Arguments::bind(name, "_item! _start _end", args)?;
            let len = list.items.len() as i64;
            let bound = |n: i64| {
                if n < 0 {
                    n.saturating_add(len).max(0)
                } else {
                    n
                }
            };
            let (start, end) = (bound(a.int_or(1, 0)?), bound(a.int_or(2, i64::MAX)?));
            let places = list
                .items
                .iter()
                .zip(0..)
                .filter(|&(_, at)| start <= at && at < end);
            let found = places
                .filter(|(v, _)| equal(v, a.value(0)))
                .map(|(_, at)| at)
                .next();
            found
                .map(Value::from)
                .ok_or_else(|| invalid("the item is not in the list"))
        }
        "copy" if list.flavor == Flavor::List && args.is_empty() => {
            listed(list.items.clone(), Flavor::List)
        }
        _ => Err(invalid(format!("a list has no method {name}"))),
    }
}

pub(super) fn dict_method(
    value: &Value,
    dict: &Dict,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match name {
        "get" => {
            let a = Arguments::bind(name, "_key! _default", args)?;
            if !is_hashable(a.value(0)) {
                return Err(invalid("a list or dictionary cannot be a key"));
            }
            let found = dict.get(a.value(0)).or(a.get(1)).cloned();
            Ok(found.unwrap_or_else(|| Value::from(())))
        }
        "items" | "keys" | "values" | "copy" => {
            Arguments::bind(name, "", args)?;
            let entries = dict.entries().iter();
            match name {
                "items" => {
                    let pairs = entries.map(|(k, v)| tuple(vec![k.clone(), v.clone()]));
                    listed(pairs.collect::<Result<_, _>>()?, Flavor::Items)
                }
                "keys" => listed(entries.map(|(k, _)| k.clone()).collect(), Flavor::Keys),
                "values" => listed(entries.map(|(_, v)| v.clone()).collect(), Flavor::Values),
                _ => Ok(value.clone()),
            }
        }
        "fromkeys" => {
            let a = Arguments::bind(name, "_keys! _value", args)?;
            let each = a.get(1).cloned().unwrap_or_else(|| Value::from(()));
            super::values::dict(
                items(a.value(0))?
                    .into_iter()
                    .map(|key| (key, each.clone())),
            )
        }
        "clear" | "pop" | "popitem" | "setdefault" | "update" => Err(refused(name)),
        _ => Err(invalid(format!("a dictionary has no method {name}"))),
    }
}
