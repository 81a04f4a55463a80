//! Why a file is refused.

use super::read::ALIGNMENTS;
use super::{MAX_DIMS, ValueType};
use crate::file::types::GgmlType;

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
    #[error("tensor {tensor:?}: its name has a NUL byte in it, where llama.cpp would end it")]
    TensorNameNul { tensor: String },
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
