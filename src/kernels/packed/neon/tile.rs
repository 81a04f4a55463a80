//! Register tiles of eight rows of W and a few of X. Blocks of the panel are read once for all of these.

use super::super::bytes::{BYTE_WIDTH, ByteRows, ByteTile, Kind, QUADS};
use super::super::{Output, by_height};
use super::{has_matrices, sdot_word, smmla};
use std::arch::aarch64::*;

/// Sums of integers and of blocks take 16 of the 32 registers. Six rows would need fewer loads, but then compilers keep some of the sums in memory.
pub(in super::super) const BYTE_TILE_HEIGHT: usize = 4;
/// Rows of W in a tile.
pub(super) const ROWS: usize = 8;
/// Words of half a block.
const HALF: usize = QUADS / 2;

const STEPS: u8 = Kind::Steps as u8;
const STEPS_AND_MINS: u8 = Kind::StepsAndMins as u8;
const STEPS_OF_HALVES: u8 = Kind::StepsOfHalves as u8;

impl ByteTile {
    /// For `t` rows of X, at most [`BYTE_TILE_HEIGHT`].
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have dot products of bytes.
    pub(in super::super) unsafe fn compute(&self, t: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            match (has_matrices(), self.kind) {
                (true, Kind::Steps) => by_height!(self.matrices::<STEPS>, t, 1 2 3 4),
                (true, Kind::StepsAndMins) => {
                    by_height!(self.matrices::<STEPS_AND_MINS>, t, 1 2 3 4)
                }
                (true, Kind::StepsOfHalves) => {
                    by_height!(self.matrices::<STEPS_OF_HALVES>, t, 1 2 3 4)
                }
                (false, Kind::Steps) => by_height!(self.dots::<STEPS>, t, 1 2 3 4),
                (false, Kind::StepsAndMins) => {
                    by_height!(self.dots::<STEPS_AND_MINS>, t, 1 2 3 4)
                }
                (false, Kind::StepsOfHalves) => {
                    by_height!(self.dots::<STEPS_OF_HALVES>, t, 1 2 3 4)
                }
                (_, Kind::StepsAndMinsOfHalves) => unreachable!("no format here has them"),
            }
        }
    }

    /// By dot products: lanes are rows of W.
    #[target_feature(enable = "neon")]
    unsafe fn dots<const KIND: u8, const N: usize>(&self) {
        for row in (0..self.y.width).step_by(ROWS) {
            let (x, y) = (self.x, Eight::new(self.y, row));
            // SAFETY: the caller's promise.
            unsafe {
                let mut sums: [[float32x4_t; 2]; N] = std::array::from_fn(|t| y.load(t));
                for b in 0..self.blocks {
                    let x = x.at_block(b);
                    for part in 0..parts(KIND) {
                        let mut acc = [[vdupq_n_s32(0); 2]; N];
                        for half in halves(KIND, part) {
                            add_dots(&mut acc, self.integers(b, row, half), x, half);
                        }
                        let steps = self.of_rows(self.steps, b * parts(KIND) + part, row);
                        for (t, (sums, acc)) in sums.iter_mut().zip(acc).enumerate() {
                            let x_step = *x.steps.add(t * x.stride);
                            for ((sum, acc), step) in sums.iter_mut().zip(acc).zip(steps) {
                                let step = vmulq_n_f32(step, x_step);
                                *sum = vfmaq_f32(*sum, vcvtq_f32_s32(acc), step);
                            }
                        }
                    }
                    if KIND == STEPS_AND_MINS {
                        let mins = self.of_rows(self.mins, b, row);
                        for (t, sums) in sums.iter_mut().enumerate() {
                            let x_sum = *x.sums.add(t * x.stride);
                            for (sum, min) in sums.iter_mut().zip(mins) {
                                *sum = vfmaq_n_f32(*sum, min, x_sum);
                            }
                        }
                    }
                }
                for (t, sums) in sums.into_iter().enumerate() {
                    y.store(t, sums);
                }
            }
        }
    }

    /// By products of matrices: lanes are two rows of X for one of W, then for the next.
    #[target_feature(enable = "neon")]
    unsafe fn matrices<const KIND: u8, const N: usize>(&self) {
        // Where there is no second row of X, the first one stands for it.
        let pairs = || (0..N.div_ceil(2)).map(|p| [2 * p, (2 * p + 1).min(N - 1)]);
        for row in (0..self.y.width).step_by(ROWS) {
            let (x, y) = (self.x, Eight::new(self.y, row));
            // SAFETY: the caller's promise.
            unsafe {
                let mut sums = [[vdupq_n_f32(0.0); 4]; BYTE_TILE_HEIGHT / 2];
                for (sums, [t, u]) in sums.iter_mut().zip(pairs()) {
                    let ([a, c], [b, d]) = (y.load(t), y.load(u));
                    *sums = [
                        vzip1q_f32(a, b),
                        vzip2q_f32(a, b),
                        vzip1q_f32(c, d),
                        vzip2q_f32(c, d),
                    ];
                }
                for b in 0..self.blocks {
                    let x = x.at_block(b);
                    let of_x = |from: *const f32, [t, u]: [usize; 2]| {
                        let first = vld1_dup_f32(from.add(t * x.stride));
                        let both = vld1_lane_f32::<1>(from.add(u * x.stride), first);
                        vcombine_f32(both, both)
                    };
                    for part in 0..parts(KIND) {
                        let mut acc = [[vdupq_n_s32(0); 4]; BYTE_TILE_HEIGHT / 2];
                        for half in halves(KIND, part) {
                            let w = self.integers(b, row, half);
                            add_matrices(acc.iter_mut().zip(pairs()), w, x, half);
                        }
                        let steps = twice(self.of_rows(self.steps, b * parts(KIND) + part, row));
                        for ((sums, acc), pair) in sums.iter_mut().zip(acc).zip(pairs()) {
                            let x_steps = of_x(x.steps, pair);
                            for ((sum, acc), step) in sums.iter_mut().zip(acc).zip(steps) {
                                let step = vmulq_f32(step, x_steps);
                                *sum = vfmaq_f32(*sum, vcvtq_f32_s32(acc), step);
                            }
                        }
                    }
                    if KIND == STEPS_AND_MINS {
                        let mins = twice(self.of_rows(self.mins, b, row));
                        for (sums, pair) in sums.iter_mut().zip(pairs()) {
                            let x_sums = of_x(x.sums, pair);
                            for (sum, min) in sums.iter_mut().zip(mins) {
                                *sum = vfmaq_f32(*sum, min, x_sums);
                            }
                        }
                    }
                }
                for ([a, b, c, d], [t, u]) in sums.into_iter().zip(pairs()) {
                    y.store(t, [vuzp1q_f32(a, b), vuzp1q_f32(c, d)]);
                    y.store(u, [vuzp2q_f32(a, b), vuzp2q_f32(c, d)]);
                }
            }
        }
    }

    /// Integers of half a block of [`ROWS`] rows.
    #[inline]
    fn integers(&self, block: usize, row: usize, half: usize) -> *const i8 {
        let word = (block * BYTE_WIDTH + row) * QUADS + half * HALF * ROWS;
        self.words.wrapping_add(word).cast()
    }

    /// Values of [`ROWS`] rows, of those that stand in lines of a panel.
    ///
    /// # Safety
    /// They must be there.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn of_rows(&self, from: *const f32, line: usize, row: usize) -> [float32x4_t; 2] {
        // SAFETY: the caller's promise.
        [0, 4].map(|i| unsafe { vld1q_f32(from.add(line * BYTE_WIDTH + row + i)) })
    }
}

