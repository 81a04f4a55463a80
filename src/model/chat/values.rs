//! Lists, tuples, dictionaries and what else Python's values are, where minijinja has one kind for several of them.

use super::invalid;
use minijinja::value::{Enumerator, Object, ObjectRepr, Value};
use minijinja::{Error, State};
use serde_json::Value as Json;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

/// Values within values. What goes through them calls itself for each level.
pub(super) const MAX_NESTING: u16 = 250;

/// Values within one value, each counted as often as it is there.
const MAX_SIZE: usize = 20_000_000;

/// What a list is to Python.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Flavor {
    List,
    Tuple,
    /// What `groupby` makes: a tuple with the names `grouper` and `list`.
    Group,
    /// `range(start, stop, step)`.
    Range(i64, i64, i64),
    Keys,
    Values,
    Items,
    /// Whatever Python computes when it is asked for: neither length nor index.
    Generator,
}

/// Several values.
#[derive(Debug)]
pub(super) struct List {
    pub(super) items: Vec<Value>,
    pub(super) flavor: Flavor,
    within: Within,
}

impl List {
    /// Whether Python gives an item for a number.
    pub(super) fn has_index(&self) -> bool {
        use Flavor::{Group, List, Range, Tuple};
        matches!(self.flavor, List | Tuple | Group | Range(..))
    }
}

impl Object for List {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        match self.has_index() {
            true => ObjectRepr::Seq,
            false => ObjectRepr::Iterable,
        }
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        if self.flavor == Flavor::Group && key.as_str().is_some() {
            let names = ["grouper", "list"];
            let at = names.iter().position(|n| Some(*n) == key.as_str())?;
            return self.items.get(at).cloned();
        }
        self.items.get(key.as_usize()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.items.len())
    }

    fn is_true(self: &Arc<Self>) -> bool {
        self.flavor == Flavor::Generator || !self.items.is_empty()
    }
}

/// Keys and their values in order.
#[derive(Debug, Default)]
pub(super) struct Dict {
    entries: Vec<(Value, Value)>,
    /// Where in `entries` a key is, once there are many.
    places: HashMap<Value, usize>,
    within: Within,
}

/// Entries among which searching one after the other is fastest.
const FEW: usize = 12;

impl Dict {
    fn place(&self, key: &Value) -> Option<usize> {
        match self.entries.len() <= FEW {
            true => self.entries.iter().position(|(k, _)| k == key),
            false => self.places.get(key).copied(),
        }
    }

    pub(super) fn get(&self, key: &Value) -> Option<&Value> {
        self.place(key).map(|at| &self.entries[at].1)
    }

    pub(super) fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }

    /// A later value takes the place of an earlier one.
    fn insert(&mut self, key: Value, value: Value) {
        if let Some(at) = self.place(&key) {
            self.entries[at].1 = value;
            return;
        }
        self.entries.push((key, value));
        let known = self.places.len();
        if self.entries.len() > FEW {
            let new = self.entries[known..].iter().enumerate();
            self.places
                .extend(new.map(|(i, (key, _))| (key.clone(), known + i)));
        }
    }
}

impl Object for Dict {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.get(key).cloned()
    }

    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        if self.entries.len() > FEW {
            return self.get(&Value::from(key)).cloned();
        }
        let mut entries = self.entries.iter();
        entries
            .find(|(k, _)| k.as_str() == Some(key))
            .map(|(_, v)| v.clone())
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.entries.iter().map(|(k, _)| k.clone()).collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.entries.len())
    }
}

/// A method of a value that is not called at once.
#[derive(Debug)]
pub(super) struct Method {
    pub(super) owner: Value,
    pub(super) name: String,
}

impl Object for Method {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn call(self: &Arc<Self>, state: &State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        super::methods::call(state, &self.owner, &self.name, args)
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<built-in method {}>", self.name)
    }
}

/// What lies within a value.
#[derive(Clone, Copy, Debug, Default)]
struct Within {
    /// How deep.
    nesting: u16,
    /// How many, each counted as often as it is there.
    size: usize,
}

fn within(value: &Value) -> Within {
    if let Some(list) = value.downcast_object_ref::<List>() {
        list.within
    } else if let Some(dict) = value.downcast_object_ref::<Dict>() {
        dict.within
    } else {
        Within::default()
    }
}

/// How many values lie within `value`.
pub(super) fn size(value: &Value) -> usize {
    within(value).size
}

fn around<'a>(values: impl Iterator<Item = &'a Value>) -> Result<Within, Error> {
    let mut all = Within::default();
    for value in values {
        let within = within(value);
        all.nesting = all.nesting.max(within.nesting);
        all.size = all.size.saturating_add(within.size + 1);
    }
    all.nesting += 1;
    if all.nesting > MAX_NESTING {
        let what = format!("values are nested more than {MAX_NESTING} deep");
        return Err(invalid(what));
    }
    // A list may hold another many times over, which costs nothing until somebody goes through it.
    match all.size > MAX_SIZE {
        true => Err(invalid(format!(
            "a value holds more than {MAX_SIZE} others"
        ))),
        false => Ok(all),
    }
}

/// Several values as one.
pub(super) fn listed(items: Vec<Value>, flavor: Flavor) -> Result<Value, Error> {
    let within = around(items.iter())?;
    Ok(Value::from_object(List {
        items,
        flavor,
        within,
    }))
}

pub(super) fn list(items: Vec<Value>) -> Result<Value, Error> {
    listed(items, Flavor::List)
}

pub(super) fn tuple(items: Vec<Value>) -> Result<Value, Error> {
    listed(items, Flavor::Tuple)
}

pub(super) fn dict(entries: impl IntoIterator<Item = (Value, Value)>) -> Result<Value, Error> {
    let mut dict = Dict::default();
    for (key, value) in entries {
        if !is_hashable(&key) {
            return Err(invalid("a list or dictionary cannot be a key"));
        }
        dict.insert(key, value);
    }
    dict.within = around(dict.entries.iter().flat_map(|(k, v)| [k, v]))?;
    Ok(Value::from_object(dict))
}

/// Whether Python takes it for a key.
pub(super) fn is_hashable(key: &Value) -> bool {
    match key.downcast_object_ref::<List>() {
        Some(list) if list.flavor == Flavor::Tuple => list.items.iter().all(is_hashable),
        Some(list) => list.flavor != Flavor::List,
        None => key.downcast_object_ref::<Dict>().is_none(),
    }
}

/// A value of JSON.
pub(super) fn from_json(json: &Json) -> Result<Value, Error> {
    fn convert(json: &Json, depth: u16) -> Result<Value, Error> {
        if depth > MAX_NESTING {
            return Err(invalid(format!(
                "values are nested more than {MAX_NESTING} deep"
            )));
        }
        Ok(match json {
            Json::Null => Value::from(()),
            Json::Bool(b) => Value::from(*b),
            Json::Number(n) => match (n.as_i64(), n.as_u64()) {
                (Some(n), _) => Value::from(n),
                (_, Some(n)) => Value::from(n),
                _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Value::from(text.as_str()),
            Json::Array(items) => {
                let items = items.iter().map(|v| convert(v, depth + 1));
                list(items.collect::<Result<_, _>>()?)?
            }
            Json::Object(fields) => {
                let fields = fields
                    .iter()
                    .map(|(k, v)| Ok((Value::from(k.as_str()), convert(v, depth + 1)?)));
                dict(fields.collect::<Result<Vec<_>, Error>>()?)?
            }
        })
    }
    convert(json, 0)
}
