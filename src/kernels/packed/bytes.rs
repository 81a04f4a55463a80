//! Products in bytes: twice as many multiplications to an instruction as in words of 16 bits. CPUs have dot products of bytes (AVX-512 VNNI, Armv8.4), or make do
//! with products of pairs (AVX2, NEON).
//!
//! X is rounded to multiples of 1/127 of a block's largest value. ggml does the same for most types; for K-quants it has one step for
//! 256 values. With AVX-512 VNNI the integers of X get 128 added, because the instruction wants one operand without a sign; what that adds to a sum depends on
//! the weights only, and is what sums begin with. Results are the same on all CPUs, to the last bit: those of plain code (`naive.rs`).

use super::{BLOCK, Line, Output, Rounded, Rows, arch, tiles};
use crate::file::types::GgmlType;
use std::ops::Range;

/// Words of four values in a block.
pub(super) const QUADS: usize = BLOCK / 4;
/// Words of a packed block: integers, its step, and the sums of its halves, the first one's and both's, times the step where nobody wants them as they are.
pub(super) const PACKED: usize = QUADS + 3;

/// Rows of a panel: two lines.
pub(in super::super) const BYTE_WIDTH: usize = 2 * LANES;
/// Rows in a line.
pub(super) const LANES: usize = 16;

/// Rounds a row of blocks: of all first the integers, then the steps, then the sums, then those of first halves.
pub(super) fn pack_row(blocks: &[[f32; BLOCK]], to: &mut [f32]) {
    let n = blocks.len();
    let (quads, scales) = to.split_at_mut(n * QUADS);
    let quads = quads.as_chunks_mut::<QUADS>().0;
    for (b, (x, quads)) in blocks.iter().zip(quads).enumerate() {
        // SAFETY: the CPU has the instructions (the caller asserts it).
        let rounded = unsafe { arch::round_to_bytes(x, quads) };
        let Rounded {
            step,
            sum,
            half_sum,
        } = rounded;
        let times = if arch::has_plain_sums() { 1.0 } else { step };
        scales[b] = step;
        scales[n + b] = sum * times;
        scales[2 * n + b] = half_sum * times;
    }
}

/// Where the parts of packed rows of X are, as [`pack_row`] writes them.
#[derive(Clone, Copy)]
pub(super) struct ByteRows {
    pub(super) quads: *const f32,
    pub(super) steps: *const f32,
    /// Times steps, unless the CPU has them plain.
    pub(super) sums: *const f32,
    /// The same of first halves.
    pub(super) firsts: *const f32,
    /// From one row to the next.
    pub(super) stride: usize,
}

impl ByteRows {
    pub(super) fn new(x: Rows) -> Self {
        let blocks = x.k / BLOCK;
        Self {
            quads: x.words.wrapping_add(x.first * QUADS),
            steps: x.words.wrapping_add(blocks * QUADS + x.first),
            sums: x.words.wrapping_add(blocks * (QUADS + 1) + x.first),
            firsts: x.words.wrapping_add(blocks * (QUADS + 2) + x.first),
            stride: x.stride,
        }
    }

    /// Without the blocks before `block`.
    #[inline]
    pub(super) fn at_block(self, block: usize) -> Self {
        Self {
            quads: self.quads.wrapping_add(block * QUADS),
            steps: self.steps.wrapping_add(block),
            sums: self.sums.wrapping_add(block),
            firsts: self.firsts.wrapping_add(block),
            ..self
        }
    }

    /// Without the rows before `t`.
    fn at_row(self, t: usize) -> Self {
        let words = t * self.stride;
        Self {
            quads: self.quads.wrapping_add(words),
            steps: self.steps.wrapping_add(words),
            sums: self.sums.wrapping_add(words),
            firsts: self.firsts.wrapping_add(words),
            ..self
        }
    }
}

/// [`BYTE_WIDTH`] rows of weights in words of four values that stand next to each other along the reduction. A block, or each half of one where
/// halves have factors, has a step, and what its sum begins with. In which order words of a block stand is the CPU's affair.
pub(in super::super) struct BytePanel {
    words: Vec<Both<f32>>,
    steps: Vec<Both<f32>>,
    /// None where sums begin with zero.
    starts: Vec<Both<i32>>,
    /// Of whole blocks, or of their halves.
    mins: Vec<Both<f32>>,
    ty: GgmlType,
    kind: Kind,
}

/// A value of each row of a panel.
pub(super) type Both<T> = [Line<T>; 2];

