//! Panels and register tiles in bytes.

use super::super::avx2::formats::{Format, GROUP, Visit, for_each_block, groups, visit};
use super::super::avx2::{Integers, columns, packed_bytes, store_lanes};
use super::super::bytes::{BYTE_WIDTH, ByteBlocks, ByteTile, Kind, LANES, QUADS};
use super::super::{BLOCK, Rounded, by_height};
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

/// 24 of the 32 registers hold sums, of integers and of blocks. Two lines of W and six rows of X need fewer loads than one and twelve.
pub(in super::super) const BYTE_TILE_HEIGHT: usize = 6;

/// Largest multiple of a step.
const MAX: f32 = 127.0;
/// What the integers of X are more than they stand for.
const OFFSET: i8 = i8::MIN;

/// Rounds a block to words of four multiples of a step each, plus 128.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) fn round_to_bytes(x: &[f32; BLOCK], quads: &mut [f32; QUADS]) -> Rounded {
    let rounded = Integers::round_block(x, MAX);
    let bytes = _mm256_xor_si256(packed_bytes(rounded.words), _mm256_set1_epi8(OFFSET));
    // SAFETY: within the array.
    unsafe { _mm256_storeu_si256(quads.as_mut_ptr().cast(), bytes) };
    rounded.scales()
}

impl ByteBlocks<'_> {
    /// Unpacks blocks of type `ty`, and says what they have. `None` if there is no format for it.
    ///
    /// # Safety
    /// The rows must have the blocks, and the CPU AVX-512 with VNNI.
    pub(in super::super) unsafe fn unpack(self, ty: GgmlType) -> Option<Kind> {
        // SAFETY: the caller's promise.
        unsafe { visit(ty, self) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni")]
    unsafe fn copy<F: Format>(self) -> Kind {
        const { assert!(LANES.is_multiple_of(GROUP) && QUADS == GROUP) };
        let kind = match (F::FACTORS, F::MINS) {
            (false, false) => Kind::Steps,
            (false, true) => Kind::StepsAndMins,
            (true, _) => Kind::StepsOfHalves,
        };
        const { assert!(!(F::FACTORS && F::MINS)) };
        let offset = _mm256_set1_epi8(F::OFFSET.cast_signed());
        for (row, rows) in groups(self.first, self.row_bytes, self.rows) {
            let (line, lane) = (row / LANES, row % LANES);
            for u in 0..self.blocks / F::BLOCKS {
                let at = rows.map(|row| row.wrapping_add(u * F::BYTES));
                // SAFETY: unit u of these rows.
                unsafe {
                    let scales = F::scales(&at);
                    for_each_block!(F, i, {
                        let block = u * F::BLOCKS + i;
                        let words = &mut self.words[block * QUADS..(block + 1) * QUADS];
                        let bytes = at.map(|at| _mm256_sub_epi8(F::bytes(at, i), offset));
                        let quads = columns(bytes);
                        for (&quads, to) in quads.iter().zip(words) {
                            store_lanes(quads, &mut to[line], lane);
                        }
                        let halves = [0, 1].map(|half| {
                            let x = _mm256_set1_epi8(OFFSET);
                            let sum = |sum, &w| _mm256_dpbusd_epi32(sum, x, w);
                            quads[4 * half..4 * half + 4]
                                .iter()
                                .fold(_mm256_setzero_si256(), sum)
                        });
                        let start = |sum| _mm256_sub_epi32(_mm256_setzero_si256(), sum);
                        if F::FACTORS {
                            for (half, sum) in halves.into_iter().enumerate() {
                                let factor = _mm256_cvtepi32_ps(scales.factors[i][half]);
                                let step = _mm256_mul_ps(scales.steps[i], factor);
                                let at = 2 * block + half;
                                store_lanes(
                                    _mm256_castps_si256(step),
                                    &mut self.steps[at][line],
                                    lane,
                                );
                                store_lanes(start(sum), &mut self.starts[at][line], lane);
                            }
                        } else {
                            let step = _mm256_castps_si256(scales.steps[i]);
                            store_lanes(step, &mut self.steps[block][line], lane);
                            let sum = _mm256_add_epi32(halves[0], halves[1]);
                            store_lanes(start(sum), &mut self.starts[block][line], lane);
                        }
                        if F::MINS {
                            let min = _mm256_castps_si256(scales.mins[i]);
                            store_lanes(min, &mut self.mins[block][line], lane);
                        }
                    });
                }
            }
        }
        kind
    }
}

impl Visit for ByteBlocks<'_> {
    type Output = Kind;

    unsafe fn visit<F: Format>(self) -> Kind {
        // SAFETY: the caller's promise.
        unsafe { self.copy::<F>() }
    }
}

