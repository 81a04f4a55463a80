//! Weights in place: tensor descriptions that point into the mapped file. Every tensor of the file is claimed by the
//! decoder or the load fails.

use super::arch::{Need, SharedSpec, Weighting};
use super::experts::{ExpertShape, FfnShape};
use super::hparams::HParams;
use super::{Kernels, ModelError, ModelOptions};
use crate::file::gguf::TensorInfo;
use crate::file::mmap::MappedGguf;
use crate::file::types::GgmlType;
use crate::ggml::{Buffer, RepackLayout, Tensor, faster_than_ggml};
use crate::kernels::{Bits, has_mul_mat, invariant, sensible};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// `y = W x + b`, or that of each of E experts.
#[derive(Clone)]
pub(crate) struct Linear {
    /// `ne = [inputs, outputs]` or [inputs, outputs, E], any type that ggml multiplies.
    pub(crate) w: Tensor,
    /// The weights as they lie in the file, where `w` is a repacked copy.
    mapped: Option<Tensor>,
    /// F32 `ne = [outputs]` or [outputs, E].
    pub(crate) b: Option<Tensor>,
    /// With how many rows the product is our own, given the weights' type: where it is faster, and where bits must not depend on how many rows there are.
    own: [fn(GgmlType, usize) -> Option<Bits>; 2],
}

impl Linear {
    /// Weights as they lie in the file, multiplied by ggml.
    pub(crate) fn new(w: Tensor, b: Option<Tensor>) -> Self {
        Self {
            w,
            mapped: None,
            b,
            own: [never; 2],
        }
    }

    /// Decides whose kernels multiply many rows with it.
    fn choose(&mut self, kernels: Kernels) {
        let w = self.mapped();
        let (ty, k) = (w.ty(), w.ne()[0]);
        let available = has_mul_mat(ty, k);
        self.own = match kernels {
            // Whoever repacks has chosen ggml's kernels.
            Kernels::Auto if self.mapped.is_none() && available => [faster_than_ggml, invariant],
            Kernels::Own if available => [sensible, invariant],
            _ => [never; 2],
        };
    }

    /// To how many bits so many rows are rounded for the product with [`Linear::mapped`], where that product is our own. `invariant`: the bits of a row's product
    /// must not depend on how many there are.
    pub(crate) fn own(&self, rows: usize, invariant: bool) -> Option<Bits> {
        self.own[usize::from(invariant)](self.mapped().ty(), rows)
    }

    /// The weights as they lie in the file, `ne = [inputs, outputs]`.
    pub(crate) fn mapped(&self) -> &Tensor {
        self.mapped.as_ref().unwrap_or(&self.w)
    }
}

/// The product is never our own.
fn never(_: GgmlType, _: usize) -> Option<Bits> {
    None
}

/// Weight and bias of a norm, F32 `ne = [D]` (or the shapes of a q/k norm).
#[derive(Clone)]
pub(crate) struct Norm {
    pub(crate) w: Tensor,
    pub(crate) b: Option<Tensor>,
}

/// Query, key and value projections.
pub(crate) enum Qkv {
    /// One matrix: `ne = [D, (H + 2 Hk) d]`.
    Fused(Linear),
    /// q `ne = [D, H d]`, k and v `ne = [D, Hk d]`.
    Split { q: Linear, k: Linear, v: Linear },
}

/// What the activation of a feed-forward network reads.
pub(crate) enum Hidden {
    /// `ne = [D, F]`.
    Plain(Linear),
    /// `ne = [D, F]` each.
    Gated { gate: Linear, up: Linear },
    /// Gate and up in one matrix, the gate in the first half: `ne = [D, 2F]`.
    Fused(Linear),
}

/// A dense feed-forward network.
pub(crate) struct Mlp {
    pub(crate) hidden: Hidden,
    /// `ne = [F, D]`.
    pub(crate) down: Linear,
}

impl Mlp {
    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let mut all = match &mut self.hidden {
            Hidden::Plain(l) | Hidden::Fused(l) => vec![l],
            Hidden::Gated { gate, up } => vec![gate, up],
        };
        all.push(&mut self.down);
        all
    }
}

