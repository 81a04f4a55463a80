//! What is wrong with a row or a file of rows.

use super::Place;
use crate::model::chat::ChatError;
use crate::model::vocab::VocabError;
use std::path::PathBuf;

/// A row that cannot be used, one variant per cause.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// A file or list without rows.
    #[error("{source_name}: there are no rows")]
    NoRows {
        /// The file, or what else was read.
        source_name: String,
    },
    /// A line longer than any text that could be used.
    #[error("{place}: longer than {max} bytes, which no context holds")]
    LineTooLong {
        /// The row.
        place: Place,
        /// The longest possible, in bytes.
        max: u64,
    },
    /// A line is not UTF-8.
    #[error("{place}: not UTF-8 text (byte {byte} of the line is 0x{value:02X}): {hint}")]
    NotUtf8 {
        /// The row.
        place: Place,
        /// The first wrong byte of the line, counted from 1.
        byte: usize,
        /// What it is.
        value: u8,
        /// What the line seems to be, and what to do.
        hint: &'static str,
    },
    /// A NUL character, which no text has.
    #[error(
        "{place}: byte {byte} of the line is NUL, which no text has: the file is damaged or no text{hint}"
    )]
    Nul {
        /// The row.
        place: Place,
        /// Which byte of the line, counted from 1; in UTF-8, whatever the file is written in.
        byte: usize,
        /// What to do.
        hint: &'static str,
    },
    /// A line is not the JSON object that is expected.
    #[error("{place}: {what} (column {column})")]
    Json {
        /// The row.
        place: Place,
        /// What the parser says.
        what: String,
        /// Where in the line, counted from 1.
        column: usize,
    },
    /// A weight that a mean cannot have.
    #[error("{place}: the weight is {weight}, it must not be negative or beyond single precision")]
    Weight {
        /// The row.
        place: Place,
        /// The weight.
        weight: f64,
    },
    /// All rows have the weight 0: there is no mean over them.
    #[error("{source_name}: all rows have the weight 0, so that nothing counts")]
    NoWeight {
        /// The file, or what else was read.
        source_name: String,
    },
    /// A row that is not an object.
    #[error(
        "{place}: {got} is no row: each is an object such as {{\"prompt\": \"...\", \"completion\": \"...\"}}"
    )]
    NotAnObject {
        /// The row.
        place: Place,
        /// What it is.
        got: &'static str,
    },
    /// Nothing to read.
    #[error(
        "{place}: no field 'prompt', 'messages', 'text', 'conversations', 'instruction', 'question' or 'query', nor 'input' and 'output', \
         'user' and 'assistant' or 'source' and 'target' (there {}){hint}",
        fields(there)
    )]
    NoContent {
        /// The row.
        place: Place,
        /// The fields that it has.
        there: Vec<String>,
        /// What else is to be said of them.
        hint: String,
    },
    /// A field of another type than it must have.
    #[error("{place}: the field '{field}' is {got}, it must be {expected}")]
    Field {
        /// The row.
        place: Place,
        /// The field.
        field: Box<str>,
        /// What it is.
        got: Box<str>,
        /// What it must be.
        expected: &'static str,
    },
    /// A speaker that no chat template knows.
    #[error(
        "{place}: messages from '{role}' are not known (system, human or user, gpt or assistant, tool)"
    )]
    Speaker {
        /// The row.
        place: Place,
        /// Who is said to speak.
        role: String,
    },
    /// A message that is none.
    #[error("{place}: {source}")]
    Message {
        /// The row.
        place: Place,
        /// Why.
        source: ChatError,
    },
    /// A file of another kind.
    #[error("{source_name}: {what}, not rows: {hint}")]
    OtherFile {
        /// The file, or what else was read.
        source_name: String,
        /// What it seems to be.
        what: String,
        /// What to do.
        hint: String,
    },
    /// Several texts in one row.
    #[error(
        "{place}: more than one text to learn ('{}'): leave the fields out that are not meant", there.join("', '")
    )]
    ManyContents {
        /// The row.
        place: Place,
        /// The fields that contradict each other.
        there: Vec<&'static str>,
    },
    /// Answers of which some are better than others.
    #[error(
        "{place}: this is preference data ({what}), adapters learn from good answers alone: {hint}"
    )]
    Preference {
        /// The row.
        place: Place,
        /// What it is called, and what shows it.
        what: String,
        /// What to do.
        hint: String,
    },
    /// A conversation of nothing.
    #[error("{place}: '{field}' is empty: no message to learn or to answer, leave the row out")]
    NoMessages {
        /// The row.
        place: Place,
        /// The list.
        field: &'static str,
    },
    /// `completion` without `prompt`.
    #[error("{place}: a completion without prompt")]
    CompletionWithoutPrompt {
        /// The row.
        place: Place,
    },
    /// `prompt` without `completion`, where one is needed.
    #[error(
        "{place}: no field {field} with a text in it: there is nothing to learn or to compare with"
    )]
    NoCompletion {
        /// The row.
        place: Place,
        /// What is missing.
        field: &'static str,
    },
    /// `text` where a prompt is needed.
    #[error("{place}: a row of 'text' has no prompt to complete")]
    NoPrompt {
        /// The row.
        place: Place,
    },
    /// A conversation in which the model says nothing.
    #[error("{place}: no message has the role 'assistant': there is nothing to learn")]
    NoAnswer {
        /// The row.
        place: Place,
    },
    /// Nothing remains to be predicted: the text is empty and the model has no EOS.
    #[error("{place}: the row has no tokens to predict")]
    NoTargets {
        /// The row.
        place: Place,
    },
    /// Messages for a model without chat template: any other model's format would only confuse it.
    #[error(
        "{place}: {} has no chat template: it continues text, it does not chat", model.display()
    )]
    NoChatTemplate {
        /// The row.
        place: Place,
        /// The model's file.
        model: PathBuf,
    },
    /// The text cannot be tokenized or formatted.
    #[error("{place}: {source}")]
    Vocab {
        /// The row.
        place: Place,
        /// Why.
        source: VocabError,
    },
}

/// How a message lists the fields that are there.
fn fields(there: &[String]) -> String {
    match there {
        [] => "are no fields".to_owned(),
        [one] => format!("is only '{one}'"),
        [.., _] => format!("are '{}'", there[..there.len().min(8)].join("', '")),
    }
}
