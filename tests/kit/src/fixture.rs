//! Small random models of every architecture, as GGUF files that libllama loads.

use crate::quantize::{dequantize, quantize};
use crate::vocab::Vocab;
use ggraft::file::gguf_write::{GgufWriter, MetaValue};
use ggraft::file::types::GgmlType;
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand_distr::{Distribution, Normal};
use std::path::{Path, PathBuf};

/// An architecture together with the optional features a file of it may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Variant {
    /// llama: grouped queries, tied output.
    Llama,
    /// llama with head size other than D / H.
    LlamaHeadDim,
    /// llama with the `rope_freqs.weight` of Llama 3.
    LlamaRopeFreqs,
    /// llama with linear rope scaling.
    LlamaLinear,
    /// llama with YaRN rope scaling.
    LlamaYarn,
    /// llama with biases on q, k, v, o and the feed-forward matrices.
    LlamaBias,
    /// llama with its own output matrix.
    LlamaUntied,
    /// qwen2: biases on q, k, v.
    Qwen2,
    /// qwen3: per-head q/k norms, untied output, head size other than D / H.
    Qwen3,
    /// gemma: scaled embeddings, GeGLU, one KV head.
    Gemma,
    /// gemma2: soft caps, post-norms, every other layer with a sliding window.
    Gemma2,
    /// gemma3: q/k norms, five of six layers with a sliding window and their own rope base (7 layers: 0-4 and 6 sliding).
    Gemma3,
    /// gemma3 with a sliding window in two of three layers, rope base of those left at its default, and linear rope scaling in the others.
    Gemma3Scaled,
    /// phi3: fused qkv and gate-up, untied output.
    Phi3,
    /// phi3 with long and short rope factors, partial rotary and an attention factor.
    Phi3LongRope,
    /// gpt2: layer norms with bias, fused qkv with bias, learned positions.
    Gpt2,
    /// olmo2: post-norms only, norms over whole q and k rows.
    Olmo2,
    /// olmo2 with a sliding window in three of four layers and YaRN in the others (Olmo 3).
    Olmo2Swa,
    /// stablelm: layer norms with bias, partial rotary, biases on q, k, v.
    StableLm,
    /// stablelm with q/k layer norms and parallel residual (StableLM 2 12B).
    StableLmParallel,
    /// starcoder2: layer norms and biases everywhere, GELU.
    Starcoder2,
    /// granite: embedding, residual, attention and logit multipliers.
    Granite,
    /// smollm3: no rope in every fourth layer.
    SmolLm3,
    /// deci: llama whose layers differ in heads, KV heads and feed-forward width.
    Deci,
    /// openelm: fused qkv, per-head q/k norms, and layers that differ as those of deci.
    OpenElm,
    /// llama with 2 of 4 experts (Mixtral).
    Mixtral,
    /// olmoe: 3 of 8 experts, whose weights are not normalized, and norms over whole q and k rows.
    Olmoe,
    /// qwen2moe: as qwen2, 2 of 6 experts with a width of their own, and a shared one with a gate.
    Qwen2Moe,
    /// qwen3moe: as qwen3, 3 of 8 experts with a width of their own.
    Qwen3Moe,
    /// granitemoe: as granite, 4 of 8 experts.
    GraniteMoe,
    /// granitemoe with a shared expert besides.
    GraniteMoeShared,
    /// gpt-oss: 4 of 8 experts with biases and gates of their own, sinks, every other layer with a sliding window, YaRN.
    GptOss,
}

/// Every variant, for tests that loop over them.
pub fn all_variants() -> &'static [Variant] {
    use Variant::*;
    &[
        Llama,
        LlamaHeadDim,
        LlamaRopeFreqs,
        LlamaLinear,
        LlamaYarn,
        LlamaBias,
        LlamaUntied,
        Qwen2,
        Qwen3,
        Gemma,
        Gemma2,
        Gemma3,
        Gemma3Scaled,
        Phi3,
        Phi3LongRope,
        Gpt2,
        Olmo2,
        Olmo2Swa,
        StableLm,
        StableLmParallel,
        Starcoder2,
        Granite,
        SmolLm3,
        Deci,
        OpenElm,
        Mixtral,
        Olmoe,
        Qwen2Moe,
        Qwen3Moe,
        GraniteMoe,
        GraniteMoeShared,
        GptOss,
    ]
}

