//! GGUF v2 and v3: a pure parser over bytes with one validation gate. After [`Gguf::parse`], indexing cannot fail.
//!
//! The format is specified in ggml's `docs/gguf.md`. Where a cap is not the specification's it is llama.cpp's, so that no
//! file passes here that would abort the process there.

mod error;
mod metadata;
mod read;
mod value;

use super::types::GgmlType;
use read::{ALIGNMENTS, Reader, place};
use std::collections::{BTreeMap, HashMap, hash_map};
use std::ops::Range;

pub use error::GgufError;
pub use value::{ArrayValue, Value, ValueType};

/// The first four bytes of every file.
pub(in crate::file) const MAGIC: [u8; 4] = *b"GGUF";
/// Alignment of tensor data in bytes when `general.alignment` is absent.
pub(in crate::file) const DEFAULT_ALIGNMENT: usize = 32;
/// `GGML_MAX_DIMS`.
pub(in crate::file) const MAX_DIMS: usize = 4;
/// `GGML_MAX_NAME`: names are stored with a terminating zero, so they stay below it.
pub(in crate::file) const MAX_TENSOR_NAME: usize = 64;

/// Length and one byte of a key, value type, one byte of value.
const MIN_KEY_VALUE: u64 = 8 + 1 + 4 + 1;
/// Length and one byte of a name, number of dimensions, one dimension, type, offset.
const MIN_TENSOR_INFO: u64 = 8 + 1 + 4 + 8 + 4 + 8;

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
        Self::parse_head(bytes, bytes.len())
    }

    /// As [`Gguf::parse`], of a file of `len` bytes whose first `bytes` may be all that was read so far. That they end too soon is
    /// [`GgufError::Truncated`].
    pub(in crate::file) fn parse_head(bytes: &[u8], len: usize) -> Result<Self, GgufError> {
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
        let left = (len - reader.pos) as u64;
        let limit = left / MIN_TENSOR_INFO;
        if n_tensors > limit {
            return Err(GgufError::TooManyTensors {
                got: n_tensors,
                limit,
            });
        }
        let limit = left / MIN_KEY_VALUE;
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
        let tensors = place(tensors, reader.pos, len, alignment)?;
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
}
