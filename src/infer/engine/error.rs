//! Why an engine refuses.

/// What an engine refuses to do, one variant per cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// As many requests wait as may.
    #[error("{waiting} requests wait already, as many as may: try again later")]
    Busy {
        /// [`super::EngineOptions::max_waiting`].
        waiting: usize,
    },
    /// The text takes more memory than the engine may use for all.
    #[error(
        "the text's keys and values take {needed} bytes, the engine may use {limit} (raise the limit or shorten the text)"
    )]
    TooLarge {
        /// Of all its tokens.
        needed: usize,
        /// [`super::EngineOptions::kv_bytes`].
        limit: usize,
    },
    /// An ensemble has more members than the engine computes texts at a time.
    #[error(
        "an ensemble of {members} members, the engine computes {most} texts at a time: let it compute more"
    )]
    TooManyMembers {
        /// Of the ensemble.
        members: usize,
        /// [`super::EngineOptions::max_running`].
        most: usize,
    },
    /// Older texts took the memory, and [`super::WhenFull::Refuse`] was asked for.
    #[error("older texts need the memory for keys and values")]
    OutOfPages,
    /// The deadline is over.
    #[error("the deadline is over")]
    Late,
    /// The system has no thread to give.
    #[error("the engine's thread cannot begin: {source}")]
    NoThread {
        /// What the system said.
        source: std::io::Error,
    },
    /// The engine is gone.
    #[error("the engine has ended")]
    Ended,
}
