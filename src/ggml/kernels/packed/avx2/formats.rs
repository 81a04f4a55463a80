//! Blocks of weights as integers.

use super::super::{Blocks, Line, WIDTH, WORDS};
use super::Integers;
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

impl Blocks<'_> {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn each<F: Format>(&mut self) -> bool {
        let mut words = [[0.0f32; WORDS]; WIDTH];
        let to = self.words.as_chunks_mut::<WORDS>().0;
        let scales = self.steps.iter_mut().zip(&mut *self.mins);
        for (b, (to, (steps, mins))) in to.iter_mut().zip(scales).enumerate() {
            let first = self.first.wrapping_add(b / F::BLOCKS * F::BYTES);
            for (r, words) in words.iter_mut().take(self.rows).enumerate() {
                // SAFETY: block b of row r.
                let (block, min) =
                    unsafe { F::block(first.add(r * self.row_bytes), b % F::BLOCKS) };
                block.store(words);
                steps.0[r] = block.step;
                if F::MINS {
                    mins.0[r] = min;
                }
            }
            interleave(&words, to);
        }
        F::MINS
    }
}

/// Words of [`WIDTH`] rows, one after the other, to rows of words.
#[target_feature(enable = "avx2,fma,f16c")]
fn interleave(from: &[[f32; WORDS]; WIDTH], to: &mut [Line<f32>; WORDS]) {
    for (half, rows) in from.as_chunks::<8>().0.iter().enumerate() {
        for (part, to) in to.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            // SAFETY: eight words of eight rows each.
            unsafe {
                let r: [__m256; 8] =
                    std::array::from_fn(|i| _mm256_loadu_ps(rows[i].as_ptr().add(8 * part)));
                let pair = |i: usize| {
                    (
                        _mm256_unpacklo_ps(r[i], r[i + 1]),
                        _mm256_unpackhi_ps(r[i], r[i + 1]),
                    )
                };
                let (a, b, c, d) = (pair(0), pair(2), pair(4), pair(6));
                let low = |a, b| _mm256_shuffle_ps::<0b01_00_01_00>(a, b);
                let high = |a, b| _mm256_shuffle_ps::<0b11_10_11_10>(a, b);
                let four = [
                    (low(a.0, b.0), low(c.0, d.0)),
                    (high(a.0, b.0), high(c.0, d.0)),
                    (low(a.1, b.1), low(c.1, d.1)),
                    (high(a.1, b.1), high(c.1, d.1)),
                ];
                for (i, (x, y)) in four.into_iter().enumerate() {
                    let first = _mm256_permute2f128_ps::<0x20>(x, y);
                    let second = _mm256_permute2f128_ps::<0x31>(x, y);
                    _mm256_storeu_ps(to[i].0.as_mut_ptr().add(8 * half), first);
                    _mm256_storeu_ps(to[i + 4].0.as_mut_ptr().add(8 * half), second);
                }
            }
        }
    }
}

/// How weights lie in memory.
trait Format {
    /// Of a unit.
    const BYTES: usize;
    /// 32 values each, in a unit.
    const BLOCKS: usize = 1;
    /// Whether a block has a minimum.
    const MINS: bool = false;

    /// Block `i` of a unit, and its minimum.
    ///
    /// # Safety
    /// There must be a unit at `at`. Callers have AVX2, FMA and F16C, and this becomes part of them.
    unsafe fn block(at: *const u8, i: usize) -> (Integers, f32);
}