/// Those of all variants that have experts.
pub fn expert_variants() -> impl Iterator<Item = Variant> {
    let all = all_variants().iter().copied();
    all.filter(|variant| variant.experts().is_some())
}

/// Every weight type that ggml can make without an importance matrix and multiply on the CPU; IQ2_S is left out because ggml
/// builds tables for seconds before it makes the first block.
pub fn all_types() -> &'static [GgmlType] {
    use GgmlType::*;
    &[
        F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS,
        IQ3_XXS, IQ3_S, TQ1_0, TQ2_0, MXFP4, NVFP4, Q1_0, Q2_0,
    ]
}

impl Variant {
    /// A name for messages and file names.
    pub fn name(self) -> &'static str {
        use Variant::*;
        match self {
            Llama => "llama",
            LlamaHeadDim => "llama-head-dim",
            LlamaRopeFreqs => "llama-rope-freqs",
            LlamaLinear => "llama-linear",
            LlamaYarn => "llama-yarn",
            LlamaBias => "llama-bias",
            LlamaUntied => "llama-untied",
            Qwen2 => "qwen2",
            Qwen3 => "qwen3",
            Gemma => "gemma",
            Gemma2 => "gemma2",
            Gemma3 => "gemma3",
            Gemma3Scaled => "gemma3-scaled",
            Phi3 => "phi3",
            Phi3LongRope => "phi3-longrope",
            Gpt2 => "gpt2",
            Olmo2 => "olmo2",
            Olmo2Swa => "olmo2-swa",
            StableLm => "stablelm",
            StableLmParallel => "stablelm-parallel",
            Starcoder2 => "starcoder2",
            Granite => "granite",
            SmolLm3 => "smollm3",
            Deci => "deci",
            OpenElm => "openelm",
            Mixtral => "mixtral",
            Olmoe => "olmoe",
            Qwen2Moe => "qwen2moe",
            Qwen3Moe => "qwen3moe",
            GraniteMoe => "granitemoe",
            GraniteMoeShared => "granitemoe-shared",
            GptOss => "gpt-oss",
        }
    }

    /// `general.architecture`.
    pub fn architecture(self) -> &'static str {
        use Variant::*;
        match self {
            Llama | LlamaHeadDim | LlamaRopeFreqs | LlamaLinear | LlamaYarn | LlamaBias
            | LlamaUntied | Mixtral => "llama",
            Qwen2 => "qwen2",
            Qwen3 => "qwen3",
            Gemma => "gemma",
            Gemma2 => "gemma2",
            Gemma3 | Gemma3Scaled => "gemma3",
            Phi3 | Phi3LongRope => "phi3",
            Gpt2 => "gpt2",
            Olmo2 | Olmo2Swa => "olmo2",
            StableLm | StableLmParallel => "stablelm",
            Starcoder2 => "starcoder2",
            Granite => "granite",
            SmolLm3 => "smollm3",
            Deci => "deci",
            OpenElm => "openelm",
            Olmoe => "olmoe",
            Qwen2Moe => "qwen2moe",
            Qwen3Moe => "qwen3moe",
            GraniteMoe | GraniteMoeShared => "granitemoe",
            GptOss => "gpt-oss",
        }
    }

    /// How many experts there are, and how many of them a token goes through.
    pub fn experts(self) -> Option<(usize, usize)> {
        use Variant::*;
        match self {
            Mixtral => Some((4, 2)),
            Qwen2Moe => Some((6, 2)),
            Olmoe | Qwen3Moe => Some((8, 3)),
            GraniteMoe | GraniteMoeShared | GptOss => Some((8, 4)),
            _ => None,
        }
    }

    /// Width of the sliding window of the variants that have one. Sequences in tests should be longer.
    pub fn sliding_window(self) -> Option<u32> {
        use Variant::*;
        matches!(self, Gemma2 | Gemma3 | Gemma3Scaled | Olmo2Swa | GptOss).then_some(6)
    }

    fn has_layer_norms(self) -> bool {
        matches!(
            self,
            Variant::Gpt2 | Variant::StableLm | Variant::StableLmParallel | Variant::Starcoder2
        )
    }

    fn is_gemma(self) -> bool {
        matches!(
            self,
            Variant::Gemma | Variant::Gemma2 | Variant::Gemma3 | Variant::Gemma3Scaled
        )
    }
}

