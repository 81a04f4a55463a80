//! Rows in the types that llama.cpp keeps keys and values in.

use super::HostError;
use crate::file::types::GgmlType;
use half::{bf16, f16};

/// A type that rows can be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Encoding {
    F32,
    F16,
    Bf16,
    /// Blocks of 32 signed integers of `bits` and a scale.
    Signed {
        bits: u32,
    },
    /// Blocks of 32 unsigned integers of `bits`, a scale and a least value.
    Unsigned {
        bits: u32,
    },
}

/// Values of a block.
const BLOCK: usize = 32;

impl Encoding {
    pub(super) fn of(ty: GgmlType) -> Result<Self, HostError> {
        Ok(match ty {
            GgmlType::F32 => Self::F32,
            GgmlType::F16 => Self::F16,
            GgmlType::BF16 => Self::Bf16,
            GgmlType::Q8_0 => Self::Signed { bits: 8 },
            GgmlType::Q5_0 => Self::Signed { bits: 5 },
            GgmlType::Q4_0 => Self::Signed { bits: 4 },
            GgmlType::Q5_1 => Self::Unsigned { bits: 5 },
            GgmlType::Q4_1 => Self::Unsigned { bits: 4 },
            _ => {
                let ty = ty.name().to_owned();
                return Err(HostError::CacheType { ty });
            }
        })
    }

    /// Whole blocks of values.
    pub(super) fn encode(self, values: &[f32], out: &mut Vec<u8>) {
        match self {
            Self::F32 => out.extend(values.iter().flat_map(|x| x.to_le_bytes())),
            Self::F16 => {
                let half = |&x: &f32| f16::from_f32(x).to_le_bytes();
                out.extend(values.iter().flat_map(half));
            }
            Self::Bf16 => {
                let half = |&x: &f32| bf16::from_f32(x).to_le_bytes();
                out.extend(values.iter().flat_map(half));
            }
            Self::Signed { bits } => {
                let blocks = values.chunks_exact(BLOCK);
                blocks.for_each(|block| signed(block, bits, out));
            }
            Self::Unsigned { bits } => {
                let blocks = values.chunks_exact(BLOCK);
                blocks.for_each(|block| unsigned(block, bits, out));
            }
        }
    }
}

/// The value of largest magnitude is the least integer but for 8 bits, where it is the largest: as ggml's reference quantizers have it.
fn signed(block: &[f32], bits: u32, out: &mut Vec<u8>) {
    let largest = block
        .iter()
        .fold(0.0f32, |largest, &x| match x.abs() > largest.abs() {
            true => x,
            false => largest,
        });
    if bits == 8 {
        let scale = largest.abs() / 127.0;
        let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
        out.extend(f16::from_f32(scale).to_le_bytes());
        let integer = |x: &f32| (x * inverse).round() as i8 as u8;
        out.extend(block.iter().map(integer));
        return;
    }
    let half = (1 << (bits - 1)) as f32;
    let scale = largest / -half;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out.extend(f16::from_f32(scale).to_le_bytes());
    let most = 2.0 * half - 1.0;
    let integer = |x: &f32| (x * inverse + half + 0.5).min(most) as u8;
    pack(&block.iter().map(integer).collect::<Vec<_>>(), bits, out);
}

fn unsigned(block: &[f32], bits: u32, out: &mut Vec<u8>) {
    let least = block.iter().copied().fold(f32::INFINITY, f32::min);
    let largest = block.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let most = ((1 << bits) - 1) as f32;
    let scale = (largest - least) / most;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    out.extend(f16::from_f32(scale).to_le_bytes());
    out.extend(f16::from_f32(least).to_le_bytes());
    let integer = |x: &f32| ((x - least) * inverse + 0.5).min(most) as u8;
    pack(&block.iter().map(integer).collect::<Vec<_>>(), bits, out);
}

/// Fifth bits of all, then the lower four: those of the block's second half above those of its first.
fn pack(integers: &[u8], bits: u32, out: &mut Vec<u8>) {
    if bits == 5 {
        let fifth = |high: u32, (i, &q): (usize, &u8)| high | u32::from(q >> 4) << i;
        let high = integers.iter().enumerate().fold(0, fifth);
        out.extend(high.to_le_bytes());
    }
    let (low, high) = integers.split_at(BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(l, h)| l & 15 | h << 4));
}

/// Multiplies each `n` neighbours with the orthonormal Hadamard matrix of size `n`, a power of two; 0 leaves them as they are. llama.cpp keeps keys and values so where its cache
/// is of integers: outliers are spread over their neighbours.
pub(super) fn hadamard(values: &mut [f32], n: usize) {
    if n == 0 {
        return;
    }
    let scale = 1.0 / (n as f32).sqrt();
    for part in values.chunks_exact_mut(n) {
        let mut step = 1;
        while step < n {
            for pair in part.chunks_exact_mut(2 * step) {
                let (a, b) = pair.split_at_mut(step);
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            step *= 2;
        }
        part.iter_mut().for_each(|x| *x *= scale);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n)
            .map(|i| ((i * 7919 % 613) as f32 - 300.0) / 97.0)
            .collect()
    }

    fn by_ggml(ty: GgmlType, values: &[f32]) -> Vec<u8> {
        let mut out = Vec::new();
        crate::ggml::quantize_rows(ty, values, values.len(), &mut out);
        out
    }

    #[test]
    fn rows_are_written_as_ggml_writes_them() {
        for ty in [
            GgmlType::F32,
            GgmlType::F16,
            GgmlType::BF16,
            GgmlType::Q8_0,
            GgmlType::Q5_0,
            GgmlType::Q4_0,
            GgmlType::Q5_1,
            GgmlType::Q4_1,
        ] {
            let values = values(256);
            let mut got = Vec::new();
            Encoding::of(ty).unwrap().encode(&values, &mut got);
            assert_eq!(got, by_ggml(ty, &values), "{ty}");
            // A block of zeros has no scale.
            let mut zeros = Vec::new();
            Encoding::of(ty).unwrap().encode(&[0.0; 32], &mut zeros);
            assert_eq!(zeros, by_ggml(ty, &[0.0; 32]), "{ty}");
        }
        assert!(Encoding::of(GgmlType::Q4_K).is_err());
    }

    #[test]
    fn a_rotation_is_orthonormal_and_its_own_inverse() {
        let mut rotated = values(128);
        hadamard(&mut rotated, 64);
        let sum: f32 = values(128)[..64].iter().sum();
        assert!((rotated[0] - sum / 8.0).abs() < 1e-4);
        assert_ne!(rotated, values(128));
        hadamard(&mut rotated, 64);
        let far = rotated.iter().zip(values(128)).map(|(a, b)| (a - b).abs());
        assert!(far.fold(0.0, f32::max) < 1e-5);
    }
}
