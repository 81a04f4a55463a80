//! Integers in blocks: what products with a frozen weight matrix are made of.
//!
//! Both operands are cut into blocks of 32 values along the reduction. A block of the matrix X that is multiplied is rounded to multiples
//! of a step of its own, at most ±8191 of them: 64 times finer than the 8 bits that ggml gives activations. A block of weights is
//! integers times a step plus a minimum, which is what most quantized types are, exactly; weights of other types are rounded as X is.
//! The products of a block are summed exactly in 32 bits (8191² · 32 < 2³¹), and the blocks in single precision, in order. So what
//! an element of the result is does not depend on how many rows there are, on the tiles it was computed in, or on who computed it.
//!
//! Many rows are multiplied in 16 bits with weights that were unpacked ([`Panel`]): `vpmaddwd` multiplies and adds twice as many pairs in an
//! instruction as a fused multiply-add of F32 does. A few are multiplied with weights as they lie in memory ([`Dots`]). Where 8 bits of X are enough,
//! both is done in bytes (and [`BytePanel`] is what weights are unpacked to), with dot products of bytes or without. AArch64 has the kernels in bytes only.

// What only kernels use: other CPUs than x86-64 lack some or all.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

use super::level::{CpuLevel, has, is_intel};
use super::mul_mat_back::round_to_bf16;
use super::{Line, prefetch};
use crate::file::types::GgmlType;
use std::ops::{Range, RangeInclusive};

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bytes;
#[cfg(test)]
mod naive;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(not(target_arch = "x86_64"))]
mod no_words;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod none;
#[cfg(target_arch = "x86_64")]
use avx2 as arch;
#[cfg(target_arch = "aarch64")]
use neon as arch;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
use none as arch;

pub(super) use bytes::{BYTE_WIDTH, BytePanel};

/// To how many bits rows of X are rounded: a block of 32 values to multiples of a step of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bits {
    /// As ggml does, but with no more than 32 values to a step: the fastest, where the CPU has the instructions ([`has_bytes`]).
    Eight,
    /// 64 times finer.
    Fourteen,
    /// To BF16, each value by itself, as ggml does for weights of BF16; for CPUs with an instruction for pairs of these ([`has_pairs`](super::floats::has_pairs)).
    Bf16,
    /// Not at all: floating-point numbers meet such weights, see [`floats`](super::floats).
    All,
}

/// Values that share a step.
pub(super) const BLOCK: usize = 32;
/// Words of two values in a block.
const WORDS: usize = BLOCK / 2;
/// Rows of a panel: two registers.
pub(super) const WIDTH: usize = 16;
/// Largest multiple of a step.
const MAX: f32 = 8191.0;
/// Blocks whose largest value is below this are zero: the reciprocal of their step would be infinite.
const TINY: f32 = 1e-30;

/// Whether this CPU has the instructions for [`Bits::Fourteen`].
pub(super) fn has_words() -> bool {
    has(CpuLevel::Avx2)
}

/// Whether this CPU has the instructions for [`Bits::Eight`].
pub(super) fn has_bytes() -> bool {
    arch::has_bytes()
}

/// Whether this CPU has the dot products of AVX-512: tiles of many rows are multiplied with them.
pub(super) fn has_avx512() -> bool {
    has(CpuLevel::Avx512Vnni)
}

/// Whether weights of type `ty` are integers in blocks: these can be multiplied as they lie in memory, see [`Dots`], and in bytes, see [`BytePanel`].
pub(super) fn has_format(ty: GgmlType) -> bool {
    arch::has_format(ty)
}

/// Rows of X that [`Dots`] take, if their kernels do not take more: with more it is faster to unpack the weights.
const MOST_DOTS: usize = 4;

/// Up to how many rows of X weights of type `ty` are multiplied as they lie in memory, if the type has a format: always where there are no tiles.
pub(super) fn most_dots(ty: GgmlType, bits: Bits) -> usize {
    match (arch::has_tiles(), ty) {
        (false, _) => usize::MAX,
        (true, ty) if bits == Bits::Eight && !has_avx512() => most_of_eight(ty),
        (true, ty) if bits == Bits::Eight && is_intel() => *turned(ty).end(),
        // Halves with steps and minimums: the sums of more rows do not fit registers.
        (true, GgmlType::Q2_K) => 2,
        (true, _) => MOST_DOTS,
    }
}

