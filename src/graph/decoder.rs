//! The decoder of every supported architecture.

use super::builder::Builder;
use super::input::{Entry, Inputs, Topology};
use crate::ggml::Tensor;
use crate::model::{HParams, Qkv, Weights};

/// Where keys and values go and come from: the KV cache at inference.
pub(crate) trait KeyValues {
    /// Takes the keys and values of the current tokens: `ne = [d, Hk, T]`, rotated.
    fn store(&mut self, b: &mut Builder, il: usize, k: &Tensor, v: &Tensor);
    /// Attends from the queries, `ne = [d, H, T]`, to everything stored -> `ne = [H d, T]`.
    fn attend(&mut self, b: &mut Builder, il: usize, q: &Tensor) -> Tensor;
}

/// An upper bound of the tensor descriptions that a decoder graph needs, inputs and views included.
pub(crate) fn max_nodes(hp: &HParams) -> usize {
    64 + 64 * hp.n_layer
}

/// Builds the decoder from inputs to logits F32 `ne = [V, n_outputs]`; `None` if no logits are wanted.
///
/// `long_context` selects LongRoPE's factors for contexts beyond the original length.
pub(crate) fn decoder(
    b: &mut Builder,
    hp: &HParams,
    w: &Weights,
    inp: &Inputs,
    topology: &Topology,
    long_context: bool,
    kv: &mut impl KeyValues,
) -> Option<Tensor> {
    let (norm, eps, d) = (hp.arch.norm, hp.norm_eps, hp.head_dim);
    let (q_width, kv_width) = (hp.n_head * d, hp.kv_width());
    let t = topology.n_tokens;
    let rope_factors = w.rope_freqs.as_ref().or(if long_context {
        w.rope_long.as_ref()
    } else {
        w.rope_short.as_ref()
    });

    // Embeddings, ne = [D, T].
    let mut x = match topology.entry {
        Entry::Tokens => b.scale(&b.get_rows(&w.token_embd, &inp.entry), hp.token_scale),
        Entry::Rows => inp.entry.clone(),
    };
    x = b.scale(&x, hp.embedding_scale);
    if let Some(table) = &w.position_embd {
        x = b.add(&x, &b.get_rows(table, &inp.positions));
    }
    x = x.named("inp_scaled", None);

    for (il, layer) in w.layers.iter().enumerate() {
        let at = Some(il);
        let last = il + 1 == w.layers.len();

        // Queries, keys and values of the normed residual stream.
        let mut h = match &layer.attn_norm {
            Some(n) => b.norm(norm, eps, n, &x).named("attn_norm", at),
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
        let v = b.heads(&v, d).named("Vcur", at);
        // Rotary positions (Su et al. 2021).
        if let Some(rope) = hp.layer_rope(il) {
            q = b.rope(&q, &inp.positions, rope_factors, rope);
            k = b.rope(&k, &inp.positions, rope_factors, rope);
        }
        let (q, k) = (q.named("Qcur", at), k.named("Kcur", at));

        kv.store(b, il, &k, &v);
        if last && topology.n_outputs == 0 {
            return None;
        }
        let a = kv.attend(b, il, &q);
        let mut a = b.linear(&layer.attn_out, &a).named("attn_out", at);

        // From here on only the rows whose logits are wanted.
        if last && let Some(ids) = &inp.outputs {
            (a, x, h) = (
                b.get_rows(&a, ids),
                b.get_rows(&x, ids),
                b.get_rows(&h, ids),
            );
        }
        if let Some(n) = &layer.attn_post_norm {
            a = b.norm(norm, eps, n, &a).named("attn_post_norm", at);
        }
        x = b
            .add(&b.scale(&a, hp.residual_scale), &x)
            .named("ffn_inp", at);

        // Feed-forward network, on the new residual or, in parallel, on what attention read.
        let f = match &layer.ffn_norm {
            Some(n) => b.norm(norm, eps, n, &x).named("ffn_norm", at),
            None if hp.arch.may_be_parallel => h,
            None => x.clone(),
        };
        let mut f = b
            .feed_forward(hp.arch.activation, layer, &f)
            .named("ffn_out", at);
        if let Some(n) = &layer.ffn_post_norm {
            f = b.norm(norm, eps, n, &f).named("ffn_post_norm", at);
        }
        x = b
            .add(&b.scale(&f, hp.residual_scale), &x)
            .named("l_out", at);
    }

    let x = b
        .norm(norm, eps, &w.output_norm, &x)
        .named("result_norm", None);
    let logits = b.linear(&w.output, &x);
    debug_assert!(t >= topology.n_outputs);
    Some(
        b.scale_capped(&logits, hp.logit_scale, hp.logit_softcap)
            .named("result_output", None)
            .output(),
    )
}
