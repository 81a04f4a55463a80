//! GGUF v2 and v3: a pure parser over bytes with one validation gate. After [`Gguf::parse`], indexing cannot fail.
//!
//! The format is specified in ggml's `docs/gguf.md`. Where a cap is not the specification's it is llama.cpp's, so that no
//! file passes here that would abort the process there.

use super::types::GgmlType;
use std::collections::{BTreeMap, HashMap, hash_map};
use std::ops::Range;

/// The first four bytes of every file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data in bytes when `general.alignment` is absent.
pub(super) const DEFAULT_ALIGNMENT: usize = 32;
/// `GGML_MAX_DIMS`.
pub(super) const MAX_DIMS: usize = 4;
/// `GGML_MAX_NAME`: names are stored with a terminating zero, so they stay below it.
pub(super) const MAX_TENSOR_NAME: usize = 64;

/// Bytes of a metadata key [gguf.md].
const MAX_KEY: u64 = u16::MAX as u64;
/// Bytes of a string and elements of an array [llama.cpp].
const MAX_LEN: u64 = 1 << 30;
/// The specification asks for a multiple of 8; a huge page is the largest alignment that serves a purpose.
const ALIGNMENTS: std::ops::RangeInclusive<u32> = 8..=1 << 21;
/// Length and one byte of a key, value type, one byte of value.
const MIN_KEY_VALUE: u64 = 8 + 1 + 4 + 1;
/// Length and one byte of a name, number of dimensions, one dimension, type, offset.
const MIN_TENSOR_INFO: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// A malformed file or a metadata value of the wrong kind, one variant per cause. Offsets (`at`) count bytes from the start
/// of the file.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum GgufError {
    #[error("the file is empty")]
    Empty,
    #[error("not a gguf file: it starts with \"{}\" instead of \"GGUF\"", got.escape_ascii())]
    BadMagic { got: [u8; 4] },
    #[error(
        "the file is big-endian; convert it to little-endian (gguf_convert_endian.py of llama.cpp)"
    )]
    BigEndian,
    #[error("gguf version {got} is not supported, only 2 and 3 are; convert the model again")]
    UnsupportedVersion { got: u32 },
    #[error("the file is cut or damaged: {what} at byte {at} needs {need} bytes, {have} are left")]
    Truncated {
        what: &'static str,
        at: u64,
        need: u64,
        have: u64,
    },
    #[error("the header declares {got} tensors, the rest of the file can hold at most {limit}")]
    TooManyTensors { got: u64, limit: u64 },
    #[error(
        "the header declares {got} metadata keys, the rest of the file can hold at most {limit}"
    )]
    TooManyKeys { got: u64, limit: u64 },
    #[error("{what} at byte {at} claims {got} bytes, at most {limit} are allowed")]
    StringTooLong {
        what: &'static str,
        at: u64,
        got: u64,
        limit: u64,
    },
    #[error("metadata key {key:?}: the array claims {got} elements, at most {limit} are allowed")]
    ArrayTooLong { key: String, got: u64, limit: u64 },
    #[error("the metadata key at byte {at} is empty")]
    KeyEmpty { at: u64 },
    #[error("the metadata key at byte {at} is not utf-8")]
    KeyNotUtf8 { at: u64 },
    #[error("metadata key {key:?} occurs twice")]
    DuplicateKey { key: String },
    #[error("metadata key {key:?} has the unknown value type {got}")]
    UnknownValueType { key: String, got: u32 },
    #[error("metadata key {key:?} is an array of arrays, which is not supported")]
    NestedArray { key: String },
    #[error("metadata key {key:?}: the boolean at byte {at} is {got}, not 0 or 1")]
    BadBool { key: String, at: u64, got: u8 },
    #[error("metadata key {key:?}: the string at byte {at} is not utf-8")]
    ValueNotUtf8 { key: String, at: u64 },
    #[error("general.alignment must be of type u32, it is {got}")]
    AlignmentType { got: ValueType },
    #[error("general.alignment is {got}; it must be a power of two from {} to {}", ALIGNMENTS.start(), ALIGNMENTS.end())]
    BadAlignment { got: u32 },
    #[error("the name of tensor number {index} is empty")]
    TensorNameEmpty { index: u64 },
    #[error("the name of tensor number {index} is not utf-8")]
    TensorNameNotUtf8 { index: u64 },
    #[error("tensor {tensor:?} occurs twice")]
    DuplicateTensor { tensor: String },
    #[error("tensor {tensor:?} has {got} dimensions, 1 to {MAX_DIMS} are allowed")]
    DimensionCount { tensor: String, got: u32 },
    #[error("tensor {tensor:?}: dimension {dimension} is zero")]
    ZeroDimension { tensor: String, dimension: usize },
    #[error("tensor {tensor:?}: the number of elements overflows, ne = {ne:?}")]
    ShapeOverflow { tensor: String, ne: [u64; MAX_DIMS] },
    #[error("tensor {tensor:?} has the unknown type {got}; it may need a newer ggraft")]
    UnknownType { tensor: String, got: u32 },
    #[error(
        "tensor {tensor:?}: rows of {got} elements are no multiple of the {expected} elements of a {ty} block"
    )]
    RowNotBlock {
        tensor: String,
        ty: GgmlType,
        expected: u64,
        got: u64,
    },
    #[error("tensor {tensor:?}: its size in bytes overflows")]
    SizeOverflow { tensor: String },
    #[error("tensor {tensor:?}: offset {got} is no multiple of the alignment {alignment}")]
    UnalignedOffset {
        tensor: String,
        alignment: u64,
        got: u64,
    },
    #[error("tensor {tensor:?}: offset {got}, but the tensor before it ends at {expected}")]
    OffsetNotContiguous {
        tensor: String,
        expected: u64,
        got: u64,
    },
    #[error(
        "tensor {tensor:?}: {need} bytes at offset {offset} reach beyond the {have} bytes of tensor data; the file is cut or damaged"
    )]
    DataBeyondEnd {
        tensor: String,
        offset: u64,
        need: u64,
        have: u64,
    },
    #[error("metadata key {key:?} is missing")]
    KeyMissing { key: String },
    #[error("metadata key {key:?} must be {expected}, it is {got}")]
    KeyType {
        key: String,
        expected: &'static str,
        got: ValueType,
    },
    #[error("metadata key {key:?} must be an array of {expected}, it is an array of {got}")]
    KeyElementType {
        key: String,
        expected: &'static str,
        got: ValueType,
    },
    #[error("metadata key {key:?}: {got} does not fit {expected}")]
    KeyRange {
        key: String,
        expected: &'static str,
        got: i128,
    },
    #[error("metadata key {key:?} must have {expected} elements, it has {got}")]
    KeyLength {
        key: String,
        expected: usize,
        got: usize,
    },
    #[error("this part of a split model says that it is number {number} (from 0) of {count}")]
    SplitNumber { number: u32, count: u32 },
    #[error("this part of a split model was renamed; its name must end with {expected:?}")]
    SplitName { expected: String },
    #[error("part {part} of {count} of the split model is missing; put all parts into one folder")]
    SplitPartMissing { part: u32, count: u32 },
    #[error("metadata key {key:?} of this part of a split model is {got}, expected {expected}")]
    SplitMismatch {
        key: &'static str,
        expected: u32,
        got: u32,
    },
    #[error(
        "the parts of the split model hold {got} tensors, split.tensors.count promises {expected}"
    )]
    SplitTensorCount { expected: u32, got: usize },
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

