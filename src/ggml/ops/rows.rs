//! Picking, placing and padding of rows.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::tensor::Tensor;

/// Row t of the result is row `slots[t]` of `values`, or row t of `x` where the slot is -1. Operands: x, values, slots.
struct PlaceRows;

impl Kernel for PlaceRows {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (x, values, slots) = (op.operand(0), op.operand(1), op.ids(2));
        let (first, dst) = out.share(slots.len());
        for (t, row) in (first..).zip(dst.chunks_exact_mut(x.ne[0])) {
            row.copy_from_slice(match usize::try_from(slots[t]) {
                Ok(slot) => values.row(slot, 0),
                Err(_) => x.row(t, 0),
            });
        }
    }
}

/// Row j of the result is the sum of those rows of `dy` whose id is j: the derivative of picking rows. Operands: dy, ids.
struct SumRows;

impl Kernel for SumRows {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (dy, ids) = (op.operand(0), op.ids(1));
        let (first, dst) = out.share(op.ne()[1]);
        for (j, row) in (first..).zip(dst.chunks_exact_mut(dy.ne[0])) {
            row.fill(0.0);
            for (t, _) in ids.iter().enumerate().filter(|&(_, &id)| id == j as i32) {
                row.iter_mut().zip(dy.row(t, 0)).for_each(|(r, d)| *r += d);
            }
        }
    }
}

/// Columns of zeros around those of `dy`: the derivative of a window of columns. Operand: dy.
struct PadColumns {
    offset: usize,
}

impl Kernel for PadColumns {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let dy = op.operand(0);
        let [width, t, ..] = op.ne();
        let (first, dst) = out.share(t);
        for (t, row) in (first..).zip(dst.chunks_exact_mut(width)) {
            row.fill(0.0);
            row[self.offset..][..dy.ne[0]].copy_from_slice(dy.row(t, 0));
        }
    }
}

impl Context {
    /// Virtual tokens among real ones: x `ne = [D, T]`, values `ne = [D, P]`, slots I32 `ne = [T]` (-1: the real one).
    pub(crate) fn place_rows(&self, x: &Tensor, values: &Tensor, slots: &Tensor) -> Tensor {
        self.custom(PlaceRows, &[x, values, slots], x.ne())
    }

    /// Sums rows by id: dy `ne = [D, T]`, ids I32 `ne = [T]` -> `ne = [D, n]`; ids outside 0..n are left out.
    pub(crate) fn sum_rows_by_id(&self, dy: &Tensor, ids: &Tensor, n: usize) -> Tensor {
        self.custom(SumRows, &[dy, ids], [dy.ne()[0], n, 1, 1])
    }

    /// dy `ne = [w, T]` as the columns from `offset` on of `ne = [width, T]`, zeros elsewhere.
    pub(crate) fn pad_columns(&self, dy: &Tensor, width: usize, offset: usize) -> Tensor {
        self.custom(PadColumns { offset }, &[dy], [width, dy.ne()[1], 1, 1])
    }
}
