//! The kernels for AArch64, in bytes only: NEON multiplies words of 16 bits no faster than F32. There are tiles for CPUs with the dot products of Armv8.4, and for
//! those with Armv8.6's products of small matrices of bytes (I8MM); without either, weights are always multiplied as they lie in memory.
//!
//! Instructions multiply bytes that both have a sign, so X keeps its own, and sums begin with zero. The operations on each element are those of x86-64, and so
//! are the bits.

use super::bytes::{ByteRows, QUADS};
use super::{BLOCK, Rounded, TINY, has};
use crate::kernels::level::CpuLevel;
use crate::kernels::neon::{columns, from_half};
use std::arch::aarch64::*;
use std::arch::asm;

mod dot;
mod formats;
mod panel;
mod tile;

pub(super) use super::no_words::{fastest_tiles, round_row};
pub(super) use formats::has_format;

/// Whether this CPU multiplies in bytes: all do.
pub(super) fn has_bytes() -> bool {
    true
}

/// Whether this CPU has tiles.
pub(super) fn has_tiles() -> bool {
    has_dot_products()
}

fn has_dot_products() -> bool {
    has(CpuLevel::DotProd)
}

/// Whether tiles are products of small matrices: twice as many multiplications to an instruction as dot products.
fn has_matrices() -> bool {
    has(CpuLevel::I8mm)
}

/// Integers of X keep their sign, and add nothing to sums.
pub(super) fn has_starts() -> bool {
    false
}

/// Sums of X's integers meet minimums only.
pub(super) fn has_plain_sums() -> bool {
    false
}

/// Rows of X in a tile.
pub(super) fn byte_tile_height() -> usize {
    tile::BYTE_TILE_HEIGHT
}

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

/// Adds 16 products to four sums. Which is added to which depends on the instructions.
///
/// # Safety
/// With `SDOT` the CPU must have that instruction.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dot<const SDOT: bool>(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    if SDOT {
        // SAFETY: the caller's promise.
        return unsafe { sdot(sums, a, b) };
    }
    // Two products are at most 2 * 128 * 127, which 16 bits hold.
    let products = vmull_s8(vget_low_s8(a), vget_low_s8(b));
    vpadalq_s16(sums, vmlal_high_s8(products, a, b))
}

// The standard library's intrinsics of these instructions are not stable yet.

/// Adds sums of four products of neighbours to each word.
///
/// # Safety
/// The CPU must have the instruction.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn sdot(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: the caller's promise; reads and writes these registers only.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// The same with word `WORD` of `b` in each place.
///
/// # Safety
/// As for [`sdot`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn sdot_word<const WORD: usize>(
    mut sums: int32x4_t,
    a: int8x16_t,
    b: int8x16_t,
) -> int32x4_t {
    // SAFETY: as for `sdot`.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sums:v}.4s, {a:v}.16b, {b:v}.4b[{word}]",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b, word = const WORD,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}

/// Adds products of two rows of eight bytes with two others: those of the first row, then those of the second.
///
/// # Safety
/// As for [`sdot`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn smmla(mut sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: as for `sdot`.
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {sums:v}.4s, {a:v}.16b, {b:v}.16b",
            sums = inout(vreg) sums, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sums
}
