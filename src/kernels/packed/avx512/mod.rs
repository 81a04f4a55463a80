//! Register tiles of 16 rows of W and a few of X on CPUs with AVX-512 and its VNNI: one register of a panel instead of two, and one
//! instruction that multiplies and adds instead of two. The same operations on each element as with AVX2, so the same bits.

use super::{Mins, NO_MINS, OF_BLOCKS, OF_HALVES, Tile, Tiles, WIDTH, WORDS, by_height};
use std::arch::x86_64::*;

pub(super) mod bytes;
pub(super) mod dot;
pub(super) mod scales;
pub(super) mod turned;
mod two;
pub(super) mod wide;

/// 24 of the 32 registers hold sums, of integers and of blocks.
pub(super) const TILES: Tiles = Tiles {
    height: HEIGHT,
    rows: Tile::avx512_rows,
};

const HEIGHT: usize = 12;

impl Tile {
    /// For `t` rows of X, at most [`HEIGHT`].
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have AVX-512F and VNNI.
    unsafe fn avx512_rows(&self, t: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                Mins::None => by_height!(self.fixed_512::<NO_MINS>, t, 1 2 3 4 5 6 7 8 9 10 11 12),
                Mins::OfBlocks => {
                    by_height!(self.fixed_512::<OF_BLOCKS>, t, 1 2 3 4 5 6 7 8 9 10 11 12)
                }
                Mins::OfHalves => {
                    by_height!(self.fixed_512::<OF_HALVES>, t, 1 2 3 4 5 6 7 8 9 10 11 12)
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn fixed_512<const MINS: u8, const N: usize>(&self) {
        const { assert!(N <= HEIGHT && WIDTH == 16) };
        let Self { y, x_stride, .. } = *self;
        let there = ((1u32 << y.width) - 1) as __mmask16;
        // SAFETY: the caller's promise; elements that Y does not have are masked.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); N];
            if y.accumulate {
                for (t, sum) in sums.iter_mut().enumerate() {
                    *sum = _mm512_maskz_loadu_ps(there, y.values.add(t * y.stride));
                }
            }
            for b in 0..self.blocks {
                let mut acc = [_mm512_setzero_si512(); N];
                let words = self.words.add(b * WORDS * WIDTH);
                let x = self.x.add(b * WORDS);
                for p in 0..WORDS {
                    let w = _mm512_load_si512(words.add(p * WIDTH).cast());
                    for (t, acc) in acc.iter_mut().enumerate() {
                        let x = _mm512_set1_epi32(x.add(t * x_stride + p).cast::<i32>().read());
                        *acc = _mm512_dpwssd_epi32(*acc, w, x);
                    }
                }
                let step = _mm512_load_ps(self.steps.add(b * WIDTH));
                for (t, (sum, acc)) in sums.iter_mut().zip(acc).enumerate() {
                    let x_step = _mm512_set1_ps(*self.x_steps.add(t * x_stride + b));
                    let step = _mm512_mul_ps(step, x_step);
                    *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), step, *sum);
                }
                if MINS == OF_BLOCKS {
                    let min = _mm512_load_ps(self.mins.add(b * WIDTH));
                    for (t, sum) in sums.iter_mut().enumerate() {
                        let x_step = _mm512_set1_ps(*self.x_steps.add(t * x_stride + b));
                        let x_sum = _mm512_set1_ps(*self.x_sums.add(t * x_stride + b));
                        *sum = _mm512_fmadd_ps(min, _mm512_mul_ps(x_sum, x_step), *sum);
                    }
                }
                if MINS == OF_HALVES {
                    let mins = [2 * b, 2 * b + 1].map(|h| _mm512_load_ps(self.mins.add(h * WIDTH)));
                    for (t, sum) in sums.iter_mut().enumerate() {
                        let x_step = _mm512_set1_ps(*self.x_steps.add(t * x_stride + b));
                        let x_sum = _mm512_set1_ps(*self.x_sums.add(t * x_stride + b));
                        let x_first = _mm512_set1_ps(*self.x_firsts.add(t * x_stride + b));
                        let x_sums = [x_first, _mm512_sub_ps(x_sum, x_first)];
                        for (min, x_sum) in mins.into_iter().zip(x_sums) {
                            *sum = _mm512_fmadd_ps(min, _mm512_mul_ps(x_sum, x_step), *sum);
                        }
                    }
                }
            }
            for (t, sum) in sums.iter().enumerate() {
                _mm512_mask_storeu_ps(y.values.add(t * y.stride), there, *sum);
            }
        }
    }
}
