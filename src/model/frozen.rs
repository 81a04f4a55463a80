//! The base model, opened.

use super::base::check_is_model;
use super::identity::fingerprint;
use super::vocab::{ChatOptions, Vocab};
use super::{BaseShape, Fingerprint, HParams, ModelError, Weights};
use crate::error::{Error, Result};
use crate::file::mmap::MappedGguf;
use crate::file::types::GgmlType;
use crate::ggml::{Operations, ThreadPool};
use crate::kernels::{CpuLevel, has_attention};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Whose kernels multiply with the weights, compute fused attention, and what stands between them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernels {
    /// Our own where they are faster than ggml's on this CPU, at no larger error: products, unless weights are repacked, attention, and what stands
    /// between. On x86-64 with AVX2 and FMA activations are rounded to 8 bits for weights that are integers, as ggml rounds them, and what [`Kernels::Own`] says of equal bits
    /// holds for these; with AVX-512 and its VNNI also for F16 and BF16, but not on Intel's CPUs. On AArch64 it holds for the types of integers but Q2_K. Other
    /// products are ours or ggml's by the weights' type and the number of rows (prompts, training, [batches](crate::Session)).
    #[default]
    Auto,
    /// ggraft's own where the CPU has them. On x86-64 with AVX2 and FMA they are nearer to the exact product than ggml's, which round activations to 8 bits. A
    /// row's product with weights of the types Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS, F32, F16 and BF16 has the same bits whatever rows it
    /// is computed with, and by however many threads; with others, fewer than 32 rows are left to ggml. The same holds for attention, and so for the logits of
    /// a model with such weights: they do not depend on how a text is cut into batches. On AArch64 they are those of [`Kernels::Auto`].
    Own,
    /// ggml's only: the logits are libllama's, bit for bit.
    Ggml,
}

impl Kernels {
    /// Whose operations stand between products.
    pub(crate) fn operations(self) -> Operations {
        match self {
            Self::Auto | Self::Own => Operations::Own,
            Self::Ggml => Operations::Ggml,
        }
    }

    /// Whether our own kernel computes fused attention over heads of `d` cached keys and values of type `ty`.
    pub(crate) fn attend(self, ty: GgmlType, d: usize) -> bool {
        match self {
            Self::Auto | Self::Own => has_attention(ty, d),
            Self::Ggml => false,
        }
    }
}

/// How to open a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelOptions {
    /// Copy matrices into ggml's interleaved layouts where it has them for this CPU, for a second copy of the weights in memory and seconds at start. Its
    /// products are then faster than from the map, but slower than ours with AVX-512 VNNI. Off by default: nothing is copied.
    pub repack: bool,
    /// Whose kernels multiply with the weights and compute fused attention.
    pub kernels: Kernels,
    /// How conversations are formatted: by the file's own template unless it says otherwise.
    pub chat: ChatOptions,
}

impl ModelOptions {
    /// Sets [`ModelOptions::repack`].
    pub fn repack(mut self, on: bool) -> Self {
        self.repack = on;
        self
    }

    /// Sets [`ModelOptions::kernels`].
    pub fn kernels(mut self, kernels: Kernels) -> Self {
        self.kernels = kernels;
        self
    }

    /// Sets [`ModelOptions::chat`].
    pub fn chat(mut self, options: ChatOptions) -> Self {
        self.chat = options;
        self
    }
}

/// A frozen base model: memory-mapped, immutable, shared by every session. Cloning is cheap.
#[derive(Clone)]
pub struct Model(Arc<Inner>);

struct Inner {
    id: u64,
    path: PathBuf,
    file: Arc<MappedGguf>,
    hp: HParams,
    weights: Weights,
    vocab: Vocab,
    shape: BaseShape,
    fingerprint: Fingerprint,
    kernels: Kernels,
    /// Pools in use, by thread count: sessions with equal counts share one.
    pools: Mutex<HashMap<usize, Weak<ThreadPool>>>,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("path", &self.0.path)
            .field("shape", &self.0.shape)
            .finish_non_exhaustive()
    }
}