/// Sizes in which layers may differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSizes {
    /// H.
    pub n_head: usize,
    /// Hk.
    pub n_head_kv: usize,
    /// F.
    pub n_ff: usize,
}

/// What to write. Letters as in the design: L, D, H, Hk, d, F, V.
#[derive(Clone, Debug, PartialEq)]
pub struct FixtureSpec {
    /// Architecture and features.
    pub variant: Variant,
    /// L.
    pub n_layer: usize,
    /// D.
    pub n_embd: usize,
    /// H.
    pub n_head: usize,
    /// Hk.
    pub n_head_kv: usize,
    /// d. Architectures that have no key for it need H * d = D.
    pub head_dim: usize,
    /// F.
    pub n_ff: usize,
    /// H, Hk and F of each layer, instead of those above; empty: all layers are alike. libllama reads such files of the
    /// architectures deci and openelm only.
    pub layers: Vec<LayerSizes>,
    /// V, at least 268.
    pub n_vocab: usize,
    /// Context length the model says it was trained for.
    pub n_ctx: usize,
    /// Type of all matrices, token embedding and output included. Norms, biases, learned positions and rope factors stay F32.
    pub weight_type: GgmlType,
    /// A quantized type whose values the matrices have, in whatever type they are stored: with `weight_type` F32 the exact model
    /// of a quantized one.
    pub rounded_to: Option<GgmlType>,
    /// Same seed, same weights (before quantization), whatever the type.
    pub seed: u64,
    /// The variant's, or another one that has the same tensors and computes the same.
    pub architecture: &'static str,
}

impl FixtureSpec {
    /// The smallest shape that shows all features of `variant` and whose rows are whole blocks of `weight_type`:
    /// D = 64, d = 16, F = 96, or D = 256, d = 64, F = 512 for types with blocks longer than 32.
    pub fn new(variant: Variant, weight_type: GgmlType) -> Self {
        let wide = weight_type.block_size() > 32;
        let (n_embd, head_dim, n_ff) = if wide { (256, 64, 512) } else { (64, 16, 96) };
        // Experts as wide as dense networks would make files that take long to write.
        let n_ff = match variant {
            Variant::Mixtral | Variant::Olmoe | Variant::GraniteMoe | Variant::GraniteMoeShared => {
                expert_width(weight_type)
            }
            _ => n_ff,
        };
        let (n_head_kv, head_dim) = match variant {
            Variant::Gpt2 | Variant::Olmoe => (4, head_dim),
            Variant::Gemma => (1, 2 * head_dim),
            Variant::LlamaHeadDim | Variant::Qwen3 | Variant::Qwen3Moe | Variant::Gemma2 => {
                (2, 2 * head_dim)
            }
            _ => (2, head_dim),
        };
        let n_layer = match variant {
            Variant::Gemma3 => 7,
            Variant::Gemma2 | Variant::Gemma3Scaled | Variant::GptOss => 3,
            Variant::Olmo2Swa | Variant::SmolLm3 => 4,
            Variant::Deci | Variant::OpenElm => 3,
            _ => 2,
        };
        let layers = match variant {
            Variant::Deci | Variant::OpenElm => [(4, 2, n_ff), (8, 1, 2 * n_ff), (4, 4, 3 * n_ff)]
                .map(|(n_head, n_head_kv, n_ff)| LayerSizes {
                    n_head,
                    n_head_kv,
                    n_ff,
                })
                .to_vec(),
            _ => Vec::new(),
        };
        Self {
            variant,
            n_layer,
            n_embd,
            n_head: 4,
            n_head_kv,
            head_dim,
            n_ff,
            layers,
            n_vocab: 288,
            n_ctx: 256,
            weight_type,
            rounded_to: None,
            seed: 1,
            architecture: variant.architecture(),
        }
    }

