//! Products with frozen weights and their derivative.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output, Parts, small_parts_of};
use crate::ggml::quant::row_to_f32;
use crate::ggml::tensor::Tensor;
use crate::kernels::{Bits, MulMat, MulMatBack, pack_row, packed_words};

/// Rows in the form that [`PackedProduct`] reads, rounded to so many bits. Operand: x.
struct Pack {
    bits: Bits,
    /// However many there are, products read few of them at a time.
    few: bool,
}

impl Pack {
    /// Rows that they are packed for, where there are `t`.
    fn rows(&self, t: usize) -> usize {
        if self.few { 1 } else { t }
    }
}

impl Kernel for Pack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let x = op.operand(0);
        let (first, packed) = out.share(x.ne[1]);
        let (k, t, bits) = (x.ne[0], self.rows(x.ne[1]), self.bits);
        let rows = packed.chunks_exact_mut(packed_words(k, t, bits));
        for (i, to) in rows.enumerate() {
            pack_row(x.row(first + i, 0), t, bits, to);
        }
    }

    fn parts(&self, op: &Op<'_>) -> Parts {
        let [words, t, ..] = op.ne();
        small_parts_of(t, words * t)
    }
}

/// `y = W x`. Operands: W (any type that has the kernel), x packed to so many bits, or as it is.
struct PackedProduct(Bits);

impl Kernel for PackedProduct {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let w = op.memory(0);
        let [k, n, ..] = w.ne;
        let x = op.operand(1);
        let &Self(bits) = self;
        assert_eq!(x.ne[0], packed_words(k, x.ne[1], bits));
        let product = MulMat {
            ty: w.ty,
            to_f32: row_to_f32,
            w: w.first,
            row_bytes: w.nb[1],
            k,
            n,
            x: x.values.as_ptr(),
            x_stride: x.stride[1],
            bits,
            t: x.ne[1],
            y: out.as_mut_ptr(),
        };
        // SAFETY: W has N rows of K values, X T packed ones, the result T rows of N; each thread writes its own part.
        unsafe { product.part(op.ith, op.nth) };
    }

    fn parts(&self, op: &Op<'_>) -> Parts {
        let [n, t, ..] = op.ne();
        MulMat::most_parts(op.memory(0).ty, self.0, n, t).map_or(Parts::Long, Parts::AtMost)
    }
}

/// `dx` of `y = W x`. Operands: W (any type), dy.
struct ProductBack;

impl Kernel for ProductBack {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let w = op.memory(0);
        let [k, n, ..] = w.ne;
        let dy = op.operand(1);
        assert_eq!(dy.ne[0], n);
        let product = MulMatBack {
            ty: w.ty,
            to_f32: row_to_f32,
            w: w.first,
            row_bytes: w.nb[1],
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

    fn parts(&self, op: &Op<'_>) -> Parts {
        Parts::Pieces(MulMatBack::pieces(op.ne()[0]))
    }
}

impl Context {
    /// Rows x `ne = [K, T]` for [`Context::mul_mat_packed`], for as many products as read them.
    pub(crate) fn pack(&self, x: &Tensor, bits: Bits) -> Tensor {
        self.pack_as(x, Pack { bits, few: false })
    }

    /// Rows x `ne = [K, T]` for [`Context::mul_mat_experts`].
    pub(crate) fn pack_few(&self, x: &Tensor, bits: Bits) -> Tensor {
        self.pack_as(x, Pack { bits, few: true })
    }

    fn pack_as(&self, x: &Tensor, pack: Pack) -> Tensor {
        if pack.bits == Bits::All {
            return x.clone();
        }
        let [k, t, ..] = x.ne();
        let words = packed_words(k, pack.rows(t), pack.bits);
        self.custom(pack, &[x], [words, t, 1, 1])
    }

    /// `W x` by our own kernel, see [`has_mul_mat`](crate::ggml::has_mul_mat): w `ne = [K, N]` as it lies in the file, rows
    /// x `ne = [K, T]` as [`Context::pack`] gives them for as many bits -> `ne = [N, T]`.
    pub(crate) fn mul_mat_packed(&self, w: &Tensor, packed: &Tensor, bits: Bits) -> Tensor {
        let ne = [w.ne()[1], packed.ne()[1], 1, 1];
        self.custom(PackedProduct(bits), &[w, packed], ne)
    }

    /// Gradient of `mul_mat(w, x)` with respect to x: w `ne = [K, N]`, dy `ne = [N, T]` -> `ne = [K, T]`. `w` must lie in
    /// memory as in the file (not repacked).
    pub(crate) fn mul_mat_back(&self, w: &Tensor, dy: &Tensor) -> Tensor {
        self.custom(ProductBack, &[w, dy], [w.ne()[0], dy.ne()[1], 1, 1])
    }
}
