//! Errors of running and training.

use super::{Failure, failure_from, ggraft_status, ggraft_status::*};
use ggraft::Error;
use ggraft::infer::engine::EngineError;
use ggraft::infer::sampler::SamplerError;
use ggraft::infer::text::StopError;
use ggraft::infer::{EnsembleError, SavedError, SessionError};
use ggraft::model::vocab::VocabError;
use ggraft::train::TrainError;
use ggraft::train::data::DataError;

failure_from!(
    DataError,
    SamplerError,
    SessionError,
    EnsembleError,
    StopError,
    TrainError,
    VocabError
);

/// The class of an error that is not one of files, adapters or hosts.
pub(super) fn class(error: &Error) -> ggraft_status {
    match error {
        Error::Cpu(_) => GGRAFT_ERROR_ARGUMENT,
        Error::Vocab(VocabError::Gguf(_)) => GGRAFT_ERROR_GGUF,
        Error::Vocab(_) => GGRAFT_ERROR_VOCAB,
        Error::Session(e) => match e {
            SessionError::ContextFull { .. } => GGRAFT_ERROR_CONTEXT_FULL,
            SessionError::Cancelled => GGRAFT_ERROR_CANCELLED,
            SessionError::OutOfMemory => GGRAFT_ERROR_MEMORY,
            SessionError::Llama(_) => GGRAFT_ERROR_HOST,
            SessionError::NonFiniteLogits => GGRAFT_ERROR_NON_FINITE,
            SessionError::TokenOutOfRange { .. }
            | SessionError::Empty
            | SessionError::EmptyPrompt
            | SessionError::BadOption { .. } => GGRAFT_ERROR_ARGUMENT,
            SessionError::AlreadyAttached
            | SessionError::NotAttached
            | SessionError::NoVirtualTokens
            | SessionError::NoLogits => GGRAFT_ERROR_STATE,
            _ => GGRAFT_ERROR_INTERNAL,
        },
        Error::Saved {
            source:
                SavedError::NotASession { .. }
                | SavedError::Version { .. }
                | SavedError::Damaged
                | SavedError::OtherBase { .. }
                | SavedError::OtherWeights
                | SavedError::OtherAdapter { .. }
                | SavedError::OtherKvType { .. }
                | SavedError::OtherAttention { .. }
                | SavedError::OtherContext { .. }
                | SavedError::Tensor { .. }
                | SavedError::Text { .. },
            ..
        } => GGRAFT_ERROR_SAVED,
        Error::Engine(e) => match e {
            EngineError::Busy { .. } => GGRAFT_ERROR_BUSY,
            EngineError::TooManyMembers { .. } => GGRAFT_ERROR_ARGUMENT,
            EngineError::TooLarge { .. }
            | EngineError::OutOfPages
            | EngineError::NoThread { .. } => GGRAFT_ERROR_MEMORY,
            EngineError::Late => GGRAFT_ERROR_CANCELLED,
            EngineError::Ended => GGRAFT_ERROR_STATE,
            _ => GGRAFT_ERROR_INTERNAL,
        },
        Error::Sampler(e) => match e {
            SamplerError::NonFinite => GGRAFT_ERROR_NON_FINITE,
            SamplerError::OutOfRange { .. }
            | SamplerError::BiasToken { .. }
            | SamplerError::ReservedSeed
            | SamplerError::VocabSize { .. }
            | SamplerError::LogitCount { .. } => GGRAFT_ERROR_ARGUMENT,
            _ => GGRAFT_ERROR_INTERNAL,
        },
        Error::Stop(StopError::Empty { .. }) => GGRAFT_ERROR_ARGUMENT,
        Error::Ensemble(
            EnsembleError::NoMembers
            | EnsembleError::WeightCount { .. }
            | EnsembleError::Weight { .. }
            | EnsembleError::NoWeight
            | EnsembleError::NoLikelihood
            | EnsembleError::NothingCounts
            | EnsembleError::InfiniteLoss { .. },
        ) => GGRAFT_ERROR_ARGUMENT,
        Error::Data(e) => match e {
            DataError::NoChatTemplate { .. } | DataError::Vocab { .. } => GGRAFT_ERROR_VOCAB,
            DataError::NoRows { .. }
            | DataError::LineTooLong { .. }
            | DataError::NotUtf8 { .. }
            | DataError::Nul { .. }
            | DataError::Json { .. }
            | DataError::Weight { .. }
            | DataError::NoWeight { .. }
            | DataError::NotAnObject { .. }
            | DataError::Field { .. }
            | DataError::Speaker { .. }
            | DataError::Message { .. }
            | DataError::OtherFile { .. }
            | DataError::NoContent { .. }
            | DataError::ManyContents { .. }
            | DataError::Preference { .. }
            | DataError::NoMessages { .. }
            | DataError::CompletionWithoutPrompt { .. }
            | DataError::NoCompletion { .. }
            | DataError::NoPrompt { .. }
            | DataError::NoAnswer { .. }
            | DataError::NoTargets { .. } => GGRAFT_ERROR_DATA,
            _ => GGRAFT_ERROR_INTERNAL,
        },
        Error::Train(e) => match e {
            TrainError::Cancelled => GGRAFT_ERROR_CANCELLED,
            TrainError::OutOfMemory => GGRAFT_ERROR_MEMORY,
            TrainError::NonFinite { .. } => GGRAFT_ERROR_NON_FINITE,
            TrainError::Option { .. }
            | TrainError::Conflict { .. }
            | TrainError::EmptyInit
            | TrainError::InitAdapter { .. }
            | TrainError::State(_) => GGRAFT_ERROR_ARGUMENT,
            TrainError::NothingToLearn { .. }
            | TrainError::NoWeight { .. }
            | TrainError::Token { .. } => GGRAFT_ERROR_DATA,
            TrainError::Checkpoint { .. } | TrainError::OtherRun { .. } => GGRAFT_ERROR_CHECKPOINT,
            _ => GGRAFT_ERROR_INTERNAL,
        },
        _ => GGRAFT_ERROR_INTERNAL,
    }
}
