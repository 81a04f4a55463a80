//! Random-weight models of real shapes, written in seconds: for speed and memory, where values do not matter but sizes do.
//!
//! Quantizing a billion random numbers would take minutes. Instead one tile of about a million per (type, row length) is quantized and its
//! rows are repeated, each tensor starting at another row.

use crate::fixture::{le_bytes, random};
use crate::quantize::quantize;
use crate::vocab::Vocab;
use ggraft::file::gguf_write::{GgufWriter, MetaValue};
use ggraft::file::types::GgmlType;
use std::collections::HashMap;
use std::path::Path;

/// A real model's shape. Letters as in the design: L, D, H, Hk, d, F, V.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    /// What it is called on the command line.
    pub name: &'static str,
    /// `general.architecture`.
    pub architecture: &'static str,
    /// L.
    pub n_layer: usize,
    /// D.
    pub n_embd: usize,
    /// H.
    pub n_head: usize,
    /// Hk.
    pub n_head_kv: usize,
    /// d.
    pub head_dim: usize,
    /// F; with experts, that of each.
    pub n_ff: usize,
    /// Experts there are, and those that a token goes through.
    pub experts: Option<(usize, usize)>,
    /// V.
    pub n_vocab: usize,
    /// BPE merges of the vocabulary.
    pub n_merges: usize,
    /// libllama's name of the pre-tokenizer.
    pub tokenizer_pre: &'static str,
    /// Whether text starts with bos.
    pub add_bos: bool,
    /// Context length trained for.
    pub n_ctx: usize,
    /// Base of rope frequencies.
    pub rope_theta: f32,
    /// Factor of Llama 3's rope scaling (low 1, high 4, original context 8192), if it has that.
    pub rope_factor: Option<f32>,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether rows of q and k have norms.
    pub qk_norm: bool,
    /// Numbers beside those that all architectures have, by key.
    pub multipliers: &'static [(&'static str, f32)],
    /// Whether the token embedding is the output matrix.
    pub tied: bool,
}

