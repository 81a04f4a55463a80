//! Activations and their derivatives.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::kernels::{exp, vectorized};
use crate::ggml::tensor::Tensor;
use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Phi(x)`, tanh approximation.
    Gelu,
}

impl Activation {
    /// Value and derivative.
    #[inline(always)]
    fn value_and_slope<const FUSED: bool>(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => {
                let s = 1.0 / (1.0 + exp::<FUSED>(-x));
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Self::Gelu => {
                const A: f32 = FRAC_2_SQRT_PI * FRAC_1_SQRT_2; // sqrt(2 / pi)
                const B: f32 = 0.044_715;
                let u = A * x * (1.0 + B * x * x);
                let t = 1.0 - 2.0 / (exp::<FUSED>(2.0 * u) + 1.0);
                let slope_u = A * (1.0 + 3.0 * B * x * x);
                (
                    0.5 * x * (1.0 + t),
                    0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope_u,
                )
            }
        }
    }
}

/// Where a gated activation finds its gate.
pub(crate) enum Gate<'a> {
    /// Gate and up as two tensors `ne = [F, T]`.
    Split(&'a Tensor, &'a Tensor),
    /// One tensor `ne = [2F, T]`, the gate in the first half of each row.
    Fused(&'a Tensor),
}

/// `dx` of `y = f(x)`. Operands: x, dy.
struct ActivationBack(Activation);

impl Kernel for ActivationBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (x, dy) = (op.operand(0).contiguous(), op.operand(1).contiguous());
        let (first, dst) = out.share(x.len());
        let (x, dy) = (&x[first..], &dy[first..]);
        slopes_times(self.0, x, dy, dst);
    }
}

vectorized! {
    /// `dx = f'(x) dy`.
    fn slopes_times(f: Activation, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        for ((dx, &x), &dy) in dx.iter_mut().zip(x).zip(dy) {
            *dx = f.value_and_slope::<FUSED>(x).1 * dy;
        }
    }
}

/// Gradients of `y = f(gate) * up` in the place of gate and up, which nothing reads any more: they are the largest
/// activations of a layer. Operands: gate, up, dy; or gate-up `ne = [2F, T]`, dy. The result is the gradient of the first
/// operand in its memory; that of up is written to up's own.
struct GatedBack {
    f: Activation,
    fused: bool,
}

vectorized! {
    /// Replaces a row of gates and one of ups by their gradients.
    fn gated_row_back(f: Activation, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
        for ((g, u), &dy) in gate.iter_mut().zip(up).zip(dy) {
            let (value, slope) = f.value_and_slope::<FUSED>(*g);
            *g = *u * slope * dy;
            *u = value * dy;
        }
    }
}

impl Kernel for GatedBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let [width, t, ..] = op.ne();
        let (first, gates) = out.share(t);
        let dy = op.operand(if self.fused { 1 } else { 2 });
        for (i, gate) in (first..).zip(gates.chunks_exact_mut(width)) {
            if self.fused {
                let (gate, up) = gate.split_at_mut(width / 2);
                gated_row_back(self.f, gate, up, dy.row(i, 0));
            } else {
                // SAFETY: row i of up, which has the shape of gate and which only this thread reads and writes.
                let up = unsafe {
                    std::slice::from_raw_parts_mut(op.second_dst(1).add(i * width), width)
                };
                gated_row_back(self.f, gate, up, dy.row(i, 0));
            }
        }
    }
}

/// Does nothing: the result is the operand's memory after the second operand was computed.
struct After;

impl Kernel for After {
    fn run(&self, _: &Op<'_>, _: Output<'_>) {}
}

/// `dx` of `y = cap tanh(s x / cap)`, from y. Operands: y, dy.
struct SoftcapBack {
    s: f32,
    cap: f32,
}

impl Kernel for SoftcapBack {
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
    /// `f(x)`.
    pub(crate) fn activation(&self, f: Activation, x: &Tensor) -> Tensor {
        match f {
            Activation::Silu => self.silu(x),
            Activation::Gelu => self.gelu(x),
        }
    }

    /// `f(gate) * up`, `ne = [F, T]`.
    pub(crate) fn gated(&self, f: Activation, gate: Gate<'_>) -> Tensor {
        match (f, gate) {
            (Activation::Silu, Gate::Split(gate, up)) => self.swiglu(gate, up),
            (Activation::Gelu, Gate::Split(gate, up)) => self.geglu(gate, up),
            (Activation::Silu, Gate::Fused(both)) => self.swiglu_fused(both),
            (Activation::Gelu, Gate::Fused(both)) => self.geglu_fused(both),
        }
    }

    /// Gradient of `f(x)` with respect to x.
    pub(crate) fn activation_back(&self, f: Activation, x: &Tensor, dy: &Tensor) -> Tensor {
        self.custom(ActivationBack(f), &[x, dy], x.ne())
    }

    /// Gradients of `f(gate) * up` with respect to gate and up (for a fused gate one tensor, `None` beside it), in the place of
    /// these: no operation that comes later may read them.
    pub(crate) fn gated_back(
        &self,
        f: Activation,
        gate: Gate<'_>,
        dy: &Tensor,
    ) -> (Tensor, Option<Tensor>) {
        match gate {
            Gate::Fused(x) => {
                let kernel = GatedBack { f, fused: true };
                (self.custom_inplace(kernel, x, &[dy]), None)
            }
            Gate::Split(gate, up) => {
                let kernel = GatedBack { f, fused: false };
                let dgate = self.custom_inplace(kernel, gate, &[up, dy]);
                let dup = self.custom_inplace(After, up, &[&dgate]);
                (dgate, Some(dup))
            }
        }
    }

    /// Gradient of `y = cap tanh(s x / cap)` with respect to x.
    pub(crate) fn softcap_back(&self, s: f32, cap: f32, y: &Tensor, dy: &Tensor) -> Tensor {
        self.custom(SoftcapBack { s, cap }, &[y, dy], y.ne())
    }
}
