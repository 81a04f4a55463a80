//! Panels and register tiles in bytes.

use super::super::avx2::formats::{Format, Visit, visit};
use super::super::bytes::{BYTE_WIDTH, ByteBlocks, ByteTile, Kind, LANES, QUADS};
use super::super::{Line, by_height};
use super::two::{self, ROWS, Two, for_each_two, sixteens};
use super::wide::Quads;
use crate::file::types::GgmlType;
use std::arch::asm;
use std::arch::x86_64::*;

/// 24 of the 32 registers hold sums, of integers and of blocks. Two lines of W and six rows of X need fewer loads than one and twelve.
pub(in super::super) const BYTE_TILE_HEIGHT: usize = 6;

/// What the integers of X are more than they stand for.
pub(in super::super) const OFFSET: i8 = i8::MIN;

impl ByteBlocks<'_> {
    /// Unpacks blocks of type `ty`, and says what they have. `None` if there is no format for it.
    ///
    /// # Safety
    /// The rows must have the blocks, and the CPU AVX-512 with VNNI.
    pub(in super::super) unsafe fn unpack_512(self, ty: GgmlType) -> Option<Kind> {
        // SAFETY: the caller's promise.
        unsafe { visit(ty, self) }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn copy<F: Format>(mut self) -> Kind {
        const { assert!(LANES == ROWS) };
        let (row_bytes, blocks) = (self.row_bytes, self.blocks);
        for (line, rows) in sixteens(self.first, row_bytes, self.rows).enumerate() {
            let mut to = ToLine {
                panel: &mut self,
                line,
            };
            // SAFETY: the caller's promise.
            unsafe { for_each_two::<F, _>(rows, row_bytes, blocks, &mut to) };
        }
        Kind::of::<F>()
    }
}

/// Sixteen rows go to a line of a panel.
struct ToLine<'a, 'b> {
    panel: &'a mut ByteBlocks<'b>,
    line: usize,
}

