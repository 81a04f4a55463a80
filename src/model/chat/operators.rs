//! Python's operators. The rewritten source of a template has each of them as a filter.

use super::limits::{charged, fits, work};
use super::numbers::{self, Number};
use super::python::python_str;
use super::values::{Dict, Flavor, List, listed};
use super::{filters, format, invalid, kind};
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error};
use std::cmp::Ordering;

pub(super) fn register(env: &mut Environment<'_>) {
    type Binary = fn(&Value, &Value) -> Result<Value, Error>;
    let binary: [(&'static str, Binary); 7] = [
        ("__add__", add),
        ("__sub__", |a, b| arithmetic(a, b, "-", numbers::subtract)),
        ("__mul__", multiply),
        ("__div__", |a, b| arithmetic(a, b, "/", numbers::divide)),
        ("__floordiv__", |a, b| {
            arithmetic(a, b, "//", numbers::floor_divide)
        }),
        ("__mod__", modulo),
        ("__pow__", |a, b| arithmetic(a, b, "**", numbers::power)),
    ];
    for (name, operator) in binary {
        env.add_filter(name, move |a: &Value, b: &Value| {
            work(std::slice::from_ref(a))?;
            work(std::slice::from_ref(b))?;
            charged(operator(a, b)?)
        });
    }
    env.add_filter("__neg__", |a: &Value| match Number::of(a) {
        Some(n) => numbers::negate(n),
        None => Err(invalid(format!("- of {}", kind(a)))),
    });
    env.add_filter("__pos__", |a: &Value| match Number::of(a) {
        Some(n) => Ok(n.value()),
        None => Err(invalid(format!("+ of {}", kind(a)))),
    });
    env.add_filter("__join__", join);
    env.add_filter("__compare__", compare_chain);
}

/// `a ~ b ~ c`.
fn join(first: &Value, others: Rest<Value>) -> Result<Value, Error> {
    work(&others)?;
    let mut out = python_str(first)?.into_owned();
    for other in others.iter() {
        let text = python_str(other)?;
        fits(out.len() + text.len())?;
        out.push_str(&text);
    }
    charged(out.into())
}

fn arithmetic(
    a: &Value,
    b: &Value,
    operator: &str,
    compute: fn(Number, Number) -> Result<Value, Error>,
) -> Result<Value, Error> {
    match (Number::of(a), Number::of(b)) {
        (Some(a), Some(b)) => compute(a, b),
        _ => Err(unsupported(a, operator, b)),
    }
}

fn unsupported(a: &Value, operator: &str, b: &Value) -> Error {
    invalid(format!("{} {operator} {}", kind(a), kind(b)))
}

pub(super) fn add(a: &Value, b: &Value) -> Result<Value, Error> {
    if let ((x, Some(a)), (y, Some(b))) = ((a, a.as_str()), (b, b.as_str())) {
        return joined((a, x.is_safe()), (b, y.is_safe()));
    }
    match (
        a.downcast_object_ref::<List>(),
        b.downcast_object_ref::<List>(),
    ) {
        (Some(x), Some(y)) => match x.flavor {
            flavor @ (Flavor::List | Flavor::Tuple) if flavor == y.flavor => {
                listed([&x.items[..], &y.items].concat(), flavor)
            }
            _ => Err(unsupported(a, "+", b)),
        },
        _ => arithmetic(a, b, "+", numbers::add),
    }
}

/// Two texts. What is joined with a safe one is made safe for HTML, as Jinja does even where nothing else is escaped.
fn joined((a, a_safe): (&str, bool), (b, b_safe): (&str, bool)) -> Result<Value, Error> {
    fits(a.len() + b.len())?;
    if !a_safe && !b_safe {
        return Ok([a, b].concat().into());
    }
    let html = |text: &str, safe| match safe {
        true => Ok(text.to_owned()),
        false => filters::html(text),
    };
    Ok(Value::from_safe_string(
        html(a, a_safe)? + &html(b, b_safe)?,
    ))
}

fn multiply(a: &Value, b: &Value) -> Result<Value, Error> {
    if let Some(result) = repeat(a, b).or_else(|| repeat(b, a)) {
        return result;
    }
    arithmetic(a, b, "*", numbers::multiply)
}

/// A text or a list so many times over.
fn repeat(what: &Value, times: &Value) -> Option<Result<Value, Error>> {
    let times = match Number::of(times)? {
        Number::Int(n) => usize::try_from(n.max(0)).unwrap_or(usize::MAX),
        Number::Float(_) => return None,
    };
    if let Some(text) = what.as_str() {
        let len = fits(text.len().saturating_mul(times));
        return Some(len.map(|_| text.repeat(times).into()));
    }
    let list = what.downcast_object_ref::<List>()?;
    if !matches!(list.flavor, Flavor::List | Flavor::Tuple) {
        return None;
    }
    let len = fits(
        list.items
            .len()
            .saturating_mul(times)
            .saturating_mul(size_of::<Value>()),
    );
    Some(len.and_then(|_| {
        let all = list.items.iter().cycle().take(list.items.len() * times);
        listed(all.cloned().collect(), list.flavor)
    }))
}

fn modulo(a: &Value, b: &Value) -> Result<Value, Error> {
    match a.as_str() {
        Some(text) => Ok(format::percent(text, b)?.into()),
        None => arithmetic(a, b, "%", numbers::modulo),
    }
}

/// `a < b` or `a < b < c`: operators and values by turns.
fn compare_chain(first: &Value, others: Rest<Value>) -> Result<bool, Error> {
    work(std::slice::from_ref(first))?;
    work(&others)?;
    let mut left = first;
    for pair in others.chunks(2) {
        let [operator, right] = pair else { break };
        if !compare(left, operator.as_str().unwrap_or_default(), right)? {
            return Ok(false);
        }
        left = right;
    }
    Ok(true)
}

pub(super) fn compare(a: &Value, operator: &str, b: &Value) -> Result<bool, Error> {
    let ordered = |holds: fn(Ordering) -> bool| Ok(order(a, b)?.is_some_and(holds));
    match operator {
        "==" => Ok(equal(a, b)),
        "!=" => Ok(!equal(a, b)),
        "<" => ordered(Ordering::is_lt),
        "<=" => ordered(Ordering::is_le),
        ">" => ordered(Ordering::is_gt),
        ">=" => ordered(Ordering::is_ge),
        "in" => contains(b, a),
        "not in" => Ok(!contains(b, a)?),
        _ => Err(invalid(format!("{operator} is no comparison"))),
    }
}

/// `a == b`.
pub(super) fn equal(a: &Value, b: &Value) -> bool {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return a == b;
    }
    if let (Some(a), Some(b)) = (Number::of(a), Number::of(b)) {
        return numbers::order(a, b) == Some(Ordering::Equal);
    }
    if let (Some(a), Some(b)) = (
        a.downcast_object_ref::<List>(),
        b.downcast_object_ref::<List>(),
    ) {
        let sort = |list: &List| match list.flavor {
            Flavor::Group => Flavor::Tuple,
            Flavor::Range(..) => Flavor::Range(0, 0, 0),
            flavor => flavor,
        };
        let pairs = || a.items.iter().zip(&b.items);
        return sort(a) == sort(b)
            && a.items.len() == b.items.len()
            && pairs().all(|(x, y)| equal(x, y));
    }
    if let (Some(a), Some(b)) = (
        a.downcast_object_ref::<Dict>(),
        b.downcast_object_ref::<Dict>(),
    ) {
        let same =
            |(key, value): &(Value, Value)| b.get(key).is_some_and(|other| equal(value, other));
        return a.entries().len() == b.entries().len() && a.entries().iter().all(same);
    }
    match (a.kind(), b.kind()) {
        (ValueKind::None, ValueKind::None) | (ValueKind::Undefined, ValueKind::Undefined) => true,
        // Others are equal to themselves only, which cannot be asked.
        _ => false,
    }
}

