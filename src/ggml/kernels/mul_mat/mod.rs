//! The product with a frozen weight matrix forward, in integers: see [`packed`](super::packed).
//!
//! Unpacking a tile of weights once for all rows makes the type of the weights almost irrelevant. Too few rows for that are multiplied with the
//! weights as they lie in memory.

use super::dequant::row_to_f32;
use super::ggml_has_avx512;
use super::packed::{self, BLOCK, Dots, MOST_DOTS, Output, Panel, Rows, WIDTH};
use crate::file::types::GgmlType;
use std::cell::RefCell;
use std::ops::Range;

/// Values of a row of W that are unpacked at a time; a panel of them takes 64 KB.
const DEPTH: usize = 2048;
/// Values of a row of W that ggml unpacks at a time: the largest block of any type.
const CHUNK: usize = 256;

/// Whether this CPU has the kernel, for rows of `k` values of type `ty`.
pub(crate) fn has_mul_mat(ty: GgmlType, k: usize) -> bool {
    packed::available()
        && k.is_multiple_of(BLOCK)
        && (ty.is_quantized() || matches!(ty, GgmlType::F16 | GgmlType::BF16))
}

/// Rows of X from which on it is worth while to unpack weights that cannot be multiplied as they lie in memory: with fewer that is most of the work.
const FEWEST_UNPACKED: usize = 32;

/// Rows of X with which the kernel is used if it is asked for.
pub(crate) fn sensible_with(ty: GgmlType) -> Range<usize> {
    let fewest = if packed::has_dots(ty) {
        1
    } else {
        FEWEST_UNPACKED
    };
    fewest..usize::MAX
}

/// Rows of X with which the kernel is faster than ggml's for weights of type `ty`; none if it never is. ggml rounds X to 8 bits where we keep 14, and
/// for types that it multiplies in tiles with the dot products of AVX-512 we cannot make up for that.
pub(crate) fn faster_with(ty: GgmlType) -> Range<usize> {
    if !ggml_has_avx512() {
        return faster_than_avx2(ty);
    }
    match packed::has_avx512() {
        true => faster_than_avx512(ty),
        false => 0..0,
    }
}

/// Always but where weights go through F32, and with F16, which ggml does not round down to 8 bits either. Measured on Zen 3.
fn faster_than_avx2(ty: GgmlType) -> Range<usize> {
    match ty {
        GgmlType::F16 => 0..0,
        GgmlType::Q4_1 | GgmlType::Q5_1 => 1..usize::MAX,
        _ if packed::has_dots(ty) => 2..usize::MAX,
        _ if packed::unpacks(ty) => FEWEST_UNPACKED..usize::MAX,
        _ => 0..0,
    }
}

/// Measured on Zen 4.
fn faster_than_avx512(ty: GgmlType) -> Range<usize> {
    match ty {
        GgmlType::Q4_1 | GgmlType::Q5_1 => 1..usize::MAX,
        GgmlType::Q3_K => 2..usize::MAX,
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::IQ4_NL => 5..usize::MAX,
        GgmlType::Q8_0 => 16..usize::MAX,
        GgmlType::F16 => 64..usize::MAX,
        GgmlType::Q5_K | GgmlType::IQ4_XS => 2..8,
        GgmlType::Q6_K => 8..64,
        _ => 0..0,
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
    /// X, `ne = [k, t]`, as rows as [`pack_row`](super::pack_row) gives them.
    pub(crate) x: *const f32,
    pub(crate) t: usize,
    /// `W X`, `ne = [n, t]`.
    pub(crate) y: *mut f32,
}

thread_local! {
    /// What a thread keeps between calls.
    static PANEL: RefCell<Panel> = const { RefCell::new(Panel::new()) };
}

impl MulMat {
    /// Computes part `ith` of `nth`: some of W's rows, whole panels of them. Values do not depend on `nth`, nor those of a row on `t`.
    ///
    /// # Safety
    /// The matrices must be valid; all parts together write all of Y, each its own.
    pub(crate) unsafe fn part(&self, ith: usize, nth: usize) {
        let panels = self.n.div_ceil(WIDTH);
        let part = panels * ith / nth..panels * (ith + 1) / nth;
        if part.is_empty() || self.t == 0 {
            return;
        }
        let rows = part.start * WIDTH..self.n.min(part.end * WIDTH);
        // SAFETY: the caller's promise.
        unsafe {
            if self.t <= MOST_DOTS && packed::has_dots(self.ty) {
                self.dots(rows);
            } else {
                self.panels(rows);
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
                t: self.t,
                k: self.k,
                y: self.y.add(rows.start),
                y_stride: self.n,
            };
            assert!(dots.compute(self.ty), "{:?} has dot products", self.ty);
        }
    }

    /// Unpacks rows of W, panel by panel, and multiplies them.
    ///
    /// # Safety
    /// As for [`MulMat::dots`].
    unsafe fn panels(&self, rows: Range<usize>) {
        PANEL.with_borrow_mut(|panel| {
            panel.resize(DEPTH / BLOCK);
            for first in rows.clone().step_by(WIDTH) {
                let rows = first..rows.end.min(first + WIDTH);
                for k0 in (0..self.k).step_by(DEPTH) {
                    let depth = k0..self.k.min(k0 + DEPTH);
                    // SAFETY: rows and columns of W, all rows of X and ours of Y.
                    unsafe {
                        self.unpack(&rows, &depth, panel);
                        self.multiply(&rows, &depth, panel);
                    }
                }
            }
        });
    }

    /// Fills the panel with columns `depth` of W's rows `rows`.
    ///
    /// # Safety
    /// They must lie in W.
    unsafe fn unpack(&self, rows: &Range<usize>, depth: &Range<usize>, panel: &mut Panel) {
        let ty = self.ty;
        // SAFETY: row and column of W.
        let at = |r: usize, k: usize| unsafe {
            let bytes = k / ty.block_size() as usize * ty.type_size() as usize;
            self.w.add(r * self.row_bytes + bytes)
        };
        let first = (at(rows.start, depth.start), self.row_bytes);
        // SAFETY: whole blocks of these rows, on a CPU that has the instructions (`has_mul_mat`).
        if unsafe { panel.unpack(ty, first, rows.len(), 0..depth.len() / BLOCK) } {
            return;
        }
        let mut values = [[0.0f32; CHUNK]; WIDTH];
        for k0 in depth.clone().step_by(CHUNK) {
            let k = CHUNK.min(depth.end - k0);
            for (r, values) in rows.clone().zip(&mut values) {
                // SAFETY: whole blocks of row r.
                unsafe { row_to_f32(ty, at(r, k0), values.as_mut_ptr(), k) };
            }
            let first = (values.as_ptr().cast(), size_of_val(&values[0]));
            let blocks = (k0 - depth.start) / BLOCK..(k0 - depth.start + k) / BLOCK;
            // SAFETY: as above.
            let known = unsafe { panel.unpack(GgmlType::F32, first, rows.len(), blocks) };
            assert!(known, "F32 has a block");
        }
    }

    /// Sets elements of Y to the part of the sum that lies in columns `depth` of W, or adds it to what the parts before gave.
    ///
    /// # Safety
    /// The panel must hold these rows and columns of W; Y's must not be written by anybody else.
    unsafe fn multiply(&self, rows: &Range<usize>, depth: &Range<usize>, panel: &Panel) {
        let x = Rows {
            words: self.x,
            t: self.t,
            k: self.k,
            first: depth.start / BLOCK,
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

#[cfg(test)]
mod tests;
