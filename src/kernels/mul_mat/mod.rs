//! The product with a frozen weight matrix forward, in integers, see [`packed`](super::packed), or in F32, see [`floats`](super::floats).
//!
//! Unpacking a tile of weights once for all rows makes the type of the weights almost irrelevant. Too few rows for that are multiplied with the
//! weights as they lie in memory.

use super::dequant::RowToF32;
use super::floats::{self, Product, Weights};
use super::level;
use super::packed::{
    self, BLOCK, BYTE_WIDTH, Bits, BytePanel, Dots, Output, Panel, Rows, WIDTH, packed_words,
};
use crate::file::types::GgmlType;
use std::cell::RefCell;
use std::ops::Range;
use std::thread::LocalKey;

/// Values of a row of W that are unpacked at a time; a panel of them takes 64 KB. A multiple of the largest block of any type.
const DEPTH: usize = 2048;
/// The same in bytes for up to [`MOST_SHALLOW`] rows of X: writing the panel is much of the work then, and 16 KB stay in the first-level cache.
const SHALLOW: usize = 512;
/// With more rows fewer additions to Y count for more.
const MOST_SHALLOW: usize = 32;
/// Values of a row of W that become F32 at a time: the largest block of any type.
const CHUNK: usize = 256;
/// Rows of W that a thread computes at least, where these are floating-point numbers.
const FLOAT_WIDTH: usize = 16;

/// Whether this CPU has the kernel, for rows of `k` values of type `ty`.
pub(crate) fn has_mul_mat(ty: GgmlType, k: usize) -> bool {
    if floats::reads(ty) {
        // In pairs.
        return ty != GgmlType::BF16 || k.is_multiple_of(2);
    }
    let in_words = ty.is_quantized() || matches!(ty, GgmlType::F16 | GgmlType::BF16);
    k.is_multiple_of(BLOCK) && (packed::has_words() && in_words || in_bytes(ty).is_some())
}

/// 8 bits, if weights of type `ty` can be multiplied in bytes.
fn in_bytes(ty: GgmlType) -> Option<Bits> {
    (packed::has_bytes() && packed::has_format(ty)).then_some(Bits::Eight)
}

/// Rows of X from which on it is worth while to unpack weights that cannot be multiplied as they lie in memory: with fewer that is most of the work.
const FEWEST_UNPACKED: usize = 32;

/// To how many bits `t` rows of X are rounded if the kernel is asked for: the bits of a row's product do not depend on `t`. `None` if it is not sensible.
pub(crate) fn sensible(ty: GgmlType, t: usize) -> Option<Bits> {
    if floats::reads(ty) {
        return Some(Bits::All);
    }
    if !packed::has_words() {
        return in_bytes(ty);
    }
    let fewest = match packed::has_format(ty) {
        true => 1,
        false => FEWEST_UNPACKED,
    };
    (t >= fewest).then_some(Bits::Fourteen)
}

/// To how many bits any number of rows of X are rounded so that the bits of a row's product do not depend on how many there are, as few as are not too few; `None`
/// where ggml's product has that property, and ours does not.
pub(crate) fn invariant(ty: GgmlType, _: usize) -> Option<Bits> {
    match ty {
        GgmlType::BF16 if floats::has_pairs() => Some(Bits::Bf16),
        _ if packed::has_format(ty) || floats::reads(ty) => in_bytes(ty).or(sensible(ty, 1)),
        // Of what is quantized ggml computes each element apart.
        _ => None,
    }
}

/// What X can be rounded to for weights of type `ty` with rows of `k` values: the most bits, and fewer for speed.
pub(crate) fn available_bits(ty: GgmlType, k: usize) -> [Option<Bits>; 2] {
    let finest = match floats::reads(ty) {
        true => Some(Bits::All),
        false => packed::has_words().then_some(Bits::Fourteen),
    };
    let fewer = match ty {
        GgmlType::BF16 => floats::has_pairs().then_some(Bits::Bf16),
        _ => in_bytes(ty),
    };
    [finest, fewer].map(|bits| bits.filter(|_| has_mul_mat(ty, k)))
}

/// What ggml, which computes what is not computed here, was built for, as far as it matters: its products of floating-point numbers with AVX-512 are faster than ours for AVX2.
#[derive(Clone, Copy)]
pub(crate) enum GgmlBuild {
    Baseline,
    Avx2,
    Avx512,
}