impl Value {
    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// Any integer type, widened.
    fn integer(&self) -> Option<i128> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::U64(v) => Some(v.into()),
            Self::I64(v) => Some(v.into()),
            Self::F32(_) | Self::F64(_) | Self::Bool(_) | Self::String(_) | Self::Array(_) => None,
        }
    }
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

impl ValueType {
    /// In the order of their numbers.
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn from_u32(n: u32) -> Option<Self> {
        Self::ALL.get(usize::try_from(n).ok()?).copied()
    }

    /// Bytes of one element in an array; the least possible (the length) for a string.
    fn min_size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

impl std::fmt::Display for ValueType {
    /// The name in lower case, for example `u32`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::String => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// An array, as a range of the parsed bytes. Its elements were validated (lengths, booleans; UTF-8 is not required of
/// tokens).
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
    /// Shape, fastest dimension first, padded with ones. No dimension is zero and the product is below 2^63.
    pub ne: [u64; MAX_DIMS],
    /// Dimensions the file declares, 1 to 4.
    pub n_dims: usize,
    /// The tensor's bytes, relative to the start of the file.
    pub range: Range<usize>,
}

impl TensorInfo {
    /// Product of the dimensions.
    pub fn n_elements(&self) -> u64 {
        self.ne.iter().product()
    }
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
    metadata: BTreeMap<String, Value>,
    /// Name to place in `tensors`.
    index: HashMap<String, usize>,
}

impl Gguf {
    /// Parses and validates the whole header; tensor data must lie within `bytes`.
    ///
    /// Allocates in proportion to the bytes it has actually read, never to what a count claims.
    ///
    /// # Errors
    /// Every way in which a file can be malformed, see [`GgufError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, GgufError> {
        if bytes.is_empty() {
            return Err(GgufError::Empty);
        }
        let mut reader = Reader { bytes, pos: 0 };
        let got = reader.array("the magic number")?;
        if got != MAGIC {
            return Err(GgufError::BadMagic { got });
        }
        let version = match reader.u32("the version")? {
            v @ (2 | 3) => v,
            // Small numbers end up in the upper half when their bytes are swapped; llama.cpp tells the two by this too.
            v if v != 0 && v & 0xffff == 0 => return Err(GgufError::BigEndian),
            got => return Err(GgufError::UnsupportedVersion { got }),
        };
        let n_tensors = reader.u64("the tensor count")?;
        let n_keys = reader.u64("the key count")?;
        let limit = reader.left() / MIN_TENSOR_INFO;
        if n_tensors > limit {
            return Err(GgufError::TooManyTensors {
                got: n_tensors,
                limit,
            });
        }
        let limit = reader.left() / MIN_KEY_VALUE;
        if n_keys > limit {
            return Err(GgufError::TooManyKeys { got: n_keys, limit });
        }

