//! What a model's file says of the model, whatever its architecture.

use super::arch;
use super::hparams::{HParams, MAX_LAYERS};
use super::identity::fingerprint;
use super::keys::{Keys, MAX_SIZE};
use super::{BaseShape, Fingerprint, ModelError, PerLayer};
use crate::error::{Error, Result};
use crate::file::mmap::{MappedGguf, Part};
use std::path::Path;

/// A base model that others run: its shape and fingerprint, to check adapters by, and which of its layers see windows. Nothing of its weights is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    shape: BaseShape,
    fingerprint: Fingerprint,
    /// Per layer: whether it sees recent positions only.
    windowed: Vec<bool>,
    /// Positions of the training.
    n_ctx_train: usize,
}

/// Period of the layers without a window, of architectures beyond the table, where the file does not say which these are; `true`: the first of each group, instead of the last. As in
/// llama.cpp's `load_arch_hparams`.
const PERIODS: &[(&str, usize, bool)] = &[
    ("afmoe", 4, false),
    ("cohere2", 4, false),
    ("cohere2moe", 4, true),
    ("exaone-moe", 4, false),
    ("exaone4", 4, false),
    ("gemma3n", 5, false),
    ("llama4", 4, false),
    ("plamo3", 8, false),
    ("smallthinker", 4, true),
];

/// Architectures beyond the table whose converter permutes q and k rows into interleaved rope pairs (`undo_permute` of convert_hf_to_gguf.py).
const PERMUTED: &[&str] = &[
    "arcee",
    "baichuan",
    "granitehybrid",
    "internlm2",
    "llama4",
    "minicpm",
    "mistral3",
    "olmo",
    "xverse",
];

impl Base {
    /// Reads the metadata and the norms of the model at `path` (any part of a split one), of an architecture that our decoder knows or of another one.
    ///
    /// # Errors
    /// If the file cannot be read, is malformed, or is no model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = MappedGguf::open(path)?;
        Self::read(&file).map_err(|source| Error::Model {
            path: path.to_owned(),
            source,
        })
    }

    pub(super) fn read(file: &MappedGguf) -> Result<Self, ModelError> {
        let main = file.main();
        check_is_model(main)?;
        let embd = "token_embd.weight";
        let rows = file.tensor(embd).and_then(|(_, info)| info.ne.get(1));
        let n_vocab = *rows.ok_or_else(|| ModelError::MissingTensor {
            tensor: embd.to_owned(),
        })? as usize;
        let (shape, windowed, n_ctx_train) = match HParams::read(main) {
            Ok(hp) => {
                let windowed = hp.layers.iter().map(|l| l.window.is_some()).collect();
                (hp.base_shape(n_vocab), windowed, hp.n_ctx_train)
            }
            Err(e) if e.is_unknown_architecture() => foreign(file, n_vocab)?,
            Err(e) => return Err(e),
        };
        Ok(Self {
            fingerprint: fingerprint(file, &shape),
            shape,
            windowed,
            n_ctx_train,
        })
    }

    /// Shape signature.
    pub fn shape(&self) -> &BaseShape {
        &self.shape
    }

    /// Identifies the model whatever its quantization.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    /// Positions of the training.
    pub(crate) fn n_ctx_train(&self) -> usize {
        self.n_ctx_train
    }

    /// Whether layer `il` sees a window of recent positions only.
    pub(crate) fn is_windowed(&self, il: usize) -> bool {
        self.windowed.get(il).copied().unwrap_or(false)
    }
}

/// Files that say so are of something else: adapters, for example.
pub(super) fn check_is_model(main: &Part) -> Result<(), ModelError> {
    match main.gguf.str("general.type")? {
        None | Some("model") => Ok(()),
        Some(kind) => Err(ModelError::NotAModel {
            kind: kind.to_owned(),
        }),
    }
}

/// Shape, windowed layers and context by the keys that all architectures share.
fn foreign(file: &MappedGguf, n_vocab: usize) -> Result<(BaseShape, Vec<bool>, usize), ModelError> {
    let main = file.main();
    let architecture = main.gguf.require_str("general.architecture")?;
    let keys = Keys::new(main, architecture);
    let n_layer = keys.size("block_count", MAX_LAYERS)?;
    let n_embd = keys.size("embedding_length", MAX_SIZE)?;
    // Layers without attention have no heads, and models of such layers do not name any.
    let heads = |key: &str| keys.size_per_layer(key, n_layer, 0);
    let n_head = heads("attention.head_count")?.unwrap_or_else(|| vec![0; n_layer]);
    let n_head_kv = heads("attention.head_count_kv")?.unwrap_or_else(|| n_head.clone());
    let most_heads = n_head.iter().copied().max().unwrap_or(0);
    let head_dim = match keys.optional_size("attention.key_length")? {
        Some(d) => d,
        None => n_embd / most_heads.max(1),
    };
    let pattern = "attention.sliding_window_pattern";
    let windowed = match keys.flag_per_layer(pattern, n_layer)? {
        Some(layers) => layers,
        None => {
            let in_table = arch::find(architecture).and_then(|arch| arch.window);
            let known = PERIODS.iter().find(|(name, ..)| *name == architecture);
            let (period, dense_first) = match (in_table, known) {
                (Some(window), _) => (window.pattern, false),
                (None, Some(&(_, period, dense_first))) => (period, dense_first),
                (None, None) => (1, false),
            };
            let period = keys.integer(pattern)?.unwrap_or(period);
            let dense = if dense_first {
                0
            } else {
                period.saturating_sub(1)
            };
            let is_windowed = |il: usize| period == 0 || il % period != dense;
            (0..n_layer).map(is_windowed).collect()
        }
    };
    let shape = BaseShape {
        architecture: architecture.to_owned(),
        n_layer,
        n_embd,
        n_head: n_head.into_iter().collect(),
        n_head_kv: n_head_kv.into_iter().collect(),
        head_dim: PerLayer::from(head_dim),
        n_vocab,
        qk_permuted: PERMUTED.contains(&architecture)
            || arch::find(architecture).is_some_and(|arch| arch.qk_permuted),
    };
    let n_ctx_train = keys.size("context_length", i32::MAX as usize)?;
    Ok((shape, windowed, n_ctx_train))
}