/// To how many bits `t` rows of X are rounded where the kernel is faster than ggml's for weights of type `ty`, at no larger error; `None` where it is not.
pub(crate) fn faster_than(ggml: GgmlBuild, ty: GgmlType, t: usize) -> Option<Bits> {
    if let Some(bits) = in_bytes(ty) {
        return Some(bits);
    }
    if ty == GgmlType::BF16 && floats::has_pairs() {
        return Some(Bits::Bf16);
    }
    let fewest = match ggml {
        GgmlBuild::Baseline => return sensible(ty, t),
        GgmlBuild::Avx2 => faster_than_avx2_from(ty)?,
        GgmlBuild::Avx512 => faster_than_avx512_from(ty)?,
    };
    sensible(ty, t).filter(|_| t >= fewest)
}

/// From how many rows on ours that are not in bytes are faster, if ever: BF16. Measured on Zen 3, when it was rounded to 14 bits.
fn faster_than_avx2_from(ty: GgmlType) -> Option<usize> {
    (ty == GgmlType::BF16).then_some(FEWEST_UNPACKED)
}

/// The same where ggml has AVX-512: F16. F32 is not for single rows. Measured on Zen 5; Intel's CPUs were not.
fn faster_than_avx512_from(ty: GgmlType) -> Option<usize> {
    (ty == GgmlType::F16 && packed::has_avx512() && !level::is_intel()).then_some(1)
}

/// `Y = W X`.
pub(crate) struct MulMat {
    /// The type of W, for which there is [`has_mul_mat`].
    pub(crate) ty: GgmlType,
    /// For types that the kernel does not unpack itself.
    pub(crate) to_f32: RowToF32,
    /// W, `ne = [k, n]`.
    pub(crate) w: *const u8,
    /// From one row of W to the next.
    pub(crate) row_bytes: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    /// X, `ne = [k, t]`, as rows as [`pack_row`](super::pack_row) gives them for so many bits; with [`Bits::Eight`] the type must be one of
    /// integers in blocks, with [`Bits::All`] of floating-point numbers, with [`Bits::Bf16`] BF16.
    pub(crate) x: *const f32,
    /// From one row of X to the next. Rows may have been packed for fewer of them than there are.
    pub(crate) x_stride: usize,
    pub(crate) bits: Bits,
    pub(crate) t: usize,
    /// `W X`, `ne = [n, t]`.
    pub(crate) y: *mut f32,
}

thread_local! {
    /// What a thread keeps between calls.
    static PANEL: RefCell<Panel> = const { RefCell::new(Panel::new()) };
    static BYTE_PANEL: RefCell<BytePanel> = const { RefCell::new(BytePanel::new()) };
}

/// Rows of W that were unpacked.
trait Unpacked: 'static {
    /// Rows at most.
    const WIDTH: usize;

    /// Columns at most, where `t` rows of X are multiplied with them.
    fn depth(t: usize) -> usize;

    /// Has room for so many blocks of each row.
    fn resize(&mut self, blocks: usize);

    /// Fills the panel with columns `depth` of W's rows `rows`.
    ///
    /// # Safety
    /// They must lie in W.
    unsafe fn unpack(&mut self, of: &MulMat, rows: &Range<usize>, depth: &Range<usize>);

    /// Multiplies the first `blocks` blocks with as many of X.
    ///
    /// # Safety
    /// The rows must have the blocks, the output room.
    unsafe fn multiply(&self, blocks: usize, x: Rows, y: Output);
}

impl MulMat {
    /// Rows of W that are computed together.
    fn width(bits: Bits) -> usize {
        match bits {
            Bits::Eight => BYTE_WIDTH,
            Bits::Fourteen => WIDTH,
            Bits::Bf16 | Bits::All => FLOAT_WIDTH,
        }
    }

    /// Parts that a product of `n` rows of W, of type `ty`, with `t` of X can have; `None` if they should be as few as possible, because W is read from memory as it lies there.
    pub(crate) fn most_parts(ty: GgmlType, bits: Bits, n: usize, t: usize) -> Option<usize> {
        let rows = match bits {
            Bits::Eight | Bits::Fourteen => Self::width(bits),
            Bits::Bf16 | Bits::All => floats::ROWS,
        };
        (t > packed::most_dots(ty, bits)).then(|| n.div_ceil(rows))
    }