/// Parts of a block that have their own steps.
const fn parts(kind: u8) -> usize {
    match kind {
        STEPS_OF_HALVES => 2,
        _ => 1,
    }
}

/// Halves of a block that belong to a part.
fn halves(kind: u8, part: usize) -> std::ops::Range<usize> {
    match parts(kind) {
        1 => 0..2,
        _ => part..part + 1,
    }
}

/// Each value twice.
#[inline]
#[target_feature(enable = "neon")]
fn twice([a, b]: [float32x4_t; 2]) -> [float32x4_t; 4] {
    [
        vzip1q_f32(a, a),
        vzip2q_f32(a, a),
        vzip1q_f32(b, b),
        vzip2q_f32(b, b),
    ]
}

/// Adds products of half a block.
///
/// # Safety
/// It must be there in `N` rows of X, and in those of W. The CPU must have the instructions.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_dots<const N: usize>(
    acc: &mut [[int32x4_t; 2]; N],
    w: *const i8,
    x: ByteRows,
    half: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let x: [_; N] = std::array::from_fn(|t| x.half(t, half));
        macro_rules! word {
            ($($word:literal)*) => {$(
                let word = [0, 16].map(|i| vld1q_s8(w.add(4 * ROWS * $word + i)));
                for (acc, x) in acc.iter_mut().zip(x) {
                    *acc = [0, 1].map(|i| sdot_word::<$word>(acc[i], word[i], x));
                }
            )*};
        }
        word!(0 1 2 3);
    }
}

