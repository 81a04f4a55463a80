//! Products of a few rows of X with weights as they lie in memory: the same operations on each element as in a [tile](super::tile), so the same bits.
//!
//! A row's block times one of X is four sums of eight products. Those of four rows are added across in pairs: then lanes are rows.

use super::super::bytes::ByteRows;
use super::super::for_each_block;
use super::super::{BLOCK, Bits, Dots, MOST_DOTS, Rows, by_height, packed_words, prefetch, tiles};
use super::formats::{Format, GROUP, Scales, Units, Visit, groups, visit};
use super::{Bytes, dot, has_dot_products};
use crate::file::types::GgmlType;
use std::arch::aarch64::*;

/// Rows of W that meet all rows of X before the next ones do: they stay in a cache meanwhile.
const ROWS_AT_A_TIME: usize = 16;

impl Dots {
    /// False if nothing is done: there are no dot products of type `ty`. Here any number of rows of X may be asked for.
    ///
    /// # Safety
    /// All pointers must be valid for that.
    pub(in super::super::super) unsafe fn compute(self, ty: GgmlType) -> bool {
        assert_eq!(self.bits, Bits::Eight);
        let x_stride = packed_words(self.k, self.t, self.bits);
        let mut done = true;
        for first in (0..self.rows).step_by(ROWS_AT_A_TIME) {
            for rows_of_x in tiles(self.t, MOST_DOTS) {
                let some = Self {
                    first: self.first.wrapping_add(first * self.row_bytes),
                    rows: ROWS_AT_A_TIME.min(self.rows - first),
                    x: self.x.wrapping_add(rows_of_x.start * x_stride),
                    t: rows_of_x.len(),
                    y: (self.y).wrapping_add(rows_of_x.start * self.y_stride + first),
                    ..self
                };
                // SAFETY: the caller's promise.
                let computed = unsafe {
                    match has_dot_products() {
                        true => visit(ty, ByteDots::<true>(some)),
                        false => visit(ty, ByteDots::<false>(some)),
                    }
                };
                done &= computed.is_some();
            }
        }
        done
    }
}

/// [`Dots`] of 1 to 4 rows of X, by that instruction or without it.
struct ByteDots<const SDOT: bool>(Dots);

impl<const SDOT: bool> Visit for ByteDots<SDOT> {
    type Output = ();

    unsafe fn visit<F: Format>(self) {
        // SAFETY: the caller's promise.
        unsafe { by_height!(self.fixed::<F>, self.0.t, 1 2 3 4) }
    }
}

impl<const SDOT: bool> ByteDots<SDOT> {
    /// # Safety
    /// As for [`Dots::compute`]; with `SDOT` the CPU must have that instruction.
    #[target_feature(enable = "neon")]
    unsafe fn fixed<F: Format, const N: usize>(self) {
        let Dots {
            rows: n,
            y,
            y_stride,
            ..
        } = self.0;
        for (first, rows) in groups(self.0.first, self.0.row_bytes, n) {
            // SAFETY: rows of W, and elements of Y.
            unsafe {
                let sums = self.group::<F, N>(rows);
                for (t, sum) in sums.into_iter().enumerate() {
                    let y = y.add(t * y_stride + first);
                    if first + GROUP <= n {
                        vst1q_f32(y, sum);
                    } else {
                        let mut lanes = [0.0f32; GROUP];
                        vst1q_f32(lanes.as_mut_ptr(), sum);
                        std::ptr::copy_nonoverlapping(lanes.as_ptr(), y, n - first);
                    }
                }
            }
        }
    }

    /// Of four rows of W. Lanes are rows.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn group<F: Format, const N: usize>(&self, rows: Units) -> [float32x4_t; N] {
        let Dots {
            x, k, row_bytes, ..
        } = self.0;
        let mut x = ByteRows::new(Rows::of_bytes(x, N, k));
        let (mut units, mut sums) = (rows, [vdupq_n_f32(0.0); N]);
        for _ in 0..k / BLOCK / F::BLOCKS {
            for r in 0..GROUP {
                let next = units.of(r).wrapping_add(GROUP * row_bytes);
                prefetch(next, F::BYTES);
            }
            // SAFETY: a unit of these rows of W, its blocks of X.
            unsafe {
                let scales = F::scales(units);
                for_each_block!(F, I, {
                    add_block::<F, SDOT, N, I>(units, &scales, x.at_block(I), &mut sums)
                });
            }
            units = units.next::<F>();
            x = x.at_block(F::BLOCKS);
        }
        sums
    }
}