    /// Sizes of layer `il`.
    pub fn layer(&self, il: usize) -> LayerSizes {
        self.layers.get(il).copied().unwrap_or(LayerSizes {
            n_head: self.n_head,
            n_head_kv: self.n_head_kv,
            n_ff: self.n_ff,
        })
    }

    /// Width of the K and V rows of layer `il`: Hk * d.
    pub fn kv_width(&self, il: usize) -> usize {
        self.layer(il).n_head_kv * self.head_dim
    }

    /// F of an expert.
    fn n_ff_expert(&self) -> usize {
        match self.variant {
            // The power of two below it, whole blocks of whatever type F is of.
            Variant::Qwen2Moe | Variant::Qwen3Moe | Variant::GptOss => 1 << (self.n_ff - 1).ilog2(),
            _ => self.n_ff,
        }
    }

    /// F of the expert that all tokens go through, if there is one.
    fn n_ff_shared(&self) -> Option<usize> {
        match self.variant {
            // As the file has no key for it.
            Variant::Qwen2Moe => Some(self.n_ff),
            Variant::GraniteMoeShared => Some(2 * self.n_ff),
            _ => None,
        }
    }

    /// Rotated dimensions per head.
    fn n_rot(&self) -> usize {
        match self.variant {
            Variant::StableLm | Variant::StableLmParallel => self.head_dim / 4,
            Variant::Phi3LongRope => self.head_dim / 2,
            _ => self.head_dim,
        }
    }
}

/// The smallest F whose rows are whole blocks of `ty`, and whose hidden values are some.
fn expert_width(ty: GgmlType) -> usize {
    if ty.block_size() > 32 { 256 } else { 64 }
}

/// Writes the model that `spec` describes.
pub fn write_fixture(path: &Path, spec: &FixtureSpec) -> std::io::Result<()> {
    let model = Builder::build(spec);
    model
        .file
        .write(path, |i, out| out.extend_from_slice(&model.data[i]))
}

/// Writes, into `dir`, a model of ours, and one of the same weights whose architecture only libllama knows: where they are, in this order.
///
/// # Errors
/// If a file cannot be written.
pub fn write_twins(dir: &Path) -> std::io::Result<[PathBuf; 2]> {
    let known = FixtureSpec::new(Variant::LlamaUntied, GgmlType::Q8_0);
    let foreign = FixtureSpec {
        architecture: "internlm2",
        ..known.clone()
    };
    let paths = ["known.gguf", "foreign.gguf"].map(|name| dir.join(name));
    write_fixture(&paths[0], &known)?;
    write_fixture(&paths[1], &foreign)?;
    Ok(paths)
}

/// The same file in memory.
pub fn fixture_bytes(spec: &FixtureSpec) -> Vec<u8> {
    let model = Builder::build(spec);
    model
        .file
        .to_bytes(|i, out| out.extend_from_slice(&model.data[i]))
}

/// Standard deviation of matrices is GAIN / sqrt(fan-in): activations keep their size and attention is far from uniform.
const GAIN: f32 = 1.2;

struct Builder<'a> {
    spec: &'a FixtureSpec,
    file: GgufWriter,
    data: Vec<Vec<u8>>,
}

impl<'a> Builder<'a> {
    fn build(spec: &'a FixtureSpec) -> Self {
        let mut b = Self {
            spec,
            file: GgufWriter::new(),
            data: Vec::new(),
        };
        b.metadata();
        b.globals();
        for layer in 0..spec.n_layer {
            b.attention(layer);
            b.feed_forward(layer);
        }
        b
    }