/// A mixture of experts (Shazeer et al. 2017): every token goes through a few of E gated networks.
pub(crate) struct Experts {
    /// Experts that each token goes through.
    pub(crate) n_used: usize,
    pub(crate) weighting: Weighting,
    /// Whose logits experts are chosen by: `ne = [D, E]`.
    pub(crate) router: Linear,
    /// `ne = [D, F, E]`.
    pub(crate) gate: Linear,
    /// `ne = [D, F, E]`.
    pub(crate) up: Linear,
    /// `ne = [F, D, E]`.
    pub(crate) down: Linear,
    pub(crate) shared: Option<SharedExpert>,
}

/// The expert that every token goes through.
pub(crate) struct SharedExpert {
    pub(crate) mlp: Mlp,
    /// Its result is multiplied by the sigmoid of this: `ne = [D, 1]`.
    pub(crate) gate: Option<Linear>,
}

/// The feed-forward network of a layer.
pub(crate) enum FeedForward {
    Dense(Mlp),
    Experts(Box<Experts>),
}

impl FeedForward {
    /// The matrices that it multiplies with, but those of [`FeedForward::routers_mut`].
    fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Dense(mlp) => mlp.linears_mut(),
            Self::Experts(e) => {
                let mut all = vec![&mut e.gate, &mut e.up, &mut e.down];
                all.extend(e.shared.iter_mut().flat_map(|s| s.mlp.linears_mut()));
                all
            }
        }
    }

    /// What decides which experts count, and how much: matrices of a few rows.
    fn routers_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Dense(_) => Vec::new(),
            Self::Experts(e) => {
                let gate = e.shared.as_mut().and_then(|s| s.gate.as_mut());
                [&mut e.router].into_iter().chain(gate).collect()
            }
        }
    }
}

/// One layer.
pub(crate) struct Layer {
    pub(crate) attn_norm: Option<Norm>,
    pub(crate) qkv: Qkv,
    /// Weight `ne = [d]` (per head), [d, H] (per head, own weights) or [H d] (whole row).
    pub(crate) q_norm: Option<Tensor>,
    /// As `q_norm`, with Hk.
    pub(crate) k_norm: Option<Tensor>,
    /// F32 `ne = [H]`: of each head a score that has no value.
    pub(crate) attn_sinks: Option<Tensor>,
    /// `ne = [H d, D]`.
    pub(crate) attn_out: Linear,
    pub(crate) attn_post_norm: Option<Norm>,
    pub(crate) ffn_norm: Option<Norm>,
    pub(crate) ffn: FeedForward,
    pub(crate) ffn_post_norm: Option<Norm>,
}

impl Layer {
    /// The matrices that it multiplies with, but routers.
    fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        let qkv = match &mut self.qkv {
            Qkv::Fused(l) => vec![l],
            Qkv::Split { q, k, v } => vec![q, k, v],
        };
        qkv.into_iter()
            .chain([&mut self.attn_out])
            .chain(self.ffn.linears_mut())
    }
}

/// All weights of a base model, immutable and shared.
pub(crate) struct Weights {
    /// `ne = [D, V]`.
    pub(crate) token_embd: Tensor,
    /// `ne = [D, context length]`: learned positions.
    pub(crate) position_embd: Option<Tensor>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) output_norm: Norm,
    /// `ne = [D, V]`; the token embeddings if the file has no other.
    pub(crate) output: Linear,
    /// F32 `ne = [n_rot/2]`: Llama 3's frequency factors.
    pub(crate) rope_freqs: Option<Tensor>,
    /// F32 `ne = [n_rot/2]`: LongRoPE's factors beyond the original context length.
    pub(crate) rope_long: Option<Tensor>,
    /// F32 `ne = [n_rot/2]`: LongRoPE's factors within the original context length.
    pub(crate) rope_short: Option<Tensor>,
    /// Bytes held in repacked copies.
    pub(crate) repacked_bytes: usize,
}

struct Loader<'a> {
    /// By name: part of the file, and what it says of the tensor.
    tensors: HashMap<&'a str, (usize, &'a TensorInfo)>,
    /// One per part of the file.
    buffers: Vec<Arc<Buffer>>,
    claimed: HashSet<String>,
}

