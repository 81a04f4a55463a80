//! Tests of Jinja: `x is defined`, `x is divisibleby 3`.

use super::limits::work;
use super::methods::is_in_case;
use super::numbers::{self, Number};
use super::operators::{compare, equal};
use super::python::python_str;
use super::values::{Dict, List, Method};
use super::{invalid, kind};
use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};

type Test = fn(&State<'_, '_>, &Value, &[Value]) -> Result<bool, Error>;

/// Names, how many arguments they take, and what they ask.
const TESTS: &[(&str, usize, Test)] = &[
    ("boolean", 0, |_, v, _| Ok(v.kind() == ValueKind::Bool)),
    ("callable", 0, |_, v, _| Ok(is_callable(v))),
    ("defined", 0, |_, v, _| Ok(!v.is_undefined())),
    ("divisibleby", 1, |_, v, a| {
        Ok(!remainder(v, &a[0])?.is_true())
    }),
    ("escaped", 0, |_, v, _| Ok(v.is_safe())),
    ("even", 0, |_, v, _| {
        Ok(!remainder(v, &Value::from(2))?.is_true())
    }),
    ("false", 0, |_, v, _| {
        Ok(v.kind() == ValueKind::Bool && !v.is_true())
    }),
    ("filter", 0, |_, v, _| named(v).map(super::is_filter)),
    ("float", 0, |_, v, _| {
        Ok(v.kind() == ValueKind::Number && !v.is_integer())
    }),
    ("in", 1, |_, v, a| compare(v, "in", &a[0])),
    ("integer", 0, |_, v, _| {
        Ok(v.kind() == ValueKind::Number && v.is_integer())
    }),
    ("iterable", 0, |_, v, _| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        Ok(matches!(v.kind(), Iterable | Map | Seq | String | Undefined) && !is_callable_object(v))
    }),
    ("lower", 0, |_, v, _| Ok(is_in_case(&python_str(v)?, false))),
    ("mapping", 0, |_, v, _| {
        Ok(v.downcast_object_ref::<Dict>().is_some())
    }),
    ("none", 0, |_, v, _| Ok(v.is_none())),
    ("number", 0, |_, v, _| {
        Ok(matches!(v.kind(), ValueKind::Number | ValueKind::Bool))
    }),
    ("odd", 0, |_, v, _| {
        Ok(equal(&remainder(v, &Value::from(2))?, &Value::from(1)))
    }),
    ("sameas", 1, |_, v, a| {
        Ok(v.kind() == a[0].kind() && v.is_integer() == a[0].is_integer() && equal(v, &a[0]))
    }),
    ("sequence", 0, |_, v, _| {
        Ok(match v.downcast_object_ref::<List>() {
            Some(list) => list.has_index(),
            None => {
                let dict = v.downcast_object_ref::<Dict>().is_some();
                dict || matches!(
                    v.kind(),
                    ValueKind::String | ValueKind::Seq | ValueKind::Undefined
                )
            }
        })
    }),
    ("string", 0, |_, v, _| Ok(v.as_str().is_some())),
    ("test", 0, |_, v, _| named(v).map(is_test)),
    ("true", 0, |_, v, _| {
        Ok(v.kind() == ValueKind::Bool && v.is_true())
    }),
    ("undefined", 0, |_, v, _| Ok(v.is_undefined())),
    ("upper", 0, |_, v, _| Ok(is_in_case(&python_str(v)?, true))),
    ("eq", 1, |_, v, a| compare(v, "==", &a[0])),
    ("equalto", 1, |_, v, a| compare(v, "==", &a[0])),
    ("==", 1, |_, v, a| compare(v, "==", &a[0])),
    ("ne", 1, |_, v, a| compare(v, "!=", &a[0])),
    ("!=", 1, |_, v, a| compare(v, "!=", &a[0])),
    ("gt", 1, |_, v, a| compare(v, ">", &a[0])),
    ("greaterthan", 1, |_, v, a| compare(v, ">", &a[0])),
    (">", 1, |_, v, a| compare(v, ">", &a[0])),
    ("ge", 1, |_, v, a| compare(v, ">=", &a[0])),
    (">=", 1, |_, v, a| compare(v, ">=", &a[0])),
    ("lt", 1, |_, v, a| compare(v, "<", &a[0])),
    ("lessthan", 1, |_, v, a| compare(v, "<", &a[0])),
    ("<", 1, |_, v, a| compare(v, "<", &a[0])),
    ("le", 1, |_, v, a| compare(v, "<=", &a[0])),
    ("<=", 1, |_, v, a| compare(v, "<=", &a[0])),
];

pub(super) fn register(env: &mut Environment<'_>) {
    // minijinja's own, which Jinja does not have.
    for name in ["endingwith", "int", "safe", "startingwith"] {
        env.remove_test(name);
    }
    for &(name, takes, test) in TESTS {
        env.add_test(
            name,
            move |state: &State<'_, '_>, value: &Value, args: Rest<Value>| {
                work(std::slice::from_ref(value))?;
                work(&args)?;
                match args.len() == takes && !args.iter().any(Value::is_kwargs) {
                    true => test(state, value, &args),
                    false => Err(invalid(format!("the test {name} takes {takes} arguments"))),
                }
            },
        );
    }
}

fn remainder(value: &Value, by: &Value) -> Result<Value, Error> {
    match (Number::of(value), Number::of(by)) {
        (Some(n), Some(by)) => numbers::modulo(n, by),
        _ => Err(invalid(format!(
            "{} is not divided by {}",
            kind(value),
            kind(by)
        ))),
    }
}

fn named(value: &Value) -> Result<&str, Error> {
    match super::values::is_hashable(value) {
        true => Ok(value.as_str().unwrap_or("")),
        false => Err(invalid("a list or dictionary has no name")),
    }
}

fn is_test(name: &str) -> bool {
    TESTS.iter().any(|(known, ..)| *known == name)
}

/// What a template itself makes and calls.
fn is_callable_object(value: &Value) -> bool {
    value
        .as_object()
        .is_some_and(|o| o.type_name().ends_with("::Macro") || o.type_name().contains("Function"))
}

fn is_callable(value: &Value) -> bool {
    value.is_undefined()
        || value.downcast_object_ref::<Method>().is_some()
        || is_callable_object(value)
}