/// The same for pairs of rows of X.
///
/// # Safety
/// As for [`add_dots`].
#[inline]
#[target_feature(enable = "neon")]
unsafe fn add_matrices<'a>(
    acc: impl Iterator<Item = (&'a mut [int32x4_t; 4], [usize; 2])>,
    w: *const i8,
    x: ByteRows,
    half: usize,
) {
    // SAFETY: the caller's promise.
    unsafe {
        let w: [[_; 4]; 2] =
            [0, 1].map(|c| std::array::from_fn(|i| vld1q_s8(w.add(8 * ROWS * c + 16 * i))));
        for (acc, [t, u]) in acc {
            let [a, b] = [t, u].map(|t| vreinterpretq_s64_s8(x.half(t, half)));
            let x = [vzip1q_s64(a, b), vzip2q_s64(a, b)].map(|x| vreinterpretq_s8_s64(x));
            for (w, x) in w.iter().zip(x) {
                *acc = std::array::from_fn(|i| smmla(acc[i], w[i], x));
            }
        }
    }
}

/// What is computed of rows of Y: up to [`ROWS`] elements, reached through a copy if there are fewer.
struct Eight(Output);

impl Eight {
    /// From element `at` on.
    fn new(y: Output, at: usize) -> Self {
        Self(Output {
            values: y.values.wrapping_add(at),
            width: (y.width - at).min(ROWS),
            ..y
        })
    }

    /// What sums begin with.
    ///
    /// # Safety
    /// Y must have row `t`.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn load(&self, t: usize) -> [float32x4_t; 2] {
        let y = self.0;
        let mut copy = [0.0f32; ROWS];
        let mut from = copy.as_ptr();
        // SAFETY: the caller's promise.
        unsafe {
            if y.accumulate {
                from = y.values.add(t * y.stride);
                if y.width < ROWS {
                    std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), y.width);
                    from = copy.as_ptr();
                }
            }
            [vld1q_f32(from), vld1q_f32(from.add(4))]
        }
    }

    /// Writes a row.
    ///
    /// # Safety
    /// Y must have row `t`.
    #[inline]
    #[target_feature(enable = "neon")]
    unsafe fn store(&self, t: usize, sums: [float32x4_t; 2]) {
        let y = self.0;
        let mut copy = [0.0f32; ROWS];
        // SAFETY: the caller's promise.
        unsafe {
            let row = y.values.add(t * y.stride);
            let to = if y.width < ROWS {
                copy.as_mut_ptr()
            } else {
                row
            };
            vst1q_f32(to, sums[0]);
            vst1q_f32(to.add(4), sums[1]);
            if y.width < ROWS {
                std::ptr::copy_nonoverlapping(to, row, y.width);
            }
        }
    }
}
