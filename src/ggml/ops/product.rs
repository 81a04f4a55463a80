//! The derivative of a product with frozen weights.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::kernels::mul_mat_back;
use crate::ggml::tensor::Tensor;

/// `dx` of `y = W x`. Operands: W (any type), dy.
struct ProductBack;

impl Kernel for ProductBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (w, ty, row_bytes, [k, n]) = op.matrix(0);
        let dy = op.operand(1);
        assert_eq!(dy.ne[0], n);
        // SAFETY: W has N rows of K values, dy T rows of N, the result T rows of K; each thread writes its own part.
        unsafe {
            mul_mat_back(
                ty,
                w,
                row_bytes,
                k,
                n,
                dy.values.as_ptr(),
                dy.stride[1],
                out.as_mut_ptr(),
                k,
                dy.ne[1],
                op.ith,
                op.nth,
            );
        }
    }
}

impl Context {
    /// Gradient of `mul_mat(w, x)` with respect to x: w `ne = [K, N]`, dy `ne = [N, T]` -> `ne = [K, T]`. `w` must lie in
    /// memory as in the file (not repacked).
    pub(crate) fn mul_mat_back(&self, w: &Tensor, dy: &Tensor) -> Tensor {
        self.custom(ProductBack, &[w, dy], [w.ne()[0], dy.ne()[1], 1, 1])
    }
}
