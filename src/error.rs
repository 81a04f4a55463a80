//! The crate's error: one enum per module, gathered here.

use crate::adapter::AdapterError;
use crate::file::gguf::GgufError;
use crate::file::peft::PeftError;

/// Result of every fallible function of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Anything that can go wrong, with the module's own error inside.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A GGUF file is malformed.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A PEFT folder is malformed or of a kind that is not supported.
    #[error(transparent)]
    Peft(#[from] PeftError),
    /// An adapter is malformed or does not fit the base model.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The operating system refused to read or write `path`.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
}
