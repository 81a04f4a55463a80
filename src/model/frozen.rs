//! The base model, opened.

use super::base::{Base, check_is_model};
use super::llama::LlamaModel;
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
    /// row's product with weights of the types Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL, IQ4_XS, MXFP4, F32, F16 and BF16 has the same bits whatever rows it
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

/// Whose decoder computes a model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecoderChoice {
    /// ggraft's own; a model of an architecture that it does not know is an error.
    #[default]
    Own,
    /// ggraft's own, and libllama's for architectures that only that one knows.
    Auto,
    /// libllama's, whatever the architecture. Sessions, engines and adapters are used as with the own one, but: memory for the whole context is taken at once, texts share no
    /// beginnings ([`EngineOptions::prefix_bytes`](crate::infer::engine::EngineOptions::prefix_bytes)), an answer's last bits can depend on what else is computed with it, and
    /// there is no training by backpropagation.
    Llama,
}

/// How to open a model.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelOptions {
    /// Copy matrices into ggml's interleaved layouts where it has them for this CPU, for a second copy of the weights in memory and seconds at start. Its
    /// products are then faster than from the map, but slower than ours with AVX-512 VNNI. Matrices of experts are not copied. Off by default: nothing is.
    pub repack: bool,
    /// Whose kernels multiply with the weights and compute fused attention.
    pub kernels: Kernels,
    /// Whose decoder computes.
    pub decoder: DecoderChoice,
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

    /// Sets [`ModelOptions::decoder`].
    pub fn decoder(mut self, decoder: DecoderChoice) -> Self {
        self.decoder = decoder;
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
    decoder: Decoding,
    vocab: Vocab,
    base: Base,
    n_ctx_train: usize,
    kernels: Kernels,
    /// Pools in use, by thread count: sessions with equal counts share one.
    pools: Mutex<HashMap<usize, Weak<ThreadPool>>>,
}

/// Who computes.
enum Decoding {
    Own(Arc<Native>),
    Llama(Arc<LlamaModel>),
}

/// What our own decoder computes with.
pub(crate) struct Native {
    pub(crate) hp: HParams,
    pub(crate) weights: Weights,
}

impl Native {
    /// Whether texts of up to `n_ctx` positions take LongRoPE's factors for contexts beyond the original one.
    pub(crate) fn has_long_context(&self, n_ctx: usize) -> bool {
        let w = &self.weights;
        (w.rope_long.is_some() || w.rope_short.is_some())
            && self.hp.rope().is_some_and(|r| n_ctx > r.n_ctx_orig)
    }
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model")
            .field("path", &self.0.path)
            .field("shape", self.shape())
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
        let in_file = |source| Error::Model {
            path: path.to_owned(),
            source,
        };
        let native = Self::read(&file, options).map_err(in_file)?;
        let base = Base::read(&file).map_err(in_file)?;
        let decoder = match native {
            Some(native) => Decoding::Own(Arc::new(native)),
            None => Decoding::Llama(Arc::new(LlamaModel::load(&file, options.repack)?)),
        };
        let vocab = Vocab::open(&file)?.with_chat(&options.chat)?;
        let n_vocab = base.shape().n_vocab;
        if vocab.n_tokens() != 0 && vocab.n_tokens() != n_vocab {
            return Err(in_file(ModelError::VocabularySize {
                tokens: vocab.n_tokens(),
                rows: n_vocab,
            }));
        }
        Ok(Self(Arc::new(Inner {
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
            path: path.to_owned(),
            n_ctx_train: base.n_ctx_train(),
            file,
            decoder,
            vocab,
            base,
            kernels: options.kernels,
            pools: Mutex::default(),
        })))
    }

    /// What our decoder computes with; `None` if libllama's is to compute.
    fn read(file: &Arc<MappedGguf>, options: &ModelOptions) -> Result<Option<Native>, ModelError> {
        if options.decoder == DecoderChoice::Llama {
            return Ok(None);
        }
        check_is_model(file.main())?;
        let hp = match HParams::read(file.main()) {
            Err(e) if e.is_unknown_architecture() && options.decoder == DecoderChoice::Auto => {
                return Ok(None);
            }
            hp => hp?,
        };
        let weights = Weights::load(file, &hp, options)?;
        Ok(Some(Native { hp, weights }))
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
        self.0.base.shape()
    }

    /// Whose kernels compute.
    pub(crate) fn kernels(&self) -> Kernels {
        self.0.kernels
    }

    /// Identifies the model whatever its quantization.
    pub fn fingerprint(&self) -> Fingerprint {
        self.0.base.fingerprint()
    }

    /// Tokenizer and chat template.
    pub fn vocab(&self) -> &Vocab {
        &self.0.vocab
    }

    /// Context length of the training, in tokens.
    pub fn n_ctx_train(&self) -> usize {
        self.0.n_ctx_train
    }

    /// Whether ggraft's own decoder computes it, or libllama's.
    pub fn is_native(&self) -> bool {
        matches!(self.0.decoder, Decoding::Own(_))
    }

    /// Bytes that our decoder holds in repacked copies of weights; 0 without [`ModelOptions::repack`].
    pub fn repacked_bytes(&self) -> usize {
        self.computed_by()
            .map_or(0, |native| native.weights.repacked_bytes)
    }

    /// Unique among all models opened by this process.
    pub(crate) fn id(&self) -> u64 {
        self.0.id
    }

    /// Shape, fingerprint, layers with windows.
    pub(crate) fn base(&self) -> &Base {
        &self.0.base
    }

    /// What our decoder computes with.
    ///
    /// # Errors
    /// [`ModelError::NoBackward`] if libllama computes.
    pub(crate) fn native(&self) -> Result<&Arc<Native>> {
        self.computed_by().map_err(|_| Error::Model {
            path: self.path().to_owned(),
            source: ModelError::NoBackward,
        })
    }

    /// What our decoder computes with, or libllama's model.
    ///
    /// # Errors
    /// Libllama's, if that one computes.
    pub(crate) fn computed_by(&self) -> Result<&Arc<Native>, &Arc<LlamaModel>> {
        match &self.0.decoder {
            Decoding::Own(native) => Ok(native),
            Decoding::Llama(llama) => Err(llama),
        }
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
