//! GGUF v2 and v3: a pure parser over bytes with one validation gate. After [`Gguf::parse`], indexing cannot fail.

use super::types::GgmlType;
use std::collections::HashMap;
use std::ops::Range;

/// A malformed file, one variant per cause.
#[derive(Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
pub enum GgufError {
    // H-file fills in: BadMagic, UnsupportedVersion, Truncated{what, at, need, have}, TooMany..., StringTooLong, ArrayTooLong,
    // BadAlignment, DuplicateKey, DuplicateTensor{name}, UnknownType{tensor,type}, ZeroDimension, ShapeOverflow, RowNotBlock,
    // UnalignedOffset, OffsetNotContiguous{tensor, expected, got}, DataBeyondEnd, KeyMissing{key}, KeyType{key, expected, got}, ...
}

/// One metadata value. Arrays stay in the file's bytes and are decoded on request.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(ArrayValue),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// Type of a metadata value or array element.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[repr(u32)]
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

/// An array, as a range of the parsed bytes. Its elements were validated (lengths, UTF-8 is not required of tokens).
#[derive(Clone, Debug, PartialEq)]
pub struct ArrayValue {
    /// Element type; never [`ValueType::Array`].
    pub elem: ValueType,
    /// Number of elements.
    pub len: usize,
    /// Where the elements lie in the parsed bytes.
    pub range: Range<usize>,
}

/// What the file says of one tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    /// Name, below 64 bytes.
    pub name: String,
    /// Element type.
    pub ty: GgmlType,
    /// Shape, fastest dimension first, padded with ones.
    pub ne: [u64; 4],
    /// Dimensions the file declares, 1 to 4.
    pub n_dims: usize,
    /// First byte, relative to the start of the file.
    pub range: Range<usize>,
}

/// The facts of one file.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// 2 or 3.
    pub version: u32,
    /// Alignment of tensor data in bytes.
    pub alignment: usize,
    /// In file order.
    pub tensors: Vec<TensorInfo>,
    pub(super) metadata: HashMap<String, Value>,
}

impl Gguf {
    /// Parses and validates the whole header; tensor data must lie within `bytes`.
    pub fn parse(_bytes: &[u8]) -> Result<Self, GgufError> {
        todo!()
    }
    /// The raw value.
    pub fn get(&self, _key: &str) -> Option<&Value> {
        todo!()
    }
    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = (&str, &Value)> {
        let mut v: Vec<_> = self.metadata.iter().map(|(k, v)| (k.as_str(), v)).collect();
        v.sort_by_key(|kv| kv.0);
        v.into_iter()
    }
    /// The tensor called `name`.
    pub fn tensor(&self, _name: &str) -> Option<&TensorInfo> {
        todo!()
    }
    /// Any integer type that fits; `Ok(None)` if the key is absent, an error if the value has another type.
    pub fn u32(&self, _key: &str) -> Result<Option<u32>, GgufError> {
        todo!()
    }
    /// F32 or F64.
    pub fn f32(&self, _key: &str) -> Result<Option<f32>, GgufError> {
        todo!()
    }
    /// Boolean.
    pub fn bool(&self, _key: &str) -> Result<Option<bool>, GgufError> {
        todo!()
    }
    /// String.
    pub fn str(&self, _key: &str) -> Result<Option<&str>, GgufError> {
        todo!()
    }
    /// As [`Gguf::u32`], absent is an error.
    pub fn require_u32(&self, _key: &str) -> Result<u32, GgufError> {
        todo!()
    }
    /// As [`Gguf::f32`], absent is an error.
    pub fn require_f32(&self, _key: &str) -> Result<f32, GgufError> {
        todo!()
    }
    /// As [`Gguf::str`], absent is an error.
    pub fn require_str(&self, _key: &str) -> Result<&str, GgufError> {
        todo!()
    }
    /// An array of any integer or boolean type, as u32 (`bytes`: what was parsed).
    pub fn u32_array(&self, _bytes: &[u8], _key: &str) -> Result<Option<Vec<u32>>, GgufError> {
        todo!()
    }
    /// An array of F32.
    pub fn f32_array(&self, _bytes: &[u8], _key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        todo!()
    }
    /// An array of strings, as raw bytes (tokens need not be UTF-8).
    pub fn str_array<'a>(
        &self,
        _bytes: &'a [u8],
        _key: &str,
    ) -> Result<Option<Vec<&'a [u8]>>, GgufError> {
        todo!()
    }
}