/// What stands beside the integers of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A step.
    Steps,
    /// A step and a minimum.
    StepsAndMins,
    /// A step for each half.
    StepsOfHalves,
    /// A step and a minimum for each half.
    StepsAndMinsOfHalves,
}

impl BytePanel {
    pub(in super::super) const fn new() -> Self {
        Self {
            words: Vec::new(),
            steps: Vec::new(),
            starts: Vec::new(),
            mins: Vec::new(),
            ty: GgmlType::Q8_0,
            kind: Kind::Steps,
        }
    }

    /// Has room for so many blocks of each row.
    pub(in super::super) fn resize(&mut self, blocks: usize) {
        let zeros = [Line([0.0; LANES]); 2];
        self.words.resize(blocks * QUADS, zeros);
        self.steps.resize(2 * blocks, zeros);
        if arch::has_starts() {
            self.starts.resize(2 * blocks, [Line([0; LANES]); 2]);
        }
        self.mins.resize(2 * blocks, zeros);
    }

    /// Fills blocks `blocks` with those of `rows` rows of weights. In the place of rows that are missing is what nobody reads.
    ///
    /// # Safety
    /// From `first` on there must be `rows` rows of so many blocks of 32 values, and whole ones of the type, `row_bytes` apart; the CPU must have
    /// the instructions ([`has_bytes`](super::has_bytes)).
    ///
    /// # Panics
    /// If the type has no format.
    pub(in super::super) unsafe fn unpack(
        &mut self,
        ty: GgmlType,
        (first, row_bytes): (*const u8, usize),
        rows: usize,
        blocks: Range<usize>,
    ) {
        let unpacked = ByteBlocks {
            first,
            row_bytes,
            rows,
            blocks: blocks.len(),
            words: &mut self.words[blocks.start * QUADS..blocks.end * QUADS],
            steps: &mut self.steps[2 * blocks.start..2 * blocks.end],
            starts: match arch::has_starts() {
                true => &mut self.starts[2 * blocks.start..2 * blocks.end],
                false => &mut [],
            },
            mins: &mut self.mins[2 * blocks.start..2 * blocks.end],
        };
        // SAFETY: the caller's promise.
        let kind = unsafe { unpacked.unpack(ty) };
        self.ty = ty;
        self.kind = kind.unwrap_or_else(|| panic!("{ty:?} has a format"));
    }

    /// Multiplies the first `blocks` blocks with as many of X.
    ///
    /// # Safety
    /// The rows must have the blocks, the output room; the CPU must have the instructions ([`has_bytes`](super::has_bytes)).
    ///
    /// # Panics
    /// If the panel has fewer blocks.
    pub(in super::super) unsafe fn multiply(&self, blocks: usize, x: Rows, y: Output) {
        assert!(2 * blocks <= self.mins.len() && y.width <= BYTE_WIDTH);
        let rows = ByteRows::new(x);
        for tile in tiles(x.t, arch::byte_tile_height()) {
            // SAFETY: these rows of X and Y.
            unsafe {
                let rows = ByteTile {
                    ty: self.ty,
                    kind: self.kind,
                    blocks,
                    words: self.words.as_ptr().cast(),
                    steps: self.steps.as_ptr().cast(),
                    starts: self.starts.as_ptr().cast(),
                    mins: self.mins.as_ptr().cast(),
                    x: rows.at_row(tile.start),
                    y: y.at_row(tile.start),
                };
                rows.compute(tile.len());
            }
        }
    }
}

/// Blocks of [`BYTE_WIDTH`] rows of weights, or fewer, that become part of a panel.
pub(super) struct ByteBlocks<'a> {
    /// The first row's first block.
    pub(super) first: *const u8,
    pub(super) row_bytes: usize,
    pub(super) rows: usize,
    /// Of each row.
    pub(super) blocks: usize,
    pub(super) words: &'a mut [Both<f32>],
    pub(super) steps: &'a mut [Both<f32>],
    pub(super) starts: &'a mut [Both<i32>],
    pub(super) mins: &'a mut [Both<f32>],
}

/// A panel times a few rows of X.
pub(super) struct ByteTile {
    /// Of the weights before they were unpacked.
    pub(super) ty: GgmlType,
    pub(super) kind: Kind,
    /// Blocks along the reduction.
    pub(super) blocks: usize,
    /// The panel.
    pub(super) words: *const f32,
    pub(super) steps: *const f32,
    pub(super) starts: *const i32,
    pub(super) mins: *const f32,
    pub(super) x: ByteRows,
    pub(super) y: Output,
}

#[cfg(test)]
mod tests;