        let mut metadata = BTreeMap::new();
        for _ in 0..n_keys {
            let (key, value) = reader.key_value()?;
            if metadata.contains_key(&key) {
                return Err(GgufError::DuplicateKey { key });
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(&Value::U32(got)) if !got.is_power_of_two() || !ALIGNMENTS.contains(&got) => {
                return Err(GgufError::BadAlignment { got });
            }
            Some(&Value::U32(alignment)) => alignment as usize,
            Some(other) => {
                return Err(GgufError::AlignmentType {
                    got: other.value_type(),
                });
            }
        };

        let mut tensors = Vec::new();
        let mut index = HashMap::new();
        // The data section starts behind the tensor descriptions, so sizes come first and places after the loop.
        for i in 0..n_tensors {
            let tensor = reader.tensor_info(i)?;
            match index.entry(tensor.name.clone()) {
                hash_map::Entry::Vacant(free) => free.insert(tensors.len()),
                hash_map::Entry::Occupied(taken) => {
                    return Err(GgufError::DuplicateTensor {
                        tensor: taken.key().clone(),
                    });
                }
            };
            tensors.push(tensor);
        }
        let tensors = place(tensors, reader.pos, bytes.len(), alignment)?;
        Ok(Self {
            version,
            alignment,
            tensors,
            metadata,
            index,
        })
    }

    /// The raw value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(k, v)| (k.as_str(), v))
    }