/// Adds block `I` of the rows' units times one of X. Lanes are rows.
///
/// A function for each block is called in one place only, and so becomes part of the caller.
///
/// # Safety
/// The units must exist, and the block of X. With `SDOT` the CPU must have that instruction.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_block<F: Format, const SDOT: bool, const N: usize, const I: usize>(
    units: Units,
    scales: &Scales,
    x: ByteRows,
    sums: &mut [float32x4_t; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let x = RowsOfX::<N>::new::<F, SDOT>(x);
        let first = x.pair::<F, SDOT>(F::bytes(units.of(0), I), F::bytes(units.of(1), I));
        let second = x.pair::<F, SDOT>(F::bytes(units.of(2), I), F::bytes(units.of(3), I));
        for (t, sum) in sums.iter_mut().enumerate() {
            for half in 0..halves::<F>() {
                let products = vpaddq_s32(first[t][half], second[t][half]);
                let step = vmulq_n_f32(scales.steps[half][I], x.steps[t]);
                *sum = vfmaq_f32(*sum, vcvtq_f32_s32(products), step);
            }
            if F::MINS {
                *sum = vfmaq_n_f32(*sum, scales.mins[I], x.sums[t]);
            }
        }
    }
}

/// How many sums a block has: each half's, if halves have steps of their own.
const fn halves<F: Format>() -> usize {
    if F::HALVES { 2 } else { 1 }
}

/// A block of rows of X.
struct RowsOfX<const N: usize> {
    bytes: [Bytes; N],
    /// What sums of products begin with: minus what the integers of W are more than they stand for.
    starts: [[int32x4_t; 2]; N],
    steps: [f32; N],
    /// Times steps.
    sums: [f32; N],
}

impl<const N: usize> RowsOfX<N> {
    /// # Safety
    /// There must be `N` rows. With `SDOT` the CPU must have that instruction.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn new<F: Format, const SDOT: bool>(x: ByteRows) -> Self {
        let (zero, less) = (vdupq_n_s32(0), vdupq_n_s8(-F::OFFSET));
        let mut rows = Self {
            bytes: [[vdupq_n_s8(0); 2]; N],
            starts: [[zero; 2]; N],
            steps: [0.0; N],
            sums: [0.0; N],
        };
        for t in 0..N {
            // SAFETY: row `t`.
            unsafe {
                rows.bytes[t] = [x.half(t, 0), x.half(t, 1)];
                rows.steps[t] = *x.steps.add(t * x.stride);
                if F::MINS {
                    rows.sums[t] = *x.sums.add(t * x.stride);
                }
            }
            if F::OFFSET != 0 {
                let starts = &mut rows.starts[t];
                for half in 0..2 {
                    let start = &mut starts[half * (halves::<F>() - 1)];
                    // SAFETY: the caller's promise.
                    *start = unsafe { dot::<SDOT>(*start, less, rows.bytes[t][half]) };
                }
            }
        }
        rows
    }

    /// Sums of products with two rows of W: two of each, for each half if halves have steps of their own.
    ///
    /// # Safety
    /// As for [`RowsOfX::new`].
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn pair<F: Format, const SDOT: bool>(&self, a: Bytes, b: Bytes) -> [[int32x4_t; 2]; N] {
        let mut sums = self.starts;
        for (t, sums) in sums.iter_mut().enumerate() {
            let mut products = [*sums; 2];
            for (products, w) in products.iter_mut().zip([a, b]) {
                for half in 0..2 {
                    let sum = &mut products[half * (halves::<F>() - 1)];
                    // SAFETY: the caller's promise.
                    *sum = unsafe { dot::<SDOT>(*sum, w[half], self.bytes[t][half]) };
                }
            }
            for (half, sum) in sums.iter_mut().enumerate() {
                *sum = vpaddq_s32(products[0][half], products[1][half]);
            }
        }
        sums
    }
}
