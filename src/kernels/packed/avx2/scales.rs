//! Steps and minimums of eight rows at a time.

use super::eight::columns;
use super::formats::{Format, Units, masked};
use std::arch::x86_64::*;

/// What the integers of a unit in each of eight rows are multiplied with. Lanes are rows.
pub(in super::super) struct Scales {
    /// Of each block.
    pub(super) steps: [__m256; 8],
    /// Also of second halves, if these have their own.
    pub(super) mins: [[__m256; 2]; 8],
    /// Of first halves of each block, and of second ones.
    pub(super) factors: [[__m256i; 2]; 8],
}

impl Scales {
    /// Steps of a block, or of a half of it if these have factors.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn steps_of<F: Format>(&self, block: usize, half: usize) -> __m256 {
        match F::FACTORS {
            true => _mm256_mul_ps(
                self.steps[block],
                _mm256_cvtepi32_ps(self.factors[block][half]),
            ),
            false => self.steps[block],
        }
    }

    /// Without minimums and factors.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn of_steps(steps: [__m256; 8]) -> Self {
        Self {
            steps,
            mins: [[_mm256_setzero_ps(); 2]; 8],
            factors: [[_mm256_setzero_si256(); 2]; 8],
        }
    }

    /// Of units of one block: a step, and a minimum if there is one.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn of_blocks(units: Units, has_mins: bool) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            if !has_mins {
                return Self::of_steps([half_of_each(units, 0); 8]);
            }
            let both = |r| units.of(r).cast::<i32>().read_unaligned();
            let (step, min) = two_halves(_mm256_setr_epi32(
                both(0),
                both(1),
                both(2),
                both(3),
                both(4),
                both(5),
                both(6),
                both(7),
            ));
            Self {
                mins: [[min; 2]; 8],
                ..Self::of_steps([step; 8])
            }
        }
    }

    /// Step and minimum, and six bits for each block's factor of both, packed into 12 bytes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn of_q4_k(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            let [halves, a, b, c] = columns(units);
            let (step, min) = two_halves(halves);
            let min = _mm256_xor_ps(min, _mm256_set1_ps(-0.0));
            let factors = |first, low| {
                let four = masked(first, 0x3f);
                let high = masked(_mm256_srli_epi32::<2>(first), 0x30);
                [four, _mm256_or_si256(masked(low, 0x0f), high)]
            };
            let (steps, mins) = (factors(a, c), factors(b, _mm256_srli_epi32::<4>(c)));
            let of_each = |scale, factors: [__m256i; 2]| {
                std::array::from_fn::<_, 8, _>(|i| {
                    let factor = _mm256_cvtepi32_ps(field(factors[i / 4], 8 * (i % 4), 0xff));
                    _mm256_mul_ps(scale, factor)
                })
            };
            Self {
                mins: of_each(min, mins).map(|min| [min; 2]),
                ..Self::of_steps(of_each(step, steps))
            }
        }
    }

    /// Step and minimum, and four bits for the factor of both of 16 values each: those of the step are the low ones.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn of_q2_k(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            let both = columns(units);
            // A unit ends with step and minimum.
            let [.., halves] = columns(units.add(68));
            let (step, min) = two_halves(halves);
            let min = _mm256_xor_ps(min, _mm256_set1_ps(-0.0));
            let of_half =
                |half: usize, from: usize| field(both[half / 4], 8 * (half % 4) + from, 15);
            let minimum = |half: usize| _mm256_mul_ps(min, _mm256_cvtepi32_ps(of_half(half, 4)));
            Self {
                mins: std::array::from_fn(|i| [minimum(2 * i), minimum(2 * i + 1)]),
                factors: std::array::from_fn(|i| [of_half(2 * i, 0), of_half(2 * i + 1, 0)]),
                ..Self::of_steps([step; 8])
            }
        }
    }

    /// A step, and factors of 16 values each: six bits less 32, of which the low four come first, then the high two.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn of_q3_k(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            // A unit ends with the step, behind 12 bytes of factors.
            let c = columns(units.add(94));
            let shifted = |i: usize| {
                let (low, high) = (
                    _mm256_srli_epi32::<16>(c[i]),
                    _mm256_slli_epi32::<16>(c[i + 1]),
                );
                _mm256_or_si256(low, high)
            };
            let (low, high) = ([shifted(0), shifted(1)], shifted(2));
            let four = |low, high| _mm256_or_si256(masked(low, 0x0f), masked(high, 0x30));
            let four = [
                four(low[0], _mm256_slli_epi32::<4>(high)),
                four(low[1], _mm256_slli_epi32::<2>(high)),
                four(_mm256_srli_epi32::<4>(low[0]), high),
                four(_mm256_srli_epi32::<4>(low[1]), _mm256_srli_epi32::<2>(high)),
            ];
            let factor = |i: usize| {
                let factor = field(four[i / 4], 8 * (i % 4), 0xff);
                _mm256_sub_epi32(factor, _mm256_set1_epi32(32))
            };
            let (_, step) = two_halves(c[3]);
            Self {
                factors: std::array::from_fn(|i| [factor(2 * i), factor(2 * i + 1)]),
                ..Self::of_steps([step; 8])
            }
        }
    }

    /// A step, and factors of 16 values each.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn of_q6_k(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            let four = columns(units.add(192));
            let factor = |i: usize| {
                let up = _mm_cvtsi32_si128(24 - 8 * (i % 4) as i32);
                _mm256_srai_epi32::<24>(_mm256_sll_epi32(four[i / 4], up))
            };
            Self {
                factors: std::array::from_fn(|i| [factor(2 * i), factor(2 * i + 1)]),
                ..Self::of_steps([half_of_each(units, 208); 8])
            }
        }
    }

    /// A step, and six bits less 32 for each block's factor of it: the high two first, then the low four.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn of_iq4_xs(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            let [first, low, ..] = columns(units);
            let (step, _) = two_halves(first);
            let high = _mm256_srli_epi32::<16>(first);
            let factor = |i: usize| {
                let high = _mm256_slli_epi32::<4>(field(high, 2 * i, 3));
                let factor = _mm256_or_si256(field(low, 4 * i, 15), high);
                _mm256_sub_epi32(factor, _mm256_set1_epi32(32))
            };
            Self::of_steps(std::array::from_fn(|i| {
                _mm256_mul_ps(step, _mm256_cvtepi32_ps(factor(i)))
            }))
        }
    }

    /// A step that is half of a power of two, given by its exponent (E8M0).
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn of_mxfp4(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        let byte = |r| i32::from(unsafe { units.of(r).read() });
        let exponents = _mm256_setr_epi32(
            byte(0),
            byte(1),
            byte(2),
            byte(3),
            byte(4),
            byte(5),
            byte(6),
            byte(7),
        );
        let less = _mm256_sub_epi32(exponents, _mm256_set1_epi32(1));
        let normal = _mm256_slli_epi32::<23>(less);
        // 2^-128 and 2^-127 have no exponent of their own.
        let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), exponents);
        let is_normal = _mm256_cmpgt_epi32(less, _mm256_setzero_si256());
        let step = _mm256_castsi256_ps(_mm256_blendv_epi8(small, normal, is_normal));
        Self::of_steps([step; 8])
    }
}

/// Half-precision numbers at an offset.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half_of_each(units: Units, offset: usize) -> __m256 {
    // SAFETY: the caller has them, and the features.
    unsafe {
        let bits = |r| units.of(r).add(offset).cast::<i16>().read_unaligned();
        _mm256_cvtph_ps(_mm_setr_epi16(
            bits(0),
            bits(1),
            bits(2),
            bits(3),
            bits(4),
            bits(5),
            bits(6),
            bits(7),
        ))
    }
}

/// Lanes of two half-precision numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn two_halves(x: __m256i) -> (__m256, __m256) {
    let order = _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    let x = _mm256_shuffle_epi8(x, _mm256_broadcastsi128_si256(order));
    let x = _mm256_permute4x64_epi64::<0b11_01_10_00>(x);
    (
        _mm256_cvtph_ps(_mm256_castsi256_si128(x)),
        _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(x)),
    )
}

/// Bits of each lane from `from` on, as many as the mask has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn field(x: __m256i, from: usize, mask: i32) -> __m256i {
    let x = _mm256_srl_epi32(x, _mm_cvtsi32_si128(from as i32));
    _mm256_and_si256(x, _mm256_set1_epi32(mask))
}
