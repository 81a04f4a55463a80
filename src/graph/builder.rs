//! The verbs that the decoder is written in. All graph building goes through here, so that what runs can also be trained:
//! while recording, each verb puts its derivative on the tape.

use super::tape::Tape;
use crate::ggml::{Context, Gate, GraphShape, Operations, PackedAttention, Scoring, Spans, Tensor};
use crate::kernels::Bits;
use crate::model::{FeedForward, Hidden, Linear, Mlp, Norm, NormKind};
use crate::operation::{Activation, Rope};
use std::cell::RefCell;
use std::sync::Arc;

/// Builds one graph.
pub(crate) struct Builder {
    ctx: Context,
    /// What must be computed, in this order: writes to the KV cache come before the reads that depend on them.
    outputs: Vec<Tensor>,
    /// While recording.
    tape: RefCell<Option<Tape>>,
    /// Bits of a row must not depend on how many there are.
    invariant: bool,
    /// The last tensor that was packed, and what it was packed to.
    packed: RefCell<Option<(Tensor, Bits, Tensor)>>,
}

impl Builder {
    /// Nothing yet.
    pub(crate) fn new(operations: Operations) -> Self {
        Self {
            ctx: Context::new(operations),
            outputs: Vec::new(),
            tape: RefCell::new(None),
            invariant: false,
            packed: RefCell::new(None),
        }
    }

    /// The same, and bits of a row do not depend on how many there are.
    pub(crate) fn invariant(self) -> Self {
        Self {
            invariant: true,
            ..self
        }
    }

    /// The context, for what is not differentiated.
    pub(crate) fn ctx(&self) -> &Context {
        &self.ctx
    }

    /// Demands that `t` is computed, after everything demanded before.
    pub(crate) fn demand(&mut self, t: &Tensor) {
        self.outputs.push(t.clone());
    }

    /// Demands that `t` is computed and can be read.
    pub(crate) fn output(&mut self, t: Tensor) -> Tensor {
        let t = self.ctx.output(t);
        self.demand(&t);
        t
    }

    /// Names `t`, of layer `layer` if it is one's, as llama.cpp does.
    pub(crate) fn named(&self, name: &str, layer: Option<usize>, t: Tensor) -> Tensor {
        self.ctx.named(name, layer, t)
    }

    /// The graph that computes everything demanded.
    pub(crate) fn finish(self) -> GraphShape {
        GraphShape::new(self.ctx, &self.outputs)
    }

