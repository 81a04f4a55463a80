//! Writes GGUF v3 files: metadata in insertion order, tensors aligned to 32 bytes, streamed, finished atomically.

use super::atomic::write_atomic;
use super::gguf::{DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, MAX_TENSOR_NAME, ValueType};
use super::types::GgmlType;
use std::io::{self, Write};
use std::path::Path;

const VERSION: u32 = 3;

/// A value to write.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum MetaValue {
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
    Bool(bool),
    String(String),
    Strings(Vec<String>),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
    Bools(Vec<bool>),
}

/// A declared tensor.
struct Declaration {
    name: String,
    ty: GgmlType,
    /// ne, fastest dimension first.
    ne: Vec<u64>,
    n_bytes: u64,
}

/// Collects metadata and tensor declarations, then streams the data.
///
/// Its panics are for errors in the calling program: nothing that comes out of a file or from a user leads to one, except
/// names and shapes that the caller passes on unchecked.
#[derive(Default)]
pub struct GgufWriter {
    meta: Vec<(String, MetaValue)>,
    tensors: Vec<Declaration>,
}

impl GgufWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a key, or replaces its value and keeps its place.
    ///
    /// # Panics
    /// If `key` is empty or `general.alignment`: the writer's alignment is fixed.
    pub fn set(&mut self, key: impl Into<String>, value: MetaValue) -> &mut Self {
        let key = key.into();
        assert!(!key.is_empty(), "a metadata key must not be empty");
        assert_ne!(
            key, "general.alignment",
            "tensors are always aligned to {DEFAULT_ALIGNMENT} bytes"
        );
        match self.meta.iter_mut().find(|(k, _)| *k == key) {
            Some((_, old)) => *old = value,
            None => self.meta.push((key, value)),
        }
        self
    }

    /// Declares a tensor, `ne` fastest dimension first; its data is asked for by index in declaration order when writing.
    ///
    /// # Panics
    /// If no reader would accept it: a name that is empty, taken or of 64 bytes and more, other than 1 to 4 dimensions, a
    /// zero dimension, rows that are no multiple of the type's block, a size that overflows.
    pub fn tensor(&mut self, name: impl Into<String>, ty: GgmlType, ne: &[u64]) -> &mut Self {
        let name = name.into();
        assert!(
            !name.is_empty() && name.len() < MAX_TENSOR_NAME,
            "tensor name {name:?} must have 1 to 63 bytes"
        );
        assert!(
            self.tensors.iter().all(|t| t.name != name),
            "tensor {name:?} is declared twice"
        );
        assert!(
            (1..=MAX_DIMS).contains(&ne.len()),
            "tensor {name:?} must have 1 to 4 dimensions, ne = {ne:?}"
        );
        assert!(
            !ne.contains(&0),
            "tensor {name:?} has a zero dimension, ne = {ne:?}"
        );
        let (block, row) = (ty.block_size(), ty.row_bytes(ne[0]));
        assert!(
            ne[0].is_multiple_of(block),
            "tensor {name:?}: rows of {} in {ty} blocks of {block}",
            ne[0]
        );
        let product =
            |first: Option<u64>| ne[1..].iter().try_fold(first?, |n, &d| n.checked_mul(d));
        let n_elements = product(Some(ne[0])).filter(|&n| n <= i64::MAX as u64);
        let (Some(_), Some(n_bytes)) = (n_elements, product(row)) else {
            panic!("the size of tensor {name:?} overflows, ne = {ne:?}");
        };
        self.tensors.push(Declaration {
            name,
            ty,
            ne: ne.to_vec(),
            n_bytes,
        });
        self
    }

    /// Tensors that are declared.
    pub(super) fn n_tensors(&self) -> usize {
        self.tensors.len()
    }

    /// Writes to a temporary name beside `path`, calls `data(i, out)` for each tensor in order, fsyncs and renames (see
    /// [`write_atomic`]).
    ///
    /// `out` is empty at each call and `data` must append exactly the tensor's bytes. Only one tensor is in memory at a time.
    ///
    /// # Errors
    /// As [`write_atomic`].
    ///
    /// # Panics
    /// If `data` appends another number of bytes than the declaration demands. `path` is not touched then.
    pub fn write(&self, path: &Path, data: impl FnMut(usize, &mut Vec<u8>)) -> io::Result<()> {
        write_atomic(path, |out| self.stream(out, data))
    }

    /// The same into memory.
    ///
    /// # Panics
    /// As [`GgufWriter::write`].
    pub fn to_bytes(&self, data: impl FnMut(usize, &mut Vec<u8>)) -> Vec<u8> {
        let mut out = Vec::new();
        self.stream(&mut out, data)
            .expect("writing to a vector cannot fail");
        out
    }

    pub(super) fn stream(
        &self,
        out: &mut dyn Write,
        mut data: impl FnMut(usize, &mut Vec<u8>),
    ) -> io::Result<()> {
        let mut header = self.header();
        pad(&mut header);
        out.write_all(&header)?;
        let mut buffer = Vec::new();
        for (i, tensor) in self.tensors.iter().enumerate() {
            buffer.clear();
            data(i, &mut buffer);
            let (name, got) = (&tensor.name, buffer.len());
            assert_eq!(
                got as u64, tensor.n_bytes,
                "tensor {i} {name:?}: the data callback appended {got} bytes"
            );
            pad(&mut buffer);
            out.write_all(&buffer)?;
        }
        Ok(())
    }

    fn header(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.meta.len() as u64).to_le_bytes());
        for (key, value) in &self.meta {
            put_string(&mut out, key);
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_string(&mut out, &tensor.name);
            out.extend((tensor.ne.len() as u32).to_le_bytes());
            out.extend(tensor.ne.iter().flat_map(|n| n.to_le_bytes()));
            out.extend((tensor.ty as u32).to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += tensor.n_bytes.next_multiple_of(DEFAULT_ALIGNMENT as u64);
        }
        out
    }
}