    /// The tensor called `name`.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// Any integer type that fits; `Ok(None)` if the key is absent, an error if the value has another type.
    ///
    /// # Errors
    /// [`GgufError::KeyType`], [`GgufError::KeyRange`].
    pub fn u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.get(key)
            .map(|value| scalar_u32(key, value))
            .transpose()
    }

    /// F32 or F64, rounded. May be infinite or NaN, as the file says.
    ///
    /// # Errors
    /// [`GgufError::KeyType`].
    pub fn f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::F32(v)) => Ok(Some(v)),
            Some(&Value::F64(v)) => Ok(Some(v as f32)),
            Some(other) => Err(key_type(key, "a float", other)),
        }
    }

    /// Boolean.
    ///
    /// # Errors
    /// [`GgufError::KeyType`].
    pub fn bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(&Value::Bool(v)) => Ok(Some(v)),
            Some(other) => Err(key_type(key, "a bool", other)),
        }
    }

    /// String.
    ///
    /// # Errors
    /// [`GgufError::KeyType`].
    pub fn str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(v)) => Ok(Some(v)),
            Some(other) => Err(key_type(key, "a string", other)),
        }
    }

    /// As [`Gguf::u32`], absent is an error.
    ///
    /// # Errors
    /// Also [`GgufError::KeyMissing`].
    pub fn require_u32(&self, key: &str) -> Result<u32, GgufError> {
        self.u32(key)?.ok_or_else(|| key_missing(key))
    }

    /// As [`Gguf::f32`], absent is an error.
    ///
    /// # Errors
    /// Also [`GgufError::KeyMissing`].
    pub fn require_f32(&self, key: &str) -> Result<f32, GgufError> {
        self.f32(key)?.ok_or_else(|| key_missing(key))
    }

    /// As [`Gguf::str`], absent is an error.
    ///
    /// # Errors
    /// Also [`GgufError::KeyMissing`].
    pub fn require_str(&self, key: &str) -> Result<&str, GgufError> {
        self.str(key)?.ok_or_else(|| key_missing(key))
    }

    /// An array of any integer or boolean type, as u32.
    ///
    /// # Errors
    /// [`GgufError::KeyType`], [`GgufError::KeyElementType`], [`GgufError::KeyRange`].
    ///
    /// # Panics
    /// May panic or return nonsense if `bytes` is not what was parsed; the same holds for the other arrays.
    pub fn u32_array(&self, bytes: &[u8], key: &str) -> Result<Option<Vec<u32>>, GgufError> {
        let Some(array) = self.array(key)? else {
            return Ok(None);
        };
        integers(bytes, key, array, "u32").map(Some)
    }

    /// An array of any integer or boolean type, as i32.
    ///
    /// # Errors
    /// As [`Gguf::u32_array`].
    pub fn i32_array(&self, bytes: &[u8], key: &str) -> Result<Option<Vec<i32>>, GgufError> {
        let Some(array) = self.array(key)? else {
            return Ok(None);
        };
        integers(bytes, key, array, "i32").map(Some)
    }

    /// A value per layer: an array of `n` integers or booleans, or one integer that holds for all of them.
    ///
    /// `n` decides what is allocated: check a layer count that comes from a file against a limit first.
    ///
    /// # Errors
    /// As [`Gguf::u32`] and [`Gguf::u32_array`]; [`GgufError::KeyLength`] if the array has another length.
    pub fn u32_or_array(
        &self,
        bytes: &[u8],
        key: &str,
        n: usize,
    ) -> Result<Option<Vec<u32>>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if array.len != n => Err(GgufError::KeyLength {
                key: key.to_owned(),
                expected: n,
                got: array.len,
            }),
            Some(Value::Array(array)) => integers(bytes, key, array, "u32").map(Some),
            Some(value) => Ok(Some(vec![scalar_u32(key, value)?; n])),
        }
    }

    /// An array of F32.
    ///
    /// # Errors
    /// [`GgufError::KeyType`], [`GgufError::KeyElementType`].
    pub fn f32_array(&self, bytes: &[u8], key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        let Some(array) = self.array(key)? else {
            return Ok(None);
        };
        if array.elem != ValueType::F32 {
            return Err(element_type(key, "f32", array));
        }
        let (floats, _) = bytes[array.range.clone()].as_chunks();
        Ok(Some(
            floats.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        ))
    }

    /// An array of strings, as raw bytes (tokens need not be UTF-8).
    ///
    /// # Errors
    /// [`GgufError::KeyType`], [`GgufError::KeyElementType`].
    pub fn str_array<'a>(
        &self,
        bytes: &'a [u8],
        key: &str,
    ) -> Result<Option<Vec<&'a [u8]>>, GgufError> {
        let Some(array) = self.array(key)? else {
            return Ok(None);
        };
        if array.elem != ValueType::String {
            return Err(element_type(key, "string", array));
        }
        let mut reader = Reader {
            bytes: &bytes[..array.range.end],
            pos: array.range.start,
        };
        (0..array.len)
            .map(|_| reader.string("an array element", MAX_LEN))
            .collect::<Result<_, _>>()
            .map(Some)
    }

    fn array(&self, key: &str) -> Result<Option<&ArrayValue>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) => Ok(Some(array)),
            Some(other) => Err(key_type(key, "an array", other)),
        }
    }
}

