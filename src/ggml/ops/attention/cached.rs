//! Keys and values of texts are stored in their pages, and attention reads them there.

use super::spans::Scoring;
use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output, Parts, small_parts};
use crate::ggml::kv::{KvLayout, KvPart, KvStep};
use crate::ggml::quant::row_from_f32;
use crate::ggml::tensor::Tensor;
use crate::kernels::{Attention, Layer, Text};
use std::sync::Arc;

/// A layer's keys and values in the texts of a step.
#[derive(Clone)]
struct Cache {
    step: Arc<KvStep>,
    class: usize,
    layer: Layer,
}

/// Stores rows. Operand: F32 `ne = [d, Hk, T]`. The result says nothing.
struct Store(Cache, KvPart);

impl Kernel for Store {
    fn run(&self, op: &Op<'_>, _: Output<'_>) {
        let Self(cache, part) = self;
        let (x, step) = (op.operand(0), cache.step.read());
        let writes = &step.class(cache.class).writes;
        let [d, hk, t, _] = x.ne;
        assert_eq!((d, hk), (cache.layer.heads.d, cache.layer.heads.hk));
        assert_eq!(t, writes.len());
        let (behind, bytes) = (cache.layer.behind[*part as usize], cache.layer.row_bytes());
        for token in op.share(t) {
            let (rows, place) = writes[token];
            for head in 0..hk {
                let at = rows.at(behind, bytes, head, place);
                // SAFETY: a row of a page that the step has to itself, and of this token only. ggml's tables are there while a graph is computed.
                unsafe {
                    let to = rows.first.cast_mut().add(at);
                    row_from_f32(cache.layer.ty, x.row(head, token), to);
                }
            }
        }
    }

    fn parts(&self, op: &Op<'_>) -> Parts {
        small_parts(op.operand(0).ne.iter().product())
    }
}

/// Attention, apart from what [`Merge`] does. Operands: q `ne = [d, H, T]`, and sinks `ne = [H]`, if there are any -> `ne = [d, H, T]`.
struct Attend(Cache, Scoring);

/// The rest of it, in place. Operands: what it replaces, and as [`Attend`].
struct Merge(Cache, Scoring);

/// Attention of a step's queries, operand `first` of the operation, and what stands behind it.
fn attention<'a>(
    op: &Op<'a>,
    first: usize,
    layer: Layer,
    texts: &'a [Text],
    Scoring { scale, softcap }: Scoring,
) -> Attention<'a> {
    let q = op.operand(first);
    assert_eq!([q.ne[0], q.ne[1]], [layer.heads.d, layer.heads.h]);
    assert_eq!(q.ne[2], texts.last().map_or(0, |text| text.tokens.end));
    let sinks = (op.n_operands() > first + 1).then(|| op.operand(first + 1).values);
    Attention {
        layer,
        q: q.values,
        q_stride: [q.stride[1], q.stride[2]],
        texts,
        scale,
        softcap,
        sinks,
    }
}

impl Kernel for Attend {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let Self(cache, scoring) = self;
        let step = cache.step.read();
        let texts = &step.class(cache.class).texts;
        // SAFETY: the texts' rows are kept and as the layer says, of a type that was asked for; there is room for the records of each layer; each
        // part writes its own.
        unsafe {
            attention(op, 0, cache.layer, texts, *scoring).part(
                op.ith,
                op.nth,
                out.as_mut_ptr(),
                step.records(),
            );
        }
    }

    fn parts(&self, _: &Op<'_>) -> Parts {
        Parts::AtMost(usize::MAX)
    }
}

impl Kernel for Merge {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let Self(cache, scoring) = self;
        let step = cache.step.read();
        let texts = &step.class(cache.class).texts;
        // SAFETY: the operation that writes them is over.
        let records = unsafe { step.written_records(cache.layer.n_records(texts)) };
        // SAFETY: as above; each part writes its own.
        unsafe {
            attention(op, 1, cache.layer, texts, *scoring).merge_part(
                records,
                op.ith,
                op.nth,
                out.as_mut_ptr(),
            );
        };
    }

    fn parts(&self, _: &Op<'_>) -> Parts {
        let step = self.0.step.read();
        let texts = &step.class(self.0.class).texts;
        small_parts(self.0.layer.n_records(texts))
    }
}

/// Keys or values of the only text of a step, for attention that reads them side by side, in place of what is there: `ne = [d, Hk, N]` of the cache's type,
/// zeros behind the last one.
struct Gather(Cache, KvPart);

impl Kernel for Gather {
    fn run(&self, op: &Op<'_>, _: Output<'_>) {
        let Self(cache, part) = self;
        let step = cache.step.read();
        let (text, n) = step.class(cache.class).only();
        let (behind, bytes) = (cache.layer.behind[*part as usize], cache.layer.row_bytes());
        let to = op.result();
        let [_, hk, room, _] = to.ne;
        assert!(n <= room && to.ty == cache.layer.ty);
        for i in op.share(hk * room) {
            let (head, key) = (i % hk, i / hk);
            // SAFETY: a row of the result, which is contiguous, and one of the text, which is kept.
            unsafe {
                let to = to.first.cast_mut().add(i * bytes);
                match text.row(key, n) {
                    Some((rows, at)) => {
                        let from = rows.first.add(rows.at(behind, bytes, head, at));
                        to.copy_from_nonoverlapping(from, bytes);
                    }
                    None => to.write_bytes(0, bytes),
                }
            }
        }
    }

    fn parts(&self, _: &Op<'_>) -> Parts {
        Parts::AtMost(usize::MAX)
    }
}

impl Context {
    /// Stores the keys or values of a step's tokens, `ne = [d, Hk, T]`, in layer `il`. The result must be demanded in front of what reads them, and says
    /// nothing.
    pub(crate) fn store_kv(
        &self,
        step: &Arc<KvStep>,
        layout: &KvLayout,
        il: usize,
        part: KvPart,
        rows: &Tensor,
    ) -> Tensor {
        let kernel = Store(cache(step, layout, il), part);
        self.custom(kernel, &[rows], [1, 1, 1, 1])
    }

    /// Attention of a step's tokens over the keys and values of their texts by our own kernel, see [`has_attention`](crate::kernels::has_attention):
    /// q `ne = [d, H, T]`, sinks F32 `ne = [H]` -> `ne = [d, H, T]`.
    pub(crate) fn cached_attention(
        &self,
        step: &Arc<KvStep>,
        layout: &KvLayout,
        il: usize,
        (q, sinks): (&Tensor, Option<&Tensor>),
        scoring: Scoring,
    ) -> Tensor {
        let cache = cache(step, layout, il);
        let srcs: Vec<_> = [q].into_iter().chain(sinks).collect();
        let y = self.custom(Attend(cache.clone(), scoring), &srcs, q.ne());
        self.custom_inplace(Merge(cache, scoring), &y, &srcs)
    }

    /// Keys or values of layer `il` of the step's only text in place of what is in `room`, `ne = [d, Hk, N]` of the cache's type: those that it has, then zeros.
    pub(crate) fn gather_kv(
        &self,
        step: &Arc<KvStep>,
        layout: &KvLayout,
        il: usize,
        part: KvPart,
        room: &Tensor,
    ) -> Tensor {
        self.custom_inplace(Gather(cache(step, layout, il), part), room, &[])
    }
}

fn cache(step: &Arc<KvStep>, layout: &KvLayout, il: usize) -> Cache {
    let (class, layer) = layout.layer(il);
    Cache {
        step: step.clone(),
        class,
        layer: *layer,
    }
}
