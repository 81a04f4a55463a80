//! The kernels for AArch64 with the dot products of Armv8.4, and with Armv8.6's products of small matrices of bytes (I8MM): in bytes only, because NEON multiplies
//! words of 16 bits no faster than F32.
//!
//! Instructions multiply bytes that both have a sign, so X keeps its own, and sums begin with zero. The operations on each element are those of x86-64, and so
//! are the bits.

use super::bytes::{ByteRows, QUADS};
use super::{BLOCK, Rounded, TINY};
use crate::ggml::kernels::neon::{columns, from_half};
use std::arch::aarch64::*;
use std::arch::asm;

mod dot;
mod formats;
mod panel;
mod tile;

pub(super) use super::no_words::{fastest_tiles, round_row, unpacks};
pub(super) use formats::has_format;
pub(super) use tile::BYTE_TILE_HEIGHT;

/// Integers of X keep their sign.
pub(super) const BIASED: bool = false;

/// Largest multiple of a step.
const MAX: f32 = 127.0;

/// A block of integers.
type Bytes = [int8x16_t; 2];

/// Rounds a block to words of four multiples of a step each.
#[target_feature(enable = "neon")]
pub(super) fn round_to_bytes(x: &[f32; BLOCK], quads: &mut [f32; QUADS]) -> Rounded {
    // SAFETY: loads within the array.
    let x: [_; 8] = std::array::from_fn(|i| unsafe { vld1q_f32(x.as_ptr().add(4 * i)) });
    // Absolute values as integers have the same order. What is infinite or not a number is above all others.
    let abs = x.map(|x| vreinterpretq_u32_f32(vabsq_f32(x)));
    let most = abs.into_iter().fold(vdupq_n_u32(0), |a, b| vmaxq_u32(a, b));
    let most = f32::from_bits(vmaxvq_u32(most));
    let (step, inverse) = if !most.is_finite() {
        (f32::NAN, 0.0)
    } else if most > TINY {
        (most / MAX, MAX / most)
    } else {
        (0.0, 0.0)
    };
    let words = x.map(|x| vmovn_s32(vcvtnq_s32_f32(vmulq_n_f32(x, inverse))));
    let bytes = |i: usize| {
        let eight = |i: usize| vmovn_s16(vcombine_s16(words[i], words[i + 1]));
        vcombine_s8(eight(i), eight(i + 2))
    };
    let bytes = [bytes(0), bytes(4)];
    for (i, bytes) in bytes.into_iter().enumerate() {
        // SAFETY: half of the array.
        unsafe { vst1q_s8(quads.as_mut_ptr().add(4 * i).cast(), bytes) };
    }
    let [first, second] = bytes.map(|x| vaddlvq_s8(x));
    Rounded {
        step,
        sum: f32::from(first + second),
        half_sum: f32::from(first),
    }
}

impl ByteRows {
    /// Without the blocks before `block`.
    #[inline]
    fn at_block(self, block: usize) -> Self {
        Self {
            quads: self.quads.wrapping_add(block * QUADS),
            steps: self.steps.wrapping_add(block),
            sums: self.sums.wrapping_add(block),
            ..self
        }
    }

    /// Integers of half of the first block of row `t`.
    ///
    /// # Safety
    /// They must be there.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn half(&self, t: usize, half: usize) -> int8x16_t {
        // SAFETY: the caller's promise.
        unsafe { vld1q_s8(self.quads.add(t * self.stride + half * (QUADS / 2)).cast()) }
    }
}

// The standard library's intrinsics of these instructions are not stable yet.

/// Adds sums of four products of neighbours to each word.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the CPU has the instruction, which reads and writes these registers only.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// The same with word `WORD` of `b` in each place.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot_word<const WORD: usize>(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the CPU has the instruction, which reads and writes these registers only.
    unsafe {
        asm!(
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.4b[{word}]",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b, word = const WORD,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Adds products of two rows of eight bytes with two others: those of the first row, then those of the second.
#[inline]
#[target_feature(enable = "neon,i8mm")]
fn smmla(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the CPU has the instruction, which reads and writes these registers only.
    unsafe {
        asm!(
            "smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