/// SmolLM 135M, Qwen2 0.5B, Llama 3.2 1B, Llama 3.1 8B, Granite 3.1 1B-A400M, OLMoE 1B-7B, and one of no real model that computes in no time.
pub const SHAPES: [Shape; 7] = [
    Shape {
        name: "smollm-135m",
        architecture: "llama",
        n_layer: 30,
        n_embd: 576,
        n_head: 9,
        n_head_kv: 3,
        head_dim: 64,
        n_ff: 1536,
        experts: None,
        n_vocab: 49_152,
        n_merges: 48_900,
        tokenizer_pre: "smollm",
        add_bos: false,
        n_ctx: 2048,
        rope_theta: 10_000.0,
        rope_factor: None,
        qkv_bias: false,
        qk_norm: false,
        multipliers: &[],
        tied: true,
    },
    Shape {
        name: "qwen2-0.5b",
        architecture: "qwen2",
        n_layer: 24,
        n_embd: 896,
        n_head: 14,
        n_head_kv: 2,
        head_dim: 64,
        n_ff: 4864,
        experts: None,
        n_vocab: 151_936,
        n_merges: 151_424,
        tokenizer_pre: "qwen2",
        add_bos: false,
        n_ctx: 32_768,
        rope_theta: 1_000_000.0,
        rope_factor: None,
        qkv_bias: true,
        qk_norm: false,
        multipliers: &[],
        tied: true,
    },
    Shape {
        name: "llama-1b",
        architecture: "llama",
        n_layer: 16,
        n_embd: 2048,
        n_head: 32,
        n_head_kv: 8,
        head_dim: 64,
        n_ff: 8192,
        experts: None,
        n_vocab: 128_256,
        n_merges: 280_147,
        tokenizer_pre: "llama-bpe",
        add_bos: true,
        n_ctx: 131_072,
        rope_theta: 500_000.0,
        rope_factor: Some(32.0),
        qkv_bias: false,
        qk_norm: false,
        multipliers: &[],
        tied: true,
    },
    Shape {
        name: "llama-8b",
        architecture: "llama",
        n_layer: 32,
        n_embd: 4096,
        n_head: 32,
        n_head_kv: 8,
        head_dim: 128,
        n_ff: 14_336,
        experts: None,
        n_vocab: 128_256,
        n_merges: 280_147,
        tokenizer_pre: "llama-bpe",
        add_bos: true,
        n_ctx: 131_072,
        rope_theta: 500_000.0,
        rope_factor: Some(8.0),
        qkv_bias: false,
        qk_norm: false,
        multipliers: &[],
        tied: false,
    },
    Shape {
        name: "granite-moe-1b",
        architecture: "granitemoe",
        n_layer: 24,
        n_embd: 1024,
        n_head: 16,
        n_head_kv: 8,
        head_dim: 64,
        n_ff: 512,
        experts: Some((32, 8)),
        n_vocab: 49_152,
        n_merges: 48_900,
        tokenizer_pre: "smollm",
        add_bos: false,
        n_ctx: 131_072,
        rope_theta: 1_500_000.0,
        rope_factor: None,
        qkv_bias: false,
        qk_norm: false,
        multipliers: &[
            ("embedding_scale", 12.0),
            ("residual_scale", 0.22),
            ("attention.scale", 0.015_625),
            ("logit_scale", 6.0),
        ],
        tied: true,
    },
    Shape {
        name: "olmoe-1b-7b",
        architecture: "olmoe",
        n_layer: 16,
        n_embd: 2048,
        n_head: 16,
        n_head_kv: 16,
        head_dim: 128,
        n_ff: 1024,
        experts: Some((64, 8)),
        n_vocab: 50_304,
        n_merges: 50_000,
        tokenizer_pre: "smollm",
        add_bos: false,
        n_ctx: 4096,
        rope_theta: 10_000.0,
        rope_factor: None,
        qkv_bias: false,
        qk_norm: true,
        multipliers: &[],
        tied: false,
    },
    Shape {
        name: "tiny",
        architecture: "llama",
        n_layer: 2,
        n_embd: 256,
        n_head: 4,
        n_head_kv: 2,
        head_dim: 64,
        n_ff: 512,
        experts: None,
        n_vocab: 8192,
        n_merges: 7940,
        tokenizer_pre: "smollm",
        add_bos: false,
        n_ctx: 2048,
        rope_theta: 10_000.0,
        rope_factor: None,
        qkv_bias: false,
        qk_norm: false,
        multipliers: &[],
        tied: true,
    },
];

/// The shape called `name`.
pub fn shape(name: &str) -> Option<&'static Shape> {
    SHAPES.iter().find(|s| s.name == name)
}

/// The type a weight file of overall type `ty` has for a matrix with rows of `n_in`, as llama.cpp's quantizer chooses it: the output
/// matrix (and so a tied token embedding) is Q6_K in every quantized file but Q8_0's, and rows that are not whole
/// 256-element blocks fall back to a type with blocks of 32.
pub fn matrix_type(ty: GgmlType, n_in: usize, is_output: bool) -> GgmlType {
    use GgmlType::*;
    let ty = if is_output && !matches!(ty, F32 | F16 | BF16 | Q8_0) {
        Q6_K
    } else {
        ty
    };
    if (n_in as u64).is_multiple_of(ty.block_size()) {
        return ty;
    }
    match ty {
        Q2_K | Q3_K => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        _ => IQ4_NL,
    }
}

/// Writes a model of `shape` whose matrices have type `ty` (see [`matrix_type`]); the output matrix too with `pure`. Returns the file's size in bytes.
pub fn write(path: &Path, shape: &Shape, ty: GgmlType, pure: bool) -> std::io::Result<u64> {
    let mut plan = Plan {
        shape,
        ty,
        pure,
        file: GgufWriter::new(),
        tensors: Vec::new(),
    };
    plan.metadata();
    plan.tensors();
    let Plan { file, tensors, .. } = plan;
    let mut tiles = HashMap::new();
    file.write(path, |i, out| tensors[i].write(i, &mut tiles, out))?;
    Ok(std::fs::metadata(path)?.len())
}

