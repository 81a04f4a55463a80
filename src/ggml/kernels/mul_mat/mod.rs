//! The product with a frozen weight matrix forward, in 16-bit integers.
//!
//! Both operands are rounded in blocks of 32 values along K to multiples of a step of their own, at most ±8191 of them: 64 times
//! finer than the 8 bits that ggml gives activations. The products of a block are summed exactly in 32 bits (8191² · 32 < 2³¹), and
//! the blocks in single precision, in order. So what an element of the result is does not depend on how many rows there are, on
//! the tiles it was computed in, or on who computed it.
//!
//! `vpmaddwd` multiplies and adds twice as many pairs in an instruction as a fused multiply-add of F32 does, and unpacking a tile of weights
//! once for all rows makes the type of the weights almost irrelevant.

// What only kernels use: there is none for other CPUs.
#![cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]

use super::Line;
use super::dequant::row_to_f32;
use crate::file::types::GgmlType;
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
use avx2 as arch;

/// Values that share a step.
const BLOCK: usize = 32;
/// Largest multiple of a step.
const MAX: f32 = 8191.0;
/// Blocks whose largest value is below this are zero: the reciprocal of their step would be infinite.
const TINY: f32 = 1e-30;
/// Rows of W in a panel: two registers.
const ROWS: usize = 16;
/// Values of a row of W that are unpacked at a time; a panel of them takes 64 KB.
const DEPTH: usize = 2048;
/// Values of a row of W that ggml unpacks at a time: the largest block of any type.
const CHUNK: usize = 256;

/// Whether this CPU has the kernel, for rows of `k` values of type `ty`.
pub(crate) fn has_mul_mat(ty: GgmlType, k: usize) -> bool {
    arch::available()
        && k.is_multiple_of(BLOCK)
        && (ty.is_quantized() || matches!(ty, GgmlType::F16 | GgmlType::BF16))
}

/// Rows of X from which on it may be worth while to unpack W: with fewer that is most of the work.
pub(crate) const FEWEST_ROWS: usize = 32;

/// Whether the kernel is faster than ggml's for weights of type `ty` and [`FEWEST_ROWS`] or more. Measured on Zen 3: ggml has dot products only
/// for these types, and tiles for the others.
pub(crate) fn packs_faster(ty: GgmlType) -> bool {
    use GgmlType::*;
    // SAFETY: a pure query of how ggml was compiled.
    let wider = unsafe { ggml_sys::ggml_cpu_has_avx512() } != 0;
    !wider && matches!(ty, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | BF16)
}

/// Words that a packed row of `k` values takes: two values each, then the steps.
pub(crate) fn packed_words(k: usize) -> usize {
    k / 2 + k / BLOCK
}

/// Rounds a row of `x.len()` values, a multiple of 32, to [`packed_words`] words. A block with a value that is infinite or not a number gets a step that is
/// not a number.
///
/// # Panics
/// If there is no [`has_mul_mat`] for such rows, or `to` is of another size.
pub(crate) fn pack_row(x: &[f32], to: &mut [f32]) {
    assert!(
        arch::available() && x.len().is_multiple_of(BLOCK) && to.len() == packed_words(x.len())
    );
    let (words, steps) = to.split_at_mut(x.len() / 2);
    let blocks = x.as_chunks::<BLOCK>().0.iter();
    for ((x, words), step) in blocks
        .zip(words.as_chunks_mut::<{ BLOCK / 2 }>().0)
        .zip(steps)
    {
        // SAFETY: the CPU has the instructions (asserted above).
        *step = unsafe { arch::round(x, words) };
    }
}

/// `Y = W X`.
pub(crate) struct MulMat {
    /// The type of W, for which there is [`has_mul_mat`].
    pub(crate) ty: GgmlType,
    /// W, `ne = [k, n]`.
    pub(crate) w: *const u8,
    /// From one row of W to the next.
    pub(crate) row_bytes: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    /// X, `ne = [k, t]`, as rows of [`packed_words`] words.
    pub(crate) x: *const f32,
    pub(crate) t: usize,
    /// `W X`, `ne = [n, t]`.
    pub(crate) y: *mut f32,
}

/// Rows of W in words of two values that stand next to each other: pair `p` of row `r` at `words[p * ROWS + r]`, and the step of
/// block `b` of row `r` at `steps[b * ROWS + r]`.
struct Panel {
    words: Vec<Line<f32>>,
    steps: Vec<Line<f32>>,
}

thread_local! {
    static PANEL: std::cell::RefCell<Panel> = const { std::cell::RefCell::new(Panel { words: Vec::new(), steps: Vec::new() }) };
}

impl MulMat {
    /// Computes part `ith` of `nth`: some of W's rows, whole panels of them. Values do not depend on `nth`, nor those of a row on `t`.
    ///
    /// # Safety
    /// The matrices must be valid; all parts together write all of Y, each its own.
    pub(crate) unsafe fn part(&self, ith: usize, nth: usize) {
        let panels = self.n.div_ceil(ROWS);
        PANEL.with_borrow_mut(|panel| {
            panel.words.resize(DEPTH / 2 * ROWS / 16, Line([0.0; 16]));
            panel
                .steps
                .resize(DEPTH / BLOCK * ROWS / 16, Line([0.0; 16]));
            for i in panels * ith / nth..panels * (ith + 1) / nth {
                let rows = i * ROWS..self.n.min((i + 1) * ROWS);
                for k0 in (0..self.k).step_by(DEPTH) {
                    let depth = k0..self.k.min(k0 + DEPTH);
                    // SAFETY: rows and columns of W, all rows of X and ours of Y.
                    unsafe {
                        panel.unpack(self, &rows, &depth);
                        panel.multiply(self, &rows, &depth);
                    }
                }
            }
        });
    }
}

