//! Products with weights that are floating-point numbers: nothing is rounded but sums, which are F32.
//!
//! The reduction is cut into runs of [`DEPTH`] values. A run has [`LANES`] sums: value `i` goes to sum `i % LANES`, in order, by fused multiply-adds. At the end of a
//! run sums are added as a tree (`i` and `i + 8`, then `i` and `i + 4`, and so on), and runs one after the other. So what an element of the result is depends neither
//! on how many rows there are, nor on the tiles it was computed in, nor on the instructions.
//!
//! Lanes along the reduction need no order of weights but the file's: weights are converted in registers as they are read from memory. A few rows of X meet one row
//! of W after the other, in the order in which memory is fastest, more rows meet [`TILE_ROWS`] rows at a time.
//!
//! X may be rounded to BF16 for weights of BF16, as ggml rounds it, where the CPU has an instruction for pairs of these: then a pair is what is called a value above.

// What only kernels use: there is none for other CPUs.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

use super::level::{self, CpuLevel, has};
#[cfg(target_arch = "x86_64")]
use super::{Line, prefetch};
use crate::file::types::GgmlType;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

/// Words of a row that are summed by themselves.
const DEPTH: usize = 512;
/// Sums of a run.
const LANES: usize = 16;
/// Values of F32 weights whose sums begin anew, and are added to those before: nothing but sums is rounded there, so chains are kept short.
const CHAIN: usize = 8 * LANES;
/// Rows of W that meet a run of X at a time, at least: they stay in the second-level cache.
pub(super) const ROWS: usize = 64;
/// Rows of W in a tile.
const TILE_ROWS: usize = 4;
/// Bytes of X that fit a first-level cache beside what is read of W.
const FEW: usize = 32 << 10;
/// How far ahead W is fetched from memory where it is read from the first byte to the last.
const AHEAD: usize = 8 << 10;

/// Whether weights of type `ty` are such, and this CPU has the instructions, which everything else here needs.
pub(super) fn reads(ty: GgmlType) -> bool {
    has(CpuLevel::Avx2) && matches!(ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16)
}

/// Whether this CPU multiplies pairs of BF16 with BF16, [`Weights::Bf16Pairs`], faster than F32.
pub(super) fn has_pairs() -> bool {
    has(CpuLevel::Avx512Bf16) && !level::is_intel()
}

/// What stands in a word of W, and of X.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Weights {
    F32,
    F16,
    Bf16,
    /// Two values in a word, in X as well.
    Bf16Pairs,
}

impl Weights {
    /// Bytes that a word of X meets.
    fn bytes(self) -> usize {
        match self {
            Self::F32 | Self::Bf16Pairs => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }
}

/// Some rows of W times all rows of X.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub(super) weights: Weights,
    /// The first row, `row_bytes` from the next.
    pub(super) first: *const u8,
    pub(super) row_bytes: usize,
    /// Rows, at least one.
    pub(super) rows: usize,
    /// Words of a row of X.
    pub(super) k: usize,
    /// The first row, `x_stride` words from the next.
    pub(super) x: *const f32,
    pub(super) x_stride: usize,
    /// Rows of X.
    pub(super) t: usize,
    /// Element `i` of row `t` goes to `y[t * y_stride + i]`.
    pub(super) y: *mut f32,
    pub(super) y_stride: usize,
}

/// Part of a product, and what is fetched from memory while it is computed.
#[derive(Clone, Copy)]
struct Part {
    of: Product,
    /// Adds to what is there.
    accumulate: bool,
    /// Where what is fetched begins.
    next: *const u8,
    /// How many rows of as many bytes as are read of each, for tiles of several rows.
    fetched: usize,
}

/// A kind of register tile.
#[derive(Clone, Copy)]
struct Tiles {
    /// Rows of X at most.
    height: usize,
    /// Multiplies rows of W one after the other with at most `height` of X, run by run, and fetches as many bytes of each as it reads. All pointers must be valid for
    /// that, and the CPU have the instructions.
    one_by_one: unsafe fn(&Part),
    /// Multiplies a run of at most [`TILE_ROWS`] rows of W with at most `height` of X. Otherwise the same.
    rows: unsafe fn(&Part),
}

impl Tiles {
    /// The fastest ones of this CPU.
    fn fastest(weights: Weights) -> Self {
        #[cfg(target_arch = "x86_64")]
        if weights == Weights::Bf16Pairs {
            return avx512::PAIRS;
        } else if has(CpuLevel::Avx512) {
            return avx512::TILES;
        } else if has(CpuLevel::Avx2) {
            return avx2::TILES;
        }
        unreachable!("{weights:?} is not available")
    }
}

impl Product {
    /// Multiplies.
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have [`CpuLevel::Avx2`], for pairs [`CpuLevel::Avx512Bf16`].
    pub(super) unsafe fn compute(&self) {
        // SAFETY: the caller's promise.
        unsafe { self.compute_by(&Tiles::fastest(self.weights)) };
    }

