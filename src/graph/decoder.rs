//! The decoder of every supported architecture.

use super::builder::Builder;
use super::input::Inputs;
use crate::ggml::Tensor;
use crate::model::{HParams, Qkv, Weights};

/// Where keys and values go and come from: the KV cache at inference.
pub(crate) trait KeyValues {
    /// Takes the keys and values of the current tokens: `ne = [d, Hk, T]`, rotated.
    fn store(&mut self, b: &mut Builder, il: usize, k: &Tensor, v: &Tensor);
    /// Attends from the queries, `ne = [d, H, T]`, to everything stored, and to a sink of each head if there are such, F32 `ne = [H]` -> `ne = [H d, T]`.
    fn attend(&mut self, b: &mut Builder, il: usize, q: &Tensor, sinks: Option<&Tensor>) -> Tensor;
}

/// The decoder of one base, for graphs over one set of inputs.
pub(crate) struct Decoder<'a> {
    hp: &'a HParams,
    w: &'a Weights,
    inp: &'a Inputs,
    rope_factors: Option<&'a Tensor>,
}

impl<'a> Decoder<'a> {
    /// `long_context` selects LongRoPE's factors for contexts beyond the original length.
    pub(crate) fn new(
        hp: &'a HParams,
        w: &'a Weights,
        inp: &'a Inputs,
        long_context: bool,
    ) -> Self {
        let rope_factors = w.rope_freqs.as_ref().or(if long_context {
            w.rope_long.as_ref()
        } else {
            w.rope_short.as_ref()
        });
        Self {
            hp,
            w,
            inp,
            rope_factors,
        }
    }

    /// Everything from inputs to logits F32 `ne = [V, n_outputs]`; `None` if none are wanted.
    pub(crate) fn run(
        &self,
        b: &mut Builder,
        n_outputs: usize,
        kv: &mut impl KeyValues,
    ) -> Option<Tensor> {
        let mut x = self.embed(b);
        let last = self.hp.n_layer() - 1;
        for il in 0..last {
            x = self.layer(b, il, &x, None, kv);
        }
        if n_outputs == 0 {
            self.last_keys(b, &x, kv);
            return None;
        }
        x = self.layer(b, last, &x, self.inp.outputs.as_ref(), kv);
        let logits = b.named("result_output", None, self.head(b, &x));
        Some(b.output(logits))
    }

    /// What enters the first layer, `ne = [D, T]`.
    pub(crate) fn embed(&self, b: &Builder) -> Tensor {
        let (hp, w, inp) = (self.hp, self.w, self.inp);
        let mut x = b.scale(&b.get_rows(&w.token_embd, &inp.tokens), hp.token_scale);
        if let Some(rows) = &inp.virtual_tokens {
            x = b.place_rows(&x, &rows.values, &rows.slots);
        }
        x = b.scale(&x, hp.embedding_scale);
        if let Some(table) = &w.position_embd {
            x = b.add(&x, &b.get_rows(table, &inp.positions));
        }
        b.named("inp_scaled", None, x)
    }

    /// Rotated and scaled queries `ne = [d, H, T]`, keys and values `ne = [d, Hk, T]` of layer `il`, and what they were computed from.
    fn queries_keys_values(
        &self,
        b: &Builder,
        il: usize,
        x: &Tensor,
    ) -> (Tensor, Tensor, Tensor, Tensor) {
        let (hp, layer, at) = (self.hp, &self.w.layers[il], Some(il));
        let shape = &hp.layers[il];
        let (norm, eps, d) = (hp.arch.norm, hp.norm_eps, shape.head_dim);
        let (q_width, kv_width) = (shape.q_width(), shape.kv_width());
        let h = match &layer.attn_norm {
            Some(n) => b.named("attn_norm", at, b.norm(norm, eps, n, x)),
            None => x.clone(),
        };
        let (q, k, v) = match &layer.qkv {
            Qkv::Split { q, k, v } => (b.linear(q, &h), b.linear(k, &h), b.linear(v, &h)),
            Qkv::Fused(l) => {
                let qkv = b.linear(l, &h);
                (
                    b.view_columns(&qkv, q_width, 0),
                    b.view_columns(&qkv, kv_width, q_width),
                    b.view_columns(&qkv, kv_width, q_width + kv_width),
                )
            }
        };
        // q/k norm, over whole rows (OLMo 2) or over each head (Qwen 3, Gemma 3, StableLM 2).
        let head_norm = |x: Tensor, weight: Option<&Tensor>, width: usize| match weight {
            Some(n) if n.ne()[0] == width && width != d => {
                b.heads(&b.scaled_norm(norm, eps, n, &x), d)
            }
            Some(n) => b.scaled_norm(norm, eps, n, &b.heads(&x, d)),
            None => b.heads(&x, d),
        };
        let mut q = head_norm(q, layer.q_norm.as_ref(), q_width);
        let mut k = head_norm(k, layer.k_norm.as_ref(), kv_width);
        let v = b.named("Vcur", at, b.heads(&v, d));
        // Rotary positions (Su et al. 2021).
        if let Some(rope) = &shape.rope {
            q = b.rope(&q, &self.inp.positions, self.rope_factors, rope);
            k = b.rope(&k, &self.inp.positions, self.rope_factors, rope);
        }
        let q = b.scale(&b.named("Qcur", at, q), shape.query_scale);
        (q, b.named("Kcur", at, k), v, h)
    }

