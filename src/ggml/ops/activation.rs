//! Activations and their derivatives.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::tensor::Tensor;
use crate::kernels::{exp, vectorized};
use crate::operation::Activation;
use ggml_sys as sys;
use std::f32::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

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
            Self::SwigluOai => {
                let (x, inside) = match x > Self::OAI_LIMIT {
                    true => (Self::OAI_LIMIT, 0.0),
                    false => (x, 1.0),
                };
                let s = 1.0 / (1.0 + exp::<FUSED>(-Self::OAI_ALPHA * x));
                let slope = s * (1.0 + Self::OAI_ALPHA * x * (1.0 - s));
                (x * s, inside * slope)
            }
        }
    }

    /// What a gate multiplies, and its derivative.
    #[inline(always)]
    fn gated_and_slope(self, up: f32) -> (f32, f32) {
        const LIMIT: f32 = Activation::OAI_LIMIT;
        match self {
            Self::Silu | Self::Gelu => (up, 1.0),
            Self::SwigluOai if up.abs() > LIMIT => (1.0 + LIMIT.copysign(up), 0.0),
            Self::SwigluOai => (1.0 + up, 1.0),
        }
    }
}

/// Where a gated activation finds its gate.
#[derive(Clone, Copy)]
pub(crate) enum Gate<'a> {
    /// Gate and up as two tensors `ne = [F, T]`.
    Split(&'a Tensor, &'a Tensor),
    /// One tensor `ne = [2F, T]`, the gate in the first half of each row.
    Fused(&'a Tensor),
}

/// `y = f(x)`. Operand: x.
struct Plain(Activation);

impl Kernel for Plain {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let x = op.operand(0).contiguous();
        let (first, dst) = out.share(x.len());
        values(self.0, &x[first..], dst);
    }
}

vectorized! {
    /// `y = f(x)`.
    fn values(f: Activation, x: &[f32], y: &mut [f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = f.value_and_slope::<FUSED>(x).0;
        }
    }
}

/// `y = f(gate) * g(up)`, where g is what the activation has for it, in general up itself. Operands: gate, up; or gate-up `ne = [2F, T]`.
struct Gated(Activation);

impl Kernel for Gated {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let [width, t, ..] = op.ne();
        let gates = op.operand(0);
        let ups = (op.n_operands() > 1).then(|| op.operand(1));
        let (first, rows) = out.share(t);
        for (i, y) in (first..).zip(rows.chunks_exact_mut(width)) {
            let (gate, up) = match ups {
                Some(ups) => (gates.row(i, 0), ups.row(i, 0)),
                None => gates.row(i, 0).split_at(width),
            };
            gated_row(self.0, gate, up, y);
        }
    }
}

vectorized! {
    /// `y = f(gate) * g(up)` of a row.
    fn gated_row(f: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
        for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
            *y = f.value_and_slope::<FUSED>(g).0 * f.gated_and_slope(u).0;
        }
    }
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

/// Gradients of [`Gated`] in the place of gate and up, which nothing reads any more: they are the largest
/// activations of a layer. Operands: gate, up, dy; or gate-up `ne = [2F, T]`, dy; behind them what is not read. The result is the gradient of the first
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
            let (gated, gated_slope) = f.gated_and_slope(*u);
            *g = gated * slope * dy;
            *u = value * gated_slope * dy;
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

impl Context {
    /// `f(x)`.
    pub(crate) fn activation(&self, f: Activation, x: &Tensor) -> Tensor {
        let of_ggml = match f {
            Activation::Silu => sys::ggml_silu,
            Activation::Gelu => sys::ggml_gelu,
            // As a gate only.
            Activation::SwigluOai => return self.custom(Plain(f), &[x], x.ne()),
        };
        if self.is_own() {
            return self.custom(Plain(f), &[x], x.ne());
        }
        // SAFETY: a valid description.
        self.build(&[x], |c| unsafe { of_ggml(c, x.raw()) })
    }

    /// `f(gate) * g(up)`, `ne = [F, T]`: g is what the activation has for it, in general up itself.
    pub(crate) fn gated(&self, f: Activation, gate: Gate<'_>) -> Tensor {
        let (srcs, width) = match gate {
            Gate::Split(gate, up) => (vec![gate, up], gate.ne()[0]),
            Gate::Fused(both) => (vec![both], both.ne()[0] / 2),
        };
        let [_, t, ..] = srcs[0].ne();
        let (alpha, limit) = (Activation::OAI_ALPHA, Activation::OAI_LIMIT);
        // ggml takes it apart only.
        let fused_oai = matches!((f, gate), (Activation::SwigluOai, Gate::Fused(_)));
        if self.is_own() || fused_oai {
            return self.custom(Gated(f), &srcs, [width, t, 1, 1]);
        }
        // SAFETY: valid descriptions of equal shapes.
        self.build(&srcs, |c| unsafe {
            match (f, gate) {
                (Activation::Silu, Gate::Split(g, u)) => {
                    sys::ggml_swiglu_split(c, g.raw(), u.raw())
                }
                (Activation::Gelu, Gate::Split(g, u)) => sys::ggml_geglu_split(c, g.raw(), u.raw()),
                (Activation::Silu, Gate::Fused(both)) => sys::ggml_swiglu(c, both.raw()),
                (Activation::Gelu, Gate::Fused(both)) => sys::ggml_geglu(c, both.raw()),
                (Activation::SwigluOai, Gate::Split(g, u)) => {
                    sys::ggml_swiglu_oai(c, g.raw(), u.raw(), alpha, limit)
                }
                (Activation::SwigluOai, Gate::Fused(_)) => unreachable!("computed above"),
            }
        })
    }

    /// Gradient of `f(x)` with respect to x.
    pub(crate) fn activation_back(&self, f: Activation, x: &Tensor, dy: &Tensor) -> Tensor {
        self.custom(ActivationBack(f), &[x, dy], x.ne())
    }

    /// Gradients of [`Context::gated`] with respect to gate and up (for a fused gate one tensor, `None` beside it), in the place of
    /// these: no operation that comes later may read them. `before` is what must have been computed, if dy says nothing of that.
    pub(crate) fn gated_back(
        &self,
        f: Activation,
        gate: Gate<'_>,
        dy: &Tensor,
        before: Option<&Tensor>,
    ) -> (Tensor, Option<Tensor>) {
        match gate {
            Gate::Fused(x) => {
                let kernel = GatedBack { f, fused: true };
                let srcs: Vec<&Tensor> = [dy].into_iter().chain(before).collect();
                (self.custom_inplace(kernel, x, &srcs), None)
            }
            Gate::Split(gate, up) => {
                let kernel = GatedBack { f, fused: false };
                let srcs: Vec<&Tensor> = [up, dy].into_iter().chain(before).collect();
                let dgate = self.custom_inplace(kernel, gate, &srcs);
                let dup = self.custom_inplace(After, up, &[&dgate]);
                (dgate, Some(dup))
            }
        }
    }
}
