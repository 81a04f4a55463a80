//! Python's arithmetic.

use super::invalid;
use minijinja::Error;
use minijinja::value::{Value, ValueKind};
use std::cmp::Ordering;

/// A number, or what Python computes with as with one.
#[derive(Clone, Copy, Debug)]
pub(super) enum Number {
    Int(i128),
    Float(f64),
}
use Number::{Float, Int};

impl Number {
    /// `None` if `value` is none.
    pub(super) fn of(value: &Value) -> Option<Self> {
        match value.kind() {
            ValueKind::Bool => Some(Int(i128::from(value.is_true()))),
            ValueKind::Number if value.is_integer() => i128::try_from(value.clone()).ok().map(Int),
            ValueKind::Number => f64::try_from(value.clone()).ok().map(Float),
            _ => None,
        }
    }

    pub(super) fn float(self) -> f64 {
        match self {
            Int(n) => n as f64,
            Float(x) => x,
        }
    }

    pub(super) fn value(self) -> Value {
        match self {
            Int(n) => int(n),
            Float(x) => Value::from(x),
        }
    }
}

/// A whole number in its shortest form.
pub(super) fn int(n: i128) -> Value {
    match i64::try_from(n) {
        Ok(n) => Value::from(n),
        Err(_) => Value::from(n),
    }
}

fn large() -> Error {
    invalid("a number is larger than 128 bits")
}

fn by_zero() -> Error {
    invalid("division by zero")
}

fn whole(n: Option<i128>) -> Result<Value, Error> {
    n.map(int).ok_or_else(large)
}

pub(super) fn add(a: Number, b: Number) -> Result<Value, Error> {
    match (a, b) {
        (Int(a), Int(b)) => whole(a.checked_add(b)),
        _ => Ok(Value::from(a.float() + b.float())),
    }
}

pub(super) fn subtract(a: Number, b: Number) -> Result<Value, Error> {
    match (a, b) {
        (Int(a), Int(b)) => whole(a.checked_sub(b)),
        _ => Ok(Value::from(a.float() - b.float())),
    }
}

pub(super) fn multiply(a: Number, b: Number) -> Result<Value, Error> {
    match (a, b) {
        (Int(a), Int(b)) => whole(a.checked_mul(b)),
        _ => Ok(Value::from(a.float() * b.float())),
    }
}

pub(super) fn negate(a: Number) -> Result<Value, Error> {
    match a {
        Int(n) => whole(n.checked_neg()),
        Float(x) => Ok(Value::from(-x)),
    }
}

pub(super) fn divide(a: Number, b: Number) -> Result<Value, Error> {
    match b.float() == 0.0 {
        true => Err(by_zero()),
        false => Ok(Value::from(a.float() / b.float())),
    }
}

/// Quotient towards minus infinity, and a remainder that has the sign of `b`.
fn floor_divided(a: i128, b: i128) -> Option<(i128, i128)> {
    let (quotient, rest) = (a.checked_div(b)?, a.checked_rem(b)?);
    match rest != 0 && (rest < 0) != (b < 0) {
        true => Some((quotient - 1, rest + b)),
        false => Some((quotient, rest)),
    }
}

/// The same of fractions, as Python does it.
fn floats_divided(a: f64, b: f64) -> (f64, f64) {
    let mut rest = a % b;
    let mut quotient = (a - rest) / b;
    if rest == 0.0 {
        rest = 0.0_f64.copysign(b);
    } else if (rest < 0.0) != (b < 0.0) {
        rest += b;
        quotient -= 1.0;
    }
    let floor = match quotient == 0.0 {
        true => 0.0_f64.copysign(a / b),
        false if quotient - quotient.floor() > 0.5 => quotient.floor() + 1.0,
        false => quotient.floor(),
    };
    (floor, rest)
}

pub(super) fn floor_divide(a: Number, b: Number) -> Result<Value, Error> {
    match (a, b) {
        _ if b.float() == 0.0 => Err(by_zero()),
        (Int(a), Int(b)) => whole(floor_divided(a, b).map(|(quotient, _)| quotient)),
        _ => Ok(Value::from(floats_divided(a.float(), b.float()).0)),
    }
}

pub(super) fn modulo(a: Number, b: Number) -> Result<Value, Error> {
    match (a, b) {
        _ if b.float() == 0.0 => Err(by_zero()),
        (Int(a), Int(b)) => whole(floor_divided(a, b).map(|(_, rest)| rest)),
        _ => Ok(Value::from(floats_divided(a.float(), b.float()).1)),
    }
}

