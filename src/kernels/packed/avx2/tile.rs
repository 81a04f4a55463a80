//! Register tiles of 16 rows of W and a few of X.

use super::super::{Mins, NO_MINS, OF_BLOCKS, OF_HALVES, Tile, Tiles, WIDTH, WORDS, by_height};
use std::arch::x86_64::*;

/// With two registers of a panel half of the 16 registers hold sums.
pub(in super::super) const TILES: Tiles = Tiles {
    height: HEIGHT,
    rows: Tile::avx2_rows,
};

const HEIGHT: usize = 4;

impl Tile {
    /// For `t` rows of X, at most [`HEIGHT`].
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have AVX2, FMA and F16C.
    unsafe fn avx2_rows(&self, t: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                Mins::None => by_height!(self.fixed::<NO_MINS>, t, 1 2 3 4),
                Mins::OfBlocks => by_height!(self.fixed::<OF_BLOCKS>, t, 1 2 3 4),
                Mins::OfHalves => by_height!(self.fixed::<OF_HALVES>, t, 1 2 3 4),
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn fixed<const MINS: u8, const N: usize>(&self) {
        let Self { y, x_stride, .. } = *self;
        // SAFETY: the caller's promise; with fewer elements than a panel has rows, Y is reached through a copy.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; N];
            let mut copy = [[0.0f32; WIDTH]; N];
            let whole = y.width == WIDTH;
            if y.accumulate {
                for (t, (sums, copy)) in sums.iter_mut().zip(&mut copy).enumerate() {
                    let y_row = y.values.add(t * y.stride).cast_const();
                    let y_row = if whole {
                        y_row
                    } else {
                        copied(y_row, copy, y.width)
                    };
                    *sums = [_mm256_loadu_ps(y_row), _mm256_loadu_ps(y_row.add(8))];
                }
            }
            for b in 0..self.blocks {
                let mut acc = [[_mm256_setzero_si256(); 2]; N];
                let words = self.words.add(b * WORDS * WIDTH);
                let x = self.x.add(b * WORDS);
                for p in 0..WORDS {
                    let w = [0, 8].map(|v| _mm256_load_si256(words.add(p * WIDTH + v).cast()));
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let x = _mm256_castps_si256(_mm256_broadcast_ss(&*x.add(t * x_stride + p)));
                        for (acc, w) in acc.iter_mut().zip(w) {
                            *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(w, x));
                        }
                    }
                }
                let of_block =
                    |from: *const f32| [0, 8].map(|v| _mm256_load_ps(from.add(b * WIDTH + v)));
                let steps = of_block(self.steps);
                for (t, (sums, acc)) in sums.iter_mut().zip(acc).enumerate() {
                    let x_step = _mm256_broadcast_ss(&*self.x_steps.add(t * x_stride + b));
                    for ((sum, acc), step) in sums.iter_mut().zip(acc).zip(steps) {
                        let step = _mm256_mul_ps(step, x_step);
                        *sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), step, *sum);
                    }
                }
                if MINS == OF_BLOCKS {
                    let mins = of_block(self.mins);
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x_step = _mm256_broadcast_ss(&*self.x_steps.add(t * x_stride + b));
                        let x_sum = _mm256_broadcast_ss(&*self.x_sums.add(t * x_stride + b));
                        let x_sum = _mm256_mul_ps(x_sum, x_step);
                        for (sum, min) in sums.iter_mut().zip(mins) {
                            *sum = _mm256_fmadd_ps(min, x_sum, *sum);
                        }
                    }
                }
                if MINS == OF_HALVES {
                    let of_half = |half: usize| {
                        let mins = self.mins.add((2 * b + half) * WIDTH);
                        [0, 8].map(|v| _mm256_load_ps(mins.add(v)))
                    };
                    let mins = [of_half(0), of_half(1)];
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x_step = _mm256_broadcast_ss(&*self.x_steps.add(t * x_stride + b));
                        let x_sum = _mm256_broadcast_ss(&*self.x_sums.add(t * x_stride + b));
                        let x_first = _mm256_broadcast_ss(&*self.x_firsts.add(t * x_stride + b));
                        let x_sums = [x_first, _mm256_sub_ps(x_sum, x_first)];
                        for (mins, x_sum) in mins.into_iter().zip(x_sums) {
                            let x_sum = _mm256_mul_ps(x_sum, x_step);
                            for (sum, min) in sums.iter_mut().zip(mins) {
                                *sum = _mm256_fmadd_ps(min, x_sum, *sum);
                            }
                        }
                    }
                }
            }
            for (t, (sums, copy)) in sums.iter().zip(&mut copy).enumerate() {
                let y_row = y.values.add(t * y.stride);
                let to = if whole { y_row } else { copy.as_mut_ptr() };
                _mm256_storeu_ps(to, sums[0]);
                _mm256_storeu_ps(to.add(8), sums[1]);
                if !whole {
                    std::ptr::copy_nonoverlapping(to, y_row, y.width);
                }
            }
        }
    }
}

/// `n` values in an array that has room for more.
///
/// # Safety
/// There must be so many at `from`.
unsafe fn copied(from: *const f32, to: &mut [f32; WIDTH], n: usize) -> *const f32 {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), n) };
    to.as_ptr()
}