fn key_missing(key: &str) -> GgufError {
    GgufError::KeyMissing {
        key: key.to_owned(),
    }
}

fn key_type(key: &str, expected: &'static str, got: &Value) -> GgufError {
    GgufError::KeyType {
        key: key.to_owned(),
        expected,
        got: got.value_type(),
    }
}

fn element_type(key: &str, expected: &'static str, got: &ArrayValue) -> GgufError {
    GgufError::KeyElementType {
        key: key.to_owned(),
        expected,
        got: got.elem,
    }
}

fn scalar_u32(key: &str, value: &Value) -> Result<u32, GgufError> {
    let got = value
        .integer()
        .ok_or_else(|| key_type(key, "an integer", value))?;
    u32::try_from(got).map_err(|_| GgufError::KeyRange {
        key: key.to_owned(),
        expected: "u32",
        got,
    })
}

fn integers<T: TryFrom<i128>>(
    bytes: &[u8],
    key: &str,
    array: &ArrayValue,
    expected: &'static str,
) -> Result<Vec<T>, GgufError> {
    fn decode<const N: usize, T: TryFrom<i128>>(
        bytes: &[u8],
        widen: impl Fn([u8; N]) -> i128,
    ) -> Result<Vec<T>, i128> {
        let (elements, _) = bytes.as_chunks();
        elements
            .iter()
            .map(|&e| widen(e))
            .map(|wide| T::try_from(wide).map_err(|_| wide))
            .collect()
    }
    let bytes = &bytes[array.range.clone()];
    match array.elem {
        ValueType::U8 | ValueType::Bool => decode(bytes, |b| u8::from_le_bytes(b).into()),
        ValueType::I8 => decode(bytes, |b| i8::from_le_bytes(b).into()),
        ValueType::U16 => decode(bytes, |b| u16::from_le_bytes(b).into()),
        ValueType::I16 => decode(bytes, |b| i16::from_le_bytes(b).into()),
        ValueType::U32 => decode(bytes, |b| u32::from_le_bytes(b).into()),
        ValueType::I32 => decode(bytes, |b| i32::from_le_bytes(b).into()),
        ValueType::U64 => decode(bytes, |b| u64::from_le_bytes(b).into()),
        ValueType::I64 => decode(bytes, |b| i64::from_le_bytes(b).into()),
        ValueType::F32 | ValueType::F64 | ValueType::String | ValueType::Array => {
            return Err(element_type(key, "integers", array));
        }
    }
    .map_err(|got| GgufError::KeyRange {
        key: key.to_owned(),
        expected,
        got,
    })
}

/// A tensor description whose place is still relative to the data section and unchecked.
struct RawTensor {
    name: String,
    ty: GgmlType,
    ne: [u64; MAX_DIMS],
    n_dims: usize,
    offset: u64,
    n_bytes: u64,
}