    fn metadata(&mut self) {
        use Variant::*;
        let spec = self.spec;
        // libllama patches vocabularies of models whose name holds "phi3", so the name says nothing.
        self.file
            .set(
                "general.architecture",
                MetaValue::String(spec.architecture.into()),
            )
            .set("general.type", MetaValue::String("model".into()))
            .set("general.name", MetaValue::String("random".into()))
            .set("general.quantization_version", MetaValue::U32(2));
        self.u32("vocab_size", spec.n_vocab);
        self.u32("context_length", spec.n_ctx);
        self.u32("embedding_length", spec.n_embd);
        self.u32("block_count", spec.n_layer);
        self.per_layer("feed_forward_length", spec.n_ff, |l| l.n_ff);
        self.per_layer("attention.head_count", spec.n_head, |l| l.n_head);
        self.per_layer("attention.head_count_kv", spec.n_head_kv, |l| l.n_head_kv);
        if spec.variant.has_layer_norms() {
            self.f32("attention.layer_norm_epsilon", 1e-5);
        } else {
            self.f32("attention.layer_norm_rms_epsilon", 1e-6);
        }
        if spec.head_dim * spec.n_head != spec.n_embd || spec.variant.is_gemma() {
            self.u32("attention.key_length", spec.head_dim);
            self.u32("attention.value_length", spec.head_dim);
        }
        if spec.variant != Gpt2 {
            self.u32("rope.dimension_count", spec.n_rot());
            self.f32(
                "rope.freq_base",
                if spec.variant.architecture() == "gemma3" {
                    1e6
                } else {
                    1e4
                },
            );
        }
        if let Some(window) = spec.variant.sliding_window() {
            self.u32("attention.sliding_window", window as usize);
        }
        match spec.variant {
            LlamaLinear => self.rope_scaling("linear", 4.0),
            LlamaYarn | Olmo2Swa | GptOss => {
                self.rope_scaling("yarn", 4.0);
                self.u32("rope.scaling.original_context_length", spec.n_ctx / 4);
            }
            Gemma2 => {
                // Low caps, so that leaving one out shows.
                self.f32("attn_logit_softcapping", 4.0);
                self.f32("final_logit_softcapping", 8.0);
            }
            Gemma3 => self.f32("rope.freq_base_swa", 5e3),
            Gemma3Scaled => {
                self.rope_scaling("linear", 8.0);
                let pattern = (0..spec.n_layer).map(|i| i % 3 < 2).collect();
                self.set(
                    "attention.sliding_window_pattern",
                    MetaValue::Bools(pattern),
                );
            }
            Phi3LongRope => {
                // Long factors apply to contexts longer than this.
                self.u32("rope.scaling.original_context_length", spec.n_ctx / 2);
                self.f32("rope.scaling.attn_factor", 1.19);
            }
            StableLm | StableLmParallel => {
                self.set(
                    "use_parallel_residual",
                    MetaValue::Bool(spec.variant == StableLmParallel),
                );
            }
            Granite | GraniteMoe | GraniteMoeShared => {
                self.f32("embedding_scale", 6.0);
                self.f32("residual_scale", 0.5);
                self.f32("attention.scale", 1.6 / spec.head_dim as f32);
                self.f32("logit_scale", 0.5);
            }
            _ => {}
        }
        if let Some((n_expert, n_used)) = spec.variant.experts() {
            self.u32("expert_count", n_expert);
            self.u32("expert_used_count", n_used);
        }
        if matches!(spec.variant, Qwen2Moe | Qwen3Moe | GptOss) {
            self.u32("expert_feed_forward_length", spec.n_ff_expert());
        }
        if let (GraniteMoeShared, Some(n_ff)) = (spec.variant, spec.n_ff_shared()) {
            self.u32("expert_shared_feed_forward_length", n_ff);
        }
        Vocab::bytes(spec.n_vocab).write(&mut self.file);
    }