/// Zeros up to the next multiple of the alignment.
fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(DEFAULT_ALIGNMENT), 0);
}

fn put_string(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &MetaValue) {
    fn ty(out: &mut Vec<u8>, ty: ValueType) {
        out.extend((ty as u32).to_le_bytes());
    }
    fn array<T>(
        out: &mut Vec<u8>,
        elem: ValueType,
        items: &[T],
        mut put: impl FnMut(&mut Vec<u8>, &T),
    ) {
        ty(out, ValueType::Array);
        ty(out, elem);
        out.extend((items.len() as u64).to_le_bytes());
        for item in items {
            put(out, item);
        }
    }
    match value {
        MetaValue::U32(v) => {
            ty(out, ValueType::U32);
            out.extend(v.to_le_bytes());
        }
        MetaValue::I32(v) => {
            ty(out, ValueType::I32);
            out.extend(v.to_le_bytes());
        }
        MetaValue::U64(v) => {
            ty(out, ValueType::U64);
            out.extend(v.to_le_bytes());
        }
        MetaValue::F32(v) => {
            ty(out, ValueType::F32);
            out.extend(v.to_le_bytes());
        }
        MetaValue::Bool(v) => {
            ty(out, ValueType::Bool);
            out.push(u8::from(*v));
        }
        MetaValue::String(v) => {
            ty(out, ValueType::String);
            put_string(out, v);
        }
        MetaValue::Strings(v) => array(out, ValueType::String, v, |out, s| put_string(out, s)),
        MetaValue::U32s(v) => array(out, ValueType::U32, v, |out, x| out.extend(x.to_le_bytes())),
        MetaValue::I32s(v) => array(out, ValueType::I32, v, |out, x| out.extend(x.to_le_bytes())),
        MetaValue::F32s(v) => array(out, ValueType::F32, v, |out, x| out.extend(x.to_le_bytes())),
        MetaValue::Bools(v) => array(out, ValueType::Bool, v, |out, x| out.push(u8::from(*x))),
    }
}
