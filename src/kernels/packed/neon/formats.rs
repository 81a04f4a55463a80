//! How weights lie in memory, type by type.

use super::{Bytes, columns, from_half};
use crate::file::types::GgmlType;
use std::arch::aarch64::*;

/// Rows that are read side by side: lanes of a register.
pub(super) const GROUP: usize = 4;

/// Rows by groups: which the first is, and where in memory each begins. Where there are too few, the last one stands for those that are missing.
pub(super) fn groups(
    first: *const u8,
    row_bytes: usize,
    rows: usize,
) -> impl Iterator<Item = (usize, Units)> {
    (0..rows).step_by(GROUP).map(move |at| {
        let row = |r: usize| first.wrapping_add((at + r).min(rows - 1) * row_bytes);
        (at, Units(std::array::from_fn(row)))
    })
}

/// Where a unit of each of some rows begins.
#[derive(Clone, Copy)]
pub(super) struct Units([*const u8; GROUP]);

impl Units {
    /// Where that of row `r` begins.
    #[inline]
    pub(super) fn of(self, r: usize) -> *const u8 {
        self.0[r]
    }

    /// The units behind these.
    #[inline]
    pub(super) fn next<F: Format>(self) -> Self {
        Self(self.0.map(|at| at.wrapping_add(F::BYTES)))
    }
}

/// Integers of 8 bits with a sign, with a step, or a step and a minimum, for each block of 32: some blocks to a unit.
pub(super) trait Format {
    /// Of a unit.
    const BYTES: usize;
    /// Of a unit, at most 8.
    const BLOCKS: usize;
    /// Whether a block has a minimum.
    const MINS: bool;
    /// Whether the halves of a block have steps of their own.
    const HALVES: bool;
    /// What the integers are more than they stand for.
    const OFFSET: i8;

    /// Of one unit in each of some rows.
    ///
    /// # Safety
    /// There must be a unit at each.
    unsafe fn scales(units: Units) -> Scales;

    /// Block `i` of a unit.
    ///
    /// # Safety
    /// As for `scales`.
    unsafe fn bytes(at: *const u8, i: usize) -> Bytes;
}

/// What the integers of a unit in each of [`GROUP`] rows are multiplied with, and what is added. Lanes are rows.
pub(super) struct Scales {
    /// Of each block's first half, or the whole of it, and of its second half.
    pub(super) steps: [[float32x4_t; 8]; 2],
    pub(super) mins: [float32x4_t; 8],
}

/// What is done with weights of a type that is known when the program runs.
pub(super) trait Visit {
    type Output;

    /// # Safety
    /// The visitor's.
    unsafe fn visit<F: Format>(self) -> Self::Output;
}

