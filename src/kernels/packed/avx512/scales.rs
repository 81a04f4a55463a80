//! Steps and minimums of sixteen rows at a time. The same numbers as [`Scales`](super::super::avx2) has.

use super::wide::{At, columns};
use std::arch::x86_64::*;

/// What the integers of a unit in each of sixteen rows are multiplied with, and what is added. Lanes are rows.
pub(in super::super) struct WideScales {
    /// Of each block; of its halves, if these have factors.
    pub(super) steps: [[__m512; 2]; 8],
    /// The same.
    pub(super) mins: [[__m512; 2]; 8],
}

impl WideScales {
    /// Of units of one block: a step, and a minimum if there is one.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in super::super) unsafe fn of_blocks(at: At, has_mins: bool) -> Self {
        // SAFETY: the caller has units, all of 16 bytes at least, and the features.
        let [both, ..] = unsafe { columns(at) };
        let min = match has_mins {
            true => high_half(both),
            false => _mm512_setzero_ps(),
        };
        Self {
            steps: [[low_half(both); 2]; 8],
            mins: [[min; 2]; 8],
        }
    }

    /// Step and minimum, and six bits for each block's factor of both, packed into 12 bytes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in super::super) unsafe fn of_q4_k(at: At) -> Self {
        // SAFETY: the caller has units, and the features.
        let [halves, a, b, c] = unsafe { columns(at) };
        let (step, min) = (low_half(halves), negative(high_half(halves)));
        let factors = |first, low| {
            let high = masked(_mm512_srli_epi32::<2>(first), 0x30);
            let four = [
                masked(first, 0x3f),
                _mm512_or_si512(masked(low, 0x0f), high),
            ];
            move |i: usize| field(four[i / 4], 8 * (i % 4), 0xff)
        };
        let (steps, mins) = (factors(a, c), factors(b, _mm512_srli_epi32::<4>(c)));
        Self {
            steps: std::array::from_fn(|i| [times(step, steps(i)); 2]),
            mins: std::array::from_fn(|i| [times(min, mins(i)); 2]),
        }
    }

    /// Step and minimum, and four bits for the factor of both of 16 values each: those of the step are the low ones.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in super::super) unsafe fn of_q2_k(at: At) -> Self {
        // SAFETY: the caller has units, and the features. A unit ends with step and minimum.
        let (both, [.., halves]) = unsafe { (columns(at), columns(at.add(68))) };
        let (step, min) = (low_half(halves), negative(high_half(halves)));
        let of_half = |half: usize, from: usize| field(both[half / 4], 8 * (half % 4) + from, 15);
        let step = |half: usize| times(step, of_half(half, 0));
        let min = |half: usize| times(min, of_half(half, 4));
        Self {
            steps: of_halves(step),
            mins: of_halves(min),
        }
    }

    /// A step, and factors of 16 values each: six bits less 32, of which the low four come first, then the high two.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in super::super) unsafe fn of_q3_k(at: At) -> Self {
        // SAFETY: the caller has units, and the features. A unit ends with the step, behind 12 bytes of factors.
        let c = unsafe { columns(at.add(94)) };
        let shifted = |i: usize| {
            let (low, high) = (
                _mm512_srli_epi32::<16>(c[i]),
                _mm512_slli_epi32::<16>(c[i + 1]),
            );
            _mm512_or_si512(low, high)
        };
        let (low, high) = ([shifted(0), shifted(1)], shifted(2));
        let four = |low, high| _mm512_or_si512(masked(low, 0x0f), masked(high, 0x30));
        let four = [
            four(low[0], _mm512_slli_epi32::<4>(high)),
            four(low[1], _mm512_slli_epi32::<2>(high)),
            four(_mm512_srli_epi32::<4>(low[0]), high),
            four(_mm512_srli_epi32::<4>(low[1]), _mm512_srli_epi32::<2>(high)),
        ];
        let step = high_half(c[3]);
        Self::of_steps(|half| {
            let factor = field(four[half / 4], 8 * (half % 4), 0xff);
            times(step, _mm512_sub_epi32(factor, _mm512_set1_epi32(32)))
        })
    }

    /// A step, and factors of 16 values each.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in super::super) unsafe fn of_q6_k(at: At) -> Self {
        // SAFETY: the caller has units, and the features. A unit ends with the step.
        let (four, [.., last]) = unsafe { (columns(at.add(192)), columns(at.add(194))) };
        let step = high_half(last);
        Self::of_steps(|half| {
            let up = _mm_cvtsi32_si128(24 - 8 * (half % 4) as i32);
            let factor = _mm512_srai_epi32::<24>(_mm512_sll_epi32(four[half / 4], up));
            times(step, factor)
        })
    }

    /// A step, and six bits less 32 for each block's factor of it: the high two first, then the low four.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in super::super) unsafe fn of_iq4_xs(at: At) -> Self {
        // SAFETY: the caller has units, and the features.
        let [first, low, ..] = unsafe { columns(at) };
        let (step, high) = (low_half(first), _mm512_srli_epi32::<16>(first));
        Self::of_steps(|half| {
            let i = half / 2;
            let high = _mm512_slli_epi32::<4>(field(high, 2 * i, 3));
            let factor = _mm512_or_si512(field(low, 4 * i, 15), high);
            times(step, _mm512_sub_epi32(factor, _mm512_set1_epi32(32)))
        })
    }

    /// A step that is half of a power of two, given by its exponent (E8M0).
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    pub(in super::super) unsafe fn of_mxfp4(at: At) -> Self {
        // SAFETY: the caller has units, of 16 bytes at least, and the features.
        let [first, ..] = unsafe { columns(at) };
        let exponents = field(first, 0, 0xff);
        let less = _mm512_sub_epi32(exponents, _mm512_set1_epi32(1));
        let normal = _mm512_slli_epi32::<23>(less);
        // 2^-128 and 2^-127 have no exponent of their own.
        let small = _mm512_sllv_epi32(_mm512_set1_epi32(0x0020_0000), exponents);
        let is_normal = _mm512_cmpgt_epi32_mask(less, _mm512_setzero_si512());
        let step = _mm512_castsi512_ps(_mm512_mask_blend_epi32(is_normal, small, normal));
        Self::of_steps(|_| step)
    }

    /// Without minimums.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
    fn of_steps(step: impl Fn(usize) -> __m512) -> Self {
        Self {
            steps: of_halves(step),
            mins: [[_mm512_setzero_ps(); 2]; 8],
        }
    }
}

