//! Why a session refuses.

use crate::host::HostError;

/// What a session refuses to do, one variant per cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SessionError {
    /// The text does not fit. Nothing was computed for what did not fit.
    #[error(
        "the context is full: {needed} positions needed, {n_ctx} available (raise the context length or reset)"
    )]
    ContextFull {
        /// Positions that the text would take, the adapter's included.
        needed: usize,
        /// Positions of the session.
        n_ctx: usize,
    },
    /// The cancel token was raised.
    #[error("cancelled")]
    Cancelled,
    /// Memory for keys and values or for intermediate results ran out.
    #[error("out of memory for keys and values or intermediate results")]
    OutOfMemory,
    /// The model or the adapter gave values that are no numbers: they must not become text.
    #[error(
        "the model computed logits that are not finite: the weights or the adapter are damaged"
    )]
    NonFiniteLogits,
    /// A token id outside the vocabulary.
    #[error("token id {id} is outside the vocabulary of {n_vocab}")]
    TokenOutOfRange {
        /// The id.
        id: i32,
        /// V.
        n_vocab: usize,
    },
    /// `feed` without tokens.
    #[error("there is nothing to compute: no tokens were given")]
    Empty,
    /// A prompt without tokens, and nothing that the model or the adapter puts around it.
    #[error("the prompt is empty, and this model begins no text by itself: give it some text")]
    EmptyPrompt,
    /// An option that cannot be.
    #[error("{option} is {value}: {why}")]
    BadOption {
        /// Which one.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        why: String,
    },
    /// `attach` on a session that has an adapter.
    #[error("an adapter is attached already: use swap")]
    AlreadyAttached,
    /// `detach` on a session that has none.
    #[error("no adapter is attached")]
    NotAttached,
    /// Logits of virtual tokens were asked for, and the adapter has none in front of the text.
    #[error("the attached adapter has no virtual tokens in front of the text")]
    NoVirtualTokens,
    /// Libllama, which computes the model, failed.
    #[error(transparent)]
    Llama(HostError),
    /// Logits were asked for before anything was computed.
    #[error("no logits yet: feed a prompt first")]
    NoLogits,
}