macro_rules! formats {
    ($($(#[$doc:meta])* $ty:ident: $bytes:literal
        $(in $blocks:literal, scales $scales:ident $(, halves $halves:literal)?)?
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
                const HALVES: bool = false $($(|| $halves)?)?;
                const OFFSET: i8 = 0 $(+ $offset)?;

                #[inline]
                #[target_feature(enable = "neon")]
                unsafe fn scales(units: Units) -> Scales {
                    // SAFETY: units, whose layout is ggml-common.h's.
                    unsafe {
                        $(return Scales::$scales(units);)?
                        #[allow(unreachable_code)]
                        Scales::of_blocks(units, Self::MINS)
                    }
                }

                #[inline]
                #[target_feature(enable = "neon")]
                unsafe fn bytes($at: *const u8, $i: usize) -> Bytes {
                    // SAFETY: the parts of a unit.
                    unsafe { $block }
                }
            }
        )*

        /// Visits the format of type `ty`, if it has one.
        ///
        /// # Safety
        /// The visitor's.
        pub(super) unsafe fn visit<V: Visit>(ty: GgmlType, visitor: V) -> Option<V::Output> {
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
    Q8_0: 34, |at, _| load(at.add(2)).map(|x| vreinterpretq_s8_u8(x));
    Q4_0: 18, less 8, |at, _| signed(nibbles(at.add(2)));
    Q4_1: 20, mins true, |at, _| signed(nibbles(at.add(4)));
    Q5_0: 22, less 16, |at, _| signed(with_fifth_bits(nibbles(at.add(6)), at.add(2)));
    Q5_1: 24, mins true, |at, _| signed(with_fifth_bits(nibbles(at.add(8)), at.add(4)));
    /// High bits, low bits, factors of 16 values each, a step.
    Q3_K: 110 in 8, scales of_q3_k, halves true, less 4, |at, i| {
        let high = bits(load(at), i, 1, 2);
        let low = bits(load(at.add(32 + 32 * (i / 4))), 2 * (i % 4), 2, 0);
        signed(or(low, high))
    };
    /// Step and minimum, both's factors, four bits.
    Q4_K: 144 in 8, scales of_q4_k, mins true, |at, i| signed(bits(load(at.add(16 + 32 * (i / 2))), 4 * (i % 2), 4, 0));
    /// Step and minimum, both's factors, high bits, four bits.
    Q5_K: 176 in 8, scales of_q4_k, mins true, |at, i| {
        let low = bits(load(at.add(48 + 32 * (i / 2))), 4 * (i % 2), 4, 0);
        signed(or(low, bits(load(at.add(16)), i, 1, 4)))
    };
    /// Four bits, two high bits, factors of 16 values each, a step.
    Q6_K: 210 in 8, scales of_q6_k, halves true, less 32, |at, i| {
        let (upper, j) = (i / 4, i % 4);
        let low = bits(load(at.add(64 * upper + 32 * (j % 2))), 4 * (j / 2), 4, 0);
        let high = bits(load(at.add(128 + 32 * upper)), 2 * j, 2, 4);
        signed(or(low, high))
    };
    IQ4_NL: 18, |at, _| levels(&NON_LINEAR, nibbles(at.add(2)));
    /// A step, high bits of its factors, low ones, four bits.
    IQ4_XS: 136 in 8, scales of_iq4_xs, |at, i| levels(&NON_LINEAR, nibbles(at.add(8 + 16 * i)));
    /// The exponent of a step, four bits.
    MXFP4: 17 in 1, scales of_mxfp4, |at, _| levels(&E2M1, nibbles(at.add(1)));
}

impl Scales {
    /// Of whole blocks, without minimums.
    #[inline]
    #[target_feature(enable = "neon")]
    fn of_steps(steps: [float32x4_t; 8]) -> Self {
        let none = [vdupq_n_f32(0.0); 8];
        Self {
            steps: [steps, none],
            mins: none,
        }
    }

    /// Of units of one block: a step, and a minimum if there is one.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn of_blocks(units: Units, has_mins: bool) -> Self {
        // SAFETY: the caller has units.
        unsafe {
            if !has_mins {
                return Self::of_steps([half_of_each(units, 0); 8]);
            }
            let [step, min] = two_halves(word_of_each(units, 0));
            Self {
                mins: [min; 8],
                ..Self::of_steps([step; 8])
            }
        }
    }

    /// Step and minimum, and six bits for each block's factor of both, packed into 12 bytes.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn of_q4_k(units: Units) -> Self {
        // SAFETY: the caller has units.
        let [halves, a, b, c] = unsafe { header(units, 0) };
        let [step, min] = two_halves(halves);
        let factors = |first, low| {
            let high = vandq_u32(vshrq_n_u32::<2>(first), each_byte(0x30));
            let low = vandq_u32(low, each_byte(0x0f));
            [vandq_u32(first, each_byte(0x3f)), vorrq_u32(low, high)]
        };
        let (steps, mins) = (factors(a, c), factors(b, vshrq_n_u32::<4>(c)));
        let min = vnegq_f32(min);
        let mut scales = Self::of_steps([step; 8]);
        for i in 0..8 {
            let of =
                |factors: [uint32x4_t; 2]| vcvtq_f32_u32(field(factors[i / 4], 8 * (i % 4), 8));
            scales.steps[0][i] = vmulq_f32(step, of(steps));
            scales.mins[i] = vmulq_f32(min, of(mins));
        }
        scales
    }

    /// A step, and factors of 16 values each: six bits less 32, of which the low four come first, then the high two.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn of_q3_k(units: Units) -> Self {
        // A unit ends with the step, behind 12 bytes of factors.
        // SAFETY: the caller has units.
        let (c, step) = unsafe { (header(units, 94), half_of_each(units, 108)) };
        let shifted = |i: usize| vorrq_u32(vshrq_n_u32::<16>(c[i]), vshlq_n_u32::<16>(c[i + 1]));
        let (low, high) = ([shifted(0), shifted(1)], shifted(2));
        let four = |low, high| {
            let low = vandq_u32(low, each_byte(0x0f));
            let six = vorrq_u32(low, vandq_u32(high, each_byte(0x30)));
            // Less 32, byte by byte.
            let factors = vsubq_s8(vreinterpretq_s8_u32(six), vdupq_n_s8(32));
            vreinterpretq_s32_s8(factors)
        };
        let four = [
            four(low[0], vshlq_n_u32::<4>(high)),
            four(low[1], vshlq_n_u32::<2>(high)),
            four(vshrq_n_u32::<4>(low[0]), high),
            four(vshrq_n_u32::<4>(low[1]), vshrq_n_u32::<2>(high)),
        ];
        Self::of_factors(step, four)
    }

    /// A step, and factors of 16 values each.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn of_q6_k(units: Units) -> Self {
        // SAFETY: the caller has units.
        let ([a, b, c, d], step) = unsafe { (header(units, 192), half_of_each(units, 208)) };
        let [a, b] = [vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b)];
        let [c, d] = [vreinterpretq_s32_u32(c), vreinterpretq_s32_u32(d)];
        Self::of_factors(step, [a, b, c, d])
    }

    /// A step, and factors of 16 values each: bytes with a sign.
    #[inline]
    #[target_feature(enable = "neon")]
    fn of_factors(step: float32x4_t, four: [int32x4_t; 4]) -> Self {
        let mut scales = Self::of_steps([step; 8]);
        for i in 0..16 {
            let up = vdupq_n_s32(24 - 8 * (i % 4) as i32);
            let factor = vshrq_n_s32::<24>(vshlq_s32(four[i / 4], up));
            scales.steps[i % 2][i / 2] = vmulq_f32(step, vcvtq_f32_s32(factor));
        }
        scales
    }

    /// A step, and six bits less 32 for each block's factor of it: the high two first, then the low four.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn of_iq4_xs(units: Units) -> Self {
        // SAFETY: the caller has units.
        let [first, low, ..] = unsafe { header(units, 0) };
        let [step, _] = two_halves(first);
        let high = vshrq_n_u32::<16>(first);
        let mut scales = Self::of_steps([step; 8]);
        for i in 0..8 {
            let high = vshlq_n_u32::<4>(field(high, 2 * i, 2));
            let factor = vreinterpretq_s32_u32(vorrq_u32(field(low, 4 * i, 4), high));
            let factor = vcvtq_f32_s32(vsubq_s32(factor, vdupq_n_s32(32)));
            scales.steps[0][i] = vmulq_f32(step, factor);
        }
        scales
    }

    /// A step that is half of a power of two, given by its exponent (E8M0).
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn of_mxfp4(units: Units) -> Self {
        // SAFETY: the caller has units.
        let exponents = field(unsafe { word_of_each(units, 0) }, 0, 8);
        let less = vreinterpretq_s32_u32(vsubq_u32(exponents, vdupq_n_u32(1)));
        let normal = vshlq_n_s32::<23>(less);
        // 2^-128 and 2^-127 have no exponent of their own.
        let small = vshlq_s32(vdupq_n_s32(0x0020_0000), vreinterpretq_s32_u32(exponents));
        let step = vbslq_s32(vcgtzq_s32(less), normal, small);
        Self::of_steps([vreinterpretq_f32_s32(step); 8])
    }
}

