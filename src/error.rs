//! The crate's error: one enum per module, gathered here.

use crate::adapter::AdapterError;
use crate::file::gguf::GgufError;
use crate::file::peft::PeftError;
use crate::host::HostError;
use crate::model::ModelError;
use std::path::{Path, PathBuf};

#[cfg(feature = "runtime")]
use crate::infer::engine::EngineError;
#[cfg(feature = "runtime")]
use crate::infer::sampler::SamplerError;
#[cfg(feature = "runtime")]
use crate::infer::text::StopError;
#[cfg(feature = "runtime")]
use crate::infer::{EnsembleError, SavedError, SessionError};
#[cfg(feature = "runtime")]
use crate::kernels::CpuError;
#[cfg(feature = "runtime")]
use crate::model::chat::ChatError;
#[cfg(feature = "runtime")]
use crate::model::vocab::VocabError;
#[cfg(feature = "runtime")]
use crate::train::TrainError;
#[cfg(feature = "runtime")]
use crate::train::data::DataError;

/// Result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Anything that can go wrong, with the module's own error inside.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A GGUF file is malformed.
    #[error("{}{source}", prefix(path))]
    Gguf {
        /// The file; `None` for bytes in memory.
        path: Option<PathBuf>,
        /// What is wrong with it.
        source: GgufError,
    },
    /// A PEFT folder is malformed or of a kind that is not supported.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// An adapter is malformed or does not fit the base model.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// A base model cannot be used.
    #[error("{}: {source}", path.display())]
    Model {
        /// The file it was opened from.
        path: PathBuf,
        /// What is wrong with it.
        source: ModelError,
    },
    /// The vocabulary cannot be used, or text cannot be tokenized.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Vocab(#[from] VocabError),
    /// The environment asks for instructions that are not there.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A session refused.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A saved session is damaged, or does not belong to the session that shall go on with it.
    #[cfg(feature = "runtime")]
    #[error("{}{source}", prefix(path))]
    Saved {
        /// The file; `None` while it is not named yet.
        path: Option<PathBuf>,
        /// What is wrong with it.
        source: SavedError,
    },
    /// An engine refused.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// An application that runs llama.cpp cannot take an adapter.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Members cannot speak as one.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Ensemble(#[from] EnsembleError),
    /// Sampling failed.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Sampler(#[from] SamplerError),
    /// A stop string is not usable.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Stop(#[from] StopError),
    /// A row of a data set cannot be used.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Data(#[from] DataError),
    /// Training failed.
    #[cfg(feature = "runtime")]
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The operating system refused to read or write `path`.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}

impl Error {
    /// Says that the bytes the error is about came from `path`, unless it says so already.
    pub(crate) fn at(self, file: &Path) -> Self {
        match self {
            Self::Gguf { path: None, source } => Self::Gguf {
                path: Some(file.to_owned()),
                source,
            },
            #[cfg(feature = "runtime")]
            Self::Saved { path: None, source } => Self::Saved {
                path: Some(file.to_owned()),
                source,
            },
            other => other,
        }
    }
}

#[cfg(feature = "runtime")]
impl From<SavedError> for Error {
    fn from(source: SavedError) -> Self {
        Self::Saved { path: None, source }
    }
}

impl From<GgufError> for Error {
    fn from(source: GgufError) -> Self {
        Self::Gguf { path: None, source }
    }
}

#[cfg(feature = "runtime")]
impl From<ChatError> for Error {
    fn from(source: ChatError) -> Self {
        Self::Vocab(source.into())
    }
}

fn prefix(path: &Option<PathBuf>) -> String {
    path.as_ref()
        .map(|p| format!("{}: ", p.display()))
        .unwrap_or_default()
}
