//! Derivatives of the activations.

use crate::ggml::context::{Context, Tensor};
use crate::ggml::custom::{Kernel, Op};
use crate::ggml::kernels::exp;
use std::sync::Arc;

/// An activation function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activated {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Phi(x)`, tanh approximation.
    Gelu,
}

impl Activated {
    /// Value and derivative.
    #[inline(always)]
    fn value_and_slope(self, x: f32) -> (f32, f32) {
        match self {
            Self::Silu => {
                let s = 1.0 / (1.0 + exp(-x));
                (x * s, s * (1.0 + x * (1.0 - s)))
            }
            Self::Gelu => {
                const A: f32 = 0.797_884_56; // sqrt(2 / pi)
                const B: f32 = 0.044_715;
                let u = A * x * (1.0 + B * x * x);
                let t = 1.0 - 2.0 / (exp(2.0 * u) + 1.0);
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
struct ActivationBack(Activated);

impl Kernel for ActivationBack {
    fn run(&self, op: &Op<'_>) {
        let (x, dy) = (op.operand(0).contiguous(), op.operand(1).contiguous());
        let (first, dst) = op.share_mut(x.len());
        let (x, dy) = (&x[first..], &dy[first..]);
        let f = self.0;
        for ((dx, &x), &dy) in dst.iter_mut().zip(x).zip(dy) {
            *dx = f.value_and_slope(x).1 * dy;
        }
    }
}

/// `[dgate, dup]` of `y = f(gate) * up`. Operands: gate, up, dy -> `ne = [F, T, 2]`; or gate-up `ne = [2F, T]`, dy -> the same
/// shape.
struct GatedBack {
    f: Activated,
    fused: bool,
}

impl GatedBack {
    fn row(&self, gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let f = self.f;
        for ((((&g, &u), &dy), dgate), dup) in gate.iter().zip(up).zip(dy).zip(dgate).zip(dup) {
            let (value, slope) = f.value_and_slope(g);
            *dgate = u * slope * dy;
            *dup = value * dy;
        }
    }
}

impl Kernel for GatedBack {
    fn run(&self, op: &Op<'_>) {
        if self.fused {
            let (x, dy) = (op.operand(0), op.operand(1));
            let [width, t, ..] = x.ne;
            let (first, dst) = op.share_mut(t);
            for (i, dx) in (first..).zip(dst.chunks_exact_mut(width)) {
                let (gate, up) = x.row(i, 0).split_at(width / 2);
                let (dgate, dup) = dx.split_at_mut(width / 2);
                self.row(gate, up, dy.row(i, 0), dgate, dup);
            }
            return;
        }
        let (gate, up, dy) = (op.operand(0), op.operand(1), op.operand(2));
        let [width, t, ..] = gate.ne;
        for i in op.share(t) {
            // SAFETY: row i of either half of the result `ne = [F, T, 2]`, written by this thread alone.
            let (dgate, dup) = unsafe {
                (
                    std::slice::from_raw_parts_mut(op.dst().add(i * width), width),
                    std::slice::from_raw_parts_mut(op.dst().add((t + i) * width), width),
                )
            };
            self.row(gate.row(i, 0), up.row(i, 0), dy.row(i, 0), dgate, dup);
        }
    }
}

/// `dx` of `y = cap tanh(s x / cap)`, from y. Operands: y, dy.
struct SoftcapBack {
    s: f32,
    cap: f32,
}

impl Kernel for SoftcapBack {
    fn run(&self, op: &Op<'_>) {
        let (y, dy) = (op.operand(0).contiguous(), op.operand(1).contiguous());
        let (first, dst) = op.share_mut(y.len());
        for ((dx, &y), &dy) in dst.iter_mut().zip(&y[first..]).zip(&dy[first..]) {
            let t = y / self.cap;
            *dx = dy * self.s * (1.0 - t * t);
        }
    }
}

impl Context {
    /// Gradient of `f(x)` with respect to x.
    pub(crate) fn activation_back(
        self: &Arc<Self>,
        f: Activated,
        x: &Tensor,
        dy: &Tensor,
    ) -> Tensor {
        self.custom(ActivationBack(f), &[x, dy], x.ne())
    }

    /// Gradients of `f(gate) * up` with respect to gate and up (for a fused gate one tensor, `None` beside it).
    pub(crate) fn gated_back(
        self: &Arc<Self>,
        f: Activated,
        gate: Gate<'_>,
        dy: &Tensor,
    ) -> (Tensor, Option<Tensor>) {
        match gate {
            Gate::Fused(x) => {
                let kernel = GatedBack { f, fused: true };
                (self.custom(kernel, &[x, dy], x.ne()), None)
            }
            Gate::Split(gate, up) => {
                let kernel = GatedBack { f, fused: false };
                let [width, t, ..] = gate.ne();
                let both = self.custom(kernel, &[gate, up, dy], [width, t, 2, 1]);
                let (row, half) = (both.nb()[1], both.nb()[2]);
                let view = |offset| self.view(&both, [width, t, 1, 1], [row, half, half], offset);
                (view(0), Some(view(half)))
            }
        }
    }

    /// Gradient of `y = cap tanh(s x / cap)` with respect to x.
    pub(crate) fn softcap_back(
        self: &Arc<Self>,
        s: f32,
        cap: f32,
        y: &Tensor,
        dy: &Tensor,
    ) -> Tensor {
        self.custom(SoftcapBack { s, cap }, &[y, dy], y.ne())
    }
}
