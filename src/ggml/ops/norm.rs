//! The norms and their derivatives.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::tensor::Tensor;
use crate::kernels::vectorized;
use ggml_sys as sys;

/// `y = norm(x) * w + b`, one row at a time. Operands: x, w, b if there is one.
struct Norm {
    /// Subtracts the mean (Ba et al. 2016), or does not (Zhang & Sennrich 2019).
    centred: bool,
    eps: f32,
}

impl Kernel for Norm {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (x, w) = (op.operand(0), op.operand(1));
        let b = (op.n_operands() > 2).then(|| op.operand(2).contiguous());
        let [n, n1, n2, _] = x.ne;
        let (first, dst) = out.share(n1 * n2);
        for (row, y) in (first..).zip(dst.chunks_exact_mut(n)) {
            let w = w.row(row % n1 % w.ne[1], 0);
            norm_row(self.centred, self.eps, x.nth_row(row), w, y);
            if let Some(b) = b {
                y.iter_mut().zip(b).for_each(|(y, b)| *y += b);
            }
        }
    }
}

/// Sums are of so many parts, which a CPU adds side by side.
const LANES: usize = 16;

/// The sum of `N` terms for each value.
#[inline(always)]
fn sums<const N: usize>(n: usize, term: impl Fn(usize) -> [f64; N]) -> [f64; N] {
    let mut lanes = [[0.0; LANES]; N];
    let mut add = |at: usize, lane: usize| {
        for (sums, term) in lanes.iter_mut().zip(term(at)) {
            sums[lane] += term;
        }
    };
    let whole = n - n % LANES;
    for first in (0..whole).step_by(LANES) {
        for lane in 0..LANES {
            add(first + lane, lane);
        }
    }
    for at in whole..n {
        add(at, at - whole);
    }
    lanes.map(|lanes| lanes.iter().sum())
}

/// What is subtracted from a row.
#[inline(always)]
fn mean(centred: bool, x: &[f32]) -> f64 {
    match centred {
        true => sums(x.len(), |i| [f64::from(x[i])])[0] / x.len() as f64,
        false => 0.0,
    }
}

/// What a row is multiplied by, given the sum of its squares.
#[inline(always)]
fn factor(square: f64, eps: f32, x: &[f32]) -> f64 {
    1.0 / (square / x.len() as f64 + f64::from(eps)).sqrt()
}

vectorized! {
    /// `norm(x) * w` of a row.
    fn norm_row(centred: bool, eps: f32, x: &[f32], w: &[f32], y: &mut [f32]) {
        let mean = mean(centred, x);
        let [square] = sums(x.len(), |i| [(f64::from(x[i]) - mean).powi(2)]);
        let (mean, r) = (mean as f32, factor(square, eps, x) as f32);
        for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
            *y = (x - mean) * r * w;
        }
    }
}

/// `dx` of `y = norm(x) * w`, one row at a time. Operands: x, w, dy.
struct NormBack {
    /// Subtracts the mean (Ba et al. 2016), or does not (Zhang & Sennrich 2019).
    centred: bool,
    eps: f32,
}

impl Kernel for NormBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (x, w, dy) = (op.operand(0), op.operand(1), op.operand(2));
        let [n, n1, n2, _] = x.ne;
        let (first, dst) = out.share(n1 * n2);
        for (row, dx) in (first..).zip(dst.chunks_exact_mut(n)) {
            let (x, dy) = (x.nth_row(row), dy.nth_row(row));
            let w = w.row(row % n1 % w.ne[1], 0);
            row_back(self.centred, self.eps, x, w, dy, dx);
        }
    }
}

vectorized! {
    /// `dx` of a row.
    fn row_back(centred: bool, eps: f32, x: &[f32], w: &[f32], dy: &[f32], dx: &mut [f32]) {
        let n = x.len() as f64;
        let mean = mean(centred, x);
        let [square, g_sum, gx_sum] = sums(x.len(), |i| {
            let (x, g) = (f64::from(x[i]) - mean, f64::from(w[i] * dy[i]));
            [x * x, g, g * x]
        });
        let r = factor(square, eps, x);
        // x hat = (x - mean) r; dx = r (g - mean(g) - x hat mean(g x hat)), without mean(g) if not centred.
        let along_x = (gx_sum * r * r / n) as f32;
        let along_1 = match centred {
            true => (g_sum / n) as f32,
            false => 0.0,
        };
        let (mean, r) = (mean as f32, r as f32);
        for (((dx, &x), &w), &dy) in dx.iter_mut().zip(x).zip(w).zip(dy) {
            *dx = r * (w * dy - along_1 - (x - mean) * along_x);
        }
    }
}

impl Context {
    /// `norm(x) * w + b`: x `ne = [n, n1, n2]`, w `ne = [n]` or [n, n1], b `ne = [n]`.
    pub(crate) fn scaled_norm(
        &self,
        centred: bool,
        eps: f32,
        x: &Tensor,
        w: &Tensor,
        b: Option<&Tensor>,
    ) -> Tensor {
        if self.is_own() {
            let mut srcs = vec![x, w];
            srcs.extend(b);
            return self.custom(Norm { centred, eps }, &srcs, x.ne());
        }
        // SAFETY: valid descriptions; shapes were validated upstream.
        let normed = self.build(&[x], |c| unsafe {
            match centred {
                true => sys::ggml_norm(c, x.raw(), eps),
                false => sys::ggml_rms_norm(c, x.raw(), eps),
            }
        });
        // SAFETY: as above.
        let y = self.build(&[&normed, w], |c| unsafe {
            sys::ggml_mul(c, normed.raw(), w.raw())
        });
        match b {
            Some(b) => self.add(&y, b),
            None => y,
        }
    }

    /// Gradient of `norm(x) * w` with respect to x: x and dy `ne = [n, n1, n2]`, w `ne = [n]` or [n, n1].
    pub(crate) fn norm_back(
        &self,
        centred: bool,
        eps: f32,
        x: &Tensor,
        w: &Tensor,
        dy: &Tensor,
    ) -> Tensor {
        self.custom(NormBack { centred, eps }, &[x, w, dy], x.ne())
    }
}
