//! Derivatives of the norms.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::kernels::vectorized;
use crate::ggml::tensor::Tensor;

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
            let (i1, i2) = (row % n1, row / n1);
            let (x, dy) = (x.row(i1, i2), dy.row(i1, i2));
            let w = w.row(i1 % w.ne[1], 0);
            row_back(self.centred, self.eps, x, w, dy, dx);
        }
    }
}

vectorized! {
    /// `dx` of a row.
    fn row_back(centred: bool, eps: f32, x: &[f32], w: &[f32], dy: &[f32], dx: &mut [f32]) {
        let n = x.len() as f64;
        let mean = match centred {
            true => x.iter().map(|&v| f64::from(v)).sum::<f64>() / n,
            false => 0.0,
        };
        let (mut square, mut g_sum, mut gx_sum) = (0.0f64, 0.0f64, 0.0f64);
        for ((&x, &w), &dy) in x.iter().zip(w).zip(dy) {
            let (x, g) = (f64::from(x) - mean, f64::from(w * dy));
            square += x * x;
            g_sum += g;
            gx_sum += g * x;
        }
        let r = 1.0 / (square / n + f64::from(eps)).sqrt();
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