pub(super) fn power(a: Number, b: Number) -> Result<Value, Error> {
    match (a, b) {
        (Int(a), Int(b)) if b >= 0 => match (a, u32::try_from(b)) {
            (0 | 1, _) => Ok(int(if b == 0 { 1 } else { a })),
            (-1, _) => Ok(int(if b % 2 == 0 { 1 } else { -1 })),
            (_, Ok(b)) => whole(a.checked_pow(b)),
            (_, Err(_)) => Err(large()),
        },
        _ => {
            let (a, b) = (a.float(), b.float());
            if a == 0.0 && b < 0.0 {
                return Err(by_zero());
            }
            let result = a.powf(b);
            match result {
                _ if result.is_nan() && !a.is_nan() && !b.is_nan() => {
                    Err(invalid("a power that is no real number"))
                }
                _ if result.is_infinite() && a.is_finite() && b.is_finite() => Err(large()),
                _ => Ok(Value::from(result)),
            }
        }
    }
}

/// `None` if one of them is no number.
pub(super) fn order(a: Number, b: Number) -> Option<Ordering> {
    match (a, b) {
        (Int(a), Int(b)) => Some(a.cmp(&b)),
        (Float(a), Float(b)) => a.partial_cmp(&b),
        (Int(a), Float(b)) => int_to_float(a, b),
        (Float(a), Int(b)) => int_to_float(b, a).map(Ordering::reverse),
    }
}

/// Without the digits that a whole number loses as a fraction.
fn int_to_float(a: i128, b: f64) -> Option<Ordering> {
    match (a as f64).partial_cmp(&b)? {
        Ordering::Equal if b.abs() < 1e38 => Some(a.cmp(&(b as i128))),
        other => Some(other),
    }
}

/// Half to even, as `round(x, digits)`.
pub(super) fn rounded(n: Number, digits: i64) -> Result<Value, Error> {
    match n {
        Int(n) if digits >= 0 => Ok(int(n)),
        Int(n) => {
            let unit = u32::try_from(-digits)
                .ok()
                .and_then(|d| 10_i128.checked_pow(d));
            let Some(unit) = unit else { return Ok(int(0)) };
            let (quotient, rest) = floor_divided(n, unit).ok_or_else(large)?;
            let up = 2 * rest > unit || 2 * rest == unit && quotient % 2 != 0;
            whole((quotient + i128::from(up)).checked_mul(unit))
        }
        Float(x) if !x.is_finite() || digits > 330 => Ok(Value::from(x)),
        Float(x) if digits >= 0 => {
            // Rust writes the nearest decimal, of two the even one.
            let text = format!("{x:.*}", digits as usize);
            Ok(Value::from(text.parse().unwrap_or(x)))
        }
        Float(x) => {
            let unit = 10_f64.powi(i32::try_from(-digits).unwrap_or(i32::MAX));
            Ok(Value::from((x / unit).round_ties_even() * unit))
        }
    }
}

/// `int(text, base)`; `None` if it is no number.
pub(super) fn parse_int(text: &str, base: i64) -> Option<i128> {
    let text = text.trim_matches(super::python::is_space);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let prefix = digits.get(..2).map(str::to_ascii_lowercase);
    let prefixed = match prefix.as_deref() {
        Some("0b") => Some(2),
        Some("0o") => Some(8),
        Some("0x") => Some(16),
        _ => None,
    };
    let (base, digits) = match (base, prefixed) {
        (0, Some(base)) => (base, &digits[2..]),
        (0, None) => (10, digits),
        (base, Some(prefixed)) if base == i64::from(prefixed) => (prefixed, &digits[2..]),
        (base, _) => (
            u32::try_from(base).ok().filter(|b| (2..=36).contains(b))?,
            digits,
        ),
    };
    let digits = digits
        .strip_prefix('_')
        .filter(|_| prefixed.is_some())
        .unwrap_or(digits);
    if digits.starts_with('_')
        || digits.ends_with('_')
        || digits.contains("__")
        || digits.starts_with(['+', '-'])
    {
        return None;
    }
    let n = i128::from_str_radix(&digits.replace('_', ""), base).ok()?;
    Some(if negative { -n } else { n })
}

/// `float(text)`; `None` if it is no number.
pub(super) fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(super::python::is_space);
    if text.starts_with('_') || text.ends_with('_') || text.contains("__") {
        return None;
    }
    text.replace('_', "").parse().ok()
}