    fn globals(&mut self) {
        use Variant::*;
        let spec = self.spec;
        let (d, v) = (spec.n_embd, spec.n_vocab);
        // Gemma multiplies embeddings by sqrt(D).
        let embd_std = if spec.variant.is_gemma() { 0.05 } else { 0.15 };
        self.matrix("token_embd.weight", d, v, embd_std);
        if spec.variant == Gpt2 {
            self.vector("position_embd.weight", &[d, spec.n_ctx], 0.0, 0.1);
        }
        // The final norm makes up for gemma's small embeddings, which are its output matrix too.
        let out_mean = if spec.variant.is_gemma() { 3.5 } else { 1.0 };
        self.vector("output_norm.weight", &[d], out_mean, 0.2);
        if spec.variant.has_layer_norms() {
            self.vector("output_norm.bias", &[d], 0.0, 0.1);
        }
        if matches!(
            spec.variant,
            LlamaUntied
                | Qwen3
                | Phi3
                | Phi3LongRope
                | Olmo2
                | Olmo2Swa
                | StableLm
                | StableLmParallel
                | Olmoe
                | Qwen2Moe
                | Qwen3Moe
                | GptOss
        ) {
            self.matrix("output.weight", d, v, 2.0 / (d as f32).sqrt());
        }
        let n_rot = spec.n_rot();
        match spec.variant {
            LlamaRopeFreqs => {
                let factors = crate::llama3_rope_factors(n_rot, 1e4, 8.0, 1.0, 4.0, 64.0);
                self.constant("rope_freqs.weight", &factors);
            }
            Phi3LongRope => {
                let factors = |step: f32| {
                    (0..n_rot / 2)
                        .map(|i| 1.0 + step * i as f32)
                        .collect::<Vec<_>>()
                };
                self.constant("rope_factors_long.weight", &factors(0.9));
                self.constant("rope_factors_short.weight", &factors(0.06));
            }
            _ => {}
        }
    }

    fn attention(&mut self, layer: usize) {
        use Variant::*;
        let spec = self.spec;
        let sizes = spec.layer(layer);
        let (d, q, kv) = (
            spec.n_embd,
            sizes.n_head * spec.head_dim,
            spec.kv_width(layer),
        );
        let name = |part: &str| format!("blk.{layer}.{part}");
        if !matches!(spec.variant, Olmo2 | Olmo2Swa) {
            self.norm(&name("attn_norm"));
        }
        let fan_in = |n: usize| GAIN / (n as f32).sqrt();
        if matches!(spec.variant, Phi3 | Phi3LongRope | Gpt2 | OpenElm) {
            self.matrix(&name("attn_qkv.weight"), d, q + 2 * kv, fan_in(d));
        } else {
            self.matrix(&name("attn_q.weight"), d, q, fan_in(d));
            self.matrix(&name("attn_k.weight"), d, kv, fan_in(d));
            self.matrix(&name("attn_v.weight"), d, kv, fan_in(d));
        }
        match spec.variant {
            Gpt2 => self.vector(&name("attn_qkv.bias"), &[q + 2 * kv], 0.0, 0.1),
            LlamaBias | Qwen2 | Qwen2Moe | StableLm | Starcoder2 | GptOss => {
                self.vector(&name("attn_q.bias"), &[q], 0.0, 0.1);
                self.vector(&name("attn_k.bias"), &[kv], 0.0, 0.1);
                self.vector(&name("attn_v.bias"), &[kv], 0.0, 0.1);
            }
            _ => {}
        }
        let qk_norms = match spec.variant {
            Qwen3 | Qwen3Moe | Gemma3 | Gemma3Scaled | OpenElm => {
                Some((vec![spec.head_dim], vec![spec.head_dim]))
            }
            Olmo2 | Olmo2Swa | Olmoe => Some((vec![q], vec![kv])),
            StableLmParallel => Some((
                vec![spec.head_dim, sizes.n_head],
                vec![spec.head_dim, sizes.n_head_kv],
            )),
            _ => None,
        };
        if let Some((q_shape, k_shape)) = qk_norms {
            self.vector(&name("attn_q_norm.weight"), &q_shape, 1.0, 0.2);
            self.vector(&name("attn_k_norm.weight"), &k_shape, 1.0, 0.2);
        }
        if spec.variant == GptOss {
            self.vector(&name("attn_sinks.weight"), &[sizes.n_head], 0.0, 1.5);
        }
        self.matrix(&name("attn_output.weight"), q, d, fan_in(q));
        if matches!(spec.variant, LlamaBias | Gpt2 | Starcoder2 | GptOss) {
            self.vector(&name("attn_output.bias"), &[d], 0.0, 0.1);
        }
        if matches!(
            spec.variant,
            Gemma2 | Gemma3 | Gemma3Scaled | Olmo2 | Olmo2Swa
        ) {
            self.vector(&name("post_attention_norm.weight"), &[d], 1.0, 0.2);
        }
    }

