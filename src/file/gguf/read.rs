//! Walks the header and checks what it says.

use super::{ArrayValue, GgufError, MAX_DIMS, MAX_TENSOR_NAME, TensorInfo, Value, ValueType};
use crate::file::types::GgmlType;

/// Bytes of a metadata key [gguf.md].
const MAX_KEY: u64 = u16::MAX as u64;
/// Bytes of a string and elements of an array [llama.cpp].
pub(super) const MAX_LEN: u64 = 1 << 30;
/// The specification asks for a multiple of 8; a huge page is the largest alignment that serves a purpose.
pub(super) const ALIGNMENTS: std::ops::RangeInclusive<u32> = 8..=1 << 21;

/// A tensor description whose place is still relative to the data section and unchecked.
pub(super) struct RawTensor {
    pub(super) name: String,
    ty: GgmlType,
    ne: [u64; MAX_DIMS],
    n_dims: usize,
    offset: u64,
    n_bytes: u64,
}

/// Checks that the tensors fill the data section one after the other, each padded to `alignment`, as llama.cpp demands.
/// The last one's padding may be missing. `header_end` and `file_len` in bytes.
pub(super) fn place(
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
pub(super) struct Reader<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) pos: usize,
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

    pub(super) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    pub(super) fn string(&mut self, what: &'static str, limit: u64) -> Result<&'a [u8], GgufError> {
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

    pub(super) fn key_value(&mut self) -> Result<(String, Value), GgufError> {
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

    pub(super) fn tensor_info(&mut self, index: u64) -> Result<RawTensor, GgufError> {
        let name = self.string("a tensor name", MAX_TENSOR_NAME as u64 - 1)?;
        if name.is_empty() {
            return Err(GgufError::TensorNameEmpty { index });
        }
        let name = std::str::from_utf8(name)
            .map_err(|_| GgufError::TensorNameNotUtf8 { index })?
            .to_owned();
        if name.contains('\0') {
            return Err(GgufError::TensorNameNul { tensor: name });
        }

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
