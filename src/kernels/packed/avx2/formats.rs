//! How weights lie in memory, type by type.

use super::super::avx512::scales::WideScales;
use super::super::avx512::wide::{At, Quads};
use super::super::bytes::QUADS;
use super::eight::Quads as Eight;
use super::scales::Scales;
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

/// Rows that are read side by side: lanes of a register.
pub(in super::super) const GROUP: usize = 8;

/// Rows by groups: which the first is, and where in memory each begins. Where there are too few, the last one stands for those that are missing.
pub(in super::super) fn groups(
    first: *const u8,
    row_bytes: usize,
    rows: usize,
) -> impl Iterator<Item = (usize, [*const u8; GROUP])> {
    (0..rows).step_by(GROUP).map(move |at| {
        let row = |r: usize| first.wrapping_add((at + r).min(rows - 1) * row_bytes);
        (at, std::array::from_fn(row))
    })
}

/// A unit in each of some rows. Addresses are computed where they are wanted: eight at a time would go through memory.
#[derive(Clone, Copy)]
pub(in super::super) struct Units<'a> {
    rows: &'a [*const u8; GROUP],
    /// From where the rows begin.
    bytes: usize,
}

impl<'a> Units<'a> {
    /// Unit `u` of the rows.
    #[inline]
    pub(in super::super) fn new<F: Format>(rows: &'a [*const u8; GROUP], u: usize) -> Self {
        let bytes = u * F::BYTES;
        Self { rows, bytes }
    }

    /// Where that of row `r` begins.
    #[inline]
    pub(in super::super) fn of(self, r: usize) -> *const u8 {
        self.rows[r].wrapping_add(self.bytes)
    }

    /// Some bytes behind where they begin.
    #[inline]
    pub(super) fn add(self, bytes: usize) -> Self {
        Self {
            bytes: self.bytes + bytes,
            ..self
        }
    }
}

/// Integers of 8 bits without a sign, with a step, or a step and a minimum, for each block of 32: some blocks to a unit.
pub(in super::super) trait Format {
    /// Of a unit.
    const BYTES: usize;
    /// Of a unit, at most 8.
    const BLOCKS: usize;
    /// Whether a block has a minimum, or its halves if these have factors.
    const MINS: bool;
    /// Whether the halves of a block have factors, at most ±4096 with the largest integer.
    const FACTORS: bool;
    /// How many minimums a block has, if any.
    const PARTS: usize = if Self::FACTORS { 2 } else { 1 };
    /// What the integers are more than they stand for: they have no sign.
    const OFFSET: u8;
    /// Of an integer.
    const BITS: u32;
    /// Whether integers have all eight bits. The others have few enough that every fourth of those that share a step add up to a byte.
    const FULL: bool = Self::BITS == 8;
    /// Of how many words that eight rows have side by side the products with X's may be added in 16 bits: each is of two pairs, at most
    /// 2 * 127 * (2^BITS - 1); those of integers of all eight bits have no sign, and are at most 128.
    const WORDS: usize = match (QUADS / Self::PARTS, 128 >> Self::BITS) {
        (_, 0) => 1,
        (there, most) if there < most => there,
        (_, most) => most,
    };
    /// From a block of a unit to the one that has bytes in common with it.
    const APART: usize;

    /// Of one unit in each of some rows.
    ///
    /// # Safety
    /// There must be a unit at each. The CPU must have AVX2, FMA and F16C.
    unsafe fn scales(units: Units) -> Scales;

    /// Block `i` of a unit.
    ///
    /// # Safety
    /// As for `scales`.
    unsafe fn bytes(at: *const u8, i: usize) -> __m256i;

    /// The same of eight rows: words of four values that stand next to each other. Lanes are rows.
    ///
    /// # Safety
    /// As for `scales`.
    unsafe fn eight(units: Units, i: usize) -> Eight;

    /// The same as `scales` for sixteen rows.
    ///
    /// # Safety
    /// There must be a unit at each. The CPU must have AVX-512 F, BW, DQ and VL.
    unsafe fn wide_scales(at: At) -> WideScales;

    /// Block `i` of a unit in each of sixteen rows.
    ///
    /// # Safety
    /// As for `wide_scales`.
    unsafe fn quads(at: At, i: usize) -> Quads;
}

