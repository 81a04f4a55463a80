//! Hyper-parameters of a base model, read from its metadata and checked once.

use super::ModelError;
use super::arch::{self, ArchSpec};
use crate::file::mmap::Part;
use crate::ggml::Rope;

/// llama.cpp's own limit of layers.
const MAX_LAYERS: usize = 512;
/// Larger than any published model, small enough that products of two of them fit 64 bits by far.
const MAX_DIM: usize = 1 << 24;

/// Sliding-window layers.
#[derive(Clone, Debug)]
pub(crate) struct Window {
    /// A token at position p sees positions above `p - size`.
    pub(crate) size: usize,
    /// Per layer: windowed or not.
    pub(crate) layers: Vec<bool>,
    /// RoPE of windowed layers.
    pub(crate) rope: Option<Rope>,
}

/// What the decoder needs to know. Letters as in the design: L layers, D, H, Hk, d, F, V.
#[derive(Clone, Debug)]
pub(crate) struct HParams {
    pub(crate) arch: &'static ArchSpec,
    /// L.
    pub(crate) n_layer: usize,
    /// D.
    pub(crate) n_embd: usize,
    /// H.
    pub(crate) n_head: usize,
    /// Hk.
    pub(crate) n_head_kv: usize,
    /// d, the same for K and V.
    pub(crate) head_dim: usize,
    /// F.
    pub(crate) n_ff: usize,
    /// Context length of the training.
    pub(crate) n_ctx_train: usize,
    pub(crate) norm_eps: f32,
    /// `None`: learned positions.
    pub(crate) rope: Option<Rope>,
    pub(crate) window: Option<Window>,
    /// Scale of attention scores.
    pub(crate) attn_scale: f32,
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
        let gguf = &part.gguf;
        let name = gguf.require_str("general.architecture")?;
        let arch = arch::find(name).ok_or_else(|| ModelError::UnsupportedArchitecture {
            architecture: name.to_owned(),
            supported: arch::names(),
        })?;
        let key = |k: &str| format!("{name}.{k}");
        let dim = |k: &str, max: usize| -> Result<usize, ModelError> {
            let key = key(k);
            in_range(&key, gguf.require_u32(&key)? as usize, 1, max)
        };
        let optional = |k: &str| gguf.f32(&key(k));

        if gguf.u32(&key("expert_count"))?.unwrap_or(0) > 0 {
            return Err(ModelError::MixtureOfExperts);
        }
        let n_layer = dim("block_count", MAX_LAYERS)?;
        let n_embd = dim("embedding_length", MAX_DIM)?;
        let per_layer = |k: &str, default: Option<usize>| -> Result<usize, ModelError> {
            let key = key(k);
            let values = match (gguf.u32_or_array(part.bytes(), &key, n_layer)?, default) {
                (Some(values), _) => values,
                (None, Some(default)) => return Ok(default),
                (None, None) => return Err(crate::file::gguf::GgufError::KeyMissing { key }.into()),
            };
            let first = values[0] as usize;
            if values.iter().any(|&v| v as usize != first) {
                return Err(ModelError::LayersDiffer { key });
            }
            in_range(&key, first, 1, MAX_DIM)
        };
        let n_head = per_layer("attention.head_count", None)?;
        let n_head_kv = per_layer("attention.head_count_kv", Some(n_head))?;
        let n_ff = per_layer("feed_forward_length", None)?;
        let divides = |what: &str, n: usize, by: usize, other: &str| {
            if n.is_multiple_of(by) {
                Ok(n / by)
            } else {
                Err(ModelError::BadValue {
                    key: key(what),
                    value: by.to_string(),
                    why: format!("must divide {other} = {n}"),
                })
            }
        };
        divides(
            "attention.head_count_kv",
            n_head,
            n_head_kv,
            "the head count",
        )?;
        let head_dim = match gguf.u32(&key("attention.key_length"))? {
            Some(d) => in_range(&key("attention.key_length"), d as usize, 1, MAX_DIM)?,
            None => divides(
                "attention.head_count",
                n_embd,
                n_head,
                "the embedding length",
            )?,
        };
        if let Some(v) = gguf.u32(&key("attention.value_length"))?
            && v as usize != head_dim
        {
            return Err(ModelError::BadValue {
                key: key("attention.value_length"),
                value: v.to_string(),
                why: format!("differs from the key length {head_dim}, which is not supported"),
            });
        }
        in_range(&key("attention.head_count"), n_head * head_dim, 1, MAX_DIM)?;
        let n_ctx_train = dim("context_length", i32::MAX as usize)?;
        let norm_eps = gguf.require_f32(&key(match arch.norm {
            arch::NormKind::Rms => "attention.layer_norm_rms_epsilon",
            arch::NormKind::Layer => "attention.layer_norm_epsilon",
        }))?;
        if !(0.0..1.0).contains(&norm_eps) {
            return Err(ModelError::BadValue {
                key: key("attention.layer_norm_(rms_)epsilon"),
                value: norm_eps.to_string(),
                why: "must be at least 0 and below 1".into(),
            });
        }

