//! What one rendering may keep and do: a template comes from strangers.

use super::values::{Dict, List};
use super::{MAX_TEXT, invalid};
use minijinja::value::Value;
use minijinja::{Error, ErrorKind};
use std::cell::Cell;

/// Bytes that all values made in one rendering may take together, though most are given back long before its end.
const MAX_MADE: usize = 1 << 30;
/// Namespaces of one rendering. They can hold each other in a row, and giving that back takes stack for each.
const MAX_NAMESPACES: usize = 50_000;
/// As many fit into any stack.
const FEW_NAMESPACES: usize = 500;
/// What operators and filters may go through, in kilobytes of text or [`ITEMS`] of lists: some seconds.
const MAX_WORK: usize = 4_000_000;
/// Values that take as long as a kilobyte of text.
const ITEMS: usize = 256;

/// What the rendering of this thread has used so far.
struct Spent {
    made: Cell<usize>,
    namespaces: Cell<usize>,
    work: Cell<usize>,
    large_stack: Cell<bool>,
}

thread_local! {
    // A template renders no other one.
    static SPENT: Spent = const {
        Spent {
            made: Cell::new(0),
            namespaces: Cell::new(0),
            work: Cell::new(0),
            large_stack: Cell::new(false),
        }
    };
}

/// Adds to what was used, and gives what that makes.
fn spend(what: fn(&Spent) -> &Cell<usize>, n: usize) -> usize {
    SPENT.with(|spent| {
        let cell = what(spent);
        cell.set(cell.get().saturating_add(n));
        cell.get()
    })
}

/// Says that a rendering must be done again with a large stack.
#[derive(Debug, thiserror::Error)]
#[error("the template nests too deeply for this stack")]
pub(super) struct NeedsStack;

/// A rendering begins.
pub(super) fn begin(large_stack: bool) {
    SPENT.with(|spent| {
        spent.made.set(0);
        spent.namespaces.set(0);
        spent.work.set(0);
        spent.large_stack.set(large_stack);
    });
}

/// Counts `bytes` that a value takes.
///
/// # Errors
/// Once there are too many.
pub(super) fn charge(bytes: usize) -> Result<(), Error> {
    match spend(|spent| &spent.made, bytes) > MAX_MADE {
        true => Err(invalid(format!(
            "the template makes values of more than {MAX_MADE} bytes"
        ))),
        false => Ok(()),
    }
}

/// Counts a value that was made.
pub(super) fn charged(value: Value) -> Result<Value, Error> {
    let bytes = if let Some(text) = value.as_str() {
        text.len()
    } else if let Some(list) = value.downcast_object_ref::<List>() {
        list.items.len() * size_of::<Value>()
    } else if let Some(dict) = value.downcast_object_ref::<Dict>() {
        dict.entries().len() * 4 * size_of::<Value>()
    } else {
        0
    };
    charge(bytes)?;
    Ok(value)
}

/// Counts what an operation goes through if it looks at all that its arguments hold.
///
/// # Errors
/// Once it is too much.
pub(super) fn work(args: &[Value]) -> Result<(), Error> {
    let cost = |value: &Value| match value.as_str() {
        Some(text) => text.len() / 1024,
        None => super::values::size(value) / ITEMS,
    };
    let cost = args.iter().map(cost).fold(0, usize::saturating_add);
    match spend(|spent| &spent.work, cost) > MAX_WORK {
        true => Err(Error::from(ErrorKind::OutOfFuel)),
        false => Ok(()),
    }
}

/// Counts a namespace.
pub(super) fn charge_namespace() -> Result<(), Error> {
    let n = spend(|spent| &spent.namespaces, 1);
    let large = SPENT.with(|spent| spent.large_stack.get());
    if n > MAX_NAMESPACES {
        return Err(invalid(format!(
            "the template makes more than {MAX_NAMESPACES} namespaces"
        )));
    }
    if n > FEW_NAMESPACES && !large {
        return Err(
            Error::new(ErrorKind::InvalidOperation, "many namespaces").with_source(NeedsStack)
        );
    }
    Ok(())
}

/// `len`, for a text that is about to be made.
///
/// # Errors
/// If it is longer than any conversation.
pub(super) fn fits(len: usize) -> Result<usize, Error> {
    match len > MAX_TEXT {
        true => Err(invalid(format!("a text of more than {MAX_TEXT} bytes"))),
        false => Ok(len),
    }
}
