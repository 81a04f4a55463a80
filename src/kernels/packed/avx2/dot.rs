//! Products of a few rows of X with weights as they lie in memory.

use super::super::avx512::{dot::ByteDots, turned::TurnedDots as TurnedDots512};
use super::super::{BLOCK, Bits, Dots, SCALED, WORDS};
use super::super::{
    by_height, for_each_block, has_avx512, is_intel, packed_words, prefetch, turned,
};
use super::formats::{Format, GROUP, Units, Visit, groups, visit};
use super::scales::Scales;
use super::store_group;
use super::turned::TurnedDots;
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

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
    /// All pointers must be valid for that, and the CPU have AVX2, FMA and F16C.
    pub(in super::super::super) unsafe fn compute(self, ty: GgmlType) -> bool {
        // SAFETY: the caller's promise.
        let done = unsafe {
            match self.bits {
                Bits::Eight if !has_avx512() => visit(ty, TurnedDots(self)),
                Bits::Eight if is_intel() && turned(ty).contains(&self.t) => {
                    visit(ty, TurnedDots512(self))
                }
                Bits::Eight => visit(ty, ByteDots(self)),
                Bits::Fourteen => visit(ty, self),
                Bits::Bf16 | Bits::All => None,
            }
        };
        done.is_some()
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn fixed<F: Format, const N: usize>(self) {
        for (first, rows) in groups(self.first, self.row_bytes, self.rows) {
            // SAFETY: rows of W.
            unsafe {
                let sums = self.group::<F, N>(rows);
                for (t, sum) in sums.into_iter().enumerate() {
                    let y = self.y.add(t * self.y_stride + first);
                    store_group(sum, y, self.rows - first);
                }
            }
        }
    }

    /// Of eight rows of W. Lanes are rows.
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn group<F: Format, const N: usize>(&self, rows: [*const u8; GROUP]) -> [__m256; N] {
        let blocks = self.k / BLOCK;
        let stride = packed_words(self.k, N, Bits::Fourteen);
        let mut sums = [_mm256_setzero_ps(); N];
        for u in 0..blocks / F::BLOCKS {
            // SAFETY: unit u of these rows of W, its blocks of X.
            unsafe {
                let units = Units::new::<F>(&rows, u);
                for r in 0..GROUP {
                    let next = units.of(r).wrapping_add(GROUP * self.row_bytes);
                    prefetch(next, F::BYTES);
                }
                let scales = F::scales(units);
                let x = X {
                    scales: self.x.add(blocks * WORDS + u * F::BLOCKS),
                    bytes: self.x.add(blocks * SCALED + u * F::BLOCKS * WORDS),
                    blocks,
                    stride,
                };
                for_each_block!(F, I, add_block::<F, N>(units, I, &scales, x, &mut sums));
            }
        }
        sums
    }
}

/// Blocks of packed rows.
#[derive(Clone, Copy)]
struct X {
    /// The first block's step; sums lie `blocks` behind it, those of first halves as far behind them.
    scales: *const f32,
    /// Its [`Bytes`](super::super::Bytes).
    bytes: *const f32,
    blocks: usize,
    /// From one row to the next.
    stride: usize,
}

/// Adds block `i` of the rows' units times that of X. Lanes are rows.
///
/// # Safety
/// The units must exist, and the blocks of X. The CPU must have AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_block<F: Format, const N: usize>(
    units: Units,
    i: usize,
    scales: &Scales,
    x: X,
    sums: &mut [__m256; N],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let [low, high] = products::<F, N>(units, i, x.bytes.add(i * WORDS), x.stride);
        for (t, sum) in sums.iter_mut().enumerate() {
            let of_row = x.scales.add(t * x.stride + i);
            let x_step = _mm256_broadcast_ss(&*of_row);
            let x_sum = _mm256_broadcast_ss(&*of_row.add(x.blocks));
            let offset = |sum| {
                let offset = _mm256_set1_epi32(i32::from(F::OFFSET));
                _mm256_mullo_epi32(_mm256_cvtps_epi32(sum), offset)
            };
            let first = _mm256_permute2x128_si256::<0x20>(low[t], high[t]);
            let second = _mm256_permute2x128_si256::<0x31>(low[t], high[t]);
            let product = if F::FACTORS {
                let x_first = _mm256_broadcast_ss(&*of_row.add(2 * x.blocks));
                let first = _mm256_sub_epi32(first, offset(x_first));
                let second = _mm256_sub_epi32(second, offset(_mm256_sub_ps(x_sum, x_first)));
                _mm256_add_epi32(
                    _mm256_mullo_epi32(first, scales.factors[i][0]),
                    _mm256_mullo_epi32(second, scales.factors[i][1]),
                )
            } else {
                let both = _mm256_add_epi32(first, second);
                if F::OFFSET == 0 {
                    both
                } else {
                    _mm256_sub_epi32(both, offset(x_sum))
                }
            };
            let step = _mm256_mul_ps(scales.steps[i], x_step);
            *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), step, *sum);
            if F::MINS && !F::FACTORS {
                let [min, _] = scales.mins[i];
                *sum = _mm256_fmadd_ps(min, _mm256_mul_ps(x_sum, x_step), *sum);
            }
            if F::MINS && F::FACTORS {
                let x_first = _mm256_broadcast_ss(&*of_row.add(2 * x.blocks));
                let x_sums = [x_first, _mm256_sub_ps(x_sum, x_first)];
                for (min, x_sum) in scales.mins[i].into_iter().zip(x_sums) {
                    *sum = _mm256_fmadd_ps(min, _mm256_mul_ps(x_sum, x_step), *sum);
                }
            }
        }
    }
}

/// Block `i` of the rows' units, without offsets and factors, times a block of rows of X: of rows 0 to 3 and 4 to 7 the sums of first halves, then
/// those of second ones.
///
/// # Safety
/// As for [`add_block`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products<F: Format, const N: usize>(
    units: Units,
    i: usize,
    x: *const f32,
    stride: usize,
) -> [[__m256i; N]; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let x: [[__m256i; 2]; N] = std::array::from_fn(|t| {
            [0, 8].map(|v| _mm256_loadu_si256(x.add(t * stride + v).cast()))
        });
        let weights = [128, 1].map(|x| _mm256_set1_epi16(x));
        let row = |r: usize| {
            let w = F::bytes(units.of(r), i);
            // Pairs are at most 2 * 255 * 64: nothing saturates.
            let part = |x, weight| _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), weight);
            x.map(|[high, low]| _mm256_add_epi32(part(high, weights[0]), part(low, weights[1])))
        };
        let add = |a: [__m256i; N], b: [__m256i; N]| -> [__m256i; N] {
            std::array::from_fn(|t| _mm256_hadd_epi32(a[t], b[t]))
        };
        let four = |r: usize| add(add(row(r), row(r + 1)), add(row(r + 2), row(r + 3)));
        [four(0), four(4)]
    }
}
