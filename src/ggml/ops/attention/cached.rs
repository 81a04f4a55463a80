//! Attention over a cache.

use super::spans::Scoring;
use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Memory, Op, Output, Parts};
use crate::ggml::tensor::Tensor;
use crate::kernels::{Attention, Cached, Shape, merge_records};

/// The operands of both: q `ne = [d, H, T, S]`, k and v `ne = [d, Hk, N, S]`, mask F16 `ne = [N, T, 1, S]`.
fn attention<'a>(op: &Op<'a>, Scoring { scale, softcap }: Scoring) -> Attention<'a> {
    let (q, k, v) = (op.operand(0), op.memory(1), op.memory(2));
    let cached = |m: &Memory| Cached {
        first: m.first,
        ty: m.ty,
        nb: [m.nb[1], m.nb[2], m.nb[3]],
    };
    let shape = shape(q.ne, k.ne);
    assert_eq!(k.ne, v.ne);
    Attention {
        shape,
        q: q.values,
        q_stride: [q.stride[1], q.stride[2], q.stride[3]],
        k: cached(&k),
        v: cached(&v),
        mask: op.halves(3),
        scale,
        softcap,
    }
}

/// Of queries `ne = [d, H, T, S]` and keys `ne = [d, Hk, N, S]`.
fn shape([d, h, t, s]: [usize; 4], [_, hk, n, _]: [usize; 4]) -> Shape {
    Shape { d, h, hk, t, n, s }
}

/// All of it -> `ne = [d, H, T, S]`.
struct Whole(Scoring);

impl Kernel for Whole {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        // SAFETY: the cache has rows of these sizes, of types that were asked for; each thread writes its own part.
        unsafe { attention(op, self.0).part(op.ith, op.nth, out.as_mut_ptr()) };
    }

    fn parts(&self, _: &Op<'_>) -> Parts {
        Parts::AtMost(usize::MAX)
    }
}

/// Parts of it, to be merged -> `ne =` [`Shape::records`].
struct Records(Scoring);

impl Kernel for Records {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let attention = attention(op, self.0);
        let (first, records) = out.share(attention.shape.records()[1]);
        // SAFETY: as for the whole.
        unsafe { attention.records(first, records) };
    }

    fn parts(&self, _: &Op<'_>) -> Parts {
        Parts::AtMost(usize::MAX)
    }
}

/// What the parts are together. Operand: records -> `ne = [d, H, T, S]`.
struct Merge(Shape);

impl Kernel for Merge {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let [_, h, t, s] = op.ne();
        let (first, heads) = out.share(h * t * s);
        merge_records(&self.0, op.operand(0).contiguous(), first, heads);
    }
}

impl Context {
    /// Attention over a cache by our own kernel, see [`has_attention`](crate::ggml::has_attention): q `ne = [d, H, T, S]`, k and v
    /// `ne = [d, Hk, N, S]`, mask F16 `ne = [N, T, 1, S]` -> `ne = [d, H, T, S]`.
    pub(crate) fn cached_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: &Tensor,
        scoring: Scoring,
    ) -> Tensor {
        let (shape, srcs) = (shape(q.ne(), k.ne()), [q, k, v, mask]);
        if !shape.is_divided() {
            return self.custom(Whole(scoring), &srcs, q.ne());
        }
        let [values, n] = shape.records();
        let records = self.custom(Records(scoring), &srcs, [values, n, 1, 1]);
        self.custom(Merge(shape), &[&records], q.ne())
    }
}