macro_rules! formats {
    ($($(#[$doc:meta])* $ty:ident: $bytes:literal $(in $blocks:literal)? $(, mins $mins:literal)?, |$at:ident, $i:pat_param| $block:expr;)*) => {
        $(
            $(#[$doc])*
            // As in GgmlType.
            #[allow(non_camel_case_types)]
            struct $ty;

            impl Format for $ty {
                const BYTES: usize = $bytes;
                $(const BLOCKS: usize = $blocks;)?
                $(const MINS: bool = $mins;)?

                #[inline(always)]
                unsafe fn block($at: *const u8, $i: usize) -> (Integers, f32) {
                    // SAFETY: the parts of a unit, whose layout is ggml-common.h's.
                    unsafe { $block }
                }
            }
        )*

        impl Blocks<'_> {
            /// Unpacks blocks of type `ty`, and says whether they have minimums. `None` if there is no way but through F32.
            ///
            /// # Safety
            /// The rows must have as many blocks as there are steps, and the CPU AVX2, FMA and F16C.
            pub(in super::super) unsafe fn unpack(mut self, ty: GgmlType) -> Option<bool> {
                match ty {
                    // SAFETY: the caller's promise.
                    $(GgmlType::$ty => Some(unsafe { self.each::<$ty>() }),)*
                    _ => None,
                }
            }
        }

        /// Whether there is a format for weights of type `ty`.
        pub(in super::super) fn unpacks(ty: GgmlType) -> bool {
            matches!(ty, $(GgmlType::$ty)|*)
        }
    };
}

formats! {
    F32: 128, |at, _| rounded(std::array::from_fn(|i| _mm256_loadu_ps(at.cast::<f32>().add(8 * i))));
    F16: 64, |at, _| rounded(std::array::from_fn(|i| _mm256_cvtph_ps(_mm_loadu_si128(at.cast::<__m128i>().add(i)))));
    BF16: 64, |at, _| rounded(std::array::from_fn(|i| {
        let upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast::<__m128i>().add(i)));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper))
    }));
    Q8_0: 34, |at, _| bytes(load(at.add(2)), half(at), 0.0);
    Q4_0: 18, |at, _| bytes(minus(nibbles(at.add(2)), 8), half(at), 0.0);
    Q4_1: 20, mins true, |at, _| bytes(nibbles(at.add(4)), half(at), half(at.add(2)));
    Q5_0: 22, |at, _| {
        let x = _mm256_or_si256(nibbles(at.add(6)), fifth_bits(at.add(2)));
        bytes(minus(x, 16), half(at), 0.0)
    };
    Q5_1: 24, mins true, |at, _| {
        let x = _mm256_or_si256(nibbles(at.add(8)), fifth_bits(at.add(4)));
        bytes(x, half(at), half(at.add(2)))
    };
    /// High bits, low bits, scales of 16 values each, a scale.
    Q3_K: 110 in 8, |at, i| {
        let high = bits(load(at), i, 1, 2);
        let low = bits(load(at.add(32 + 32 * (i / 4))), 2 * (i % 4), 3, 0);
        let scales = at.add(96);
        let scale = |s: usize| {
            let low = if s < 8 { *scales.add(s) & 15 } else { *scales.add(s - 8) >> 4 };
            let high = *scales.add(8 + s % 4) >> (2 * (s / 4)) & 3;
            i16::from(low | high << 4) - 32
        };
        scaled(minus(_mm256_or_si256(low, high), 4), [scale(2 * i), scale(2 * i + 1)], half(at.add(108)))
    };
    /// Scale and minimum, both's factors, four bits.
    Q4_K: 144 in 8, mins true, |at, i| {
        let x = bits(load(at.add(16 + 32 * (i / 2))), 4 * (i % 2), 15, 0);
        let (scale, min) = factors(at.add(4), i);
        bytes(x, half(at) * scale, -(half(at.add(2)) * min))
    };
    /// Scale and minimum, both's factors, high bits, four bits.
    Q5_K: 176 in 8, mins true, |at, i| {
        let low = bits(load(at.add(48 + 32 * (i / 2))), 4 * (i % 2), 15, 0);
        let high = bits(load(at.add(16)), i, 1, 4);
        let (scale, min) = factors(at.add(4), i);
        bytes(_mm256_or_si256(low, high), half(at) * scale, -(half(at.add(2)) * min))
    };
    /// Four bits, two high bits, scales of 16 values each, a scale.
    Q6_K: 210 in 8, |at, i| {
        let (upper, j) = (i / 4, i % 4);
        let low = bits(load(at.add(64 * upper + 32 * (j % 2))), 4 * (j / 2), 15, 0);
        let high = bits(load(at.add(128 + 32 * upper)), 2 * j, 3, 4);
        let scale = |s: usize| i16::from(at.cast::<i8>().add(192 + 2 * i + s).read());
        scaled(minus(_mm256_or_si256(low, high), 32), [scale(0), scale(1)], half(at.add(208)))
    };
    IQ4_NL: 18, |at, _| bytes(levels(nibbles(at.add(2))), half(at), 0.0);
    /// A scale, high bits of its factors, low ones, four bits.
    IQ4_XS: 136 in 8, |at, i| {
        let low = *at.add(4 + i / 2) >> (4 * (i % 2)) & 15;
        let high = at.add(2).cast::<u16>().read_unaligned() >> (2 * i) & 3;
        let factor = i32::from(low) + 16 * i32::from(high) - 32;
        bytes(levels(nibbles(at.add(8 + 16 * i))), half(at) * factor as f32, 0.0)
    };
}

// Everything below is inlined into functions that have the CPU's features: that is what makes it safe to call.