impl two::Visit for ToLine<'_, '_> {
    // Those of the next panel.
    const AHEAD: usize = BYTE_WIDTH;
    const SOON: bool = false;

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
    fn copy_block<F: Format, const I: usize>(&mut self, two: &Two<I>, which: usize, quads: Quads) {
        let (panel, line, block) = (&mut *self.panel, self.line, two.first + which);
        let words = &mut panel.words[block * QUADS..(block + 1) * QUADS];
        let offset = _mm512_set1_epi8(F::OFFSET.cast_signed());
        for (i, to) in words.iter_mut().enumerate() {
            store(_mm512_sub_epi8(quads[i], offset), &mut to[line]);
        }
        // Minus what 128 more in each integer of X adds.
        let start = |from: usize, to: usize| {
            let more = i32::from(F::OFFSET) * -i32::from(OFFSET) * 4 * (to - from) as i32;
            let (mut sum, x) = (_mm512_set1_epi32(more), _mm512_set1_epi8(OFFSET));
            if F::FULL {
                for quad in &quads[from..to] {
                    sum = _mm512_dpbusd_epi32(sum, *quad, x);
                }
                return sum;
            }
            // Sums of so small integers are bytes, too.
            let pair = |i: usize| _mm512_add_epi8(quads[i], quads[i + 1]);
            let four = |i: usize| _mm512_add_epi8(pair(i), pair(i + 2));
            let all = match to - from {
                4 => four(from),
                _ => _mm512_add_epi8(four(from), four(from + 4)),
            };
            _mm512_dpbusd_epi32(sum, all, x)
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
            for part in 0..F::PARTS {
                let mins = _mm512_castps_si512(two.mins::<F>(which, part));
                store(mins, &mut panel.mins[block * F::PARTS + part][line]);
            }
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
    pub(in super::super) unsafe fn compute_512(&self, t: usize) {
        const STEPS: u8 = Kind::Steps as u8;
        const STEPS_AND_MINS: u8 = Kind::StepsAndMins as u8;
        const STEPS_OF_HALVES: u8 = Kind::StepsOfHalves as u8;
        const ALL_OF_HALVES: u8 = Kind::StepsAndMinsOfHalves as u8;
        // SAFETY: the caller's promise.
        unsafe {
            match self.kind {
                Kind::Steps => by_height!(self.fixed::<STEPS>, t, 1 2 3 4 5 6),
                Kind::StepsAndMins => by_height!(self.fixed::<STEPS_AND_MINS>, t, 1 2 3 4 5 6),
                Kind::StepsOfHalves => by_height!(self.fixed::<STEPS_OF_HALVES>, t, 1 2 3 4 5 6),
                Kind::StepsAndMinsOfHalves => {
                    by_height!(self.fixed::<ALL_OF_HALVES>, t, 1 2 3 4 5 6)
                }
            }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn fixed<const KIND: u8, const N: usize>(&self) {
        const { assert!(N <= BYTE_TILE_HEIGHT && LANES == 16) };
        let Self { y, x, .. } = *self;
        let there = (1u64 << y.width) - 1;
        let there = [there as __mmask16, (there >> LANES) as __mmask16];
        let min_halves = KIND == Kind::StepsAndMinsOfHalves as u8;
        let parts = match KIND == Kind::StepsOfHalves as u8 || min_halves {
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
                    let quad = (b * parts + part) * (QUADS / parts);
                    let mut acc = [start; N];
                    for half in 0..2 / parts {
                        let quad = quad + half * HALF;
                        let w = self.words.add(quad * BYTE_WIDTH);
                        add_half(&mut acc, w, x.quads.add(quad), x.stride);
                    }
                    let steps = [0, LANES].map(|l| _mm512_load_ps(self.steps.add(scale + l)));
                    for (t, (sums, acc)) in sums.iter_mut().zip(acc).enumerate() {
                        let x_step = _mm512_set1_ps(*x.steps.add(t * x.stride + b));
                        for ((sum, acc), step) in sums.iter_mut().zip(acc).zip(steps) {
                            let step = _mm512_mul_ps(step, x_step);
                            *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), step, *sum);
                        }
                    }
                }
                if min_halves {
                    let of_half = |half: usize| {
                        let mins = self.mins.add((2 * b + half) * BYTE_WIDTH);
                        [0, LANES].map(|l| _mm512_load_ps(mins.add(l)))
                    };
                    let mins = [of_half(0), of_half(1)];
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x_sum = _mm512_set1_ps(*x.sums.add(t * x.stride + b));
                        let x_first = _mm512_set1_ps(*x.firsts.add(t * x.stride + b));
                        let x_sums = [x_first, _mm512_sub_ps(x_sum, x_first)];
                        for (mins, x_sum) in mins.into_iter().zip(x_sums) {
                            for (sum, min) in sums.iter_mut().zip(mins) {
                                *sum = _mm512_fmadd_ps(min, x_sum, *sum);
                            }
                        }
                    }
                }
                if KIND == Kind::StepsAndMins as u8 {
                    let mins = self.mins.add(b * BYTE_WIDTH);
                    let mins = [0, LANES].map(|l| _mm512_load_ps(mins.add(l)));
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x_sum = _mm512_set1_ps(*x.sums.add(t * x.stride + b));
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

/// Words of half a block.
const HALF: usize = QUADS / 2;

/// Adds products of the words of half a block, from `w` and from `x` on.
///
/// In assembly, because compilers that are not told of one CPU keep some of the sums in memory.
///
/// # Safety
/// As for [`ByteTile::compute`].
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn add_half<const N: usize>(
    acc: &mut [[__m512i; 2]; N],
    w: *const f32,
    x: *const f32,
    x_stride: usize,
) {
    const { assert!(HALF == 4 && BYTE_WIDTH == 32) };
    // `out(zmm_reg) _` has no type that says how wide the register is.
    let mut scratch = [_mm512_setzero_si512(); 3];
    // A word of both lines of W times one of each row of X: the numbers of its two sums, and where it begins.
    macro_rules! quad {
        ($p:literal, [$($first:literal $second:literal $row:literal)*]) => {
            concat!(
                "vmovdqa64 {w0}, [{w} + 128 * ", $p, "]\n",
                "vmovdqa64 {w1}, [{w} + 128 * ", $p, " + 64]\n",
                $(
                    "vpbroadcastd {x}, dword ptr [", $row, " + 4 * ", $p, "]\n",
                    "vpdpbusd {", $first, "}, {x}, {w0}\n",
                    "vpdpbusd {", $second, "}, {x}, {w1}\n",
                )*
            )
        };
    }
    macro_rules! half {
        ($rows:tt, $($t:literal)*) => {
            asm!(
                quad!(0, $rows),
                quad!(1, $rows),
                quad!(2, $rows),
                quad!(3, $rows),
                // Few rows do not need all of these.
                "/* {s} {x3} */",
                $(inout(zmm_reg) acc[$t][0], inout(zmm_reg) acc[$t][1],)*
                w0 = out(zmm_reg) scratch[0],
                w1 = out(zmm_reg) scratch[1],
                x = out(zmm_reg) scratch[2],
                w = in(reg) w,
                x0 = in(reg) x,
                x3 = in(reg) x.wrapping_add(3 * x_stride),
                s = in(reg) 4 * x_stride,
                options(pure, readonly, nostack, preserves_flags)
            )
        };
    }
    // SAFETY: reads the words only.
    unsafe {
        match N {
            1 => half!([0 1 "{x0}"], 0),
            2 => half!([0 1 "{x0}" 2 3 "{x0} + {s}"], 0 1),
            3 => half!([0 1 "{x0}" 2 3 "{x0} + {s}" 4 5 "{x0} + 2 * {s}"], 0 1 2),
            4 => half!([0 1 "{x0}" 2 3 "{x0} + {s}" 4 5 "{x0} + 2 * {s}" 6 7 "{x3}"], 0 1 2 3),
            5 => half!(
                [0 1 "{x0}" 2 3 "{x0} + {s}" 4 5 "{x0} + 2 * {s}" 6 7 "{x3}" 8 9 "{x3} + {s}"],
                0 1 2 3 4
            ),
            6 => half!(
                [0 1 "{x0}" 2 3 "{x0} + {s}" 4 5 "{x0} + 2 * {s}" 6 7 "{x3}" 8 9 "{x3} + {s}" 10 11 "{x3} + 2 * {s}"],
                0 1 2 3 4 5
            ),
            _ => unreachable!("a tile of {N} rows"),
        }
    }
    let _ = scratch;
}