/// How `a` stands to `b`; `None` for what is no number.
pub(super) fn order(a: &Value, b: &Value) -> Result<Option<Ordering>, Error> {
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        return Ok(Some(a.cmp(b)));
    }
    if let (Some(a), Some(b)) = (Number::of(a), Number::of(b)) {
        return Ok(numbers::order(a, b));
    }
    if let (Some(x), Some(y)) = (
        a.downcast_object_ref::<List>(),
        b.downcast_object_ref::<List>(),
    ) {
        let tuple = |list: &List| matches!(list.flavor, Flavor::Tuple | Flavor::Group);
        let lists = x.flavor == Flavor::List && y.flavor == Flavor::List;
        if lists || tuple(x) && tuple(y) {
            for (x, y) in x.items.iter().zip(&y.items) {
                if !equal(x, y) {
                    return order(x, y);
                }
            }
            return Ok(Some(x.items.len().cmp(&y.items.len())));
        }
    }
    Err(invalid(format!(
        "{} cannot be compared with {}",
        kind(a),
        kind(b)
    )))
}

/// `item in all`.
pub(super) fn contains(all: &Value, item: &Value) -> Result<bool, Error> {
    if let Some(text) = all.as_str() {
        return match item.as_str() {
            Some(part) => Ok(text.contains(part)),
            None => Err(invalid(format!("{} in a text", kind(item)))),
        };
    }
    if let Some(list) = all.downcast_object_ref::<List>() {
        return Ok(list.items.iter().any(|other| equal(other, item)));
    }
    if let Some(dict) = all.downcast_object_ref::<Dict>() {
        return match super::values::is_hashable(item) {
            true => Ok(dict.get(item).is_some()),
            false => Err(invalid("a list or dictionary cannot be a key")),
        };
    }
    match all.kind() {
        ValueKind::Undefined => Ok(false),
        ValueKind::Seq | ValueKind::Iterable => {
            Ok(all.try_iter()?.any(|other| equal(&other, item)))
        }
        _ => Err(invalid(format!("in {}", kind(all)))),
    }
}
