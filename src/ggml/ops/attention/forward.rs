//! `O = P V`.

use super::operands::Operands;
use super::spans::{Span, Spans};
use super::weights::weights;
use super::{PackedAttention, SCRATCH, Scratch, store_head};
use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output, Parts};
use crate::ggml::tensor::Tensor;
use crate::kernels::{RowMajor, Strided, gemm, room};

/// Operands: those of [`PackedAttention`] -> `ne = [H d, T]`.
struct Attention(Spans);

impl Kernel for Attention {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let spans = &self.0;
        let x = Operands::new(op, spans, op.n_operands());
        let h = x.q.ne[1];
        let list: Vec<_> = spans.spans().collect();
        SCRATCH.with_borrow_mut(|s| {
            for unit in op.share(h * list.len()) {
                // SAFETY: values of one head and one span, which only this unit writes.
                unsafe { attend(spans, &x, &list[unit / h], unit % h, s, &out) };
            }
        });
    }

    fn parts(&self, _: &Op<'_>) -> Parts {
        Parts::AtMost(usize::MAX)
    }
}

/// The output of one head for the tokens of one span.
///
/// # Safety
/// No other thread may write it.
unsafe fn attend(
    spans: &Spans,
    x: &Operands<'_>,
    span: &Span,
    head: usize,
    s: &mut Scratch,
    out: &Output<'_>,
) {
    let [d, h, ..] = x.q.ne;
    s.kv.gather(x, spans, (span, span.keys()), head);
    for tile in spans.tiles(span) {
        let p = weights(x, spans, (&tile, head), &s.kv.k_t, &mut s.p, &mut s.slopes);
        let width = tile.keys.len();
        let o = room(&mut s.rows, tile.n * d);
        gemm(
            false,
            [tile.n, d, width],
            Strided::rows(p, width),
            RowMajor(&s.kv.v[tile.keys.start * d..], d),
            RowMajor(o, d),
        );
        // SAFETY: the caller's promise.
        unsafe { store_head(out, d, (head, h), tile.token, o) };
    }
}

impl Context {
    /// Scaled dot-product attention over packed rows -> `ne = [H d, T]`.
    pub(crate) fn packed_attention(&self, spans: &Spans, of: PackedAttention<'_>) -> Tensor {
        let [d, h, t, _] = of.q.ne();
        assert_eq!(spans.n_tokens(), t);
        let kernel = Attention(spans.clone());
        self.custom(kernel, &of.operands(), [d * h, t, 1, 1])
    }
}
