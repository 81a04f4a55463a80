//! Hyper-parameters of a base model, read from its metadata and checked once.

use super::arch::{self, ArchSpec, NormKind};
use super::experts::{FfnShape, read_ffn};
use super::keys::{Keys, MAX_SIZE};
use super::rope::{read_rope, read_window};
use super::{BaseShape, ModelError};
use crate::file::gguf::Gguf;
use crate::file::mmap::Part;
use crate::operation::Rope;

/// llama.cpp's own limit of layers.
pub(super) const MAX_LAYERS: usize = 512;

/// What one layer looks like. Letters as in the design: H, Hk, d.
#[derive(Clone, Debug)]
pub(crate) struct LayerShape {
    /// H.
    pub(crate) n_head: usize,
    /// Hk.
    pub(crate) n_head_kv: usize,
    /// d, the same for K and V.
    pub(crate) head_dim: usize,
    pub(crate) ffn: FfnShape,
    /// `None`: positions are learned, or the layer knows of none.
    pub(crate) rope: Option<Rope>,
    /// A token at position p sees positions above `p - window`; `None`: all before it.
    pub(crate) window: Option<usize>,
    /// Factor of queries before their product with the keys, 1 where the scores have one.
    pub(crate) query_scale: f32,
    /// Factor of attention scores, 1 where the queries have one.
    pub(crate) score_scale: f32,
}

impl LayerShape {
    /// Width of a row of queries: H * d.
    pub(crate) fn q_width(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Width of a row of K or V: Hk * d.
    pub(crate) fn kv_width(&self) -> usize {
        self.n_head_kv * self.head_dim
    }
}

/// What the decoder needs to know. Letters as in the design: L layers, D.
#[derive(Clone, Debug)]
pub(crate) struct HParams {
    pub(crate) arch: &'static ArchSpec,
    /// D.
    pub(crate) n_embd: usize,
    /// L of them, one at least.
    pub(crate) layers: Vec<LayerShape>,
    /// Context length of the training.
    pub(crate) n_ctx_train: usize,
    pub(crate) norm_eps: f32,
    /// Soft cap of attention scores, 0 is none.
    pub(crate) attn_softcap: f32,
    /// Soft cap of logits, 0 is none.
    pub(crate) logit_softcap: f32,
    /// Factor of token embeddings only (Gemma's sqrt(D)).
    pub(crate) token_scale: f32,
    /// Factor of token embeddings and of virtual tokens (Granite).
    pub(crate) embedding_scale: f32,
    /// Factor of what attention and feed-forward network add to the residual stream (Granite).
    pub(crate) residual_scale: f32,
    /// Factor of logits (Granite's reciprocal).
    pub(crate) logit_scale: f32,
}

impl HParams {
    /// Reads and checks the metadata of the model's first file.
    pub(crate) fn read(part: &Part) -> Result<Self, ModelError> {
        let arch = architecture(&part.gguf)?;
        let keys = Keys::new(part, arch.name);
        let n_embd = keys.size("embedding_length", MAX_SIZE)?;
        let n_ctx_train = keys.size("context_length", i32::MAX as usize)?;
        let layers = read_layers(keys, arch, n_embd, n_ctx_train)?;
        let softcap = |key: &str, default: Option<f32>| match default {
            Some(default) => Ok(keys.not_negative(key)?.unwrap_or(default)),
            None => Ok::<_, ModelError>(0.0),
        };
        let multiplier = |key: &str| read_multiplier(keys, arch, key);
        Ok(Self {
            arch,
            n_embd,
            layers,
            n_ctx_train,
            norm_eps: read_norm_eps(keys, arch)?,
            attn_softcap: softcap("attn_logit_softcapping", arch.attn_softcap)?,
            logit_softcap: softcap("final_logit_softcapping", arch.logit_softcap)?,
            token_scale: if arch.scale_tokens {
                (n_embd as f32).sqrt()
            } else {
                1.0
            },
            embedding_scale: multiplier("embedding_scale")?.unwrap_or(1.0),
            residual_scale: multiplier("residual_scale")?.unwrap_or(1.0),
            logit_scale: multiplier("logit_scale")?.map_or(1.0, f32::recip),
        })
    }

    /// L.
    pub(crate) fn n_layer(&self) -> usize {
        self.layers.len()
    }

    /// RoPE of the first layer that has one: rotated dimensions and original context length are the same in all.
    pub(crate) fn rope(&self) -> Option<&Rope> {
        self.layers.iter().find_map(|l| l.rope.as_ref())
    }

    /// The windows that layers have, each once, in order of the first layer that has it; `None` is that of layers without.
    pub(crate) fn windows(&self) -> Vec<Option<usize>> {
        let mut found = Vec::new();
        for layer in &self.layers {
            if !found.contains(&layer.window) {
                found.push(layer.window);
            }
        }
        found
    }