impl Weights {
    /// Claims every tensor of `file`. With [`ModelOptions::repack`], matrices are copied into ggml's layouts where it has them.
    pub(crate) fn load(
        file: &Arc<MappedGguf>,
        hp: &HParams,
        options: &ModelOptions,
    ) -> Result<Self, ModelError> {
        let buffers = file
            .parts()
            .iter()
            .map(|part| {
                let bytes = part.bytes();
                // SAFETY: `file` keeps the map alive and in place; that nobody changes the file is its contract.
                unsafe { Buffer::read_only(bytes.as_ptr(), bytes.len(), file.clone()) }
            })
            .collect();
        let tensors = file
            .tensors()
            .map(|(part, t)| (t.name.as_str(), (part, t)))
            .collect();
        let mut l = Loader {
            tensors,
            buffers,
            claimed: HashSet::new(),
        };

        let d = hp.n_embd;
        let token_embd = l.rows("token_embd.weight", d)?;
        let n_vocab = token_embd.ne()[1];
        let position_embd = match hp.arch.positions {
            Need::Absent => None,
            _ => Some(l.table("position_embd.weight", &[d, hp.n_ctx_train])?),
        };
        let layers = (0..hp.n_layer())
            .map(|il| l.layer(il, hp))
            .collect::<Result<_, _>>()?;
        let output_norm = l.norm("output_norm", d, Need::Required)?.expect("required");
        let output = if l.has("output.weight") {
            l.linear("output", [d, n_vocab])?
        } else {
            let w = l.table("token_embd.weight", &[d, n_vocab])?;
            Linear::new(w, l.vector("output.bias", &[n_vocab], Need::Optional)?)
        };
        let half = hp.rope().map_or(0, |r| r.n_rot / 2);
        let mut factors = |name: &str| {
            if half == 0 {
                Ok(None)
            } else {
                l.vector(name, &[half], Need::Optional)
            }
        };
        let rope_freqs = factors("rope_freqs.weight")?;
        let rope_long = factors("rope_factors_long.weight")?;
        let rope_short = factors("rope_factors_short.weight")?;

        if let Some((_, t)) = file.tensors().find(|(_, t)| !l.claimed.contains(&t.name)) {
            return Err(ModelError::UnclaimedTensor {
                tensor: t.name.clone(),
                architecture: hp.arch.name,
            });
        }
        let mut weights = Self {
            token_embd,
            position_embd,
            layers,
            output_norm,
            output,
            rope_freqs,
            rope_long,
            rope_short,
            repacked_bytes: 0,
        };
        if options.repack {
            weights.repacked_bytes = weights.repack()?;
        }
        weights.linears().for_each(|l| l.choose(options.kernels));
        // Small as routers are, ggml's product would take more threads to meet than it takes to compute.
        let kernels = match options.kernels {
            Kernels::Auto => Kernels::Own,
            kernels => kernels,
        };
        let routers = (weights.layers.iter_mut()).flat_map(|layer| layer.ffn.routers_mut());
        routers.for_each(|l| l.choose(kernels));
        Ok(weights)
    }

    /// All that tokens are multiplied with, but routers.
    fn linears(&mut self) -> impl Iterator<Item = &mut Linear> {
        let layers = self.layers.iter_mut().flat_map(Layer::linears_mut);
        layers.chain([&mut self.output])
    }

    /// Copies matrices into ggml's layouts, one buffer for each, where it has one; returns the bytes that they take. Those of experts stay where they are: most of
    /// them rest.
    fn repack(&mut self) -> Result<usize, ModelError> {
        let mut todo: Vec<_> = self
            .linears()
            .filter(|l| l.w.ne()[2] == 1)
            .filter_map(|l| Some((RepackLayout::of(&l.w)?, l)))
            .collect();
        let mut bytes = 0;
        while let Some(&(layout, _)) = todo.first() {
            let (now, later): (Vec<_>, Vec<_>) = todo.into_iter().partition(|t| t.0 == layout);
            let plain: Vec<_> = now.iter().map(|(_, l)| l.w.clone()).collect();
            let size = layout.size(&plain);
            let copies = layout
                .repack(&plain)
                .ok_or(ModelError::OutOfMemory { bytes: size })?;
            for ((_, l), copy) in now.into_iter().zip(copies) {
                l.mapped = Some(std::mem::replace(&mut l.w, copy));
            }
            bytes += size;
            todo = later;
        }
        Ok(bytes)
    }

    /// V.
    pub(crate) fn n_vocab(&self) -> usize {
        self.token_embd.ne()[1]
    }
}

/// ggml's CPU backend has a dot product for rows of this type, so `mul_mat` and `get_rows` take it.
fn multiplies(ty: GgmlType) -> bool {
    use GgmlType::*;
    ty.is_quantized() || matches!(ty, F32 | F16 | BF16)
}

