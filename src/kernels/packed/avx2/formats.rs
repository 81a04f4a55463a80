//! How weights lie in memory, type by type.

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
}

/// What the integers of a unit in each of [`GROUP`] rows are multiplied with. Lanes are rows.
pub(in super::super) struct Scales {
    /// Of each block.
    pub(in super::super) steps: [__m256; 8],
    /// Also of second halves, if these have their own.
    pub(in super::super) mins: [[__m256; 2]; 8],
    /// Of first halves of each block, and of second ones.
    pub(in super::super) factors: [[__m256i; 2]; 8],
}

/// What is done with weights of a type that is known when the program runs.
pub(in super::super) trait Visit {
    type Output;

    /// # Safety
    /// The visitor's.
    unsafe fn visit<F: Format>(self) -> Self::Output;
}

macro_rules! formats {
    ($($(#[$doc:meta])* $ty:ident: $bytes:literal
        $(in $blocks:literal, scales $scales:ident $(, factors $factors:literal)?)?
        $(, mins $mins:literal)? $(, less $offset:literal)?, |$at:ident, $i:pat_param| $block:expr;)*) => {
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
    Q8_0: 34, less 128, |at, _| _mm256_xor_si256(load(at.add(2)), _mm256_set1_epi8(i8::MIN));
    Q4_0: 18, less 8, |at, _| nibbles(at.add(2));
    Q4_1: 20, mins true, |at, _| nibbles(at.add(4));
    Q5_0: 22, less 16, |at, _| _mm256_or_si256(nibbles(at.add(6)), fifth_bits(at.add(2)));
    Q5_1: 24, mins true, |at, _| _mm256_or_si256(nibbles(at.add(8)), fifth_bits(at.add(4)));
    /// Factors of both, 16 values each, two bits, step and minimum.
    Q2_K: 84 in 8, scales of_q2_k, factors true, mins true, |at, i| bits(load(at.add(16 + 32 * (i / 4))), 2 * (i % 4), 3, 0);
    /// High bits, low bits, factors of 16 values each, a step.
    Q3_K: 110 in 8, scales of_q3_k, factors true, less 4, |at, i| {
        let high = bits(load(at), i, 1, 2);
        let low = bits(load(at.add(32 + 32 * (i / 4))), 2 * (i % 4), 3, 0);
        _mm256_or_si256(low, high)
    };
    /// Step and minimum, both's factors, four bits.
    Q4_K: 144 in 8, scales of_q4_k, mins true, |at, i| bits(load(at.add(16 + 32 * (i / 2))), 4 * (i % 2), 15, 0);
    /// Step and minimum, both's factors, high bits, four bits.
    Q5_K: 176 in 8, scales of_q4_k, mins true, |at, i| {
        let low = bits(load(at.add(48 + 32 * (i / 2))), 4 * (i % 2), 15, 0);
        let high = bits(load(at.add(16)), i, 1, 4);
        _mm256_or_si256(low, high)
    };
    /// Four bits, two high bits, factors of 16 values each, a step.
    Q6_K: 210 in 8, scales of_q6_k, factors true, less 32, |at, i| {
        let (upper, j) = (i / 4, i % 4);
        let low = bits(load(at.add(64 * upper + 32 * (j % 2))), 4 * (j / 2), 15, 0);
        let high = bits(load(at.add(128 + 32 * upper)), 2 * j, 3, 4);
        _mm256_or_si256(low, high)
    };
    IQ4_NL: 18, less 128, |at, _| levels(nibbles(at.add(2)));
    /// A step, high bits of its factors, low ones, four bits.
    IQ4_XS: 136 in 8, scales of_iq4_xs, less 128, |at, i| levels(nibbles(at.add(8 + 16 * i)));
}

impl Scales {
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
    unsafe fn of_blocks(units: Units, has_mins: bool) -> Self {
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
    unsafe fn of_q4_k(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            let [halves, a, b, c] = columns(units, 0);
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
    unsafe fn of_q2_k(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            let both = columns(units, 0);
            // A unit ends with step and minimum.
            let [.., halves] = columns(units, 68);
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
    unsafe fn of_q3_k(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            // A unit ends with the step, behind 12 bytes of factors.
            let c = columns(units, 94);
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
    unsafe fn of_q6_k(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            let four = columns(units, 192);
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
    unsafe fn of_iq4_xs(units: Units) -> Self {
        // SAFETY: the caller has units, and the features.
        unsafe {
            let [first, low, ..] = columns(units, 0);
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
}

/// 32 bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(at: *const u8) -> __m256i {
    // SAFETY: the caller has them, and the features.
    unsafe { _mm256_loadu_si256(at.cast()) }
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

/// 16 bytes at an offset in each row, as four columns of four.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn columns(units: Units, offset: usize) -> [__m256i; 4] {
    // SAFETY: the caller has them, and the features.
    unsafe {
        let row = |r: usize| _mm_loadu_si128(units.of(r).add(offset).cast());
        let rows = [0, 1, 2, 3].map(|r| _mm256_set_m128i(row(r + 4), row(r)));
        let pairs = [
            _mm256_unpacklo_epi32(rows[0], rows[1]),
            _mm256_unpacklo_epi32(rows[2], rows[3]),
            _mm256_unpackhi_epi32(rows[0], rows[1]),
            _mm256_unpackhi_epi32(rows[2], rows[3]),
        ];
        [
            _mm256_unpacklo_epi64(pairs[0], pairs[1]),
            _mm256_unpackhi_epi64(pairs[0], pairs[1]),
            _mm256_unpacklo_epi64(pairs[2], pairs[3]),
            _mm256_unpackhi_epi64(pairs[2], pairs[3]),
        ]
    }
}

/// Bytes under a mask.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn masked(x: __m256i, mask: i8) -> __m256i {
    _mm256_and_si256(x, _mm256_set1_epi8(mask))
}

/// Bits of each lane from `from` on, as many as the mask has.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn field(x: __m256i, from: usize, mask: i32) -> __m256i {
    let x = _mm256_srl_epi32(x, _mm_cvtsi32_si128(from as i32));
    _mm256_and_si256(x, _mm256_set1_epi32(mask))
}

/// Bits of each byte from `from` on, as many as the mask has, moved to `to`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn bits(x: __m256i, from: usize, mask: i8, to: usize) -> __m256i {
    let x = if from > to {
        _mm256_srl_epi16(x, _mm_cvtsi32_si128((from - to) as i32))
    } else {
        _mm256_sll_epi16(x, _mm_cvtsi32_si128((to - from) as i32))
    };
    masked(x, mask << to)
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

/// Four bits as the values that IQ4_NL and IQ4_XS give them, plus 128.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn levels(x: __m256i) -> __m256i {
    let levels = _mm_setr_epi8(
        1, 24, 45, 63, 79, 93, 106, 118, -127, -115, -103, -90, -75, -59, -39, -15,
    );
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), x)
}
