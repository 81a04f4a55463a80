//! The architectures, one row of plain data each. What the file itself can answer is not in the table: a bias, a q/k
//! norm or a fused projection exists if its tensor exists, the output is tied if `output.weight` is absent.

use crate::operation::{Activation, RopeKind};

/// Normalization of the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NormKind {
    /// Root mean square (Zhang & Sennrich 2019).
    Rms,
    /// Mean and variance (Ba et al. 2016).
    Layer,
}

/// Whether a tensor must be in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    Required,
    Optional,
    Absent,
}

/// Layers that see a window of recent positions only.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct WindowSpec {
    /// Window when the file names none; `None`: then no layer is windowed.
    pub(crate) default_window: Option<usize>,
    /// Every `pattern`-th layer (the last of each group) sees everything, unless the file says otherwise.
    pub(crate) pattern: usize,
    /// RoPE base of windowed layers when the file names none; `None`: the model's own.
    pub(crate) rope_base: Option<f32>,
    /// Windowed layers use the model's RoPE scaling too (gemma2), or none (gemma3, olmo3).
    pub(crate) rope_scaled: bool,
}

/// Where an architecture has experts (Shazeer et al. 2017), what is said of them nowhere in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExpertSpec {
    /// Files without experts are models of the architecture as well.
    pub(crate) may_be_dense: bool,
    pub(crate) weighting: Weighting,
    /// F of an expert is `expert_feed_forward_length` or, where the file names none, a share of `feed_forward_length`; elsewhere it is
    /// `feed_forward_length`.
    pub(crate) own_width: bool,
    pub(crate) shared: SharedSpec,
}

/// What the experts that were chosen for a token count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weighting {
    /// Their probabilities among all experts.
    Probability,
    /// The same, divided by their sum.
    Normalized,
    /// Their probabilities among those that were chosen: the same as `Normalized` but for rounding.
    AmongChosen,
}

/// The expert that every token goes through besides those that were chosen for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SharedSpec {
    /// None.
    Absent,
    /// There is one if the file names its width.
    Optional,
    /// One, as wide as a dense network unless the file names its width, and multiplied by a gate of its own.
    Gated,
}

/// One architecture.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ArchSpec {
    /// `general.architecture`.
    pub(crate) name: &'static str,
    pub(crate) norm: NormKind,
    /// Of the feed-forward network.
    pub(crate) activation: Activation,
    /// The activation is that of a gate, which multiplies the rest (Shazeer 2020): `f(gate) * up` instead of `f(up)`.
    pub(crate) gated: bool,
    /// Gate and up may be one matrix, the gate in the first half: they are where `ffn_gate` is absent.
    pub(crate) may_fuse_gate: bool,
    /// `None`: no rotary embedding (learned positions).
    pub(crate) rope: Option<RopeKind>,
    /// The file may switch the rotary embedding off (`rope.scaling.finetuned` is false).
    pub(crate) optional_rope: bool,
    /// Norm in front of attention and of the feed-forward network.
    pub(crate) pre_norm: bool,
    /// The norm in front of the feed-forward network may be missing: attention and feed-forward network then read the
    /// same normed input (parallel residual).
    pub(crate) may_be_parallel: bool,
    /// The tensor of the second of them.
    pub(crate) ffn_norm: &'static str,
    /// Norm behind attention and behind the feed-forward network.
    pub(crate) post_norm: bool,
    pub(crate) qk_norm: Need,
    /// `attn_sinks`: of each head a score that has no value, and takes its part of the weights.
    pub(crate) sinks: Need,
    /// `position_embd.weight`.
    pub(crate) positions: Need,
    /// Token embeddings are multiplied by sqrt(D). Virtual tokens are not: PEFT trains them behind that factor.
    pub(crate) scale_tokens: bool,
    /// Queries are multiplied by the scale of attention before their product with the keys. Elsewhere the scores are: equal but
    /// for rounding.
    pub(crate) scale_queries: bool,
    pub(crate) window: Option<WindowSpec>,
    /// Layer count at which attention is scaled by 1/sqrt(D/H) instead of 1/sqrt(d) (Gemma 27B).
    pub(crate) wide_attn_scale_at: Option<usize>,
    /// Every n-th layer has no rotary embedding (SmolLM3).
    pub(crate) nope_step: Option<usize>,
    /// Soft cap of attention scores where the file names none (0: no cap); `None`: there is never one.
    pub(crate) attn_softcap: Option<f32>,
    /// The same of logits.
    pub(crate) logit_softcap: Option<f32>,
    /// The file may set factors of embeddings, of what layers add, of attention scores and of logits.
    pub(crate) multipliers: bool,
    /// The converter permuted q and k rows into interleaved rope pairs.
    pub(crate) qk_permuted: bool,
    /// `None`: its feed-forward networks are dense.
    pub(crate) experts: Option<ExpertSpec>,
}

/// What most architectures have in common.
const BASE: ArchSpec = ArchSpec {
    name: "",
    norm: NormKind::Rms,
    activation: Activation::Silu,
    gated: true,
    may_fuse_gate: false,
    rope: Some(RopeKind::Neox),
    optional_rope: false,
    pre_norm: true,
    may_be_parallel: false,
    ffn_norm: "ffn_norm",
    post_norm: false,
    qk_norm: Need::Absent,
    sinks: Need::Absent,
    positions: Need::Absent,
    scale_tokens: false,
    scale_queries: false,
    window: None,
    wide_attn_scale_at: None,
    nope_step: None,
    attn_softcap: None,
    logit_softcap: None,
    multipliers: false,
    qk_permuted: false,
    experts: None,
};