    fn feed_forward(&mut self, layer: usize) {
        use Variant::*;
        let spec = self.spec;
        let (d, f) = (spec.n_embd, spec.layer(layer).n_ff);
        let name = |part: &str| format!("blk.{layer}.{part}");
        match spec.variant {
            Olmo2 | Olmo2Swa | StableLmParallel => {}
            GptOss => self.norm(&name("post_attention_norm")),
            _ => self.norm(&name("ffn_norm")),
        }
        if let Some((n_expert, _)) = spec.variant.experts() {
            return self.experts(layer, n_expert);
        }
        let (up_std, down_std) = (GAIN / (d as f32).sqrt(), GAIN / (f as f32).sqrt());
        match spec.variant {
            Phi3 | Phi3LongRope => self.matrix(&name("ffn_up.weight"), d, 2 * f, up_std),
            Gpt2 | Starcoder2 => self.matrix(&name("ffn_up.weight"), d, f, up_std),
            _ => {
                self.matrix(&name("ffn_gate.weight"), d, f, up_std);
                self.matrix(&name("ffn_up.weight"), d, f, up_std);
            }
        }
        self.matrix(&name("ffn_down.weight"), f, d, down_std);
        if spec.variant == LlamaBias {
            self.vector(&name("ffn_gate.bias"), &[f], 0.0, 0.1);
        }
        if matches!(spec.variant, LlamaBias | Gpt2 | Starcoder2) {
            self.vector(&name("ffn_up.bias"), &[f], 0.0, 0.1);
            self.vector(&name("ffn_down.bias"), &[d], 0.0, 0.1);
        }
        if matches!(
            spec.variant,
            Gemma2 | Gemma3 | Gemma3Scaled | Olmo2 | Olmo2Swa
        ) {
            self.vector(&name("post_ffw_norm.weight"), &[d], 1.0, 0.2);
        }
    }

    fn experts(&mut self, layer: usize, n_expert: usize) {
        let spec = self.spec;
        let (d, f) = (spec.n_embd, spec.n_ff_expert());
        let name = |part: &str| format!("blk.{layer}.ffn_{part}.weight");
        let fan_in = |n: usize| GAIN / (n as f32).sqrt();
        // Real files have it in F32. Experts differ so much in their probabilities that one that rounding takes for another counts little.
        let router_std = 3.0 / (d as f32).sqrt();
        self.vector(&name("gate_inp"), &[d, n_expert], 0.0, router_std);
        for (part, n_in, n_out) in [("gate", d, f), ("up", d, f), ("down", f, d)] {
            let name = name(&format!("{part}_exps"));
            self.tensor(&name, &[n_in, n_out, n_expert], fan_in(n_in));
            if spec.variant == Variant::GptOss {
                // Some gates and ups are beyond 7, where they are cut.
                let bias = name.replace(".weight", ".bias");
                let std = if part == "down" { 0.3 } else { 3.0 };
                self.vector(&bias, &[n_out, n_expert], 0.0, std);
            }
        }
        if spec.variant == Variant::GptOss {
            let bias = name("gate_inp").replace(".weight", ".bias");
            self.vector(&bias, &[n_expert], 0.0, 1.0);
        }
        let Some(f) = spec.n_ff_shared() else {
            return;
        };
        if spec.variant == Variant::Qwen2Moe {
            self.vector(&name("gate_inp_shexp"), &[d], 0.0, fan_in(d));
        }
        for (part, n_in, n_out) in [("gate", d, f), ("up", d, f), ("down", f, d)] {
            self.matrix(&name(&format!("{part}_shexp")), n_in, n_out, fan_in(n_in));
        }
    }

