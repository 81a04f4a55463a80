//! Products of a few rows of X with weights as they lie in memory: the same operations on each element as in a [tile](super::tile), so the same bits.
//!
//! A row's block times one of X is sums of eight products, a lane each. Those of four rows are added across in pairs: then lanes are rows.

use super::super::bytes::{ByteRows, QUADS};
use super::super::{BLOCK, Bits, Dots, Rows, by_height};
use super::formats::{Format, GROUP, Scales, Units, Visit, for_each_block, groups, visit};
use super::sdot;
use crate::file::types::GgmlType;
use std::arch::aarch64::*;

impl Visit for Dots {
    type Output = ();

    unsafe fn visit<F: Format>(self) {
        // SAFETY: the caller's promise.
        unsafe { by_height!(self.fixed::<F>, self.t, 1 2 3 4) }
    }
}

impl Dots {
    /// False if nothing is done: there are no dot products of type `ty`.
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have dot products of bytes.
    pub(in super::super::super) unsafe fn compute(self, ty: GgmlType) -> bool {
        assert_eq!(self.bits, Bits::Eight);
        // SAFETY: the caller's promise.
        unsafe { visit(ty, self) }.is_some()
    }

    #[target_feature(enable = "neon,dotprod")]
    unsafe fn fixed<F: Format, const N: usize>(self) {
        for (first, rows) in groups(self.first, self.row_bytes, self.rows) {
            // SAFETY: rows of W, and elements of Y.
            unsafe {
                let sums = self.group::<F, N>(rows);
                for (t, sum) in sums.into_iter().enumerate() {
                    let y = self.y.add(t * self.y_stride + first);
                    if first + GROUP <= self.rows {
                        vst1q_f32(y, sum);
                    } else {
                        let mut lanes = [0.0f32; GROUP];
                        vst1q_f32(lanes.as_mut_ptr(), sum);
                        std::ptr::copy_nonoverlapping(lanes.as_ptr(), y, self.rows - first);
                    }
                }
            }
        }
    }

    /// Of four rows of W. Lanes are rows.
    #[target_feature(enable = "neon,dotprod")]
    unsafe fn group<F: Format, const N: usize>(&self, rows: Units) -> [float32x4_t; N] {
        let x = ByteRows::new(Rows {
            words: self.x,
            t: N,
            k: self.k,
            first: 0,
        });
        let (mut units, mut sums) = (rows, [vdupq_n_f32(0.0); N]);
        for first in (0..self.k / BLOCK).step_by(F::BLOCKS) {
            // SAFETY: a unit of these rows of W, its blocks of X.
            unsafe {
                let scales = F::scales(units);
                for_each_block!(F, I, {
                    add_block::<F, N>((units, I), &scales, x.at_block(first + I), &mut sums)
                });
            }
            units = units.next::<F>();
        }
        sums
    }
}

/// Adds a block of the rows' units times one of X. Lanes are rows.
///
/// # Safety
/// The units must exist, and the block of X. The CPU must have dot products of bytes.
#[inline]
#[target_feature(enable = "neon,dotprod")]
unsafe fn add_block<F: Format, const N: usize>(
    (units, i): (Units, usize),
    scales: &Scales,
    x: ByteRows,
    sums: &mut [float32x4_t; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let zero = vdupq_n_s32(0);
        let rows_of_x: [[int8x16_t; 2]; N] = std::array::from_fn(|t| {
            [0, QUADS / 2].map(|quad| vld1q_s8(x.quads.add(t * x.stride + quad).cast()))
        });
        // What sums begin with: minus what the integers of W are more than they stand for.
        let starts = rows_of_x.map(|[first, second]| {
            let less = vdupq_n_s8(-F::OFFSET);
            let start = |sum, x| match F::OFFSET {
                0 => sum,
                _ => sdot(sum, less, x),
            };
            match F::HALVES {
                true => [start(zero, first), start(zero, second)],
                false => [start(start(zero, first), second), zero],
            }
        });
        let row = |r: usize| -> [[int32x4_t; 2]; N] {
            let [first, second] = F::bytes(units.of(r), i);
            std::array::from_fn(|t| {
                let ([x, y], [start, other]) = (rows_of_x[t], starts[t]);
                let sum = sdot(start, first, x);
                match F::HALVES {
                    true => [sum, sdot(other, second, y)],
                    false => [sdot(sum, second, y), other],
                }
            })
        };
        let add = |a: [[int32x4_t; 2]; N], b: [[int32x4_t; 2]; N]| -> [[int32x4_t; 2]; N] {
            std::array::from_fn(|t| [0, 1].map(|half| vpaddq_s32(a[t][half], b[t][half])))
        };
        let products = add(add(row(0), row(1)), add(row(2), row(3)));
        for (t, (sum, products)) in sums.iter_mut().zip(products).enumerate() {
            let x_step = *x.steps.add(t * x.stride);
            for (products, step) in products.into_iter().zip(scales.steps[i]) {
                let step = vmulq_n_f32(step, x_step);
                *sum = vfmaq_f32(*sum, vcvtq_f32_s32(products), step);
                if !F::HALVES {
                    break;
                }
            }
            if F::MINS {
                *sum = vfmaq_n_f32(*sum, scales.mins[i], *x.sums.add(t * x.stride));
            }
        }
    }
}