/// Writes a LoRA adapter for libllama, of random values: queries and values of every layer, as PEFT does by default.
pub fn write_lora(path: &Path, shape: &Shape, rank: usize, seed: u64) -> std::io::Result<()> {
    let mut file = GgufWriter::new();
    let text = |s: &str| MetaValue::String(s.into());
    file.set("general.architecture", text(shape.architecture))
        .set("general.type", text("adapter"))
        .set("adapter.type", text("lora"))
        .set("adapter.lora.alpha", MetaValue::F32(rank as f32));
    let mut values = Vec::new();
    for layer in 0..shape.n_layer {
        for (part, n_head) in [("attn_q", shape.n_head), ("attn_v", shape.n_head_kv)] {
            let n_out = n_head * shape.head_dim;
            for (side, ne) in [("a", [shape.n_embd, rank]), ("b", [rank, n_out])] {
                let name = format!("blk.{layer}.{part}.weight.lora_{side}");
                values.push(random(seed, &name, ne[0] * ne[1], 0.0, 0.01));
                file.tensor(name, GgmlType::F32, &ne.map(|n| n as u64));
            }
        }
    }
    file.write(path, |i, out| out.extend(le_bytes(&values[i])))
}

enum Tensor {
    /// Rows of `n_in` elements of type `ty`, normal with standard deviation 1 / sqrt(`n_in`).
    Matrix {
        ty: GgmlType,
        n_in: usize,
        n_out: usize,
    },
    /// F32.
    Vector(Vec<f32>),
}

impl Tensor {
    fn write(
        &self,
        index: usize,
        tiles: &mut HashMap<(GgmlType, usize), Vec<u8>>,
        out: &mut Vec<u8>,
    ) {
        const TILE: usize = 1 << 20;
        match *self {
            Self::Vector(ref values) => out.extend(le_bytes(values)),
            Self::Matrix { ty, n_in, n_out } => {
                let tile = tiles.entry((ty, n_in)).or_insert_with(|| {
                    let n = TILE / n_in * n_in;
                    quantize(
                        ty,
                        &random(0, "tile", n, 0.0, 1.0 / (n_in as f32).sqrt()),
                        n_in,
                    )
                });
                let row = tile.len() / (TILE / n_in);
                let total = row * n_out;
                // A stride that is not a multiple of the tile's length in rows gives neighbouring tensors different rows.
                let mut at = index * 61 * row % tile.len();
                out.reserve(total);
                let end = out.len() + total;
                while out.len() < end {
                    let n = (tile.len() - at).min(end - out.len());
                    out.extend_from_slice(&tile[at..at + n]);
                    at = 0;
                }
            }
        }
    }
}

struct Plan<'a> {
    shape: &'a Shape,
    ty: GgmlType,
    pure: bool,
    file: GgufWriter,
    tensors: Vec<Tensor>,
}

