//! Reference tensors from a safetensors file.

use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeMap;
use std::path::Path;

/// All tensors of one file.
#[derive(Debug)]
pub struct Tensors(BTreeMap<String, (Vec<usize>, Data)>);

#[derive(Debug)]
enum Data {
    F32(Vec<f32>),
    I64(Vec<i64>),
}

impl Tensors {
    /// Reads `path`.
    ///
    /// # Panics
    /// If the file cannot be read or a tensor is neither F32 nor I64: reference data is part of the test.
    pub fn load(path: &Path) -> Self {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file =
            SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let tensors = file.tensors().into_iter().map(|(name, view)| {
            let data = match view.dtype() {
                Dtype::F32 => Data::F32(elements(view.data(), f32::from_le_bytes)),
                Dtype::I64 => Data::I64(elements(view.data(), i64::from_le_bytes)),
                other => panic!(
                    "{}: tensor {name} is {other:?}, expected F32 or I64",
                    path.display()
                ),
            };
            (name, (view.shape().to_vec(), data))
        });
        Self(tensors.collect())
    }

    /// Names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Whether there is a tensor called `name`.
    pub fn contains(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// Shape in the file's order (slowest dimension first).
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn shape(&self, name: &str) -> &[usize] {
        &self.get(name).0
    }

    /// Elements of an F32 tensor.
    ///
    /// # Panics
    /// If there is no such tensor or it has another type.
    pub fn f32(&self, name: &str) -> &[f32] {
        match &self.get(name).1 {
            Data::F32(v) => v,
            Data::I64(_) => panic!("tensor {name} is I64, expected F32"),
        }
    }

    /// Elements of an I64 tensor.
    ///
    /// # Panics
    /// If there is no such tensor or it has another type.
    pub fn i64(&self, name: &str) -> &[i64] {
        match &self.get(name).1 {
            Data::I64(v) => v,
            Data::F32(_) => panic!("tensor {name} is F32, expected I64"),
        }
    }

    /// Elements of an I64 tensor as token ids.
    ///
    /// # Panics
    /// As [`Tensors::i64`], or if a value is no token id.
    pub fn tokens(&self, name: &str) -> Vec<i32> {
        self.i64(name)
            .iter()
            .map(|&id| {
                i32::try_from(id)
                    .unwrap_or_else(|_| panic!("tensor {name} holds {id}, no token id"))
            })
            .collect()
    }

    fn get(&self, name: &str) -> &(Vec<usize>, Data) {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("no tensor called {name}"))
    }
}

fn elements<T, const N: usize>(bytes: &[u8], decode: fn([u8; N]) -> T) -> Vec<T> {
    bytes
        .chunks_exact(N)
        .map(|c| decode(c.try_into().expect("chunks_exact yields N bytes")))
        .collect()
}