    /// What an adapter must know of the model, whose vocabulary has `n_vocab` tokens.
    pub(crate) fn base_shape(&self, n_vocab: usize) -> BaseShape {
        let sizes = |of: fn(&LayerShape) -> usize| self.layers.iter().map(of).collect();
        BaseShape {
            architecture: self.arch.name.to_owned(),
            n_layer: self.n_layer(),
            n_embd: self.n_embd,
            n_head: sizes(|l| l.n_head),
            n_head_kv: sizes(|l| l.n_head_kv),
            head_dim: sizes(|l| l.head_dim),
            n_vocab,
            qk_permuted: self.arch.qk_permuted,
        }
    }
}

fn architecture(gguf: &Gguf) -> Result<&'static ArchSpec, ModelError> {
    let name = gguf.require_str("general.architecture")?;
    arch::find(name).ok_or_else(|| ModelError::UnsupportedArchitecture {
        architecture: name.to_owned(),
        supported: arch::names(),
    })
}

/// The layers, first to last.
fn read_layers(
    keys: Keys<'_>,
    arch: &ArchSpec,
    n_embd: usize,
    n_ctx_train: usize,
) -> Result<Vec<LayerShape>, ModelError> {
    let n_layer = keys.size("block_count", MAX_LAYERS)?;
    let per_layer = |key: &str| keys.size_per_layer(key, n_layer, 1);
    let (head_count, kv_count) = ("attention.head_count", "attention.head_count_kv");
    let n_head = keys.required(head_count, per_layer(head_count)?)?;
    let n_head_kv = per_layer(kv_count)?.unwrap_or_else(|| n_head.clone());
    let ffn = read_ffn(keys, arch, n_layer)?;
    let head_dim = read_head_dim(keys, n_embd, n_head[0])?;
    for (il, (&h, &hk)) in n_head.iter().zip(&n_head_kv).enumerate() {
        if !h.is_multiple_of(hk) {
            let why = format!("must divide the head count = {h}");
            return Err(keys.bad_in_layer(kv_count, hk, il, why));
        }
        if h * head_dim > MAX_SIZE {
            let why = format!("times the head size {head_dim} must be 1 to {MAX_SIZE}");
            return Err(keys.bad_in_layer(head_count, h, il, why));
        }
    }

    let rope = read_rope(keys, arch, head_dim, n_ctx_train)?;
    let window = read_window(keys, arch, n_layer, rope)?;
    let scale = read_attn_scale(keys, arch, n_layer, n_embd / n_head[0], head_dim)?;
    let (query_scale, score_scale) = if arch.scale_queries {
        (scale, 1.0)
    } else {
        (1.0, scale)
    };
    let layer = |il: usize| {
        let window = window.as_ref().filter(|w| w.layers[il]);
        let no_rope = arch.nope_step.is_some_and(|n| (il + 1).is_multiple_of(n));
        LayerShape {
            n_head: n_head[il],
            n_head_kv: n_head_kv[il],
            head_dim,
            ffn: ffn[il],
            rope: window.map_or(rope, |w| w.rope).filter(|_| !no_rope),
            window: window.map(|w| w.size),
            query_scale,
            score_scale,
        }
    };
    Ok((0..n_layer).map(layer).collect())
}

/// d: as the file says, or D divided by the first layer's heads.
fn read_head_dim(keys: Keys<'_>, n_embd: usize, n_head: usize) -> Result<usize, ModelError> {
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(d) => d,
        None if n_embd.is_multiple_of(n_head) => n_embd / n_head,
        None => {
            let why = format!("must divide the embedding length = {n_embd}");
            return Err(keys.bad("attention.head_count", n_head, why));
        }
    };
    match keys.integer("attention.value_length")? {
        Some(v) if v != head_dim => {
            let why = format!("differs from the key length {head_dim}, which is not supported");
            Err(keys.bad("attention.value_length", v, why))
        }
        _ => Ok(head_dim),
    }
}

/// Scale of attention, whether of queries or of scores; `share` is what each of the first layer's heads has of D.
fn read_attn_scale(
    keys: Keys<'_>,
    arch: &ArchSpec,
    n_layer: usize,
    share: usize,
    head_dim: usize,
) -> Result<f32, ModelError> {
    let width = if arch.wide_attn_scale_at == Some(n_layer) {
        share
    } else {
        head_dim
    };
    let given = read_multiplier(keys, arch, "attention.scale")?;
    Ok(given.unwrap_or_else(|| (width as f32).sqrt().recip()))
}

/// One of the factors that the file may set.
fn read_multiplier(keys: Keys<'_>, arch: &ArchSpec, key: &str) -> Result<Option<f32>, ModelError> {
    if !arch.multipliers {
        return Ok(None);
    }
    // llama.cpp reads 0 as "not set".
    Ok(keys.number(key)?.filter(|&v| v != 0.0))
}

fn read_norm_eps(keys: Keys<'_>, arch: &ArchSpec) -> Result<f32, ModelError> {
    let key = match arch.norm {
        NormKind::Rms => "attention.layer_norm_rms_epsilon",
        NormKind::Layer => "attention.layer_norm_epsilon",
    };
    let eps = keys.required(key, keys.not_negative(key)?)?;
    if eps >= 1.0 {
        return Err(keys.bad(key, eps, "must be at least 0 and below 1"));
    }
    Ok(eps)
}