/// Checks that the tensors fill the data section one after the other, each padded to `alignment`, as llama.cpp demands.
/// The last one's padding may be missing. `header_end` and `file_len` in bytes.
fn place(
    raw: Vec<RawTensor>,
    header_end: usize,
    file_len: usize,
    alignment: usize,
) -> Result<Vec<TensorInfo>, GgufError> {
    // A file whose header ends within the padding has no data; if it has tensors, the first one fails below.
    let start = header_end.next_multiple_of(alignment).min(file_len);
    let have = (file_len - start) as u64;
    let alignment = alignment as u64;
    let mut expected = 0u64;
    let mut tensors = Vec::with_capacity(raw.len());
    for t in raw {
        let RawTensor {
            name,
            ty,
            ne,
            n_dims,
            offset,
            n_bytes,
        } = t;
        if offset % alignment != 0 {
            return Err(GgufError::UnalignedOffset {
                tensor: name,
                alignment,
                got: offset,
            });
        }
        let end = match offset.checked_add(n_bytes) {
            Some(end) if end <= have => end,
            _ => {
                return Err(GgufError::DataBeyondEnd {
                    tensor: name,
                    offset,
                    need: n_bytes,
                    have,
                });
            }
        };
        if offset != expected {
            return Err(GgufError::OffsetNotContiguous {
                tensor: name,
                expected,
                got: offset,
            });
        }
        // Neither sum can overflow: `end` lies within the file, whose length is at most isize::MAX.
        expected = end.next_multiple_of(alignment);
        let range = start + offset as usize..start + end as usize;
        tensors.push(TensorInfo {
            name,
            ty,
            ne,
            n_dims,
            range,
        });
    }
    Ok(tensors)
}

/// Walks the header. Positions never pass the end of `bytes`.
struct Reader<'a> {
    bytes: &'a [u8],
    pos: usize,
}

impl<'a> Reader<'a> {
    /// Bytes behind the position.
    fn left(&self) -> u64 {
        (self.bytes.len() - self.pos) as u64
    }

