//! Why a saved session is refused.

use crate::file::types::GgmlType;
use crate::model::Fingerprint;

/// A saved session that cannot go on here, one variant per cause. What is no GGUF file at all is [`crate::Error::Gguf`].
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SavedError {
    /// A GGUF file of another kind.
    #[error("not a saved session: general.type is {found:?}")]
    NotASession {
        /// `general.type`, or `absent`.
        found: String,
    },
    /// The file of a later version.
    #[error(
        "the session was saved in format version {found}, this build reads {supported}: use a newer ggraft, or compute the text again"
    )]
    Version {
        /// Of the file.
        found: u32,
        /// Of this build.
        supported: u32,
    },
    /// The checksum is not that of the file.
    #[error(
        "the saved session is damaged: its checksum is wrong or missing (compute the text again)"
    )]
    Damaged,
    /// Another model.
    #[error(
        "the session was saved on another base (fingerprint {saved}, this one has {base}): open that base"
    )]
    OtherBase {
        /// Of the base that it was saved on.
        saved: Fingerprint,
        /// Of this one.
        base: Fingerprint,
    },
    /// Another file of this model.
    #[error(
        "the session was saved on another file of this base, whose weights are rounded differently: open that file, or compute the text again"
    )]
    OtherWeights,
    /// The text was computed under another adapter, or with none.
    #[error(
        "the session was saved with {saved}, attached is {attached}: attach what it was saved with before loading"
    )]
    OtherAdapter {
        /// That adapter, or `no adapter`.
        saved: String,
        /// The session's.
        attached: String,
    },
    /// Keys and values of another type.
    #[error(
        "the session was saved with a {saved} KV cache, this one has {session}: make the session with {saved}"
    )]
    OtherKvType {
        /// Of the file.
        saved: GgmlType,
        /// Of the session.
        session: GgmlType,
    },
    /// The text was computed with fused attention, and the session has none, or the other way round.
    #[error(
        "the session was saved with flash attention {}, this one has it {}: make the session as the saved one was",
        on_off(*saved),
        on_off(!*saved)
    )]
    OtherAttention {
        /// Whether it was fused.
        saved: bool,
    },
    /// The text was computed with the rotary factors for long contexts, and the session has those for short ones, or the other way round.
    #[error(
        "the session was saved with a context {} the model's original one, whose rotary factors are others: make the session with such a context",
        if *saved { "beyond" } else { "within" }
    )]
    OtherContext {
        /// Whether the context was beyond the original one.
        saved: bool,
    },
    /// A tensor is missing, unknown, or not what text and model demand.
    #[error("the saved session cannot be: tensor {tensor:?} {why}")]
    Tensor {
        /// Its name.
        tensor: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// What it says of its text contradicts itself, or the model.
    #[error("the saved session cannot be: {why}")]
    Text {
        /// What is wrong.
        why: &'static str,
    },
}

fn on_off(on: bool) -> &'static str {
    match on {
        true => "on",
        false => "off",
    }
}