/// How many rows of X, on CPUs without dot products, are multiplied in bytes with weights of which eight rows are turned in registers. Panels take less time for
/// each row of X, but the more to be written the more bits there are to tell apart, or the less is left to do in 16 bits.
fn most_of_eight(ty: GgmlType) -> usize {
    match ty {
        GgmlType::Q6_K | GgmlType::Q8_0 => 16,
        _ => 8,
    }
}

/// How many rows of X, on Intel's CPUs with AVX-512, are multiplied in bytes with weights that are turned in registers; more are with a panel, fewer with rows of weights. The
/// CPUs shuffle on one port, and sums that are added across take shuffles for each row of X; but rows of whole bytes take as many to be turned, and those of
/// values in several places more. Where halves have sums, a block's integers fit registers beside those of few rows only.
fn turned(ty: GgmlType) -> RangeInclusive<usize> {
    match ty {
        GgmlType::Q8_0 => 3..=8,
        GgmlType::Q6_K => 2..=4,
        GgmlType::Q3_K => 1..=4,
        GgmlType::IQ4_XS => 1..=6,
        _ => 1..=8,
    }
}

/// Words that each of `t` packed rows of `k` values takes, `k` a multiple of 32 if they are rounded. With 14 bits they are, of all blocks, first their integers, then the steps,
/// the sums of the integers, the sums of the first halves; and if the rows are few, the integers in [`Bytes`].
pub(crate) fn packed_words(k: usize, t: usize, bits: Bits) -> usize {
    let block = match bits {
        Bits::Eight => bytes::PACKED,
        Bits::Fourteen if t <= MOST_DOTS => SCALED + WORDS,
        Bits::Fourteen => SCALED,
        Bits::Bf16 => return k.div_ceil(2),
        Bits::All => return k,
    };
    k / BLOCK * block
}

/// Words of a packed block without its bytes.
const SCALED: usize = WORDS + 3;

/// Integers of a block as 128 times a high byte and a low one, both of -64 to 64: the high ones first.
type Bytes = [f32; WORDS];

/// A rounded block, apart from its integers.
struct Rounded {
    step: f32,
    /// Of the integers: small enough to be exact.
    sum: f32,
    half_sum: f32,
}

/// Rounds one of `t` rows to [`packed_words`] words. A block with a value that is infinite or not a number gets a step that is not a number.
///
/// # Panics
/// If there are no kernels for so many bits, or the sizes do not fit.
pub(crate) fn pack_row(x: &[f32], t: usize, bits: Bits, to: &mut [f32]) {
    match bits {
        Bits::Eight | Bits::Fourteen => {}
        Bits::Bf16 => return round_to_bf16(x, to),
        Bits::All => return to.copy_from_slice(x),
    }
    let (blocks, rest) = x.as_chunks::<BLOCK>();
    assert!(rest.is_empty() && to.len() == packed_words(x.len(), t, bits));
    if bits == Bits::Eight {
        assert!(has_bytes());
        return bytes::pack_row(blocks, to);
    }
    assert!(has_words());
    let n = blocks.len();
    let (words, scales) = to.split_at_mut(n * WORDS);
    let (scales, bytes) = scales.split_at_mut(n * (SCALED - WORDS));
    let words = words.as_chunks_mut::<WORDS>().0;
    let mut bytes = bytes.as_chunks_mut::<WORDS>().0.iter_mut();
    for (b, (x, words)) in blocks.iter().zip(words).enumerate() {
        // SAFETY: the CPU has the instructions (asserted above).
        let rounded = unsafe { arch::round_row(x, words, bytes.next()) };
        scales[b] = rounded.step;
        scales[n + b] = rounded.sum;
        scales[2 * n + b] = rounded.half_sum;
    }
}

/// Some blocks of packed rows.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    /// As [`pack_row`] gives them.
    pub(super) words: *const f32,
    /// Rows.
    pub(super) t: usize,
    /// Values of a row.
    pub(super) k: usize,
    /// The first block that is wanted.
    pub(super) first: usize,
    /// From one row to the next.
    pub(super) stride: usize,
}

