//! The derivative of a product with frozen weights.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::kernels::MulMatBack;
use crate::ggml::tensor::Tensor;

/// `dx` of `y = W x`. Operands: W (any type), dy.
struct ProductBack;

impl Kernel for ProductBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (w, ty, row_bytes, [k, n]) = op.matrix(0);
        let dy = op.operand(1);
        assert_eq!(dy.ne[0], n);
        let product = MulMatBack {
            ty,
            w,
            row_bytes,
            k,
            n,
            dy: dy.values.as_ptr(),
            dy_stride: dy.stride[1],
            dx: out.as_mut_ptr(),
            dx_stride: k,
            t: dy.ne[1],
        };
        // SAFETY: W has N rows of K values, dY T rows of N, the result T rows of K; each thread writes its own part.
        unsafe { product.part(op.ith, op.nth) }
    }
}

impl Context {
    /// Gradient of `mul_mat(w, x)` with respect to x: w `ne = [K, N]`, dy `ne = [N, T]` -> `ne = [K, T]`. `w` must lie in
    /// memory as in the file (not repacked).
    pub(crate) fn mul_mat_back(&self, w: &Tensor, dy: &Tensor) -> Tensor {
        self.custom(ProductBack, &[w, dy], [w.ne()[0], dy.ne()[1], 1, 1])
    }
}
