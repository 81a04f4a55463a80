//! Compute kernels where ggml has none, or slower ones: products of a quantized matrix and of its transpose, attention over a cache, and
//! what attention of training is made of.
//!
//! Results do not depend on how work is cut into tiles, chunks or threads: every element is one fixed chain of
//! operations.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
mod dequant;
mod exp;
mod floats;
mod gemm;
pub(crate) mod level;
mod mul_mat;
mod mul_mat_back;
#[cfg(target_arch = "aarch64")]
mod neon;
mod packed;

pub(crate) use attention::{Attention, Heads, Layer, PAGE, Rows, Text, has_attention, visible};
pub(crate) use exp::{exp, exp_sub_sum, largest, log_add_exp, log_sum_exp, tanh};
pub(crate) use gemm::{RowMajor, Strided, gemm};
pub(crate) use level::vectorized;
pub use level::{CpuError, CpuLevel};
pub(crate) use mul_mat::{
    GgmlBuild, MulMat, available_bits, faster_than, has_mul_mat, invariant, sensible,
};
pub(crate) use mul_mat_back::MulMatBack;
pub(crate) use packed::{Bits, pack_row, packed_words};

#[cfg(test)]
use crate::file::types::GgmlType;

/// The first `n` values of memory that a thread keeps, whatever they are.
pub(crate) fn room(v: &mut Vec<f32>, n: usize) -> &mut [f32] {
    if v.len() < n {
        v.resize(n, 0.0);
    }
    &mut v[..n]
}

/// Asks for so many bytes to be fetched from memory, whatever is there: rows lie too far apart, or are too many, for the CPU to guess what is read next.
#[inline]
fn prefetch(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(size_of::<Line<f32>>()) {
        let at = at.wrapping_add(line);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: reads nothing.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(at.cast());
        }
        // Stable Rust has no other way, and none for other CPUs.
        #[cfg(target_arch = "aarch64")]
        // SAFETY: reads nothing.
        unsafe {
            std::arch::asm!("prfm pldl1keep, [{}]", in(reg) at, options(nostack, preserves_flags, readonly));
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let _ = at;
    }
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line<T>([T; 16]);

/// The types of weights that have kernels of ours.
#[cfg(test)]
const TYPES: [GgmlType; 16] = [
    GgmlType::F32,
    GgmlType::F16,
    GgmlType::BF16,
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q2_K,
    GgmlType::Q3_K,
    GgmlType::Q4_K,
    GgmlType::Q5_K,
    GgmlType::Q6_K,
    GgmlType::IQ4_NL,
    GgmlType::IQ4_XS,
    GgmlType::MXFP4,
];

/// Where a block of a quantized type has its factors in half precision.
#[cfg(test)]
fn factors(ty: GgmlType) -> &'static [usize] {
    match ty {
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 | GgmlType::IQ4_NL | GgmlType::IQ4_XS => {
            &[0]
        }
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => &[0, 2],
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::Q6_K => &[208],
        GgmlType::MXFP4 => &[],
        ty => unreachable!("{ty:?} has no kernel, or no factors"),
    }
}

/// Memory that ends with `bytes`, and where they begin in it: off any alignment but the type's own, as in a mapped file, and with nothing behind them, so that
/// AddressSanitizer sees who reads more.
#[cfg(test)]
struct Exact {
    memory: Box<[u8]>,
    offset: usize,
}

#[cfg(test)]
impl Exact {
    fn new(ty: GgmlType, bytes: &[u8]) -> Self {
        let offset = match ty {
            GgmlType::F32 => 4,
            _ => 2,
        };
        let memory = [&[0; 4][..offset], bytes].concat().into_boxed_slice();
        Self { memory, offset }
    }
}

#[cfg(test)]
impl std::ops::Deref for Exact {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.offset..]
    }
}

#[cfg(test)]
impl std::ops::DerefMut for Exact {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.offset..]
    }
}

/// Reproducible values in -1..1.
#[cfg(test)]
fn values(n: usize, mut state: u32) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