/// What is done with weights of a type that is known when the program runs.
pub(in super::super) trait Visit {
    type Output;

    /// # Safety
    /// The visitor's.
    unsafe fn visit<F: Format>(self) -> Self::Output;
}

macro_rules! formats {
    ($($(#[$doc:meta])* $ty:ident: $bits:literal bits, $bytes:literal
        $(in $blocks:literal, scales $scales:ident $(, factors $factors:literal)?)?
        $(, apart $apart:literal)? $(, mins $mins:literal)? $(, less $offset:literal)?, |$at:ident, $i:pat_param| $block:expr;)*) => {
        $(
            $(#[$doc])*
            // As in GgmlType.
            #[allow(non_camel_case_types)]
            struct $ty;

            impl Format for $ty {
                const BYTES: usize = $bytes;
                const BLOCKS: usize = 1 $(- 1 + $blocks)?;
                const MINS: bool = false $(|| $mins)?;
                const FACTORS: bool = false $($(|| $factors)?)?;
                const OFFSET: u8 = 0 $(+ $offset)?;
                const BITS: u32 = $bits;
                const APART: usize = 1 $(- 1 + $apart)?;

                #[inline]
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn scales(units: Units) -> Scales {
                    // SAFETY: units, whose layout is ggml-common.h's.
                    unsafe {
                        $(return Scales::$scales(units);)?
                        #[allow(unreachable_code)]
                        Scales::of_blocks(units, Self::MINS)
                    }
                }

                #[inline]
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn bytes($at: *const u8, $i: usize) -> __m256i {
                    // SAFETY: the parts of a unit.
                    unsafe { $block }
                }

                #[inline]
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn eight($at: Units, $i: usize) -> Eight {
                    #[allow(unused_imports)]
                    use super::eight::{bits, fifth_bits, levels, load, nibbles, or, without_sign};
                    // SAFETY: the parts of a unit.
                    unsafe { $block }
                }

                #[inline]
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                unsafe fn wide_scales(at: At) -> WideScales {
                    // SAFETY: units, whose layout is ggml-common.h's.
                    unsafe {
                        $(return WideScales::$scales(at);)?
                        #[allow(unreachable_code)]
                        WideScales::of_blocks(at, Self::MINS)
                    }
                }

                #[inline]
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
                unsafe fn quads($at: At, $i: usize) -> Quads {
                    #[allow(unused_imports)]
                    use super::super::avx512::wide::{bits, fifth_bits, levels, load, nibbles, or, without_sign};
                    // SAFETY: the parts of a unit.
                    unsafe { $block }
                }
            }
        )*

        /// Visits the format of type `ty`, if it has one.
        ///
        /// # Safety
        /// The visitor's.
        pub(in super::super) unsafe fn visit<V: Visit>(ty: GgmlType, visitor: V) -> Option<V::Output> {
            match ty {
                // SAFETY: the caller's promise.
                $(GgmlType::$ty => Some(unsafe { visitor.visit::<$ty>() }),)*
                _ => None,
            }
        }

        /// Whether weights of type `ty` are integers in blocks.
        pub(in super::super) fn has_format(ty: GgmlType) -> bool {
            matches!(ty, $(GgmlType::$ty)|*)
        }
    };
}

// Units of one block begin with its step, and its minimum if it has one, in half precision.
formats! {
    Q8_0: 8 bits, 34, less 128, |at, _| without_sign(load(at.add(2)));
    Q4_0: 4 bits, 18, less 8, |at, _| nibbles(at.add(2));
    Q4_1: 4 bits, 20, mins true, |at, _| nibbles(at.add(4));
    Q5_0: 5 bits, 22, less 16, |at, _| or(nibbles(at.add(6)), fifth_bits(at.add(2)));
    Q5_1: 5 bits, 24, mins true, |at, _| or(nibbles(at.add(8)), fifth_bits(at.add(4)));
    /// Factors of both, 16 values each, two bits, step and minimum.
    Q2_K: 2 bits, 84 in 8, scales of_q2_k, factors true, mins true, |at, i| bits(load(at.add(16 + 32 * (i / 4))), 2 * (i % 4), 3, 0);
    /// High bits, low bits, factors of 16 values each, a step.
    Q3_K: 3 bits, 110 in 8, scales of_q3_k, factors true, less 4, |at, i| {
        let high = bits(load(at), i, 1, 2);
        let low = bits(load(at.add(32 + 32 * (i / 4))), 2 * (i % 4), 3, 0);
        or(low, high)
    };
    /// Step and minimum, both's factors, four bits.
    Q4_K: 4 bits, 144 in 8, scales of_q4_k, mins true, |at, i| bits(load(at.add(16 + 32 * (i / 2))), 4 * (i % 2), 15, 0);
    /// Step and minimum, both's factors, high bits, four bits.
    Q5_K: 5 bits, 176 in 8, scales of_q4_k, mins true, |at, i| {
        let low = bits(load(at.add(48 + 32 * (i / 2))), 4 * (i % 2), 15, 0);
        let high = bits(load(at.add(16)), i, 1, 4);
        or(low, high)
    };
    /// Four bits, two high bits, factors of 16 values each, a step.
    Q6_K: 6 bits, 210 in 8, scales of_q6_k, factors true, apart 2, less 32, |at, i| {
        let (upper, j) = (i / 4, i % 4);
        let low = bits(load(at.add(64 * upper + 32 * (j % 2))), 4 * (j / 2), 15, 0);
        let high = bits(load(at.add(128 + 32 * upper)), 2 * j, 3, 4);
        or(low, high)
    };
    IQ4_NL: 8 bits, 18, less 128, |at, _| levels(NON_LINEAR, nibbles(at.add(2)));
    /// A step, high bits of its factors, low ones, four bits.
    IQ4_XS: 8 bits, 136 in 8, scales of_iq4_xs, less 128, |at, i| levels(NON_LINEAR, nibbles(at.add(8 + 16 * i)));
    /// The exponent of a step, four bits.
    MXFP4: 5 bits, 17 in 1, scales of_mxfp4, less 12, |at, _| levels(E2M1, nibbles(at.add(1)));
}

/// 32 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(at: *const u8) -> __m256i {
    // SAFETY: the caller has them, and the features.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

/// Bytes under a mask.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn masked(x: __m256i, mask: i8) -> __m256i {
    _mm256_and_si256(x, _mm256_set1_epi8(mask))
}

/// Bits of each byte from `from` on, as many as the mask has, moved to `to`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn bits(x: __m256i, from: usize, mask: i8, to: usize) -> __m256i {
    let x = if from > to {
        _mm256_srl_epi16(x, _mm_cvtsi32_si128((from - to) as i32))
    } else {
        _mm256_sll_epi16(x, _mm_cvtsi32_si128((to - from) as i32))
    };
    masked(x, mask << to)
}

