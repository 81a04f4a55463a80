//! Panels and register tiles in bytes.

use super::super::avx2::formats::{Format, Visit, visit};
use super::super::avx2::{Integers, packed_bytes};
use super::super::bytes::{BYTE_WIDTH, ByteBlocks, ByteTile, Kind, LANES, QUADS};
use super::super::{BLOCK, Line, Rounded, by_height};
use super::two::{self, ROWS, Two, for_each_two, sixteens};
use crate::file::types::GgmlType;
use std::arch::x86_64::*;

/// 24 of the 32 registers hold sums, of integers and of blocks. Two lines of W and six rows of X need fewer loads than one and twelve.
pub(in super::super) const BYTE_TILE_HEIGHT: usize = 6;

/// Largest multiple of a step.
const MAX: f32 = 127.0;
/// What the integers of X are more than they stand for.
pub(super) const OFFSET: i8 = i8::MIN;

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

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn copy<F: Format>(mut self) -> Kind {
        const { assert!(LANES == ROWS) };
        const { assert!(!(F::FACTORS && F::MINS)) };
        let (row_bytes, blocks) = (self.row_bytes, self.blocks);
        for (line, rows) in sixteens(self.first, row_bytes, self.rows).enumerate() {
            let mut to = ToLine {
                panel: &mut self,
                line,
            };
            // SAFETY: the caller's promise.
            unsafe { for_each_two::<F>(rows, row_bytes, blocks, &mut to) };
        }
        match (F::FACTORS, F::MINS) {
            (false, false) => Kind::Steps,
            (false, true) => Kind::StepsAndMins,
            (true, _) => Kind::StepsOfHalves,
        }
    }
}

/// Sixteen rows go to a line of a panel.
struct ToLine<'a, 'b> {
    panel: &'a mut ByteBlocks<'b>,
    line: usize,
}

impl two::Visit for ToLine<'_, '_> {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn visit<F: Format, const I: usize>(&mut self, two: Two<I>) {
        // SAFETY: the caller's promise.
        unsafe {
            let [first, second] = two.quads::<F>();
            self.copy_block::<F, I>(&two, 0, first);
            if two.there == 2 {
                self.copy_block::<F, I>(&two, 1, second);
            }
        }
    }
}

impl ToLine<'_, '_> {
    /// Copies one of the two blocks.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn copy_block<F: Format, const I: usize>(
        &mut self,
        two: &Two<I>,
        which: usize,
        quads: [__m512i; QUADS],
    ) {
        let (panel, line, block) = (&mut *self.panel, self.line, two.first + which);
        let words = &mut panel.words[block * QUADS..(block + 1) * QUADS];
        for (i, to) in words.iter_mut().enumerate() {
            store(quads[i], &mut to[line]);
        }
        // Minus what 128 more in each integer of X adds.
        let start = |from: usize, to: usize| {
            let (x, zero) = (_mm512_set1_epi8(OFFSET), _mm512_setzero_si512());
            let mut sum = zero;
            for quad in &quads[from..to] {
                sum = _mm512_dpbusd_epi32(sum, x, *quad);
            }
            _mm512_sub_epi32(zero, sum)
        };
        let mut put = |at: usize, step, start| {
            store(_mm512_castps_si512(step), &mut panel.steps[at][line]);
            store(start, &mut panel.starts[at][line]);
        };
        if F::FACTORS {
            put(2 * block, two.steps::<F>(which, 0), start(0, QUADS / 2));
            put(
                2 * block + 1,
                two.steps::<F>(which, 1),
                start(QUADS / 2, QUADS),
            );
        } else {
            put(block, two.steps::<F>(which, 0), start(0, QUADS));
        }
        if F::MINS {
            let mins = _mm512_castps_si512(two.mins::<F>(which));
            store(mins, &mut panel.mins[block][line]);
        }
    }
}

/// Writes a line.
#[inline]
#[target_feature(enable = "avx512f")]
fn store<T>(x: __m512i, to: &mut Line<T>) {
    const { assert!(size_of::<Line<T>>() == 64 && align_of::<Line<T>>() == 64) };
    // SAFETY: a line is a register wide and aligned.
    unsafe { _mm512_store_si512((&raw mut *to).cast(), x) };
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
