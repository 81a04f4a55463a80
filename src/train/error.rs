//! Why training is refused or stops.

use super::param::StateError;
use std::path::PathBuf;

/// Training that cannot begin or go on, one variant per cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// The cancel token was raised.
    #[error("training was cancelled")]
    Cancelled,
    /// Memory ran out.
    #[error("out of memory: use smaller batches, shorter rows or a smaller memory budget")]
    OutOfMemory,
    /// The loss or its gradient is infinite or not a number.
    #[error(
        "step {step}: the {what} is {value}: use a lower learning rate, and see whether the data of that step is sound"
    )]
    NonFinite {
        /// The step, counted from 1.
        step: u64,
        /// Loss or norm of the gradient.
        what: &'static str,
        /// Its value.
        value: f64,
    },
    /// An option is out of range.
    #[error("{option} is {value}: {why}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it should be.
        why: &'static str,
    },
    /// Two options that exclude each other.
    #[error("{first} cannot be used with {second}: {why}")]
    Conflict {
        /// One of them.
        first: String,
        /// The other.
        second: String,
        /// Why.
        why: &'static str,
    },
    /// No example has anything to learn.
    #[error(
        "{}: no row has a token to predict within {max_len} tokens: let rows be longer or the adapter shorter",
        named(set, file)
    )]
    NothingToLearn {
        /// Training or validation set.
        set: &'static str,
        /// The file that all of it comes from, if there is one.
        file: Option<PathBuf>,
        /// The longest row that is used.
        max_len: usize,
    },
    /// All rows have the weight 0: there is no mean over them.
    #[error(
        "{}: all rows have the weight 0, so that nothing counts",
        named(set, file)
    )]
    NoWeight {
        /// Training or validation set.
        set: &'static str,
        /// The file that all of it comes from, if there is one.
        file: Option<PathBuf>,
    },
    /// A token id that the model does not have.
    #[error("row {row} of the {set}: token {token} is not in the vocabulary of {n_vocab}")]
    Token {
        /// Training or validation set.
        set: &'static str,
        /// Which row, counted from 1.
        row: usize,
        /// The id.
        token: i32,
        /// V.
        n_vocab: usize,
    },
    /// The adapter that training starts from is of another kind, length or template than asked for.
    #[error("cannot start from this adapter: it is {got}, training asks for {expected}")]
    InitAdapter {
        /// What it is.
        got: String,
        /// What was asked for.
        expected: String,
    },
    /// A text to start from has no tokens.
    #[error("the text to start from has no tokens")]
    EmptyInit,
    /// A name or shape of a parameter is wrong.
    #[error(transparent)]
    State(#[from] StateError),
    /// A file is no checkpoint, or a damaged one.
    #[error("{}: not a usable checkpoint: {why}", path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A checkpoint of another run.
    #[error("{}: the checkpoint was made with {what}", path.display())]
    OtherRun {
        /// The file.
        path: PathBuf,
        /// What differs.
        what: &'static str,
    },
}

/// A set, and the file that it comes from.
fn named(set: &str, file: &Option<PathBuf>) -> String {
    match file {
        Some(file) => format!("{} ({set})", file.display()),
        None => set.to_owned(),
    }
}