impl Rows {
    /// All blocks of `t` rows that were rounded to 8 bits.
    fn of_bytes(words: *const f32, t: usize, k: usize) -> Self {
        Self {
            words,
            t,
            k,
            first: 0,
            stride: packed_words(k, t, Bits::Eight),
        }
    }
}

/// Some rows of weights in memory, to be multiplied with all of a few rows of X.
pub(super) struct Dots {
    /// The first row, `row_bytes` from the next.
    pub(super) first: *const u8,
    pub(super) row_bytes: usize,
    /// At least one.
    pub(super) rows: usize,
    /// As [`pack_row`] gives them for so many bits.
    pub(super) x: *const f32,
    pub(super) bits: Bits,
    /// Rows of X: 1 to [`most_dots`].
    pub(super) t: usize,
    /// Values of a row.
    pub(super) k: usize,
    /// Element `i` of row `t` goes to `y[t * y_stride + i]`.
    pub(super) y: *mut f32,
    pub(super) y_stride: usize,
}

/// Where a product goes: element `i` of row `t` at `values[t * stride + i]`.
#[derive(Clone, Copy)]
pub(super) struct Output {
    pub(super) values: *mut f32,
    pub(super) stride: usize,
    /// Elements of a row, at most as many as the panel has rows.
    pub(super) width: usize,
    /// Adds to what is there.
    pub(super) accumulate: bool,
}

impl Output {
    /// Without the rows before `t`.
    fn at_row(self, t: usize) -> Self {
        Self {
            values: self.values.wrapping_add(t * self.stride),
            ..self
        }
    }
}

/// [`WIDTH`] rows of weights in words of two values that stand next to each other along the reduction: pair `p` of row `r` at
/// `words[p].0[r]`, and the step and minimum of block `b` of row `r` at `steps[b].0[r]` and `mins[b].0[r]`, or minimums of its halves at `mins[2 * b].0[r]` and
/// behind it.
pub(super) struct Panel {
    words: Vec<Line<f32>>,
    steps: Vec<Line<f32>>,
    mins: Vec<Line<f32>>,
    kind: Mins,
}

/// Minimums of a panel's blocks. Those that are zero are not written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mins {
    None,
    OfBlocks,
    OfHalves,
}

// For tiles, which are compiled for each.
#[cfg(target_arch = "x86_64")]
const NO_MINS: u8 = Mins::None as u8;
#[cfg(target_arch = "x86_64")]
const OF_BLOCKS: u8 = Mins::OfBlocks as u8;
#[cfg(target_arch = "x86_64")]
const OF_HALVES: u8 = Mins::OfHalves as u8;

impl Panel {
    pub(super) const fn new() -> Self {
        Self {
            words: Vec::new(),
            steps: Vec::new(),
            mins: Vec::new(),
            kind: Mins::None,
        }
    }

    /// Has room for so many blocks of each row.
    pub(super) fn resize(&mut self, blocks: usize) {
        self.words.resize(blocks * WORDS, Line([0.0; WIDTH]));
        self.steps.resize(blocks, Line([0.0; WIDTH]));
        self.mins.resize(2 * blocks, Line([0.0; WIDTH]));
    }

    /// Fills blocks `blocks` with those of `rows` rows of weights; rows that are missing stay as they were. False if nothing is done, because
    /// there is no way but through F32.
    ///
    /// # Safety
    /// From `first` on there must be `rows` rows of so many blocks of 32 values, and whole ones of the type, `row_bytes` apart; the CPU must have the instructions ([`has_words`]).
    pub(super) unsafe fn unpack(
        &mut self,
        ty: GgmlType,
        (first, row_bytes): (*const u8, usize),
        rows: usize,
        blocks: Range<usize>,
    ) -> bool {
        let unpacked = Blocks {
            first,
            row_bytes,
            rows,
            words: &mut self.words[blocks.start * WORDS..blocks.end * WORDS],
            steps: &mut self.steps[blocks.clone()],
            mins: &mut self.mins[2 * blocks.start..2 * blocks.end],
        };
        // SAFETY: the caller's promise.
        match unsafe { unpacked.unpack(ty) } {
            Some(kind) => {
                self.kind = kind;
                true
            }
            None => false,
        }
    }