impl Model {
    /// Maps the model at `path` (any part of a split one) and checks all of it but the weights' values.
    ///
    /// The file must not be changed while the model is open, see [`MappedGguf`].
    ///
    /// # Errors
    /// If the file cannot be read, is malformed, or holds a model that the decoder does not know in full.
    pub fn open(path: impl AsRef<Path>, options: &ModelOptions) -> Result<Self> {
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        CpuLevel::current()?;
        let path = path.as_ref();
        let file = Arc::new(MappedGguf::open(path)?);
        let (hp, weights) = Self::read(&file, options).map_err(|source| Error::Model {
            path: path.to_owned(),
            source,
        })?;
        let vocab = Vocab::open(&file)?.with_chat(&options.chat)?;
        let n_vocab = weights.n_vocab();
        if vocab.n_tokens() != 0 && vocab.n_tokens() != n_vocab {
            let source = ModelError::VocabularySize {
                tokens: vocab.n_tokens(),
                rows: n_vocab,
            };
            return Err(Error::Model {
                path: path.to_owned(),
                source,
            });
        }
        let shape = hp.base_shape(n_vocab);
        let fingerprint = fingerprint(&file, &shape);
        Ok(Self(Arc::new(Inner {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            path: path.to_owned(),
            file,
            hp,
            weights,
            vocab,
            shape,
            fingerprint,
            kernels: options.kernels,
            pools: Mutex::default(),
        })))
    }

    fn read(
        file: &Arc<MappedGguf>,
        options: &ModelOptions,
    ) -> Result<(HParams, Weights), ModelError> {
        let main = file.main();
        check_is_model(main)?;
        let hp = HParams::read(main)?;
        let weights = Weights::load(file, &hp, options)?;
        Ok((hp, weights))
    }

    /// The path it was opened from.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// The mapped file: metadata and tensors.
    pub fn file(&self) -> &MappedGguf {
        &self.0.file
    }

    /// Shape signature.
    pub fn shape(&self) -> &BaseShape {
        &self.0.shape
    }

    /// Whose kernels compute.
    pub(crate) fn kernels(&self) -> Kernels {
        self.0.kernels
    }

    /// Identifies the model whatever its quantization.
    pub fn fingerprint(&self) -> Fingerprint {
        self.0.fingerprint
    }

    /// Tokenizer and chat template.
    pub fn vocab(&self) -> &Vocab {
        &self.0.vocab
    }

    /// Context length of the training, in tokens.
    pub fn n_ctx_train(&self) -> usize {
        self.0.hp.n_ctx_train
    }

    /// Bytes held in repacked copies of weights; 0 without [`ModelOptions::repack`].
    pub fn repacked_bytes(&self) -> usize {
        self.0.weights.repacked_bytes
    }

    /// Unique among all models opened by this process.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    pub(crate) fn hparams(&self) -> &HParams {
        &self.0.hp
    }

    /// Whether texts of up to `n_ctx` positions take LongRoPE's factors for contexts beyond the original one.
    pub(crate) fn has_long_context(&self, n_ctx: usize) -> bool {
        let (hp, w) = (self.hparams(), self.weights());
        (w.rope_long.is_some() || w.rope_short.is_some())
            && hp.rope().is_some_and(|r| n_ctx > r.n_ctx_orig)
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.0.weights
    }

    /// The pool of `n_threads`, started if no session uses one of that size.
    pub(crate) fn pool(&self, n_threads: usize) -> Arc<ThreadPool> {
        let mut pools = self.0.pools.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = pools.get(&n_threads).and_then(Weak::upgrade) {
            return pool;
        }
        let pool = Arc::new(ThreadPool::new(n_threads));
        pools.insert(n_threads, Arc::downgrade(&pool));
        pool
    }
}