/// Experts as wide as the file says that feed-forward networks are, whose probabilities are normalized.
const NORMALIZED: ExpertSpec = ExpertSpec {
    may_be_dense: true,
    weighting: Weighting::Normalized,
    own_width: false,
    shared: SharedSpec::Absent,
};

const GRANITE: ArchSpec = ArchSpec {
    multipliers: true,
    experts: Some(ExpertSpec {
        shared: SharedSpec::Optional,
        ..NORMALIZED
    }),
    ..INTERLEAVED
};

const INTERLEAVED: ArchSpec = ArchSpec {
    rope: Some(RopeKind::Interleaved),
    qk_permuted: true,
    ..BASE
};

const GEMMA: ArchSpec = ArchSpec {
    name: "gemma",
    activation: Activation::Gelu,
    scale_tokens: true,
    scale_queries: true,
    ..BASE
};

/// Every supported architecture, by name.
pub(crate) const ARCHITECTURES: &[ArchSpec] = &[
    ArchSpec {
        name: "deci",
        ..INTERLEAVED
    },
    GEMMA,
    ArchSpec {
        name: "gemma2",
        post_norm: true,
        window: Some(WindowSpec {
            default_window: Some(4096),
            pattern: 2,
            rope_base: None,
            rope_scaled: true,
        }),
        wide_attn_scale_at: Some(46),
        attn_softcap: Some(50.0),
        logit_softcap: Some(30.0),
        ..GEMMA
    },
    ArchSpec {
        name: "gemma3",
        post_norm: true,
        qk_norm: Need::Required,
        window: Some(WindowSpec {
            default_window: None,
            pattern: 6,
            rope_base: Some(10_000.0),
            rope_scaled: false,
        }),
        wide_attn_scale_at: Some(62),
        logit_softcap: Some(0.0),
        ..GEMMA
    },
    ArchSpec {
        name: "gpt2",
        norm: NormKind::Layer,
        activation: Activation::Gelu,
        gated: false,
        rope: None,
        positions: Need::Required,
        ..BASE
    },
    ArchSpec {
        name: "gpt-oss",
        activation: Activation::SwigluOai,
        ffn_norm: "post_attention_norm",
        sinks: Need::Required,
        window: Some(WindowSpec {
            default_window: None,
            pattern: 2,
            rope_base: None,
            rope_scaled: true,
        }),
        experts: Some(ExpertSpec {
            may_be_dense: false,
            weighting: Weighting::AmongChosen,
            own_width: true,
            shared: SharedSpec::Absent,
        }),
        ..BASE
    },
    ArchSpec {
        name: "granite",
        optional_rope: true,
        ..GRANITE
    },
    ArchSpec {
        name: "granitemoe",
        ..GRANITE
    },
    ArchSpec {
        name: "llama",
        // Mixtral.
        experts: Some(NORMALIZED),
        ..INTERLEAVED
    },
    ArchSpec {
        name: "olmo2",
        pre_norm: false,
        post_norm: true,
        qk_norm: Need::Required,
        window: Some(WindowSpec {
            default_window: None,
            pattern: 4,
            rope_base: None,
            rope_scaled: false,
        }),
        ..BASE
    },
    ArchSpec {
        name: "olmoe",
        qk_norm: Need::Required,
        experts: Some(ExpertSpec {
            may_be_dense: false,
            weighting: Weighting::Probability,
            ..NORMALIZED
        }),
        ..BASE
    },
    ArchSpec {
        name: "openelm",
        qk_norm: Need::Required,
        ..BASE
    },
    ArchSpec {
        name: "phi3",
        may_fuse_gate: true,
        scale_queries: true,
        ..BASE
    },
    ArchSpec {
        name: "qwen2",
        ..BASE
    },
    ArchSpec {
        name: "qwen2moe",
        experts: Some(ExpertSpec {
            may_be_dense: false,
            weighting: Weighting::Probability,
            own_width: true,
            shared: SharedSpec::Gated,
        }),
        ..BASE
    },
    ArchSpec {
        name: "qwen3",
        qk_norm: Need::Required,
        ..BASE
    },
    ArchSpec {
        name: "qwen3moe",
        qk_norm: Need::Required,
        experts: Some(ExpertSpec {
            may_be_dense: false,
            own_width: true,
            ..NORMALIZED
        }),
        ..BASE
    },
    ArchSpec {
        name: "smollm3",
        nope_step: Some(4),
        ..INTERLEAVED
    },
    ArchSpec {
        name: "stablelm",
        norm: NormKind::Layer,
        may_be_parallel: true,
        qk_norm: Need::Optional,
        ..BASE
    },
    ArchSpec {
        name: "starcoder2",
        norm: NormKind::Layer,
        activation: Activation::Gelu,
        gated: false,
        ..BASE
    },
];

/// The architecture called `name`.
pub(crate) fn find(name: &str) -> Option<&'static ArchSpec> {
    ARCHITECTURES.iter().find(|a| a.name == name)
}

/// Names of all supported architectures, for messages.
pub(crate) fn names() -> String {
    ARCHITECTURES
        .iter()
        .map(|a| a.name)
        .collect::<Vec<_>>()
        .join(", ")
}