impl ByteTile {
    /// For `t` rows of X, at most [`BYTE_TILE_HEIGHT`].
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have AVX-512 with VNNI.
    pub(in super::super) unsafe fn compute(&self, t: usize) {
        const STEPS: u8 = Kind::Steps as u8;
        const STEPS_AND_MINS: u8 = Kind::StepsAndMins as u8;
        const STEPS_OF_HALVES: u8 = Kind::StepsOfHalves as u8;
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                Kind::Steps => by_height!(self.fixed::<STEPS>, t, 1 2 3 4 5 6),
                Kind::StepsAndMins => by_height!(self.fixed::<STEPS_AND_MINS>, t, 1 2 3 4 5 6),
                Kind::StepsOfHalves => by_height!(self.fixed::<STEPS_OF_HALVES>, t, 1 2 3 4 5 6),
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn fixed<const KIND: u8, const N: usize>(&self) {
        const { assert!(N <= BYTE_TILE_HEIGHT && LANES == 16) };
        let Self { y, x_stride, .. } = *self;
        let there = (1u64 << y.width) - 1;
        let there = [there as __mmask16, (there >> LANES) as __mmask16];
        let parts = match KIND == Kind::StepsOfHalves as u8 {
            true => 2,
            false => 1,
        };
        // SAFETY: the caller's promise; elements that Y does not have are masked.
        unsafe {
            let y_row = |t: usize, line: usize| y.values.wrapping_add(t * y.stride + line * LANES);
            let mut sums = [[_mm512_setzero_ps(); 2]; N];
            if y.accumulate {
                for (t, sums) in sums.iter_mut().enumerate() {
                    *sums = [0, 1].map(|l| _mm512_maskz_loadu_ps(there[l], y_row(t, l)));
                }
            }
            for b in 0..self.blocks {
                for part in 0..parts {
                    let scale = (b * parts + part) * BYTE_WIDTH;
                    let start = self.starts.add(scale);
                    let start = [0, LANES].map(|l| _mm512_load_si512(start.add(l).cast()));
                    let mut acc = [start; N];
                    for p in 0..QUADS / parts {
                        let quad = b * QUADS + part * (QUADS / parts) + p;
                        let w = self.words.add(quad * BYTE_WIDTH);
                        let w = [0, LANES].map(|l| _mm512_load_si512(w.add(l).cast()));
                        for (t, acc) in acc.iter_mut().enumerate() {
                            let x = self.x.add(t * x_stride + quad).cast::<i32>().read();
                            let x = _mm512_set1_epi32(x);
                            for (acc, w) in acc.iter_mut().zip(w) {
                                *acc = _mm512_dpbusd_epi32(*acc, x, w);
                            }
                        }
                    }
                    let steps = [0, LANES].map(|l| _mm512_load_ps(self.steps.add(scale + l)));
                    for (t, (sums, acc)) in sums.iter_mut().zip(acc).enumerate() {
                        let x_step = _mm512_set1_ps(*self.x_steps.add(t * x_stride + b));
                        for ((sum, acc), step) in sums.iter_mut().zip(acc).zip(steps) {
                            let step = _mm512_mul_ps(step, x_step);
                            *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), step, *sum);
                        }
                    }
                }
                if KIND == Kind::StepsAndMins as u8 {
                    let mins = self.mins.add(b * BYTE_WIDTH);
                    let mins = [0, LANES].map(|l| _mm512_load_ps(mins.add(l)));
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x_sum = _mm512_set1_ps(*self.x_sums.add(t * x_stride + b));
                        for (sum, min) in sums.iter_mut().zip(mins) {
                            *sum = _mm512_fmadd_ps(min, x_sum, *sum);
                        }
                    }
                }
            }
            for (t, sums) in sums.iter().enumerate() {
                for (l, sum) in sums.iter().enumerate() {
                    _mm512_mask_storeu_ps(y_row(t, l), there[l], *sum);
                }
            }
        }
    }
}
