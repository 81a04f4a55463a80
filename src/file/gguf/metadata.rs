//! Metadata by key, in the type that is asked for.

use super::read::{MAX_LEN, Reader};
use super::{ArrayValue, Gguf, GgufError, Value, ValueType};

impl Gguf {
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