    /// Multiplies the first `blocks` blocks with as many of X.
    ///
    /// # Safety
    /// The rows must have the blocks, the output room; the CPU must have the instructions ([`has_words`]).
    ///
    /// # Panics
    /// If the panel has fewer blocks.
    pub(super) unsafe fn multiply(&self, blocks: usize, x: Rows, y: Output) {
        // SAFETY: the caller's promise; the tiles are of this CPU.
        unsafe { self.multiply_by(&arch::fastest_tiles(), blocks, x, y) };
    }

    /// As [`Panel::multiply`], with register tiles of this kind.
    ///
    /// # Safety
    /// As for [`Panel::multiply`]; the CPU must have the instructions.
    unsafe fn multiply_by(&self, kind: &Tiles, blocks: usize, x: Rows, y: Output) {
        assert!(blocks <= self.steps.len() && y.width <= WIDTH);
        let (row_blocks, stride) = (x.k / BLOCK, x.stride);
        for tile in tiles(x.t, kind.height) {
            // SAFETY: these rows of X and Y.
            unsafe {
                let row = x.words.add(tile.start * stride);
                let rows = Tile {
                    blocks,
                    words: self.words.as_ptr().cast(),
                    steps: self.steps.as_ptr().cast(),
                    kind: self.kind,
                    mins: self.mins.as_ptr().cast(),
                    x: row.add(x.first * WORDS),
                    x_steps: row.add(row_blocks * WORDS + x.first),
                    x_sums: row.add(row_blocks * (WORDS + 1) + x.first),
                    x_firsts: row.add(row_blocks * (WORDS + 2) + x.first),
                    x_stride: stride,
                    y: y.at_row(tile.start),
                };
                (kind.rows)(&rows, tile.len());
            }
        }
    }
}

/// Blocks of [`WIDTH`] rows of weights, or fewer, that become part of a panel.
struct Blocks<'a> {
    /// The first row's first block.
    first: *const u8,
    row_bytes: usize,
    rows: usize,
    words: &'a mut [Line<f32>],
    steps: &'a mut [Line<f32>],
    mins: &'a mut [Line<f32>],
}

/// A panel times a few rows of X.
struct Tile {
    /// Blocks along the reduction.
    blocks: usize,
    /// The panel.
    words: *const f32,
    steps: *const f32,
    kind: Mins,
    mins: *const f32,
    /// X: words, steps, sums, those of first halves, and from one row to the next.
    x: *const f32,
    x_steps: *const f32,
    x_sums: *const f32,
    x_firsts: *const f32,
    x_stride: usize,
    y: Output,
}

/// A kind of register tile.
struct Tiles {
    /// Rows of X in one.
    height: usize,
    /// Computes one with so many rows, 1 to `height`. All its pointers must be valid for that, and the CPU have the instructions.
    rows: unsafe fn(&Tile, usize),
}

/// `t` rows of X as tiles of at most `height`, almost equal: a small last one would leave the multipliers waiting for its few chains.
fn tiles(t: usize, height: usize) -> impl Iterator<Item = Range<usize>> {
    let n = t.div_ceil(height);
    (0..n).map(move |i| i * t / n..(i + 1) * t / n)
}

/// A tile of `$t` rows of X by method `$fixed`, which is compiled for each kind and number of them.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! by_height {
    ($tile:ident.$fixed:ident::<$kind:tt>, $t:expr, $($n:literal)*) => {
        match $t {
            $($n => $tile.$fixed::<$kind, $n>(),)*
            t => unreachable!("a tile of {t} rows"),
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use by_height;

/// Repeats a statement for each block of a unit of a format: `$i` is the constant, which shifts depend on.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! for_each_block {
    ($format:ident, $i:ident, $do:expr) => {
        for_each_block!($format, $i, $do, 0 1 2 3 4 5 6 7)
    };
    ($format:ident, $i:ident, $do:expr, $($n:literal)*) => {$(
        if $n < $format::BLOCKS {
            const $i: usize = $n;
            $do
        }
    )*};
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use for_each_block;

#[cfg(all(test, target_arch = "x86_64"))]
mod tests;
