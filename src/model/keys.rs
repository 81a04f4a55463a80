//! Metadata of an architecture, each value within the range that the decoder can work with.

use super::ModelError;
use crate::file::gguf::{GgufError, Value};
use crate::file::mmap::Part;

/// Larger than any published model, small enough that products of two of them fit 64 bits by far.
pub(super) const MAX_SIZE: usize = 1 << 24;

/// Reads what a model's first file says under `<architecture>.<key>`. Every error names the key.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    part: &'a Part,
    architecture: &'a str,
}

impl<'a> Keys<'a> {
    pub(super) fn new(part: &'a Part, architecture: &'a str) -> Self {
        Self { part, architecture }
    }

    /// The key with the architecture in front.
    pub(super) fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// The error for a value that cannot be: `why` it cannot.
    pub(super) fn bad(
        &self,
        key: &str,
        value: impl ToString,
        why: impl Into<String>,
    ) -> ModelError {
        ModelError::BadValue {
            key: self.name(key),
            value: value.to_string(),
            why: why.into(),
        }
    }

    /// The same for a value of layer `il`.
    pub(super) fn bad_in_layer(
        &self,
        key: &str,
        value: usize,
        il: usize,
        why: impl Into<String>,
    ) -> ModelError {
        self.bad(key, format!("{value} in layer {il}"), why)
    }

    /// Any integer.
    pub(super) fn integer(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let value = self.part.gguf.u32(&self.name(key))?;
        Ok(value.map(|n| n as usize))
    }

    /// 1 to `max`, and not absent.
    pub(super) fn size(&self, key: &str, max: usize) -> Result<usize, ModelError> {
        self.required(key, self.integer(key)?)
            .and_then(|n| self.in_range(key, n, max))
    }

    /// 1 to [`MAX_SIZE`].
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let value = self.integer(key)?;
        value.map(|n| self.in_range(key, n, MAX_SIZE)).transpose()
    }

    /// `least` to [`MAX_SIZE`] for each of `n_layer` layers: an array, or one number for all of them.
    pub(super) fn size_per_layer(
        &self,
        key: &str,
        n_layer: usize,
        least: usize,
    ) -> Result<Option<Vec<usize>>, ModelError> {
        let (gguf, name) = (&self.part.gguf, self.name(key));
        let Some(values) = gguf.u32_or_array(self.part.bytes(), &name, n_layer)? else {
            return Ok(None);
        };
        let check = |(il, n): (usize, u32)| match n as usize {
            n if (least..=MAX_SIZE).contains(&n) => Ok(n),
            n => Err(self.bad_in_layer(key, n, il, format!("must be {least} to {MAX_SIZE}"))),
        };
        let sizes = values.into_iter().enumerate().map(check);
        sizes.collect::<Result<_, _>>().map(Some)
    }

    /// An array of integers or booleans with an entry for each of `n_layer` layers, and maybe more; `None` if the key is absent
    /// or has one value.
    pub(super) fn flag_per_layer(
        &self,
        key: &str,
        n_layer: usize,
    ) -> Result<Option<Vec<bool>>, ModelError> {
        let (gguf, name) = (&self.part.gguf, self.name(key));
        if !matches!(gguf.get(&name), Some(Value::Array(_))) {
            return Ok(None);
        }
        let flags = gguf
            .u32_array(self.part.bytes(), &name)?
            .unwrap_or_default();
        if flags.len() < n_layer {
            let value = format!("{} entries", flags.len());
            return Err(self.bad(key, value, format!("the model has {n_layer} layers")));
        }
        Ok(Some(flags[..n_layer].iter().map(|&f| f != 0).collect()))
    }

    /// A finite number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        match self.part.gguf.f32(&self.name(key))? {
            Some(v) if !v.is_finite() => Err(self.bad(key, v, "must be finite")),
            value => Ok(value),
        }
    }

    /// A finite number that is 0 or positive.
    pub(super) fn not_negative(&self, key: &str) -> Result<Option<f32>, ModelError> {
        match self.number(key)? {
            Some(v) if v < 0.0 => Err(self.bad(key, v, "must not be negative")),
            value => Ok(value),
        }
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, key: &str) -> Result<Option<f32>, ModelError> {
        match self.number(key)? {
            Some(v) if v <= 0.0 => Err(self.bad(key, v, "must be positive")),
            value => Ok(value),
        }
    }

    pub(super) fn bool(&self, key: &str) -> Result<Option<bool>, ModelError> {
        Ok(self.part.gguf.bool(&self.name(key))?)
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        Ok(self.part.gguf.str(&self.name(key))?)
    }

    /// `value`, or the error for an absent key.
    pub(super) fn required<T>(&self, key: &str, value: Option<T>) -> Result<T, ModelError> {
        let key = || self.name(key);
        value.ok_or_else(|| GgufError::KeyMissing { key: key() }.into())
    }

    /// 1 to `max`.
    pub(super) fn in_range(&self, key: &str, n: usize, max: usize) -> Result<usize, ModelError> {
        match n {
            1.. if n <= max => Ok(n),
            _ => Err(self.bad(key, n, format!("must be 1 to {max}"))),
        }
    }
}