    /// Computes part `ith` of `nth`: some of W's rows, whole panels of them. Values do not depend on `nth`, nor those of a row on `t`.
    ///
    /// # Safety
    /// The matrices must be valid; all parts together write all of Y, each its own.
    pub(crate) unsafe fn part(&self, ith: usize, nth: usize) {
        let panels = Self::panels_of(self.bits, self.n);
        // SAFETY: the caller's promise.
        unsafe { self.panels(panels * ith / nth..panels * (ith + 1) / nth) };
    }

    /// Panels of `n` rows of W, which are computed together.
    pub(crate) fn panels_of(bits: Bits, n: usize) -> usize {
        n.div_ceil(Self::width(bits))
    }

    /// Computes some of the [panels](MulMat::panels_of). Values do not depend on which others are computed with them, nor those of a row on `t`.
    ///
    /// # Safety
    /// The matrices must be valid, and nobody else write these rows of W's part of Y.
    pub(crate) unsafe fn panels(&self, panels: Range<usize>) {
        if panels.is_empty() || self.t == 0 {
            return;
        }
        let width = Self::width(self.bits);
        let rows = panels.start * width..self.n.min(panels.end * width);
        // SAFETY: the caller's promise.
        unsafe {
            match self.bits {
                Bits::Bf16 | Bits::All => self.floats(rows),
                _ if self.t <= packed::most_dots(self.ty, self.bits)
                    && packed::has_format(self.ty) =>
                {
                    self.dots(rows)
                }
                Bits::Eight => self.unpacked(rows, &BYTE_PANEL),
                Bits::Fourteen => self.unpacked(rows, &PANEL),
            }
        }
    }

    /// Multiplies rows of W as they lie in memory.
    ///
    /// # Safety
    /// There must be rows, which nobody else computes.
    unsafe fn dots(&self, rows: Range<usize>) {
        // SAFETY: these rows of W, all of X, ours of Y, on a CPU that has the instructions (`has_mul_mat`).
        unsafe {
            let dots = Dots {
                first: self.w.add(rows.start * self.row_bytes),
                row_bytes: self.row_bytes,
                rows: rows.len(),
                x: self.x,
                bits: self.bits,
                t: self.t,
                k: self.k,
                y: self.y.add(rows.start),
                y_stride: self.n,
            };
            assert!(dots.compute(self.ty), "{:?} has dot products", self.ty);
        }
    }

    /// Multiplies rows of W as the numbers that they are.
    ///
    /// # Safety
    /// As for [`MulMat::dots`].
    unsafe fn floats(&self, rows: Range<usize>) {
        let weights = match (self.ty, self.bits) {
            (GgmlType::BF16, Bits::Bf16) => Weights::Bf16Pairs,
            (GgmlType::BF16, Bits::All) => Weights::Bf16,
            (GgmlType::F16, Bits::All) => Weights::F16,
            (GgmlType::F32, Bits::All) => Weights::F32,
            (ty, bits) => unreachable!("{ty:?} and {bits:?}"),
        };
        // SAFETY: these rows of W, all of X, ours of Y, on a CPU that has the instructions (`has_mul_mat`, `has_pairs`).
        unsafe {
            let product = Product {
                weights,
                first: self.w.add(rows.start * self.row_bytes),
                row_bytes: self.row_bytes,
                rows: rows.len(),
                k: packed_words(self.k, self.t, self.bits),
                x: self.x,
                x_stride: self.x_stride,
                t: self.t,
                y: self.y.add(rows.start),
                y_stride: self.n,
            };
            product.compute();
        }
    }

    /// Unpacks rows of W, panel by panel, and multiplies them.
    ///
    /// # Safety
    /// As for [`MulMat::dots`].
    unsafe fn unpacked<P: Unpacked>(
        &self,
        rows: Range<usize>,
        panel: &'static LocalKey<RefCell<P>>,
    ) {
        panel.with_borrow_mut(|panel| {
            let most = P::depth(self.t);
            panel.resize(most / BLOCK);
            for first in rows.clone().step_by(P::WIDTH) {
                let rows = first..rows.end.min(first + P::WIDTH);
                for k0 in (0..self.k).step_by(most) {
                    let depth = k0..self.k.min(k0 + most);
                    // SAFETY: rows and columns of W, all rows of X and ours of Y.
                    unsafe {
                        panel.unpack(self, &rows, &depth);
                        self.multiply(&rows, &depth, panel);
                    }
                }
            }
        });
    }