        let rope = read_rope(part, arch, head_dim, n_ctx_train)?;
        let window = read_window(part, arch, n_layer, rope)?;
        // Granite marks models without RoPE with this key.
        let rope = if arch.multipliers && gguf.bool(&key("rope.scaling.finetuned"))? == Some(false)
        {
            None
        } else {
            rope
        };

        let attn_scale = if arch.wide_attn_scale_at == Some(n_layer) {
            ((n_embd / n_head) as f32).sqrt().recip()
        } else {
            (head_dim as f32).sqrt().recip()
        };
        let multiplier = |k: &str| -> Result<Option<f32>, ModelError> {
            if !arch.multipliers {
                return Ok(None);
            }
            // llama.cpp reads 0 as "not set".
            let value = optional(k)?.filter(|&v| v != 0.0);
            value.map(|v| finite(&key(k), v)).transpose()
        };
        let (attn_cap, logit_cap) = arch.softcaps.unwrap_or((0.0, 0.0));
        let softcap = |k: &str, default: f32| -> Result<f32, ModelError> {
            let v = finite(&key(k), optional(k)?.unwrap_or(default))?;
            if v < 0.0 {
                return Err(ModelError::BadValue {
                    key: key(k),
                    value: v.to_string(),
                    why: "must not be negative".into(),
                });
            }
            Ok(v)
        };
        Ok(Self {
            arch,
            n_layer,
            n_embd,
            n_head,
            n_head_kv,
            head_dim,
            n_ff,
            n_ctx_train,
            norm_eps,
            rope,
            window,
            attn_scale: multiplier("attention.scale")?.unwrap_or(attn_scale),
            attn_softcap: if arch.softcaps.is_some() {
                softcap("attn_logit_softcapping", attn_cap)?
            } else {
                0.0
            },
            logit_softcap: if arch.scale_tokens {
                softcap("final_logit_softcapping", logit_cap)?
            } else {
                0.0
            },
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

    /// RoPE of layer `il`, if it has one.
    pub(crate) fn layer_rope(&self, il: usize) -> Option<&Rope> {
        if self
            .arch
            .nope_step
            .is_some_and(|step| (il + 1).is_multiple_of(step))
        {
            return None;
        }
        match &self.window {
            Some(w) if w.layers[il] => w.rope.as_ref(),
            _ => self.rope.as_ref(),
        }
    }

    /// Width of a K or V row: Hk * d.
    pub(crate) fn kv_width(&self) -> usize {
        self.n_head_kv * self.head_dim
    }
}

fn in_range(key: &str, value: usize, min: usize, max: usize) -> Result<usize, ModelError> {
    if (min..=max).contains(&value) {
        Ok(value)
    } else {
        Err(ModelError::BadValue {
            key: key.to_owned(),
            value: value.to_string(),
            why: format!("must be {min} to {max}"),
        })
    }
}

fn finite(key: &str, value: f32) -> Result<f32, ModelError> {
    if value.is_finite() {
        Ok(value)
    } else {
        Err(ModelError::BadValue {
            key: key.to_owned(),
            value: value.to_string(),
            why: "must be finite".into(),
        })
    }
}

/// RoPE with its context extension: none, linear (kaiokendev), YaRN (Peng et al. 2023) or long factors (LongRoPE).
fn read_rope(
    part: &Part,
    arch: &ArchSpec,
    head_dim: usize,
    n_ctx_train: usize,
) -> Result<Option<Rope>, ModelError> {
    let gguf = &part.gguf;
    let Some(kind) = arch.rope else {
        return Ok(None);
    };
    let key = |k: &str| format!("{}.rope.{k}", arch.name);
    let n_rot = gguf
        .u32(&key("dimension_count"))?
        .map_or(head_dim, |n| n as usize);
    if n_rot == 0 || n_rot > head_dim || n_rot % 2 != 0 {
        return Err(ModelError::BadValue {
            key: key("dimension_count"),
            value: n_rot.to_string(),
            why: format!("must be even and 2 to the head size {head_dim}"),
        });
    }
    let freq_base = finite(
        &key("freq_base"),
        gguf.f32(&key("freq_base"))?.unwrap_or(10_000.0),
    )?;
    if freq_base <= 0.0 {
        return Err(ModelError::BadValue {
            key: key("freq_base"),
            value: freq_base.to_string(),
            why: "must be positive".into(),
        });
    }
    let scaling = gguf.str(&key("scaling.type"))?.unwrap_or("linear");
    let yarn = match scaling {
        "none" | "linear" | "longrope" => false,
        "yarn" => true,
        other => {
            return Err(ModelError::BadValue {
                key: key("scaling.type"),
                value: other.to_owned(),
                why: "must be none, linear, yarn or longrope".into(),
            });
        }
    };
    let factor = match gguf.f32(&key("scaling.factor"))? {
        Some(f) => f,
        // The key's name before scaling types existed.
        None => gguf.f32(&key("scale_linear"))?.unwrap_or(0.0),
    };
    let factor = finite(&key("scaling.factor"), factor)?;
    if factor < 0.0 {
        return Err(ModelError::BadValue {
            key: key("scaling.factor"),
            value: factor.to_string(),
            why: "must not be negative".into(),
        });
    }
    let freq_scale = if factor == 0.0 || scaling == "none" {
        1.0
    } else {
        factor.recip()
    };
    // ggml multiplies YaRN's magnitude by 1 + 0.1 ln(factor) itself, and that is the value wanted for factors above 1:
    // what is handed over is 1, or its inverse where the magnitude must stay 1.
    let magnitude = if yarn && freq_scale > 1.0 {
        1.0 / (1.0 - 0.1 * freq_scale.ln())
    } else {
        1.0
    };
    let attn_factor = finite(
        &key("scaling.attn_factor"),
        gguf.f32(&key("scaling.attn_factor"))?.unwrap_or(1.0),
    )?;
    Ok(Some(Rope {
        kind,
        n_rot,
        n_ctx_orig: match gguf.u32(&key("scaling.original_context_length"))? {
            Some(n) if n > 0 => n as usize,
            _ => n_ctx_train,
        },
        freq_base,
        freq_scale,
        ext_factor: if yarn { 1.0 } else { 0.0 },
        attn_factor: attn_factor * magnitude,
        beta_fast: 32.0,
        beta_slow: 1.0,
    }))
}

fn read_window(
    part: &Part,
    arch: &ArchSpec,
    n_layer: usize,
    rope: Option<Rope>,
) -> Result<Option<Window>, ModelError> {
    let gguf = &part.gguf;
    let Some(spec) = arch.window else {
        return Ok(None);
    };
    let key = |k: &str| format!("{}.{k}", arch.name);
    let size = match gguf.u32(&key("attention.sliding_window"))? {
        Some(n) => n as usize,
        None => spec.default_window.unwrap_or(0),
    };
    if size == 0 {
        return Ok(None);
    }
    // A period, or the layers one by one.
    let pattern_key = key("attention.sliding_window_pattern");
    let layers = match gguf.get(&pattern_key) {
        Some(crate::file::gguf::Value::Array(_)) => {
            let layers = gguf
                .u32_array(part.bytes(), &pattern_key)?
                .unwrap_or_default();
            if layers.len() < n_layer {
                return Err(ModelError::BadValue {
                    key: pattern_key,
                    value: format!("{} entries", layers.len()),
                    why: format!("the model has {n_layer} layers"),
                });
            }
            layers[..n_layer].iter().map(|&w| w != 0).collect()
        }
        _ => {
            let period = gguf.u32(&pattern_key)?.map_or(spec.pattern, |n| n as usize);
            (0..n_layer)
                .map(|il| period == 0 || il % period < period - 1)
                .collect()
        }
    };
    let base = match gguf.f32(&key("rope.freq_base_swa"))? {
        Some(b) => Some(finite(&key("rope.freq_base_swa"), b)?),
        None => spec.rope_base,
    };
    let rope = rope.map(|r| {
        let r = Rope {
            freq_base: base.unwrap_or(r.freq_base),
            ..r
        };
        if spec.rope_scaled {
            r
        } else {
            Rope {
                freq_scale: 1.0,
                ext_factor: 0.0,
                attn_factor: 1.0,
                ..r
            }
        }
    });
    Ok(Some(Window { size, layers, rope }))
}