/// 32 bytes.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load(at: *const u8) -> [uint8x16_t; 2] {
    // SAFETY: the caller has them.
    unsafe { [vld1q_u8(at), vld1q_u8(at.add(16))] }
}

/// Half-precision numbers at an offset.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn half_of_each(units: Units, offset: usize) -> float32x4_t {
    // SAFETY: the caller has them.
    unsafe {
        let at = |r: usize| units.of(r).add(offset).cast::<u16>();
        let halves = vld1_lane_u16::<0>(at(0), vdup_n_u16(0));
        let halves = vld1_lane_u16::<1>(at(1), halves);
        let halves = vld1_lane_u16::<2>(at(2), halves);
        from_half(vld1_lane_u16::<3>(at(3), halves))
    }
}

/// Words at an offset.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn word_of_each(units: Units, offset: usize) -> uint32x4_t {
    // SAFETY: the caller has them.
    unsafe {
        let at = |r: usize| units.of(r).add(offset).cast::<u32>();
        let words = vld1q_lane_u32::<0>(at(0), vdupq_n_u32(0));
        let words = vld1q_lane_u32::<1>(at(1), words);
        let words = vld1q_lane_u32::<2>(at(2), words);
        vld1q_lane_u32::<3>(at(3), words)
    }
}

/// Lanes of two half-precision numbers.
#[inline]
#[target_feature(enable = "neon")]
fn two_halves(x: uint32x4_t) -> [float32x4_t; 2] {
    [from_half(vmovn_u32(x)), from_half(vshrn_n_u32::<16>(x))]
}