impl Loader<'_> {
    fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A description of the file's tensor `name`, placed in the map. `expected` is checked, zeros match anything.
    fn claim(
        &mut self,
        name: &str,
        expected: &[usize],
        ok: fn(GgmlType) -> bool,
    ) -> Result<Tensor, ModelError> {
        let (part, info) = *self
            .tensors
            .get(name)
            .ok_or_else(|| ModelError::MissingTensor {
                tensor: name.to_owned(),
            })?;
        let ne: Vec<usize> = info.ne[..info.n_dims].iter().map(|&n| n as usize).collect();
        let padded = |i: usize| ne.get(i).copied().unwrap_or(1);
        if (0..4).any(|i| {
            let want = expected.get(i).copied().unwrap_or(1);
            want != 0 && want != padded(i)
        }) {
            return Err(ModelError::TensorShape {
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                got: ne,
            });
        }
        if !ok(info.ty) {
            return Err(ModelError::TensorType {
                tensor: name.to_owned(),
                ty: info.ty.name(),
            });
        }
        let tensor = self.buffers[part].tensor(info.ty, &ne, name, info.range.start);
        self.claimed.insert(name.to_owned());
        Ok(tensor)
    }

    /// Rows that are picked by token: `ne = [width, any]`.
    fn rows(&mut self, name: &str, width: usize) -> Result<Tensor, ModelError> {
        self.claim(name, &[width, 0], multiplies)
    }

    /// A matrix for products, or one whose rows are picked.
    fn table(&mut self, name: &str, ne: &[usize]) -> Result<Tensor, ModelError> {
        self.claim(name, ne, multiplies)
    }

    fn vector(
        &mut self,
        name: &str,
        ne: &[usize],
        need: Need,
    ) -> Result<Option<Tensor>, ModelError> {
        if need == Need::Absent || (need == Need::Optional && !self.has(name)) {
            return Ok(None);
        }
        self.claim(name, ne, |ty| ty == GgmlType::F32).map(Some)
    }

    fn linear(&mut self, name: &str, ne: [usize; 2]) -> Result<Linear, ModelError> {
        let w = self.table(&format!("{name}.weight"), &ne)?;
        let b = self.vector(&format!("{name}.bias"), &[ne[1]], Need::Optional)?;
        Ok(Linear::new(w, b))
    }

    fn norm(&mut self, name: &str, width: usize, need: Need) -> Result<Option<Norm>, ModelError> {
        let Some(w) = self.vector(&format!("{name}.weight"), &[width], need)? else {
            return Ok(None);
        };
        let b = self.vector(&format!("{name}.bias"), &[width], Need::Optional)?;
        Ok(Some(Norm { w, b }))
    }

    /// A q or k norm over `heads` heads of `dim` values: the tensor's shape says which kind it is.
    fn head_norm(
        &mut self,
        name: &str,
        dim: usize,
        heads: usize,
        need: Need,
    ) -> Result<Option<Tensor>, ModelError> {
        let name = format!("{name}.weight");
        let shape = self
            .tensors
            .get(name.as_str())
            .map(|(_, info)| (info.ne[0] as usize, info.ne[1] as usize));
        match shape {
            Some((n, 1)) if n == dim * heads => self.vector(&name, &[n], need),
            Some((n, h)) if n == dim && h == heads => self.vector(&name, &[n, h], need),
            _ => self.vector(&name, &[dim], need),
        }
    }

    fn layer(&mut self, il: usize, hp: &HParams) -> Result<Layer, ModelError> {
        let arch = hp.arch;
        let name = |part: &str| format!("blk.{il}.{part}");
        let (d, shape) = (hp.n_embd, &hp.layers[il]);
        let (q_width, kv_width) = (shape.q_width(), shape.kv_width());
        let pre = if arch.pre_norm {
            Need::Required
        } else {
            Need::Absent
        };
        let post = if arch.post_norm {
            Need::Required
        } else {
            Need::Absent
        };

        let attn_norm = self.norm(&name("attn_norm"), d, pre)?;
        let qkv = if self.has(&name("attn_qkv.weight")) {
            Qkv::Fused(self.linear(&name("attn_qkv"), [d, q_width + 2 * kv_width])?)
        } else {
            Qkv::Split {
                q: self.linear(&name("attn_q"), [d, q_width])?,
                k: self.linear(&name("attn_k"), [d, kv_width])?,
                v: self.linear(&name("attn_v"), [d, kv_width])?,
            }
        };
        let mut head_norm = |part: &str, heads: usize| {
            self.head_norm(&name(part), shape.head_dim, heads, arch.qk_norm)
        };
        let q_norm = head_norm("attn_q_norm", shape.n_head)?;
        let k_norm = head_norm("attn_k_norm", shape.n_head_kv)?;
        let attn_sinks = self.vector(&name("attn_sinks.weight"), &[shape.n_head], arch.sinks)?;
        let attn_out = self.linear(&name("attn_output"), [q_width, d])?;
        let attn_post_norm = self.norm(&name("post_attention_norm"), d, post)?;
        let ffn_pre = if arch.may_be_parallel {
            Need::Optional
        } else {
            pre
        };
        let ffn_norm = self.norm(&name(arch.ffn_norm), d, ffn_pre)?;
        let ffn = self.feed_forward(il, hp)?;
        let ffn_post_norm = self.norm(&name("post_ffw_norm"), d, post)?;
        Ok(Layer {
            attn_norm,
            qkv,
            q_norm,
            k_norm,
            attn_sinks,
            attn_out,
            attn_post_norm,
            ffn_norm,
            ffn,
            ffn_post_norm,
        })
    }

    fn feed_forward(&mut self, il: usize, hp: &HParams) -> Result<FeedForward, ModelError> {
        match hp.layers[il].ffn {
            FfnShape::Dense { n_ff } => self.dense(il, hp, n_ff).map(FeedForward::Dense),
            FfnShape::Experts(shape) => {
                let experts = self.experts(il, hp, shape)?;
                Ok(FeedForward::Experts(Box::new(experts)))
            }
        }
    }

    /// A network of width `f`.
    fn dense(&mut self, il: usize, hp: &HParams, f: usize) -> Result<Mlp, ModelError> {
        let name = |part: &str| format!("blk.{il}.ffn_{part}");
        let (d, gate, up) = (hp.n_embd, name("gate"), name("up"));
        let hidden = if !hp.arch.gated {
            Hidden::Plain(self.linear(&up, [d, f])?)
        } else if hp.arch.may_fuse_gate && !self.has(&format!("{gate}.weight")) {
            Hidden::Fused(self.linear(&up, [d, 2 * f])?)
        } else {
            Hidden::Gated {
                gate: self.linear(&gate, [d, f])?,
                up: self.linear(&up, [d, f])?,
            }
        };
        let down = self.linear(&name("down"), [f, d])?;
        Ok(Mlp { hidden, down })
    }

    fn experts(
        &mut self,
        il: usize,
        hp: &HParams,
        shape: ExpertShape,
    ) -> Result<Experts, ModelError> {
        let name = |part: &str| format!("blk.{il}.ffn_{part}");
        let (d, e, f) = (hp.n_embd, shape.n_expert, shape.n_ff);
        let spec = hp.arch.experts.expect("the architecture has experts");
        let shared = match shape.n_ff_shared {
            Some(f) => {
                let gate = match spec.shared {
                    SharedSpec::Gated => Some(self.linear(&name("gate_inp_shexp"), [d, 1])?),
                    SharedSpec::Absent | SharedSpec::Optional => None,
                };
                let mlp = Mlp {
                    hidden: Hidden::Gated {
                        gate: self.linear(&name("gate_shexp"), [d, f])?,
                        up: self.linear(&name("up_shexp"), [d, f])?,
                    },
                    down: self.linear(&name("down_shexp"), [f, d])?,
                };
                Some(SharedExpert { mlp, gate })
            }
            None => None,
        };
        let mut each = |part: &str, ne: [usize; 3]| {
            let w = self.table(&format!("{}.weight", name(part)), &ne)?;
            let bias = format!("{}.bias", name(part));
            let b = self.vector(&bias, &ne[1..], Need::Optional)?;
            Ok::<_, ModelError>(Linear::new(w, b))
        };
        let (gate, up) = (each("gate_exps", [d, f, e])?, each("up_exps", [d, f, e])?);
        let down = each("down_exps", [f, d, e])?;
        Ok(Experts {
            n_used: shape.n_used,
            weighting: spec.weighting,
            router: self.linear(&name("gate_inp"), [d, e])?,
            gate,
            up,
            down,
            shared,
        })
    }
}
