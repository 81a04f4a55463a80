//! Why a command failed, as one line and an exit status.

use crate::{interrupt, io};
use ggraft::CpuError;
use ggraft::adapter::AdapterError;
use ggraft::infer::sampler::SamplerError;
use ggraft::infer::{EnsembleError, SessionError};
use ggraft::model::vocab::VocabError;
use ggraft::train::TrainError;
use ggraft::train::data::{DataError, Place};
use std::path::PathBuf;
use std::process::ExitCode;

pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// What the library says.
    #[error(transparent)]
    Library(ggraft::Error),
    /// Arguments that contradict each other in a way that clap cannot see.
    #[error("{0}")]
    Usage(String),
    /// Arguments that are well-formed and still cannot be used with this model or adapter.
    #[error("{0}")]
    Unsuitable(String),
    /// What the library says about a file or folder that it does not name.
    #[error("{}: {source}", path.display())]
    About {
        path: PathBuf,
        source: Box<ggraft::Error>,
    },
    /// An adapter of another shape, and somebody hoped.
    #[error(
        "{0} (--force overrides the fingerprint only: it makes no adapter of another shape fit)"
    )]
    Forced(Box<Failure>),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        path: PathBuf,
        source: std::io::Error,
    },
    /// One row of a JSONL file cannot be computed.
    #[error("{place}: {why}")]
    Row { place: Place, why: Box<Failure> },
    /// A text does not fit.
    #[error(
        "the context is full: {needed} positions needed, {n_ctx} available (a longer one: --ctx)"
    )]
    ContextFull { needed: usize, n_ctx: usize },
    /// A text has filled the context and would go on.
    #[error("the context is full (a longer one: --ctx)")]
    NoRoom,
    /// There is no memory for a context of that length.
    #[error("{0}: lower --ctx, the length of the context")]
    Memory(SessionError),
    /// Ctrl-C; what was saved.
    #[error("{0}")]
    Interrupted(String),
    /// Standard output cannot be written.
    #[error("standard output: {0}")]
    Stdout(std::io::Error),
}

/// Every error that the library's functions return becomes [`Failure::Library`].
macro_rules! from_library {
    ($($error:ty),*) => {
        $(impl From<$error> for Failure {
            fn from(e: $error) -> Self {
                match ggraft::Error::from(e) {
                    ggraft::Error::Session(e @ SessionError::OutOfMemory) => Self::Memory(e),
                    ggraft::Error::Session(SessionError::ContextFull { needed, n_ctx }) => {
                        Self::ContextFull { needed, n_ctx }
                    }
                    e => Self::Library(e),
                }
            }
        })*
    };
}
from_library!(
    ggraft::Error,
    AdapterError,
    CpuError,
    DataError,
    EnsembleError,
    SamplerError,
    SessionError,
    VocabError
);

impl Failure {
    /// Says which row it is about, unless it says so already.
    pub(crate) fn at(place: &Place, why: Self) -> Self {
        match why {
            Self::Library(ggraft::Error::Data(_)) => why,
            why => Self::Row {
                place: place.clone(),
                why: Box::new(why),
            },
        }
    }

    /// Says so if it is the shape of an adapter that `force` cannot help.
    pub(crate) fn forced(self, force: bool) -> Self {
        match self.library() {
            Some(ggraft::Error::Adapter(e)) if force && e.is_shape_mismatch() => {
                Self::Forced(Box::new(self))
            }
            _ => self,
        }
    }

    fn library(&self) -> Option<&ggraft::Error> {
        match self {
            Self::Library(e) => Some(e),
            Self::About { source, .. } => Some(source),
            _ => None,
        }
    }

    /// The value of an option is wrong, whether clap knows it or the library.
    fn is_usage(&self) -> bool {
        if let Self::Usage(_) = self {
            return true;
        }
        let Some(e) = self.library() else {
            return false;
        };
        matches!(
            e,
            ggraft::Error::Session(
                SessionError::BadOption { .. } | SessionError::TokenOutOfRange { .. }
            ) | ggraft::Error::Sampler(
                SamplerError::OutOfRange { .. }
                    | SamplerError::BiasToken { .. }
                    | SamplerError::ReservedSeed
            ) | ggraft::Error::Stop(_)
                | ggraft::Error::Ensemble(_)
                | ggraft::Error::Train(TrainError::Option { .. } | TrainError::Conflict { .. })
                | ggraft::Error::Adapter(
                    AdapterError::TaskRequired { .. }
                        | AdapterError::TaskOutOfRange { .. }
                        | AdapterError::TaskNotApplicable { .. }
                        | AdapterError::BadRowFactor { .. }
                        | AdapterError::RowFactorNotApplicable { .. }
                )
        )
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        match self {
            Self::Library(
                ggraft::Error::Session(SessionError::Cancelled)
                | ggraft::Error::Train(TrainError::Cancelled),
            )
            | Self::Interrupted(_) => true,
            Self::Row { why, .. } => why.is_cancelled(),
            _ => false,
        }
    }

    pub(crate) fn is_context_full(&self) -> bool {
        matches!(self, Self::ContextFull { .. } | Self::NoRoom)
    }

    /// The decoder does not know the model's architecture, or not in full.
    pub(crate) fn is_unknown_architecture(&self) -> bool {
        let Some(ggraft::Error::Model { source, .. }) = self.library() else {
            return false;
        };
        source.is_unknown_architecture()
    }

    /// Nobody reads our output any more (`ggraft ... | head`): that is the reader's decision and no failure.
    fn is_broken_pipe(&self) -> bool {
        let (Self::Stdout(source)
        | Self::File { source, .. }
        | Self::Library(ggraft::Error::Io { source, .. })) = self
        else {
            return false;
        };
        source.kind() == std::io::ErrorKind::BrokenPipe
    }

    /// Prints the line and returns the status.
    pub(crate) fn report(&self) -> ExitCode {
        if self.is_broken_pipe() {
            return ExitCode::SUCCESS;
        }
        io::note(&format!("error: {}", self.line()));
        match self {
            _ if self.is_usage() => ExitCode::from(2),
            _ if self.is_cancelled() => ExitCode::from(interrupt::STATUS),
            _ => ExitCode::FAILURE,
        }
    }

    /// The message without line breaks: names in files may contain them.
    pub(crate) fn line(&self) -> String {
        let text = self.to_string();
        text.split(char::is_control)
            .filter(|part| !part.is_empty())
            .collect::<Vec<_>>()
            .join(" ")
    }
}