impl Panel {
    /// Fills the panel with columns `depth` of W's rows `rows`; rows that are missing stay as they were.
    ///
    /// # Safety
    /// They must lie in W.
    unsafe fn unpack(&mut self, product: &MulMat, rows: &Range<usize>, depth: &Range<usize>) {
        let ty = product.ty;
        // SAFETY: row and column of W.
        let at = |r: usize, k: usize| unsafe {
            let bytes = k / ty.block_size() as usize * ty.type_size() as usize;
            product.w.add(r * product.row_bytes + bytes)
        };
        let mut blocks = Blocks {
            first: at(rows.start, depth.start),
            row_bytes: product.row_bytes,
            rows: rows.len(),
            words: &mut self.words[..depth.len() / 2],
            steps: &mut self.steps[..depth.len() / BLOCK],
        };
        // SAFETY: whole blocks of these rows, on a CPU that has the instructions (`has_mul_mat`).
        if unsafe { blocks.unpack(ty) } {
            return;
        }
        let mut values = [[0.0f32; CHUNK]; ROWS];
        for k0 in depth.clone().step_by(CHUNK) {
            let k = CHUNK.min(depth.end - k0);
            for (r, values) in rows.clone().zip(&mut values) {
                // SAFETY: whole blocks of row r.
                unsafe { row_to_f32(ty, at(r, k0), values.as_mut_ptr(), k) };
            }
            let from = k0 - depth.start;
            let mut blocks = Blocks {
                first: values.as_ptr().cast(),
                row_bytes: size_of_val(&values[0]),
                rows: rows.len(),
                words: &mut self.words[from / 2..(from + k) / 2],
                steps: &mut self.steps[from / BLOCK..(from + k) / BLOCK],
            };
            // SAFETY: as above.
            let known = unsafe { blocks.unpack(GgmlType::F32) };
            assert!(known, "F32 has a block");
        }
    }

    /// Sets elements of Y to the part of the sum that lies in columns `depth` of W, or adds it to what the parts before gave.
    ///
    /// # Safety
    /// The panel must hold these rows and columns of W; Y's must not be written by anybody else.
    unsafe fn multiply(&self, product: &MulMat, rows: &Range<usize>, depth: &Range<usize>) {
        let stride = packed_words(product.k);
        let tiles = product.t.div_ceil(arch::COLUMNS);
        for tile in 0..tiles {
            let (from, to) = (tile * product.t / tiles, (tile + 1) * product.t / tiles);
            // SAFETY: rows from..to of X and Y.
            unsafe {
                let x = product.x.add(from * stride);
                let tile = Tile {
                    blocks: depth.len() / BLOCK,
                    words: self.words.as_ptr().cast(),
                    steps: self.steps.as_ptr().cast(),
                    x: x.add(depth.start / 2),
                    x_steps: x.add(product.k / 2 + depth.start / BLOCK),
                    x_stride: stride,
                    y: product.y.add(from * product.n + rows.start),
                    y_stride: product.n,
                    rows: rows.len(),
                    accumulate: depth.start > 0,
                };
                tile.compute(to - from);
            }
        }
    }
}

/// Blocks of [`ROWS`] rows of W, or fewer, that become part of a panel.
struct Blocks<'a> {
    /// The first row's first block.
    first: *const u8,
    row_bytes: usize,
    rows: usize,
    words: &'a mut [Line<f32>],
    steps: &'a mut [Line<f32>],
}

/// [`ROWS`] rows of W times some rows of X.
struct Tile {
    /// Blocks along K.
    blocks: usize,
    /// The panel.
    words: *const f32,
    steps: *const f32,
    /// Packed rows of X: words, steps, and from one row to the next.
    x: *const f32,
    x_steps: *const f32,
    x_stride: usize,
    /// Element (i, t) at `y[t * y_stride + i]`.
    y: *mut f32,
    y_stride: usize,
    /// Rows of W that there are.
    rows: usize,
    /// Adds to what Y has.
    accumulate: bool,
}

/// Other CPUs multiply with ggml.
#[cfg(not(target_arch = "x86_64"))]
mod arch {
    use super::{BLOCK, Blocks, Tile};
    use crate::file::types::GgmlType;

    pub(super) const COLUMNS: usize = 1;

    pub(super) fn available() -> bool {
        false
    }

    pub(super) unsafe fn round(_: &[f32; BLOCK], _: &mut [f32; BLOCK / 2]) -> f32 {
        unreachable!("not available")
    }

    impl Blocks<'_> {
        pub(super) unsafe fn unpack(&mut self, _: GgmlType) -> bool {
            unreachable!("not available")
        }
    }

    impl Tile {
        pub(super) unsafe fn compute(&self, _: usize) {
            unreachable!("not available")
        }
    }
}

#[cfg(test)]
mod tests;