impl Plan<'_> {
    fn metadata(&mut self) {
        let s = self.shape;
        let key = |name: &str| format!("{}.{name}", s.architecture);
        let file_type = match self.ty {
            GgmlType::F32 => Some(0),
            GgmlType::F16 => Some(1),
            GgmlType::Q4_0 => Some(2),
            GgmlType::Q8_0 => Some(7),
            GgmlType::Q4_K => Some(14),
            GgmlType::Q5_K => Some(16),
            GgmlType::Q6_K => Some(18),
            GgmlType::BF16 => Some(32),
            _ => None,
        };
        self.file
            .set(
                "general.architecture",
                MetaValue::String(s.architecture.into()),
            )
            .set("general.type", MetaValue::String("model".into()))
            .set(
                "general.name",
                MetaValue::String(format!("random {}", s.name)),
            )
            .set("general.quantization_version", MetaValue::U32(2));
        if let Some(number) = file_type {
            self.file.set("general.file_type", MetaValue::U32(number));
        }
        for (name, value) in [
            ("vocab_size", s.n_vocab),
            ("context_length", s.n_ctx),
            ("embedding_length", s.n_embd),
            ("block_count", s.n_layer),
            ("feed_forward_length", s.n_ff),
            ("attention.head_count", s.n_head),
            ("attention.head_count_kv", s.n_head_kv),
            ("rope.dimension_count", s.head_dim),
        ] {
            self.file.set(key(name), MetaValue::U32(value as u32));
        }
        self.file
            .set(
                key("attention.layer_norm_rms_epsilon"),
                MetaValue::F32(1e-5),
            )
            .set(key("rope.freq_base"), MetaValue::F32(s.rope_theta));
        for &(name, value) in s.multipliers {
            self.file.set(key(name), MetaValue::F32(value));
        }
        if let Some((n_expert, n_used)) = s.experts {
            for (name, n) in [("expert_count", n_expert), ("expert_used_count", n_used)] {
                self.file.set(key(name), MetaValue::U32(n as u32));
            }
        }
        Vocab::syllables(s.n_vocab, s.n_merges, s.tokenizer_pre, s.add_bos).write(&mut self.file);
    }

    fn tensors(&mut self) {
        let s = self.shape;
        let (d, q, kv) = (s.n_embd, s.n_head * s.head_dim, s.n_head_kv * s.head_dim);
        self.matrix("token_embd.weight".into(), d, s.n_vocab, s.tied);
        self.norm("output_norm.weight".into());
        if !s.tied {
            self.matrix("output.weight".into(), d, s.n_vocab, true);
        }
        if let Some(factor) = s.rope_factor {
            let factors =
                crate::llama3_rope_factors(s.head_dim, s.rope_theta, factor, 1.0, 4.0, 8192.0);
            self.vector("rope_freqs.weight".into(), factors);
        }
        for layer in 0..s.n_layer {
            let name = |part: &str| format!("blk.{layer}.{part}");
            self.norm(name("attn_norm.weight"));
            self.matrix(name("attn_q.weight"), d, q, false);
            self.matrix(name("attn_k.weight"), d, kv, false);
            self.matrix(name("attn_v.weight"), d, kv, false);
            if s.qkv_bias {
                for (part, n) in [("attn_q.bias", q), ("attn_k.bias", kv), ("attn_v.bias", kv)] {
                    self.vector(name(part), random(0, &name(part), n, 0.0, 0.1));
                }
            }
            self.matrix(name("attn_output.weight"), q, d, false);
            self.norm(name("ffn_norm.weight"));
            if s.qk_norm {
                for (part, n) in [("attn_q_norm.weight", q), ("attn_k_norm.weight", kv)] {
                    self.vector(name(part), random(0, &name(part), n, 1.0, 0.1));
                }
            }
            let parts = [("gate", d, s.n_ff), ("up", d, s.n_ff), ("down", s.n_ff, d)];
            for (part, n_in, n_out) in parts {
                match s.experts {
                    None => self.matrix(name(&format!("ffn_{part}.weight")), n_in, n_out, false),
                    Some((n_expert, _)) => {
                        self.experts(
                            name(&format!("ffn_{part}_exps.weight")),
                            n_in,
                            n_out,
                            n_expert,
                        );
                    }
                }
            }
            if let Some((n_expert, _)) = s.experts {
                let name = name("ffn_gate_inp.weight");
                let std = 1.0 / (d as f32).sqrt();
                let values = random(0, &name, d * n_expert, 0.0, std);
                self.tensor(name, &[d, n_expert], values);
            }
        }
    }

    /// A matrix for each of `n` experts.
    fn experts(&mut self, name: String, n_in: usize, n_out: usize, n: usize) {
        let ty = matrix_type(self.ty, n_in, false);
        self.file
            .tensor(name, ty, &[n_in, n_out, n].map(|n| n as u64));
        let n_out = n_out * n;
        self.tensors.push(Tensor::Matrix { ty, n_in, n_out });
    }

    fn matrix(&mut self, name: String, n_in: usize, n_out: usize, is_output: bool) {
        let ty = matrix_type(self.ty, n_in, is_output && !self.pure);
        self.file.tensor(name, ty, &[n_in as u64, n_out as u64]);
        self.tensors.push(Tensor::Matrix { ty, n_in, n_out });
    }

    fn norm(&mut self, name: String) {
        let values = random(0, &name, self.shape.n_embd, 1.0, 0.1);
        self.vector(name, values);
    }

    fn vector(&mut self, name: String, values: Vec<f32>) {
        self.tensor(name, &[values.len()], values);
    }

    /// An F32 tensor.
    fn tensor(&mut self, name: String, ne: &[usize], values: Vec<f32>) {
        let ne: Vec<u64> = ne.iter().map(|&n| n as u64).collect();
        self.file.tensor(name, GgmlType::F32, &ne);
        self.tensors.push(Tensor::Vector(values));
    }
}
