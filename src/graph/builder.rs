//! The verbs that the decoder is written in. All graph building goes through here, so that what runs can also be trained:
//! a verb is the place where its derivative will be recorded.

use crate::ggml::{Context, Rope, Tensor};
use crate::model::{Activation, Layer, Linear, Norm, NormKind};
use std::sync::Arc;

/// Builds one graph in one context.
pub(crate) struct Builder {
    ctx: Arc<Context>,
    /// What must be computed, in this order: writes to the KV cache come before the reads that depend on them.
    outputs: Vec<Tensor>,
}

impl Builder {
    /// Builds in `ctx`.
    pub(crate) fn new(ctx: Arc<Context>) -> Self {
        Self {
            ctx,
            outputs: Vec::new(),
        }
    }

    /// The context, for inputs.
    pub(crate) fn ctx(&self) -> &Arc<Context> {
        &self.ctx
    }

    /// Demands that `t` is computed, after everything demanded before.
    pub(crate) fn demand(&mut self, t: &Tensor) {
        self.outputs.push(t.clone());
    }

    /// Everything demanded.
    pub(crate) fn into_outputs(self) -> Vec<Tensor> {
        self.outputs
    }

    /// `W x + b`: x `ne = [K, T]` -> `ne = [N, T]`.
    pub(crate) fn linear(&self, l: &Linear, x: &Tensor) -> Tensor {
        let y = self.ctx.mul_mat(&l.w, x);
        match &l.b {
            Some(b) => self.ctx.add(&y, b),
            None => y,
        }
    }

    /// Norm over rows, then weight and bias.
    pub(crate) fn norm(&self, kind: NormKind, eps: f32, n: &Norm, x: &Tensor) -> Tensor {
        let y = self.scaled_norm(kind, eps, &n.w, x);
        match &n.b {
            Some(b) => self.ctx.add(&y, b),
            None => y,
        }
    }

    /// Norm over rows, then a weight that is broadcast over the remaining dimensions.
    pub(crate) fn scaled_norm(
        &self,
        kind: NormKind,
        eps: f32,
        weight: &Tensor,
        x: &Tensor,
    ) -> Tensor {
        let y = match kind {
            NormKind::Rms => self.ctx.rms_norm(x, eps),
            NormKind::Layer => self.ctx.norm(x, eps),
        };
        self.ctx.mul(&y, weight)
    }

    /// `a + b`.
    pub(crate) fn add(&self, a: &Tensor, b: &Tensor) -> Tensor {
        self.ctx.add(a, b)
    }

    /// `s * x`; nothing for s = 1.
    pub(crate) fn scale(&self, x: &Tensor, s: f32) -> Tensor {
        if s == 1.0 {
            x.clone()
        } else {
            self.ctx.scale(x, s)
        }
    }

    /// `cap * tanh(s * x / cap)`, or `s * x` without a cap (0).
    pub(crate) fn scale_capped(&self, x: &Tensor, s: f32, cap: f32) -> Tensor {
        if cap == 0.0 {
            return self.scale(x, s);
        }
        let y = self.ctx.tanh(&self.ctx.scale(x, s / cap));
        self.ctx.scale(&y, cap)
    }

    /// Rows of a table, as F32.
    pub(crate) fn get_rows(&self, table: &Tensor, ids: &Tensor) -> Tensor {
        self.ctx.get_rows(table, ids)
    }

    /// Rotary embedding of heads: x `ne = [d, H, T]`.
    pub(crate) fn rope(
        &self,
        x: &Tensor,
        pos: &Tensor,
        factors: Option<&Tensor>,
        rope: &Rope,
    ) -> Tensor {
        self.ctx.rope(x, pos, factors, rope)
    }

    /// Splits rows into heads: `ne = [H d, T]` -> [d, H, T].
    pub(crate) fn heads(&self, x: &Tensor, head_dim: usize) -> Tensor {
        let [width, t, ..] = x.ne();
        self.view_heads(x, head_dim, width / head_dim, t, 0)
    }

    /// `n_head` heads that start `offset` values into each row: `ne = [W, T]` -> [d, n_head, T].
    pub(crate) fn view_heads(
        &self,
        x: &Tensor,
        head_dim: usize,
        n_head: usize,
        t: usize,
        offset: usize,
    ) -> Tensor {
        let size = size_of::<f32>();
        let nb = [head_dim * size, x.nb()[1], x.nb()[1] * t];
        self.ctx
            .view(x, [head_dim, n_head, t, 1], nb, offset * size)
    }

    /// `width` values that start `offset` values into each row: `ne = [W, T]` -> [width, T].
    pub(crate) fn view_columns(&self, x: &Tensor, width: usize, offset: usize) -> Tensor {
        let t = x.ne()[1];
        let nb = x.nb();
        self.ctx.view(
            x,
            [width, t, 1, 1],
            [nb[1], nb[1] * t, nb[1] * t],
            offset * size_of::<f32>(),
        )
    }

    /// The feed-forward network behind its norm: x `ne = [D, T]` -> `ne = [D, T]`.
    pub(crate) fn feed_forward(&self, activation: Activation, layer: &Layer, x: &Tensor) -> Tensor {
        let up = self.linear(&layer.ffn_up, x);
        let h = match (activation, &layer.ffn_gate) {
            (Activation::Gelu, _) => self.ctx.gelu(&up),
            (Activation::SwiGlu, Some(gate)) => self.ctx.swiglu(&self.linear(gate, x), &up),
            (Activation::SwiGlu, None) => self.ctx.swiglu_fused(&up),
            (Activation::GeGlu, Some(gate)) => self.ctx.geglu(&self.linear(gate, x), &up),
            (Activation::GeGlu, None) => unreachable!("weights are loaded with a gate"),
        };
        self.linear(&layer.ffn_down, &h)
    }

    /// Scaled dot-product attention (Vaswani et al. 2017) over grouped heads, each of S streams on its own:
    /// q `ne = [d, H, T, S]`, k and v `ne = [d, Hk, N, S]`, mask F16 `ne = [N, T, 1, S]` -> `ne = [H d, T S]`.
    /// `flash` selects the fused kernel. `softcap` 0 is none.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        mask: &Tensor,
        scale: f32,
        softcap: f32,
        flash: bool,
    ) -> Tensor {
        const BY_HEAD: [i32; 4] = [0, 2, 1, 3];
        let c = &self.ctx;
        let [d, h, t, s] = q.ne();
        let (q, k, v) = (
            c.permute(q, BY_HEAD),
            c.permute(k, BY_HEAD),
            c.permute(v, BY_HEAD),
        );
        if flash {
            return c.reshape(
                &c.flash_attn(&q, &k, &v, mask, scale, softcap),
                &[d * h, t * s],
            );
        }
        let scores = c.mul_mat_f32(&k, &q);
        let weights = if softcap == 0.0 {
            c.soft_max(&scores, mask, scale)
        } else {
            c.soft_max(&self.scale_capped(&scores, scale, softcap), mask, 1.0)
        };
        let values = c.mul_mat(&c.cont(&c.transpose(&v)), &weights);
        c.reshape(&c.cont(&c.permute(&values, BY_HEAD)), &[d * h, t * s])
    }
}