#[inline(always)]
unsafe fn rounded(x: [__m256; 4]) -> (Integers, f32) {
    // SAFETY: callers have the features.
    (unsafe { Integers::round(x) }, 0.0)
}

/// 32 bytes.
#[inline(always)]
unsafe fn load(at: *const u8) -> __m256i {
    // SAFETY: the caller has them, and the features.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

/// A half-precision number.
#[inline(always)]
unsafe fn half(at: *const u8) -> f32 {
    // SAFETY: the caller has it, and the features.
    unsafe {
        let bits = i32::from(at.cast::<u16>().read_unaligned());
        _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)))
    }
}

/// Bits `from` to `from + 8` of each byte under the mask, moved up by `to`.
#[inline(always)]
unsafe fn bits(x: __m256i, from: usize, mask: i8, to: i32) -> __m256i {
    // SAFETY: callers have the features.
    unsafe {
        let low = _mm256_srl_epi16(x, _mm_cvtsi32_si128(from as i32));
        let low = _mm256_and_si256(low, _mm256_set1_epi8(mask));
        _mm256_sll_epi16(low, _mm_cvtsi32_si128(to))
    }
}

/// 16 bytes of two 4-bit numbers as 32 bytes: the low ones, then the high ones.
#[inline(always)]
unsafe fn nibbles(at: *const u8) -> __m256i {
    // SAFETY: the caller has them, and the features.
    unsafe {
        let both = _mm_loadu_si128(at.cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(both), both);
        _mm256_and_si256(both, _mm256_set1_epi8(15))
    }
}

/// 32 bits as the fifth bits of 32 bytes.
#[inline(always)]
unsafe fn fifth_bits(at: *const u8) -> __m256i {
    // SAFETY: the caller has them, and the features.
    unsafe {
        let bits = _mm256_set1_epi32(at.cast::<i32>().read_unaligned());
        let spread = _mm256_shuffle_epi8(
            bits,
            _mm256_set_epi64x(
                0x0303_0303_0303_0303,
                0x0202_0202_0202_0202,
                0x0101_0101_0101_0101,
                0,
            ),
        );
        let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
        _mm256_and_si256(set, _mm256_set1_epi8(16))
    }
}

/// Four bits as the values that IQ4_NL and IQ4_XS give them.
#[inline(always)]
unsafe fn levels(x: __m256i) -> __m256i {
    // SAFETY: callers have the features.
    unsafe {
        let levels = _mm_setr_epi8(
            -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
        );
        _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), x)
    }
}

#[inline(always)]
unsafe fn minus(x: __m256i, offset: i8) -> __m256i {
    // SAFETY: callers have the features.
    unsafe { _mm256_sub_epi8(x, _mm256_set1_epi8(offset)) }
}

/// The factors of a superblock's scale and minimum for its block `i`: six bits each, packed by Q4_K and Q5_K into 12 bytes.
#[inline(always)]
unsafe fn factors(at: *const u8, i: usize) -> (f32, f32) {
    // SAFETY: the caller has 12 bytes.
    let byte = |i: usize| unsafe { *at.add(i) };
    let (scale, min) = if i < 4 {
        (byte(i) & 63, byte(i + 4) & 63)
    } else {
        let high = |i| byte(i) >> 6 << 4;
        (byte(i + 4) & 15 | high(i - 4), byte(i + 4) >> 4 | high(i))
    };
    (f32::from(scale), f32::from(min))
}

/// Signed bytes times a step, and a minimum: nothing is rounded.
#[inline(always)]
unsafe fn bytes(x: __m256i, step: f32, min: f32) -> (Integers, f32) {
    // SAFETY: callers have the features.
    let words = unsafe { halves(x) };
    (Integers { words, step }, min)
}

/// Signed bytes times a factor for each half, at most ±4096, times a step.
#[inline(always)]
unsafe fn scaled(x: __m256i, factors: [i16; 2], step: f32) -> (Integers, f32) {
    // SAFETY: callers have the features.
    let words = unsafe {
        let [low, high] = halves(x);
        [
            _mm256_mullo_epi16(low, _mm256_set1_epi16(factors[0])),
            _mm256_mullo_epi16(high, _mm256_set1_epi16(factors[1])),
        ]
    };
    (Integers { words, step }, 0.0)
}

/// Signed bytes in 16 bits.
#[inline(always)]
unsafe fn halves(x: __m256i) -> [__m256i; 2] {
    // SAFETY: callers have the features.
    unsafe {
        [
            _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x)),
            _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(x)),
        ]
    }
}