/// Bits of either.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn or(a: __m256i, b: __m256i) -> __m256i {
    _mm256_or_si256(a, b)
}

/// Integers with a sign, plus 128.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn without_sign(x: __m256i) -> __m256i {
    _mm256_xor_si256(x, _mm256_set1_epi8(i8::MIN))
}

/// 16 bytes of two 4-bit numbers as 32 bytes: the low ones, then the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn nibbles(at: *const u8) -> __m256i {
    // SAFETY: the caller has them, and the features.
    unsafe {
        let both = _mm_loadu_si128(at.cast());
        let both = _mm256_set_m128i(_mm_srli_epi16::<4>(both), both);
        masked(both, 15)
    }
}

/// 32 bits as the fifth bits of 32 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
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

/// Four bits as the values that a table gives them.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn levels(of: Levels, x: __m256i) -> __m256i {
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table(of)), x)
}

/// Values of all four bits, more than they stand for by a format's offset.
pub(in super::super) type Levels = [u8; 16];

/// Those of IQ4_NL and IQ4_XS, plus 128.
pub(in super::super) const NON_LINEAR: Levels = [
    1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241,
];

/// Twice those of MXFP4 (E2M1: a sign, two bits of exponent, one of mantissa), plus 12.
pub(in super::super) const E2M1: Levels =
    [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// A table as a register.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn table(of: Levels) -> __m128i {
    // SAFETY: 16 bytes.
    unsafe { _mm_loadu_si128(of.as_ptr().cast()) }
}