    /// With tiles of a kind.
    ///
    /// # Safety
    /// As for [`Product::compute`]; the CPU must have the instructions.
    unsafe fn compute_by(&self, kind: &Tiles) {
        let few = self.t <= kind.height;
        if few && self.t * self.k * size_of::<f32>() <= FEW {
            let all = Part {
                of: *self,
                accumulate: false,
                next: self.first.wrapping_add(AHEAD),
                fetched: 0,
            };
            // SAFETY: the caller's promise.
            return unsafe { (kind.one_by_one)(&all) };
        }
        // Many rows of X do not stay there, and should be read less often.
        let n = self.t.clamp(ROWS, 4 * ROWS);
        for first in (0..self.rows).step_by(n) {
            for k in (0..self.k).step_by(DEPTH) {
                let rows = first..self.rows.min(first + n);
                let next = match k + DEPTH < self.k {
                    true => first * self.row_bytes + (k + DEPTH) * self.weights.bytes(),
                    false => rows.end * self.row_bytes,
                };
                // SAFETY: some rows and a run of them.
                unsafe {
                    let part = Part {
                        of: self.rows(rows).run(k),
                        accumulate: k > 0,
                        next: self.first.wrapping_add(next),
                        fetched: 0,
                    };
                    match few {
                        true => (kind.one_by_one)(&part),
                        false => part.in_tiles(kind),
                    }
                }
            }
        }
    }

    /// Some rows of W.
    ///
    /// # Safety
    /// They must be there.
    unsafe fn rows(&self, rows: Range<usize>) -> Self {
        Self {
            // SAFETY: the caller's promise.
            first: unsafe { self.first.add(rows.start * self.row_bytes) },
            rows: rows.len(),
            y: self.y.wrapping_add(rows.start),
            ..*self
        }
    }

    /// Some rows of X.
    ///
    /// # Safety
    /// They must be there.
    unsafe fn rows_of_x(&self, rows: Range<usize>) -> Self {
        Self {
            // SAFETY: the caller's promise.
            x: unsafe { self.x.add(rows.start * self.x_stride) },
            t: rows.len(),
            y: self.y.wrapping_add(rows.start * self.y_stride),
            ..*self
        }
    }

    /// The run from word `k` on.
    ///
    /// # Safety
    /// The word must be there.
    unsafe fn run(&self, k: usize) -> Self {
        Self {
            // SAFETY: the caller's promise.
            first: unsafe { self.first.add(k * self.weights.bytes()) },
            k: DEPTH.min(self.k - k),
            // SAFETY: the caller's promise.
            x: unsafe { self.x.add(k) },
            ..*self
        }
    }
}

impl Part {
    /// Multiplies a run of some rows tile by tile, and fetches as many rows from memory, some with each tile.
    ///
    /// # Safety
    /// As for [`Product::compute`]; the CPU must have the tiles.
    unsafe fn in_tiles(&self, kind: &Tiles) {
        let rows = self.of.rows;
        let steps = self.of.t.div_ceil(kind.height) * rows.div_ceil(TILE_ROWS);
        let mut step = 0;
        for tile in tiles(self.of.t, kind.height) {
            for row in (0..rows).step_by(TILE_ROWS) {
                let fetched = rows * step / steps..rows * (step + 1) / steps;
                step += 1;
                let next = fetched.start * self.of.row_bytes;
                // SAFETY: some of the rows.
                unsafe {
                    (kind.rows)(&Self {
                        of: self
                            .of
                            .rows(row..rows.min(row + TILE_ROWS))
                            .rows_of_x(tile.clone()),
                        next: self.next.wrapping_add(next),
                        fetched: fetched.len(),
                        ..*self
                    });
                }
            }
        }
    }
}

/// `t` rows as tiles of at most `height`, almost equal: a small last one would leave the multipliers waiting for its few chains.
fn tiles(t: usize, height: usize) -> impl Iterator<Item = Range<usize>> {
    let n = t.div_ceil(height);
    (0..n).map(move |i| i * t / n..(i + 1) * t / n)
}

/// A part of so many rows of X by function `$f`, which is compiled for each number and for the weights listed.
#[cfg(target_arch = "x86_64")]
macro_rules! by_height {
    ($part:expr, $f:ident, $weights:tt, $($n:literal)*) => {
        match $part.of.t {
            $($n => by_height!(@ $part, $f, $weights, $n),)*
            t => unreachable!("a tile of {t} rows"),
        }
    };
    (@ $part:expr, $f:ident, [$($weights:ident)*], $n:literal) => {
        match $part.of.weights {
            $(Weights::$weights => $f::<$weights, $n>($part),)*
            #[allow(unreachable_patterns)]
            weights => unreachable!("{weights:?} in other tiles"),
        }
    };
}
#[cfg(target_arch = "x86_64")]
use by_height;

/// The values from `from` to the end of a run, fewer than [`LANES`], and zeros.
#[cfg(target_arch = "x86_64")]
fn tail(from: usize, k: usize, value: impl Fn(usize) -> f32) -> [f32; LANES] {
    let mut tail = [0.0; LANES];
    for (to, i) in tail.iter_mut().zip(from..k) {
        *to = value(i);
    }
    tail
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