    fn take(&mut self, n: u64, what: &'static str) -> Result<&'a [u8], GgufError> {
        let have = self.left();
        if n > have {
            return Err(GgufError::Truncated {
                what,
                at: self.pos as u64,
                need: n,
                have,
            });
        }
        let taken = &self.bytes[self.pos..self.pos + n as usize];
        self.pos += n as usize;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &'static str, limit: u64) -> Result<&'a [u8], GgufError> {
        let at = self.pos as u64;
        let got = self.u64(what)?;
        if got > limit {
            return Err(GgufError::StringTooLong {
                what,
                at,
                got,
                limit,
            });
        }
        self.take(got, what)
    }

    fn key_value(&mut self) -> Result<(String, Value), GgufError> {
        let at = self.pos as u64;
        let key = self.string("a metadata key", MAX_KEY)?;
        if key.is_empty() {
            return Err(GgufError::KeyEmpty { at });
        }
        let key = std::str::from_utf8(key).map_err(|_| GgufError::KeyNotUtf8 { at })?;
        let what = "a metadata value";
        let value = match self.value_type(key)? {
            ValueType::U8 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            ValueType::I8 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            ValueType::U16 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            ValueType::I16 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            ValueType::U32 => Value::U32(u32::from_le_bytes(self.array(what)?)),
            ValueType::I32 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            ValueType::F32 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            ValueType::U64 => Value::U64(u64::from_le_bytes(self.array(what)?)),
            ValueType::I64 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            ValueType::F64 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            ValueType::Bool => {
                let at = self.pos;
                let byte = self.take(1, what)?;
                check_bools(key, at, byte)?;
                Value::Bool(byte[0] == 1)
            }
            ValueType::String => {
                let at = self.pos as u64;
                let text = std::str::from_utf8(self.string(what, MAX_LEN)?).map_err(|_| {
                    GgufError::ValueNotUtf8 {
                        key: key.to_owned(),
                        at,
                    }
                })?;
                Value::String(text.to_owned())
            }
            ValueType::Array => Value::Array(self.array_value(key)?),
        };
        Ok((key.to_owned(), value))
    }

    fn value_type(&mut self, key: &str) -> Result<ValueType, GgufError> {
        let got = self.u32("a value type")?;
        ValueType::from_u32(got).ok_or_else(|| GgufError::UnknownValueType {
            key: key.to_owned(),
            got,
        })
    }

    fn array_value(&mut self, key: &str) -> Result<ArrayValue, GgufError> {
        let elem = self.value_type(key)?;
        if elem == ValueType::Array {
            return Err(GgufError::NestedArray {
                key: key.to_owned(),
            });
        }
        let len = self.u64("an array length")?;
        if len > MAX_LEN {
            return Err(GgufError::ArrayTooLong {
                key: key.to_owned(),
                got: len,
                limit: MAX_LEN,
            });
        }
        let start = self.pos;
        // At most 2^30 * 8. For strings this only sees to it that a huge length is refused before the walk.
        let elements = self.take(len * elem.min_size() as u64, "an array")?;
        match elem {
            ValueType::Bool => check_bools(key, start, elements)?,
            ValueType::String => {
                self.pos = start;
                for _ in 0..len {
                    self.string("an array element", MAX_LEN)?;
                }
            }
            _ => {}
        }
        Ok(ArrayValue {
            elem,
            len: len as usize,
            range: start..self.pos,
        })
    }

    fn tensor_info(&mut self, index: u64) -> Result<RawTensor, GgufError> {
        let name = self.string("a tensor name", MAX_TENSOR_NAME as u64 - 1)?;
        if name.is_empty() {
            return Err(GgufError::TensorNameEmpty { index });
        }
        let name = std::str::from_utf8(name)
            .map_err(|_| GgufError::TensorNameNotUtf8 { index })?
            .to_owned();

        let n_dims = match self.u32("a dimension count")? {
            n @ 1..=4 => n as usize,
            got => return Err(GgufError::DimensionCount { tensor: name, got }),
        };
        let mut ne = [1; MAX_DIMS];
        for (dimension, n) in ne[..n_dims].iter_mut().enumerate() {
            *n = self.u64("a dimension")?;
            if *n == 0 {
                return Err(GgufError::ZeroDimension {
                    tensor: name,
                    dimension,
                });
            }
        }
        // ggml counts elements in an i64.
        let n_elements = ne.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
        if n_elements.is_none_or(|n| n > i64::MAX as u64) {
            return Err(GgufError::ShapeOverflow { tensor: name, ne });
        }

        let number = self.u32("a tensor type")?;
        let Some(ty) = GgmlType::from_u32(number) else {
            return Err(GgufError::UnknownType {
                tensor: name,
                got: number,
            });
        };
        if !ne[0].is_multiple_of(ty.block_size()) {
            return Err(GgufError::RowNotBlock {
                tensor: name,
                ty,
                expected: ty.block_size(),
                got: ne[0],
            });
        }
        let n_bytes = ne[1..]
            .iter()
            .try_fold(ty.row_bytes(ne[0]), |n, &d| Some(n?.checked_mul(d)))
            .flatten();
        let Some(n_bytes) = n_bytes else {
            return Err(GgufError::SizeOverflow { tensor: name });
        };
        let offset = self.u64("a tensor offset")?;
        Ok(RawTensor {
            name,
            ty,
            ne,
            n_dims,
            offset,
            n_bytes,
        })
    }
}

/// `bytes` start at `at` in the file.
fn check_bools(key: &str, at: usize, bytes: &[u8]) -> Result<(), GgufError> {
    match bytes.iter().position(|&b| b > 1) {
        None => Ok(()),
        Some(i) => Err(GgufError::BadBool {
            key: key.to_owned(),
            at: (at + i) as u64,
            got: bytes[i],
        }),
    }
}