    /// Keys and values of the last layer, for a step that only fills the cache.
    fn last_keys(&self, b: &mut Builder, x: &Tensor, kv: &mut impl KeyValues) {
        let il = self.hp.n_layer() - 1;
        let (_, k, v, _) = self.queries_keys_values(b, il, x);
        kv.store(b, il, &k, &v);
    }

    /// Layer `il` on the residual stream x `ne = [D, T]` -> `ne = [D, T]`, or only the rows `outputs` (I32) of it.
    pub(crate) fn layer(
        &self,
        b: &mut Builder,
        il: usize,
        x: &Tensor,
        outputs: Option<&Tensor>,
        kv: &mut impl KeyValues,
    ) -> Tensor {
        let (hp, layer, at) = (self.hp, &self.w.layers[il], Some(il));
        let (norm, eps) = (hp.arch.norm, hp.norm_eps);
        let (q, k, v, mut h) = self.queries_keys_values(b, il, x);
        kv.store(b, il, &k, &v);
        let a = kv.attend(b, il, &q, layer.attn_sinks.as_ref());
        let mut a = b.named("attn_out", at, b.linear(&layer.attn_out, &a));
        let mut x = x.clone();

        // From here on only the rows whose logits are wanted.
        if let Some(ids) = outputs {
            (a, x, h) = (
                b.get_rows(&a, ids),
                b.get_rows(&x, ids),
                b.get_rows(&h, ids),
            );
        }
        if let Some(n) = &layer.attn_post_norm {
            a = b.named("attn_post_norm", at, b.norm(norm, eps, n, &a));
        }
        x = b.add(&b.scale(&a, hp.residual_scale), &x);
        x = b.named("ffn_inp", at, x);

        // Feed-forward network, on the new residual or, in parallel, on what attention read.
        let f = match &layer.ffn_norm {
            Some(n) => b.named("ffn_norm", at, b.norm(norm, eps, n, &x)),
            None if hp.arch.may_be_parallel => h,
            None => x.clone(),
        };
        let mut f = b.feed_forward(hp.arch.activation, &layer.ffn, at, &f);
        f = b.named("ffn_out", at, f);
        if let Some(n) = &layer.ffn_post_norm {
            f = b.named("ffn_post_norm", at, b.norm(norm, eps, n, &f));
        }
        let x = b.add(&b.scale(&f, hp.residual_scale), &x);
        b.named("l_out", at, x)
    }

    /// The norm in front of the output matrix: x `ne = [D, T]` -> `ne = [D, T]`.
    pub(crate) fn output_norm(&self, b: &Builder, x: &Tensor) -> Tensor {
        let (hp, w) = (self.hp, self.w);
        let x = b.norm(hp.arch.norm, hp.norm_eps, &w.output_norm, x);
        b.named("result_norm", None, x)
    }

    /// Logits F32 `ne = [V, T]` of normed rows.
    pub(crate) fn logits(&self, b: &Builder, x: &Tensor) -> Tensor {
        let logits = b.linear(&self.w.output, x);
        b.scale_capped(&logits, self.hp.logit_scale, self.hp.logit_softcap)
    }

    fn head(&self, b: &Builder, x: &Tensor) -> Tensor {
        self.logits(b, &self.output_norm(b, x))
    }
}
