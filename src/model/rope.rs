//! What the metadata says of positions: the rotary embedding, and which layers see a window of recent positions only.

use super::ModelError;
use super::arch::ArchSpec;
use super::keys::Keys;
use crate::operation::{Rope, RopeKind};

/// Sliding-window layers.
pub(super) struct Window {
    /// A token at position p sees positions above `p - size`.
    pub(super) size: usize,
    /// Per layer: windowed or not.
    pub(super) layers: Vec<bool>,
    /// RoPE of windowed layers.
    pub(super) rope: Option<Rope>,
}

/// The rotary embedding (Su et al. 2021) of layers without a window.
pub(super) fn read_rope(
    keys: Keys<'_>,
    arch: &ArchSpec,
    head_dim: usize,
    n_ctx_train: usize,
) -> Result<Option<Rope>, ModelError> {
    let Some(kind) = arch.rope else {
        return Ok(None);
    };
    if arch.optional_rope && keys.bool("rope.scaling.finetuned")? == Some(false) {
        return Ok(None);
    }
    rotation(keys, kind, head_dim, n_ctx_train).map(Some)
}

/// RoPE with its context extension: none, linear (kaiokendev), YaRN (Peng et al. 2023) or long factors (LongRoPE).
fn rotation(
    keys: Keys<'_>,
    kind: RopeKind,
    head_dim: usize,
    n_ctx_train: usize,
) -> Result<Rope, ModelError> {
    let n_rot = keys.integer("rope.dimension_count")?.unwrap_or(head_dim);
    if n_rot == 0 || n_rot > head_dim || n_rot % 2 != 0 {
        let why = format!("must be even and 2 to the head size {head_dim}");
        return Err(keys.bad("rope.dimension_count", n_rot, why));
    }
    let scaling = keys.text("rope.scaling.type")?.unwrap_or("linear");
    let yarn = match scaling {
        "none" | "linear" | "longrope" => false,
        "yarn" => true,
        other => {
            let why = "must be none, linear, yarn or longrope";
            return Err(keys.bad("rope.scaling.type", other, why));
        }
    };
    let factor = match keys.not_negative("rope.scaling.factor")? {
        Some(factor) => factor,
        // The key's name before scaling types existed.
        None => keys.not_negative("rope.scale_linear")?.unwrap_or(0.0),
    };
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
    let n_ctx_orig = keys.integer("rope.scaling.original_context_length")?;
    let attn_factor = keys.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
    Ok(Rope {
        kind,
        n_rot,
        n_ctx_orig: n_ctx_orig.filter(|&n| n > 0).unwrap_or(n_ctx_train),
        freq_base: keys.positive("rope.freq_base")?.unwrap_or(10_000.0),
        freq_scale,
        ext_factor: if yarn { 1.0 } else { 0.0 },
        attn_factor: attn_factor * magnitude,
        beta_fast: 32.0,
        beta_slow: 1.0,
    })
}

/// The windowed layers, if there are any; `rope` is that of the others.
pub(super) fn read_window(
    keys: Keys<'_>,
    arch: &ArchSpec,
    n_layer: usize,
    rope: Option<Rope>,
) -> Result<Option<Window>, ModelError> {
    let Some(spec) = arch.window else {
        return Ok(None);
    };
    let size = keys.integer("attention.sliding_window")?;
    let size = size.or(spec.default_window).unwrap_or(0);
    if size == 0 {
        return Ok(None);
    }
    // The layers one by one, or a period.
    let pattern = "attention.sliding_window_pattern";
    let layers = match keys.flag_per_layer(pattern, n_layer)? {
        Some(layers) => layers,
        None => {
            let period = keys.integer(pattern)?.unwrap_or(spec.pattern);
            let windowed = |il| period == 0 || il % period < period - 1;
            (0..n_layer).map(windowed).collect()
        }
    };
    let base = keys.number("rope.freq_base_swa")?.or(spec.rope_base);
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