/// A value of each half of each block.
#[inline]
fn of_halves(of: impl Fn(usize) -> __m512) -> [[__m512; 2]; 8] {
    std::array::from_fn(|i| [of(2 * i), of(2 * i + 1)])
}

/// Lanes of half-precision numbers, the low halves of each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn low_half(x: __m512i) -> __m512 {
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x))
}

/// The same of high halves.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn high_half(x: __m512i) -> __m512 {
    low_half(_mm512_srli_epi32::<16>(x))
}

#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn negative(x: __m512) -> __m512 {
    _mm512_xor_ps(x, _mm512_set1_ps(-0.0))
}

/// A number times an integer.
#[inline]
#[target_feature(enable = "avx512f")]
fn times(x: __m512, factor: __m512i) -> __m512 {
    _mm512_mul_ps(x, _mm512_cvtepi32_ps(factor))
}

/// Bytes under a mask.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn masked(x: __m512i, mask: i8) -> __m512i {
    _mm512_and_si512(x, _mm512_set1_epi8(mask))
}

/// Bits of each lane from `from` on, as many as the mask has.
#[inline]
#[target_feature(enable = "avx512f")]
fn field(x: __m512i, from: usize, mask: i32) -> __m512i {
    let x = _mm512_srl_epi32(x, _mm_cvtsi32_si128(from as i32));
    _mm512_and_si512(x, _mm512_set1_epi32(mask))
}