    /// A norm in front of a block: weight, and bias for layer norms, `ne = [D]`.
    fn norm(&mut self, name: &str) {
        self.vector(&format!("{name}.weight"), &[self.spec.n_embd], 1.0, 0.2);
        if self.spec.variant.has_layer_norms() {
            self.vector(&format!("{name}.bias"), &[self.spec.n_embd], 0.0, 0.1);
        }
    }

    /// A random matrix `ne = [n_in, n_out]` in the spec's type.
    fn matrix(&mut self, name: &str, n_in: usize, n_out: usize, std: f32) {
        self.tensor(name, &[n_in, n_out], std);
    }

    /// Random matrices, `ne = [n_in, ..]`, in the spec's type.
    fn tensor(&mut self, name: &str, ne: &[usize], std: f32) {
        let n_in = ne[0];
        let mut values = random(self.spec.seed, name, ne.iter().product(), 0.0, std);
        if let Some(ty) = self.spec.rounded_to {
            values = dequantize(ty, &quantize(ty, &values, n_in), n_in);
        }
        self.push(
            name,
            self.spec.weight_type,
            ne,
            quantize(self.spec.weight_type, &values, n_in),
        );
    }

    /// A random F32 tensor.
    fn vector(&mut self, name: &str, ne: &[usize], mean: f32, std: f32) {
        let values = random(self.spec.seed, name, ne.iter().product(), mean, std);
        self.push(name, GgmlType::F32, ne, le_bytes(&values));
    }

    /// A given F32 tensor, `ne = [values]`.
    fn constant(&mut self, name: &str, values: &[f32]) {
        self.push(name, GgmlType::F32, &[values.len()], le_bytes(values));
    }

    fn push(&mut self, name: &str, ty: GgmlType, ne: &[usize], data: Vec<u8>) {
        let ne: Vec<u64> = ne.iter().map(|&n| n as u64).collect();
        self.file.tensor(name, ty, &ne);
        self.data.push(data);
    }

    fn rope_scaling(&mut self, kind: &str, factor: f32) {
        self.set("rope.scaling.type", MetaValue::String(kind.into()));
        self.f32("rope.scaling.factor", factor);
    }

    fn u32(&mut self, key: &str, value: usize) {
        self.set(key, MetaValue::U32(value as u32));
    }

    /// One number for all layers, or one for each if they differ.
    fn per_layer(&mut self, key: &str, all: usize, each: fn(&LayerSizes) -> usize) {
        if self.spec.layers.is_empty() {
            return self.u32(key, all);
        }
        let numbers = self.spec.layers.iter().map(|l| each(l) as u32);
        self.set(key, MetaValue::U32s(numbers.collect()));
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.set(key, MetaValue::F32(value));
    }

    fn set(&mut self, key: &str, value: MetaValue) {
        self.file
            .set(format!("{}.{key}", self.spec.architecture), value);
    }
}

/// Normal numbers that depend on seed and tensor name only, so that a tensor is the same in every variant and type.
pub(crate) fn random(seed: u64, name: &str, n: usize, mean: f32, std: f32) -> Vec<f32> {
    // FNV-1a.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut rng = StdRng::seed_from_u64(seed ^ hash);
    let normal = Normal::new(mean, std).expect("finite standard deviation");
    (0..n).map(|_| normal.sample(&mut rng)).collect()
}

pub(crate) fn le_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}
