//! Why a base model is refused.

use crate::file::gguf::GgufError;

/// A base model that cannot be used, one variant per cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A metadata key is missing or of the wrong type.
    #[error(transparent)]
    Metadata(#[from] GgufError),
    /// The decoder does not know this architecture.
    #[error("unsupported architecture '{architecture}' (supported: {supported})")]
    UnsupportedArchitecture {
        /// `general.architecture`.
        architecture: String,
        /// Names that would work.
        supported: String,
    },
    /// The file is not a language model.
    #[error("this is a GGUF file of type '{kind}', not a model")]
    NotAModel {
        /// `general.type`.
        kind: String,
    },
    /// The file has experts, and the decoder knows no mixtures of experts of its architecture.
    #[error("mixture-of-experts models of this architecture are not supported")]
    MixtureOfExperts,
    /// Experts that are chosen or weighted in a way that the decoder does not know.
    #[error("'{key}' is {value}, which is not supported: {why}")]
    UnsupportedExperts {
        /// The metadata key.
        key: String,
        /// Its value.
        value: String,
        /// What the decoder computes.
        why: String,
    },
    /// A metadata value is out of range or contradicts another one.
    #[error("'{key}' is {value}: {why}")]
    BadValue {
        /// The metadata key.
        key: String,
        /// Its value.
        value: String,
        /// What it should be.
        why: String,
    },
    /// A tensor that the architecture needs is not in the file.
    #[error("tensor '{tensor}' is missing")]
    MissingTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor of the file has no place in the decoder: running without it would give wrong results.
    #[error(
        "tensor '{tensor}' is unknown to architecture '{architecture}': the model would not compute what it was trained to"
    )]
    UnclaimedTensor {
        /// Its name.
        tensor: String,
        /// The architecture.
        architecture: &'static str,
    },
    /// A tensor has another shape than the metadata says.
    #[error("tensor '{tensor}' has shape {got:?}, expected {expected:?} (0: any)")]
    TensorShape {
        /// Its name.
        tensor: String,
        /// ne that the metadata asks for.
        expected: Vec<usize>,
        /// ne in the file.
        got: Vec<usize>,
    },
    /// A tensor has a type that cannot stand where it stands.
    #[error("tensor '{tensor}' has type {ty}, which cannot be used there")]
    TensorType {
        /// Its name.
        tensor: String,
        /// Its type.
        ty: &'static str,
    },
    /// The tokenizer and the embedding table disagree.
    #[error("the tokenizer has {tokens} tokens, the embedding table {rows} rows")]
    VocabularySize {
        /// Tokens.
        tokens: usize,
        /// Rows of `token_embd.weight`.
        rows: usize,
    },
    /// libllama was to compute the model, and does not open it.
    #[error("libllama refused the model (-v shows what it says)")]
    RefusedByLlama,
    /// Libllama computes the model, which has no backward pass.
    #[error(
        "libllama computes this model, forward only: backpropagation needs an architecture that ggraft's own decoder knows; --mezo (TrainOptions::mezo) estimates gradients by forward passes"
    )]
    NoBackward,
    /// Repacked weights did not fit into memory.
    #[error("out of memory: {bytes} bytes for repacked weights")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
}

impl ModelError {
    /// Our decoder does not know the architecture, or not in full: libllama's may.
    pub fn is_unknown_architecture(&self) -> bool {
        matches!(
            self,
            Self::UnsupportedArchitecture { .. }
                | Self::MixtureOfExperts
                | Self::UnsupportedExperts { .. }
        )
    }
}
