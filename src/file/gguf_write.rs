//! Writes GGUF v3 files: metadata in insertion order, tensors aligned to 32 bytes, streamed, finished atomically.

use super::types::GgmlType;
use std::path::Path;

/// A value to write.
#[derive(Clone, Debug)]
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

/// Collects metadata and tensor declarations, then streams the data.
#[derive(Default)]
pub struct GgufWriter {
    meta: Vec<(String, MetaValue)>,
    tensors: Vec<(String, GgmlType, Vec<u64>)>,
}

impl GgufWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }
    /// Adds or replaces a key.
    pub fn set(&mut self, key: impl Into<String>, value: MetaValue) -> &mut Self {
        self.meta.push((key.into(), value));
        self
    }
    /// Declares a tensor, `ne` fastest dimension first; its data is asked for by index in declaration order when writing.
    pub fn tensor(&mut self, name: impl Into<String>, ty: GgmlType, ne: &[u64]) -> &mut Self {
        self.tensors.push((name.into(), ty, ne.to_vec()));
        self
    }
    /// Writes to a temporary name beside `path`, calls `data(i, out)` for each tensor in order (it must append exactly the
    /// tensor's bytes), fsyncs and renames.
    pub fn write(
        &self,
        _path: &Path,
        _data: impl FnMut(usize, &mut Vec<u8>),
    ) -> std::io::Result<()> {
        todo!()
    }
    /// The same into memory.
    pub fn to_bytes(&self, _data: impl FnMut(usize, &mut Vec<u8>)) -> Vec<u8> {
        todo!()
    }
}
