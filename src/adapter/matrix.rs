//! Matrices of trained values, kept in the precision they were stored in.

use super::AdapterError;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Precision of the values of an adapter file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Half precision, 2 bytes a value. Tensors with a value beyond ±65504 are written as [`Precision::F32`] instead.
    #[default]
    F16,
    /// Single precision, 4 bytes a value.
    F32,
}

/// A matrix of values, `ne = [width, rows]`, rows contiguous.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    width: usize,
    data: Data,
}

#[derive(Debug, Clone, PartialEq)]
enum Data {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl Matrix {
    /// Rows of single-precision values, `ne = [width, data.len() / width]`.
    ///
    /// # Errors
    /// [`AdapterError::RaggedRows`] unless `data` is one or more whole rows.
    pub fn from_f32(width: usize, data: Vec<f32>) -> Result<Self, AdapterError> {
        check(width, data.len())?;
        Ok(Self {
            width,
            data: Data::F32(data),
        })
    }

    /// Rows of half-precision values, `ne = [width, data.len() / width]`.
    ///
    /// # Errors
    /// [`AdapterError::RaggedRows`] unless `data` is one or more whole rows.
    pub fn from_f16(width: usize, data: Vec<f16>) -> Result<Self, AdapterError> {
        check(width, data.len())?;
        Ok(Self {
            width,
            data: Data::F16(data),
        })
    }

    /// Values per row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Number of rows, at least one.
    pub fn n_rows(&self) -> usize {
        self.n_values() / self.width
    }

    /// Number of values, width times rows.
    pub fn n_values(&self) -> usize {
        match &self.data {
            Data::F16(v) => v.len(),
            Data::F32(v) => v.len(),
        }
    }

    /// How the values are held.
    pub fn precision(&self) -> Precision {
        match &self.data {
            Data::F16(_) => Precision::F16,
            Data::F32(_) => Precision::F32,
        }
    }

    /// All values, `ne = [width, rows]`, if they are held in half precision.
    pub fn as_f16(&self) -> Option<&[f16]> {
        match &self.data {
            Data::F16(v) => Some(v),
            Data::F32(_) => None,
        }
    }

    /// All values, `ne = [width, rows]`, if they are held in single precision.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match &self.data {
            Data::F16(_) => None,
            Data::F32(v) => Some(v),
        }
    }

    /// Copies row `i` to `out`, `ne = [width]`.
    ///
    /// # Panics
    /// If there is no row `i`, or `out` is not `width` long.
    pub fn row_f32(&self, i: usize, out: &mut [f32]) {
        let range = i * self.width..(i + 1) * self.width;
        match &self.data {
            Data::F16(v) => v[range].convert_to_f32_slice(out),
            Data::F32(v) => out.copy_from_slice(&v[range]),
        }
    }

    /// All values in single precision, `ne = [width, rows]`.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            Data::F16(v) => v.to_f32_vec(),
            Data::F32(v) => v.clone(),
        }
    }

    /// The precision these rows are written in when `wanted` is asked for: half precision only if every value fits.
    pub(super) fn stored_as(&self, wanted: Precision) -> Precision {
        match (&self.data, wanted) {
            (_, Precision::F32) => Precision::F32,
            (Data::F16(_), Precision::F16) => Precision::F16,
            (Data::F32(v), Precision::F16) => {
                let fits = v.iter().all(|x| x.abs() <= f16::MAX.to_f32());
                if fits { Precision::F16 } else { Precision::F32 }
            }
        }
    }

    /// Appends the values in little-endian order, rounded to nearest even where `precision` is narrower.
    pub(super) fn write_le(&self, precision: Precision, out: &mut Vec<u8>) {
        match (&self.data, precision) {
            (Data::F16(v), Precision::F16) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
            (Data::F16(v), Precision::F32) => {
                out.extend(v.iter().flat_map(|x| x.to_f32().to_le_bytes()))
            }
            (Data::F32(v), Precision::F16) => {
                out.extend(v.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()))
            }
            (Data::F32(v), Precision::F32) => out.extend(v.iter().flat_map(|x| x.to_le_bytes())),
        }
    }

    /// Index and value of the first value that is infinite or not a number.
    pub(super) fn first_non_finite(&self) -> Option<(usize, f32)> {
        match &self.data {
            Data::F16(v) => v
                .iter()
                .position(|x| !x.is_finite())
                .map(|i| (i, v[i].to_f32())),
            Data::F32(v) => v.iter().position(|x| !x.is_finite()).map(|i| (i, v[i])),
        }
    }

    /// The rows of `self`, then those of `other`, which must be as wide; half precision only if both are.
    pub(super) fn concat(&self, other: &Matrix) -> Matrix {
        debug_assert_eq!(self.width, other.width);
        let data = match (&self.data, &other.data) {
            (Data::F16(a), Data::F16(b)) => Data::F16([a.as_slice(), b].concat()),
            _ => Data::F32([self.to_f32(), other.to_f32()].concat()),
        };
        Matrix {
            width: self.width,
            data,
        }
    }
}

fn check(width: usize, values: usize) -> Result<(), AdapterError> {
    if width == 0 || values == 0 || !values.is_multiple_of(width) {
        return Err(AdapterError::RaggedRows { width, values });
    }
    Ok(())
}