    /// Starts recording: what is built from now on can be differentiated with respect to `variables`.
    pub(crate) fn record<'a>(&mut self, variables: impl IntoIterator<Item = &'a Tensor>) {
        self.tape.replace(Some(Tape::new(variables)));
    }

    /// Ends recording.
    ///
    /// # Panics
    /// If nothing is being recorded.
    pub(crate) fn recorded(&mut self) -> Tape {
        self.tape.take().expect("recording was started")
    }

    fn note(
        &self,
        operands: &[&Tensor],
        result: &Tensor,
        vjp: impl FnOnce(&Context, &Tensor) -> Vec<Tensor> + 'static,
    ) {
        if let Some(tape) = &mut *self.tape.borrow_mut() {
            tape.record(operands, result, vjp);
        }
    }

    /// `W x + b`: x `ne = [K, T]` -> `ne = [N, T]`.
    pub(crate) fn linear(&self, l: &Linear, x: &Tensor) -> Tensor {
        let y = match l.own(x.ne()[1], self.invariant) {
            Some(bits) => (self.ctx).mul_mat_packed(l.mapped(), &self.pack(x, bits), bits),
            None => self.ctx.mul_mat(&l.w, x),
        };
        let y = match &l.b {
            Some(b) => self.ctx.add(&y, b),
            None => y,
        };
        let w = l.mapped().clone();
        self.note(&[x], &y, move |c, dy| vec![c.mul_mat_back(&w, dy)]);
        y
    }

    /// `x` as our own products read it: once for all that read the same.
    fn pack(&self, x: &Tensor, bits: Bits) -> Tensor {
        let mut last = self.packed.borrow_mut();
        match &*last {
            Some((of, to, packed)) if of.id() == x.id() && *to == bits => packed.clone(),
            _ => {
                let packed = self.ctx.pack(x, bits);
                *last = Some((x.clone(), bits, packed.clone()));
                packed
            }
        }
    }

    /// Norm over rows, then weight and bias.
    pub(crate) fn norm(&self, kind: NormKind, eps: f32, n: &Norm, x: &Tensor) -> Tensor {
        self.norm_with(kind, eps, &n.w, n.b.as_ref(), x)
    }

    /// Norm over rows, then a weight that is broadcast over the remaining dimensions.
    pub(crate) fn scaled_norm(
        &self,
        kind: NormKind,
        eps: f32,
        weight: &Tensor,
        x: &Tensor,
    ) -> Tensor {
        self.norm_with(kind, eps, weight, None, x)
    }

    fn norm_with(
        &self,
        kind: NormKind,
        eps: f32,
        weight: &Tensor,
        bias: Option<&Tensor>,
        x: &Tensor,
    ) -> Tensor {
        let centred = kind == NormKind::Layer;
        let y = self.ctx.scaled_norm(centred, eps, x, weight, bias);
        let (input, weight) = (x.clone(), weight.clone());
        self.note(&[x], &y, move |c, dy| {
            vec![c.norm_back(centred, eps, &input, &weight, dy)]
        });
        y
    }

    /// `a + b`.
    pub(crate) fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let y = self.ctx.add(a, b);
        self.note(&[a, b], &y, |_, dy| vec![dy.clone(), dy.clone()]);
        y
    }

    /// `s * x`; nothing for s = 1.
    pub(crate) fn scale(&self, x: &Tensor, s: f32) -> Tensor {
        if s == 1.0 {
            return x.clone();
        }
        let y = self.ctx.scale(x, s);
        self.note(&[x], &y, move |c, dy| vec![c.scale(dy, s)]);
        y
    }

    /// `cap * tanh(s * x / cap)`, or `s * x` without a cap (0). Nothing else may read `x`.
    pub(crate) fn scale_capped(&self, x: &Tensor, s: f32, cap: f32) -> Tensor {
        if cap == 0.0 {
            return self.scale(x, s);
        }
        let y = self.ctx.softcap(x, s, cap);
        let capped = y.clone();
        self.note(&[x], &y, move |c, dy| {
            vec![c.softcap_back(s, cap, &capped, dy)]
        });
        y
    }

    /// Rows of a table, as F32: table `ne = [D, V]`, ids I32 `ne = [T]` -> `ne = [D, T]`.
    pub(crate) fn get_rows(&self, table: &Tensor, ids: &Tensor) -> Tensor {
        let y = self.ctx.get_rows(table, ids);
        let (n, ids) = (table.ne()[1], ids.clone());
        self.note(&[table], &y, move |c, dy| {
            vec![c.sum_rows_by_id(dy, &ids, n)]
        });
        y
    }

    /// Virtual tokens among real ones: x `ne = [D, T]`, values `ne = [D, P]`, slots I32 `ne = [T]` (-1: the real one).
    pub(crate) fn place_rows(&self, x: &Tensor, values: &Tensor, slots: &Tensor) -> Tensor {
        let y = self.ctx.place_rows(x, values, slots);
        let (n, slots) = (values.ne()[1], slots.clone());
        // Embeddings of real tokens are frozen, so nothing asks for the gradient of x.
        self.note(&[values], &y, move |c, dy| {
            vec![c.sum_rows_by_id(dy, &slots, n)]
        });
        y
    }

    /// Rotary embedding of heads: x `ne = [d, H, T]`.
    pub(crate) fn rope(
        &self,
        x: &Tensor,
        pos: &Tensor,
        factors: Option<&Tensor>,
        rope: &Rope,
    ) -> Tensor {
        let y = self.ctx.rope(x, pos, factors, rope);
        let (pos, factors, rope) = (pos.clone(), factors.cloned(), *rope);
        self.note(&[x], &y, move |c, dy| {
            vec![c.rope_back(dy, &pos, factors.as_ref(), &rope)]
        });
        y
    }

    /// Splits rows into heads: `ne = [H d, T]` -> [d, H, T].
    pub(crate) fn heads(&self, x: &Tensor, head_dim: usize) -> Tensor {
        let [width, t, ..] = x.ne();
        let size = size_of::<f32>();
        let nb = [head_dim * size, x.nb()[1], x.nb()[1] * t];
        let y = self.ctx.view(x, [head_dim, width / head_dim, t, 1], nb, 0);
        self.note(&[x], &y, move |c, dy| vec![c.reshape(dy, &[width, t])]);
        y
    }

    /// `width` values that start `offset` values into each row: `ne = [W, T]` -> [width, T].
    pub(crate) fn view_columns(&self, x: &Tensor, width: usize, offset: usize) -> Tensor {
        let [all, t, ..] = x.ne();
        let nb = x.nb();
        let y = self.ctx.view(
            x,
            [width, t, 1, 1],
            [nb[1], nb[1] * t, nb[1] * t],
            offset * size_of::<f32>(),
        );
        self.note(&[x], &y, move |c, dy| vec![c.pad_columns(dy, all, offset)]);
        y
    }

    /// The feed-forward network behind its norm, with activation `f`: x `ne = [D, T]` -> `ne = [D, T]`.
    pub(crate) fn feed_forward(
        &self,
        f: Activation,
        ffn: &FeedForward,
        layer: Option<usize>,
        x: &Tensor,
    ) -> Tensor {
        match ffn {
            FeedForward::Dense(mlp) => self.mlp(f, mlp, x, false),
            FeedForward::Experts(experts) => self.mixture(f, experts, layer, x),
        }
    }

    /// A dense network with activation `f`: x `ne = [D, T]` -> `ne = [D, T]`. `is_read`: the derivative of what comes of it reads its result.
    fn mlp(&self, f: Activation, mlp: &Mlp, x: &Tensor, is_read: bool) -> Tensor {
        let h = match &mlp.hidden {
            Hidden::Plain(up) => {
                let up = self.linear(up, x);
                let h = self.ctx.activation(f, &up);
                let input = up.clone();
                self.note(&[&up], &h, move |c, dh| {
                    vec![c.activation_back(f, &input, dh)]
                });
                h
            }
            Hidden::Gated { gate, up } => {
                let up = self.linear(up, x);
                let gate = self.linear(gate, x);
                self.gated(f, &gate, &up, is_read)
            }
            Hidden::Fused(both) => {
                let both = self.linear(both, x);
                let h = self.ctx.gated(f, Gate::Fused(&both));
                let (input, read) = (both.clone(), is_read.then(|| h.clone()));
                self.note(&[&both], &h, move |c, dh| {
                    vec![c.gated_back(f, Gate::Fused(&input), dh, read.as_ref()).0]
                });
                h
            }
        };
        self.linear(&mlp.down, &h)
    }

    /// `f(gate) * up`, of which nothing else may read either: `ne = [F, T]`. Gradients take their place, and where layers are computed twice nothing but
    /// `is_read` says that the second time the result must be there before: without a derivative that reads what comes of it, nobody computes it.
    fn gated(&self, f: Activation, gate: &Tensor, up: &Tensor, is_read: bool) -> Tensor {
        let h = self.ctx.gated(f, Gate::Split(gate, up));
        let (g, u, read) = (gate.clone(), up.clone(), is_read.then(|| h.clone()));
        self.note(&[gate, up], &h, move |c, dh| {
            let (dgate, dup) = c.gated_back(f, Gate::Split(&g, &u), dh, read.as_ref());
            vec![dgate, dup.expect("two operands")]
        });
        h
    }

    /// Attention over packed rows, for training -> `ne = [H d, T]`. Sinks are frozen.
    pub(crate) fn packed_attention(&self, spans: &Arc<Spans>, of: PackedAttention<'_>) -> Tensor {
        let y = self.ctx.packed_attention(spans, of);
        let (spans, sinks) = (spans.clone(), of.sinks.cloned());
        let operands = PackedAttention { sinks: None, ..of }.operands();
        let kept: Vec<Tensor> = operands.iter().map(|&t| t.clone()).collect();
        self.note(&operands, &y, move |c, dy| {
            let of = PackedAttention {
                q: &kept[0],
                k: &kept[1],
                v: &kept[2],
                prefix: kept.get(3).zip(kept.get(4)).map(|(k, v)| [k, v]),
                sinks: sinks.as_ref(),
            };
            let grads = c.packed_attention_back(&spans, of, dy);
            let mut parts = vec![grads.q, grads.k, grads.v];
            parts.extend(grads.prefix.into_iter().flatten());
            parts
        });
        y
    }

    /// Scaled dot-product attention (Vaswani et al. 2017) over grouped heads by ggml: q `ne = [d, H, T]`, k and v `ne = [d, Hk, N]`,
    /// mask F16 `ne = [N, T]`, sinks F32 `ne = [H]` -> `ne = [H d, T]`. Either fused, or as scores, softmax and values one after the other. For inference only: it is
    /// not recorded.
    pub(crate) fn attention(
        &self,
        q: &Tensor,
        [k, v]: [&Tensor; 2],
        (mask, sinks): (&Tensor, Option<&Tensor>),
        scoring: Scoring,
        fused: bool,
    ) -> Tensor {
        const BY_HEAD: [i32; 4] = [0, 2, 1, 3];
        let c = &self.ctx;
        let [d, h, t, _] = q.ne();
        let [q, k, v] = [q, k, v].map(|x| c.permute(x, BY_HEAD));
        if fused {
            let heads = c.flash_attn(&q, [&k, &v], mask, sinks, scoring);
            return c.reshape(&heads, &[d * h, t]);
        }
        let scores = c.mul_mat_f32(&k, &q);
        let Scoring { scale, softcap } = scoring;
        let weights = if softcap == 0.0 {
            c.soft_max(&scores, mask, sinks, scale)
        } else {
            c.soft_max(
                &self.scale_capped(&scores, scale, softcap),
                mask,
                sinks,
                1.0,
            )
        };
        let values = c.mul_mat(&c.cont(&c.transpose(&v)), &weights);
        c.reshape(&c.cont(&c.permute(&values, BY_HEAD)), &[d * h, t])
    }
}

mod experts;
#[cfg(test)]
mod tests;