    /// Column `k` of W's row `r`, the first value of a block.
    ///
    /// # Safety
    /// It must lie in W.
    unsafe fn at(&self, r: usize, k: usize) -> *const u8 {
        let bytes = k / self.ty.block_size() as usize * self.ty.type_size() as usize;
        // SAFETY: the caller's promise.
        unsafe { self.w.add(r * self.row_bytes + bytes) }
    }

    /// Sets elements of Y to the part of the sum that lies in columns `depth` of W, or adds it to what the parts before gave.
    ///
    /// # Safety
    /// The panel must hold these rows and columns of W; Y's must not be written by anybody else.
    unsafe fn multiply(&self, rows: &Range<usize>, depth: &Range<usize>, panel: &impl Unpacked) {
        let x = Rows {
            words: self.x,
            t: self.t,
            k: self.k,
            first: depth.start / BLOCK,
            stride: self.x_stride,
        };
        // SAFETY: all rows of X, and ours of Y.
        unsafe {
            let y = Output {
                values: self.y.add(rows.start),
                stride: self.n,
                width: rows.len(),
                accumulate: depth.start > 0,
            };
            panel.multiply(depth.len() / BLOCK, x, y);
        }
    }
}

impl Unpacked for Panel {
    const WIDTH: usize = WIDTH;

    fn depth(_: usize) -> usize {
        DEPTH
    }

    fn resize(&mut self, blocks: usize) {
        self.resize(blocks);
    }

    unsafe fn unpack(&mut self, of: &MulMat, rows: &Range<usize>, depth: &Range<usize>) {
        // SAFETY: the caller's promise.
        let at = |r, k| unsafe { of.at(r, k) };
        let first = (at(rows.start, depth.start), of.row_bytes);
        // SAFETY: whole blocks of these rows, on a CPU that has the instructions (`has_mul_mat`).
        if unsafe { self.unpack(of.ty, first, rows.len(), 0..depth.len() / BLOCK) } {
            return;
        }
        let mut values = [[0.0f32; CHUNK]; WIDTH];
        for k0 in depth.clone().step_by(CHUNK) {
            let k = CHUNK.min(depth.end - k0);
            for (r, values) in rows.clone().zip(&mut values) {
                // SAFETY: whole blocks of row r.
                unsafe { (of.to_f32)(of.ty, at(r, k0), values.as_mut_ptr(), k) };
            }
            let first = (values.as_ptr().cast(), size_of_val(&values[0]));
            let blocks = (k0 - depth.start) / BLOCK..(k0 - depth.start + k) / BLOCK;
            // SAFETY: as above.
            let known = unsafe { self.unpack(GgmlType::F32, first, rows.len(), blocks) };
            assert!(known, "F32 has a block");
        }
    }

    unsafe fn multiply(&self, blocks: usize, x: Rows, y: Output) {
        // SAFETY: the caller's promise.
        unsafe { self.multiply(blocks, x, y) };
    }
}

impl Unpacked for BytePanel {
    const WIDTH: usize = BYTE_WIDTH;

    fn depth(t: usize) -> usize {
        if t <= MOST_SHALLOW { SHALLOW } else { DEPTH }
    }

    fn resize(&mut self, blocks: usize) {
        self.resize(blocks);
    }

    unsafe fn unpack(&mut self, of: &MulMat, rows: &Range<usize>, depth: &Range<usize>) {
        // SAFETY: whole blocks of these rows, on a CPU that has the instructions (`faster_than_ggml`).
        unsafe {
            let first = (of.at(rows.start, depth.start), of.row_bytes);
            self.unpack(of.ty, first, rows.len(), 0..depth.len() / BLOCK);
        }
    }

    unsafe fn multiply(&self, blocks: usize, x: Rows, y: Output) {
        // SAFETY: the caller's promise.
        unsafe { self.multiply(blocks, x, y) };
    }
}

#[cfg(test)]
mod tests;