/// 16 bytes at an offset in each row, as four columns of four.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn header(units: Units, offset: usize) -> [uint32x4_t; 4] {
    // SAFETY: the caller has them.
    let row = |r: usize| unsafe { vreinterpretq_u32_u8(vld1q_u8(units.of(r).add(offset))) };
    columns([row(0), row(1), row(2), row(3)])
}

/// A byte, four times in each word.
#[inline]
#[target_feature(enable = "neon")]
fn each_byte(x: u8) -> uint32x4_t {
    vreinterpretq_u32_u8(vdupq_n_u8(x))
}

/// `n` bits of each word from `from` on.
#[inline]
#[target_feature(enable = "neon")]
fn field(x: uint32x4_t, from: usize, n: usize) -> uint32x4_t {
    let x = vshlq_u32(x, vdupq_n_s32(-(from as i32)));
    match from + n {
        32 => x,
        _ => vandq_u32(x, vdupq_n_u32((1 << n) - 1)),
    }
}

/// `n` bits of each byte from `from` on, moved to `to`.
#[inline]
#[target_feature(enable = "neon")]
fn bits(x: [uint8x16_t; 2], from: usize, n: usize, to: usize) -> [uint8x16_t; 2] {
    x.map(|x| {
        let x = vshlq_u8(x, vdupq_n_s8(to as i8 - from as i8));
        match (from + n, to) {
            (8, 0) => x,
            _ => vandq_u8(x, vdupq_n_u8(((1 << n) - 1) << to)),
        }
    })
}

#[inline]
#[target_feature(enable = "neon")]
fn or(a: [uint8x16_t; 2], b: [uint8x16_t; 2]) -> [uint8x16_t; 2] {
    [vorrq_u8(a[0], b[0]), vorrq_u8(a[1], b[1])]
}

/// Numbers below 128 as what they are.
#[inline]
#[target_feature(enable = "neon")]
fn signed(x: [uint8x16_t; 2]) -> Bytes {
    x.map(|x| vreinterpretq_s8_u8(x))
}

/// 16 bytes of two 4-bit numbers as 32 bytes: the low ones, then the high ones.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn nibbles(at: *const u8) -> [uint8x16_t; 2] {
    // SAFETY: the caller has them.
    let both = unsafe { vld1q_u8(at) };
    [vandq_u8(both, vdupq_n_u8(15)), vshrq_n_u8::<4>(both)]
}

/// Numbers of 4 bits with the fifth of each: 32 bits at an address.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn with_fifth_bits(x: [uint8x16_t; 2], at: *const u8) -> [uint8x16_t; 2] {
    // SAFETY: the caller has them.
    let all = unsafe { vreinterpretq_u8_u32(vld1q_dup_u32(at.cast())) };
    let bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040_2010_0804_0201));
    let place = vcombine_u8(vdup_n_u8(0), vdup_n_u8(1));
    let place = [place, vaddq_u8(place, vdupq_n_u8(2))];
    std::array::from_fn(|i| {
        let set = vtstq_u8(vqtbl1q_u8(all, place[i]), bit);
        vbslq_u8(vdupq_n_u8(16), set, x[i])
    })
}

/// Values of all four bits.
type Levels = [i8; 16];

/// Those of IQ4_NL and IQ4_XS.
const NON_LINEAR: Levels = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Twice those of MXFP4 (E2M1: a sign, two bits of exponent, one of mantissa).
const E2M1: Levels = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Four bits as the values that a table gives them.
#[inline]
#[target_feature(enable = "neon")]
fn levels(of: &Levels, x: [uint8x16_t; 2]) -> Bytes {
    // SAFETY: loads the array.
    let levels = unsafe { vld1q_s8(of.as_ptr()) };
    x.map(|x| vqtbl1q_s8(levels, x))
}
