//! Sums, scales and the soft cap.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::tensor::Tensor;
use crate::kernels::{tanh, vectorized};
use ggml_sys as sys;

/// `a + b`, whose single row is repeated if it has only one. Operands: a, b.
struct Add;

impl Kernel for Add {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (a, b) = (op.operand(0), op.operand(1));
        let [n, n1, n2, _] = a.ne;
        let (first, dst) = out.share(n1 * n2);
        for (row, y) in (first..).zip(dst.chunks_exact_mut(n)) {
            let (i1, i2) = (row % n1, row / n1);
            add_row(a.row(i1, i2), b.row(i1 % b.ne[1], i2 % b.ne[2]), y);
        }
    }
}

/// `a + b` in the place of a. Operands: a, b.
struct AddOnto;

impl Kernel for AddOnto {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let b = op.operand(1);
        let [n, n1, n2, _] = op.ne();
        let (first, dst) = out.share(n1 * n2);
        for (row, a) in (first..).zip(dst.chunks_exact_mut(n)) {
            add_onto_row(a, b.nth_row(row));
        }
    }
}

vectorized! {
    fn add_onto_row(a: &mut [f32], b: &[f32]) {
        for (a, b) in a.iter_mut().zip(b) {
            *a += b;
        }
    }
}

vectorized! {
    fn add_row(a: &[f32], b: &[f32], y: &mut [f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a + b;
        }
    }
}

/// `s x`. Operand: x.
struct Scale(f32);

impl Kernel for Scale {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let x = op.operand(0);
        let [n, n1, n2, _] = x.ne;
        let (first, dst) = out.share(n1 * n2);
        for (row, y) in (first..).zip(dst.chunks_exact_mut(n)) {
            scale_row(self.0, x.nth_row(row), y);
        }
    }
}

vectorized! {
    fn scale_row(s: f32, x: &[f32], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = s * x;
        }
    }
}

/// `cap tanh(s x / cap)` in the place of x, which nothing reads any more: logits are the largest tensor of a step.
struct SoftCap {
    s: f32,
    cap: f32,
}

impl Kernel for SoftCap {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let n = op.ne().iter().product();
        cap_all(self.s / self.cap, self.cap, out.share(n).1);
    }
}

vectorized! {
    fn cap_all(s: f32, cap: f32, x: &mut [f32]) {
        for x in x {
            *x = cap * tanh::<FUSED>(s * *x);
        }
    }
}

/// `dx` of `y = cap tanh(s x / cap)`, from y. Operands: y, dy.
struct SoftCapBack {
    s: f32,
    cap: f32,
}

impl Kernel for SoftCapBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (y, dy) = (op.operand(0).contiguous(), op.operand(1).contiguous());
        let (first, dst) = out.share(y.len());
        for ((dx, &y), &dy) in dst.iter_mut().zip(&y[first..]).zip(&dy[first..]) {
            let t = y / self.cap;
            *dx = dy * self.s * (1.0 - t * t);
        }
    }
}

impl Context {
    /// `a + b`, `b` repeated to the shape of `a`.
    pub(crate) fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        if self.is_own() {
            return self.custom(Add, &[a, b], a.ne());
        }
        // SAFETY: valid descriptions; shapes were validated upstream.
        self.build(&[a, b], |c| unsafe { sys::ggml_add(c, a.raw(), b.raw()) })
    }

    /// `a + b`, of equal shapes, in the memory of `a`, which nothing else may read.
    pub(crate) fn add_onto(&self, a: &Tensor, b: &Tensor) -> Tensor {
        match self.is_own() {
            true => self.custom_inplace(AddOnto, a, &[b]),
            // ggml takes the memory where it can.
            false => self.add(a, b),
        }
    }

    /// `s * x`.
    pub(crate) fn scale(&self, x: &Tensor, s: f32) -> Tensor {
        if self.is_own() {
            return self.custom(Scale(s), &[x], x.ne());
        }
        // SAFETY: a valid description.
        self.build(&[x], |c| unsafe { sys::ggml_scale(c, x.raw(), s) })
    }

    /// `cap * tanh(s * x / cap)`; nothing else may read `x`.
    pub(crate) fn softcap(&self, x: &Tensor, s: f32, cap: f32) -> Tensor {
        if self.is_own() {
            return self.custom_inplace(SoftCap { s, cap }, x, &[]);
        }
        let x = self.scale(x, s / cap);
        // SAFETY: a valid description.
        let x = self.build(&[&x], |c| unsafe { sys::ggml_tanh(c, x.raw()) });
        self.scale(&x, cap)
    }

    /// Gradient of `y = cap tanh(s x / cap)` with respect to x.
    pub(crate) fn softcap_back(&self, s: f32, cap: f32, y: &Tensor, dy: &Tensor) -> Tensor {
        self.custom(SoftCapBack { s, cap }, &[y, dy], y.ne())
    }
}
