//! Picking, placing, copying and padding of rows.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output, Parts, small_parts};
use crate::ggml::quant::row_to_f32;
use crate::ggml::tensor::Tensor;
use ggml_sys as sys;

/// Rows of a table of any type, as F32. Operands: table, ids.
struct GetRows;

impl Kernel for GetRows {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (table, ids) = (op.memory(0), op.ids(1));
        let [width, n, ..] = table.ne;
        let (first, dst) = out.share(ids.len());
        for (&id, row) in ids[first..].iter().zip(dst.chunks_exact_mut(width)) {
            let id = id as usize;
            assert!(id < n, "a row of the table");
            // SAFETY: a row of the table, as many values as the result's has.
            unsafe {
                row_to_f32(
                    table.ty,
                    table.first.add(id * table.nb[1]),
                    row.as_mut_ptr(),
                    width,
                )
            };
        }
    }
}

/// The rows of one operand, then those of another one if there is one.
struct CopyRows;

impl Kernel for CopyRows {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let a = op.operand(0);
        let [width, n1, n2, _] = a.ne;
        let b = (op.n_operands() > 1).then(|| op.operand(1));
        let rows: usize = op.ne()[1..].iter().product();
        let (first, dst) = out.share(rows);
        for (i, row) in (first..).zip(dst.chunks_exact_mut(width)) {
            row.copy_from_slice(match b {
                Some(b) if i >= n1 * n2 => b.row(i - n1 * n2, 0),
                _ => a.nth_row(i),
            });
        }
    }
}

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

    fn parts(&self, op: &Op<'_>) -> Parts {
        small_parts(op.operand(0).values.len())
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
    /// Rows of `a`, `ne = [D, V]` of any type, picked by `rows`, I32 `ne = [T]`, as F32 `ne = [D, T]`.
    pub(crate) fn get_rows(&self, a: &Tensor, rows: &Tensor) -> Tensor {
        if self.is_own() {
            return self.custom(GetRows, &[a, rows], [a.ne()[0], rows.ne()[0], 1, 1]);
        }
        // SAFETY: valid descriptions; shapes were validated upstream.
        self.build(&[a, rows], |c| unsafe {
            sys::ggml_get_rows(c, a.raw(), rows.raw())
        })
    }

    /// A copy without gaps.
    pub(crate) fn cont(&self, a: &Tensor) -> Tensor {
        // Columns of a transposed tensor are no rows, and rows of several streams no list.
        let is_rows = a.nb()[0] == size_of::<f32>() && a.ne()[3] == 1;
        if self.is_own() && is_rows {
            return self.custom(CopyRows, &[a], a.ne());
        }
        // SAFETY: a valid description.
        self.build(&[a], |c| unsafe { sys::ggml_cont(c, a.raw()) })
    }

    /// The rows of `a`, then those of `b`: `ne = [n, T]` and [n, U] -> [n, T + U].
    pub(crate) fn concat_rows(&self, a: &Tensor, b: &Tensor) -> Tensor {
        if self.is_own() {
            let [n, t, ..] = a.ne();
            return self.custom(CopyRows, &[a, b], [n, t + b.ne()[1], 1, 1]);
        }
        // SAFETY: valid descriptions of equal width.
        self.build(&[a, b], |c| unsafe {
            sys::ggml_concat(c, a.raw(), b.raw(), 1)
        })
    }

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
