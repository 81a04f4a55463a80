//! Products in bytes of a few rows of X with weights that are turned in registers: the same operations on each element as in a tile of
//! [bytes](super::bytes), so the same bits.
//!
//! Eight rows of W are read side by side, and a block of them meets all rows of X as soon as it is turned ([`eight`](super::eight)): nothing of W is written, as it is
//! to a panel, and nothing is added across.

use super::super::bytes::{ByteRows, QUADS};
use super::super::{BLOCK, Dots, Rows, by_height, for_each_block, prefetch};
use super::bytes::{scaled_sums, x_sums};
use super::eight::Quads;
use super::formats::{Format, GROUP, Units, Visit, groups};
use super::scales::Scales;
use super::store_group;
use std::arch::x86_64::*;

/// Rows of X that are multiplied at a time: of more, not even a unit's columns stay in the first-level cache.
pub(in super::super) const MOST_TURNED: usize = 16;
/// Up to how many rows of X there is code for each number of them.
const MOST_UNROLLED: usize = 4;

/// [`Dots`] of rows of X that were rounded to 8 bits, [`MOST_TURNED`] at most.
pub(in super::super) struct TurnedDots(pub(in super::super) Dots);

impl Visit for TurnedDots {
    type Output = ();

    unsafe fn visit<F: Format>(self) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.0.t {
                t @ 1..=MOST_UNROLLED => by_height!(self.up_to::<F>, t, 1 2 3 4),
                _ => self.up_to::<F, MOST_TURNED>(),
            }
        }
    }
}

impl TurnedDots {
    /// For `N` rows of X; for fewer if these are more than [`MOST_UNROLLED`].
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn up_to<F: Format, const N: usize>(self) {
        let t = match N {
            ..=MOST_UNROLLED => N,
            _ => self.0.t,
        };
        let Dots {
            first,
            row_bytes,
            rows,
            k,
            y,
            y_stride,
            ..
        } = self.0;
        let x = ByteRows::new(Rows::of_bytes(self.0.x, t, k));
        for (row, eight) in groups(first, row_bytes, rows) {
            let mut sums = [_mm256_setzero_ps(); N];
            let sums = &mut sums[..t];
            for u in 0..k / BLOCK / F::BLOCKS {
                let units = Units::new::<F>(&eight, u);
                fetch_ahead::<F>(units, u, row_bytes);
                // SAFETY: unit u of these rows, its blocks of X.
                unsafe {
                    let scales = F::scales(units);
                    let x = x.at_block(u * F::BLOCKS);
                    for_each_block!(
                        F,
                        I,
                        add_block::<F>(F::eight(units, I), I, &scales, x, sums)
                    );
                }
            }
            for (t, &mut sum) in sums.iter_mut().enumerate() {
                let y = y.wrapping_add(t * y_stride + row);
                // SAFETY: elements of Y.
                unsafe { store_group(sum, y, rows - row) };
            }
        }
    }
}

/// Has as much of the next eight rows fetched from memory as unit `u` of these is: the same unit of each or, where rows are short, all of what lies behind what was fetched for the
/// unit before. On Zen 3 memory gives 1.1 to 1.5 times as much if it is asked for in order, but a seventh less of rows of 4.6 KB.
#[inline]
fn fetch_ahead<F: Format>(units: Units, u: usize, row_bytes: usize) {
    /// Bytes of a row that is short.
    const SHORT: usize = 3 << 10;
    let next = |r| units.of(r).wrapping_add(GROUP * row_bytes);
    if row_bytes <= SHORT {
        let in_order = next(0).wrapping_add((GROUP - 1) * u * F::BYTES);
        return prefetch(in_order, GROUP * F::BYTES);
    }
    for r in 0..GROUP {
        prefetch(next(r), F::BYTES);
    }
}

/// Adds block `i` of a unit of eight rows times that of X. Lanes are rows.
///
/// # Safety
/// X must have the block. The CPU must have AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_block<F: Format>(
    quads: Quads,
    i: usize,
    scales: &Scales,
    x: ByteRows,
    sums: &mut [__m256],
) {
    for (t, sum) in sums.iter_mut().enumerate() {
        let at = t * x.stride + i;
        // SAFETY: the caller's promise.
        unsafe {
            let x_step = _mm256_broadcast_ss(&*x.steps.add(at));
            let words = x.quads.add(t * x.stride + i * QUADS);
            for part in 0..F::PARTS {
                let first = part * (QUADS / F::PARTS);
                let mut product = _mm256_cvtepi32_ps(products::<F>(&quads, words, first));
                if !F::FULL && F::OFFSET > 0 {
                    // Integers below 2²⁴: exact.
                    let offset = _mm256_set1_ps(f32::from(F::OFFSET));
                    product = _mm256_fnmadd_ps(offset, x_sums::<F>(x, at)[part], product);
                }
                let step = _mm256_mul_ps(scales.steps_of::<F>(i, part), x_step);
                *sum = _mm256_fmadd_ps(product, step, *sum);
            }
            if F::MINS {
                for (part, x_sum) in scaled_sums::<F>(x, at)
                    .into_iter()
                    .enumerate()
                    .take(F::PARTS)
                {
                    *sum = _mm256_fmadd_ps(scales.mins[i][part], x_sum, *sum);
                }
            }
        }
    }
}

/// Words of a block, or of a half of it, from `first` on times those of a row of X.
///
/// # Safety
/// As for [`add_block`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products<F: Format>(quads: &Quads, x: *const f32, first: usize) -> __m256i {
    let mut acc = _mm256_setzero_si256();
    for from in (first..first + QUADS / F::PARTS).step_by(F::WORDS) {
        let mut words = _mm256_setzero_si256();
        for (i, &quad) in quads.iter().enumerate().skip(from).take(F::WORDS) {
            // SAFETY: the caller's promise.
            let x = _mm256_castps_si256(unsafe { _mm256_broadcast_ss(&*x.add(i)) });
            let product = if F::FULL {
                let signed = _mm256_sub_epi8(quad, _mm256_set1_epi8(F::OFFSET.cast_signed()));
                _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(x, signed))
            } else {
                _mm256_maddubs_epi16(quad, x)
            };
            words = _mm256_add_epi16(words, product);
        }
        acc = _mm256_add_epi32(acc, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    }
    acc
}
