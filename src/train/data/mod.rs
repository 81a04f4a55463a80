//! Rows of text, from JSONL files or from memory, and how they become tokens.
//!
//! A file has one JSON object per line, or is one JSON array of them. An object has one of these forms; other fields are ignored,
//! and so are empty lines:
//!
//! ```text
//! {"prompt": "...", "completion": "..."}                        the completion and EOS are learned
//! {"messages": [{"role": "user", "content": "..."}, ...]}       the assistant's messages, in the model's chat template
//! {"prompt": [messages], "completion": [messages]}              the assistant's messages of the completion
//! {"text": "..."}                                               all of it and EOS
//! {"instruction": "...", "input": "...", "output": "..."}       Alpaca: the output, see [`Content::Instruction`]
//! {"conversations": [{"from": "human", "value": "..."}, ...]}   ShareGPT: as messages
//! ```
//!
//! Other names of the same: `instruction`, `question` or `query` (`input` or `user` beside an answer) and `input` or `context`; `output`,
//! `response`, `answer` or `assistant`; `source` and `target` are prompt and completion. A message with `"weight": 0` or
//! `"train": false` is not learned. Rows of weight 0 are left out where their tokens are kept for training ([`Examples`]).
//!
//! A `"weight"` multiplies a row's part in the mean loss, `"tools"` go to the chat template, and so does a `"system"` message
//! beside an instruction or conversations. A file whose name ends in `.txt` is one row of text.
//!
//! ```
//! use ggraft::train::data::{Content, Dataset, Row};
//! use ggraft::{Model, ModelOptions};
//!
//! let row = Row::new(Content::Completion {
//!     prompt: "Ashbridge".to_owned(),
//!     completion: Some(" Harrow County".to_owned()),
//! });
//! let data = Dataset::from_rows(vec![row.weight(2.0)])?;
//! let model = Model::open("models/tinylm-q8_0.gguf", &ModelOptions::default())?;
//! let examples = data.examples(&model)?;
//! assert_eq!(examples[0].then.last(), Some(&(model.vocab().eos().unwrap(), true)));
//! # Ok::<(), ggraft::Error>(())
//! ```

mod encoding;
mod error;
mod examples;
mod idle;
mod kind;
mod lines;
mod messages;
mod place;
mod read;
mod row;
mod tokens;

pub use error::DataError;
pub use examples::{Examples, ExamplesBuilder};
pub use place::Place;

use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::chat::Conversation;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// What a row holds.
#[derive(Clone, Debug)]
pub enum Content {
    /// A text, and how it goes on.
    Completion {
        /// What is given.
        prompt: String,
        /// What follows; rows that are only to be completed have none.
        completion: Option<String>,
    },
    /// A conversation.
    Messages {
        /// What was said.
        conversation: Conversation,
        /// So many messages at its beginning are not learned, whoever says them.
        given: usize,
        /// Indices of further messages that are not learned: those that a file marks with `"weight": 0` or `"train": false`.
        skipped: Vec<usize>,
    },
    /// An instruction in Alpaca's form: for a model with a chat template the user's message (instruction and input on lines of
    /// their own), for one without it Alpaca's prompt.
    Instruction(Instruction),
    /// A text of which nothing is given.
    Text(String),
}

/// What to do, in Alpaca's form.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Instruction {
    /// The system message, for a chat template.
    pub system: Option<String>,
    /// What to do.
    pub instruction: String,
    /// What to do it with, perhaps empty.
    pub input: String,
    /// The answer; rows that are only to be completed have none.
    pub output: Option<String>,
}

/// One row of a data set.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it holds.
    pub content: Content,
    /// Its part in the mean loss, 1 unless it says otherwise.
    pub weight: f32,
    place: Place,
    /// A part of a text that goes on in the next row: no EOS ends it.
    goes_on: bool,
}

/// Tokens of a row for a loss: what is given and what must be predicted.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// Tokens that are given, without BOS and without virtual tokens: who computes them places both.
    pub given: Vec<i32>,
    /// Tokens that follow, at least one, and whether each counts in the loss.
    pub then: Vec<(i32, bool)>,
    /// Part in the mean loss.
    pub weight: f32,
    /// Whether the text begins here, so that BOS comes first if the model wants one; `false` for tokens that are complete.
    pub bos: bool,
}

impl Example {
    /// All tokens, those that are given first.
    pub fn ids(&self) -> impl Iterator<Item = i32> + '_ {
        let then = self.then.iter().map(|&(id, _)| id);
        self.given.iter().copied().chain(then)
    }
}

/// A row to be completed.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// The text, in the model's chat template if the row is a conversation.
    pub text: String,
    /// Its tokens, without BOS.
    pub tokens: Vec<i32>,
    /// The right completion, if the row has it.
    pub answer: Option<Example>,
}

/// Rows, at least one.
#[derive(Clone, Debug)]
pub struct Dataset {
    rows: Vec<Row>,
}

impl Dataset {
    /// Reads and checks all rows of a file.
    ///
    /// # Errors
    /// If the file cannot be read, and [`DataError`] for the first row that is malformed.
    pub fn read_jsonl(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::from_reader(BufReader::new(file), path)
    }

    /// Reads and checks all rows that `from` holds; errors call it `name`.
    ///
    /// # Errors
    /// As [`Dataset::read_jsonl`].
    pub fn from_reader(from: impl BufRead, name: impl AsRef<Path>) -> Result<Self> {
        let mut rows = Vec::new();
        for_each_row(from, name, |row| {
            rows.push(row);
            Ok(())
        })?;
        Ok(Self { rows })
    }

    /// Rows in memory. Those that come from a file keep their place in it, the others are numbered.
    ///
    /// # Errors
    /// [`DataError::NoRows`], [`DataError::Weight`].
    pub fn from_rows(mut rows: Vec<Row>) -> Result<Self> {
        for (i, row) in rows.iter_mut().enumerate() {
            if row.place.file.is_none() {
                row.place.number = i + 1;
            }
            row::check_weight(row.weight.into(), &row.place)?;
        }
        if rows.is_empty() {
            let source_name = "data set".to_owned();
            return Err(DataError::NoRows { source_name }.into());
        }
        Ok(Self { rows })
    }

    /// The rows that count: those of weight 0 are left out, with a warning that names the first of them.
    ///
    /// # Errors
    /// [`DataError::NoWeight`] if no row is left.
    pub fn counted(mut self) -> Result<Self> {
        let mut idle = idle::Idle::default();
        self.rows.retain(|row| idle.counts(row));
        idle.finish(!self.rows.is_empty())?;
        Ok(self)
    }

    /// All rows, in their order.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The same rows, with texts of more than `max_tokens` tokens cut into rows of so many, between characters. Only the last of them
    /// ends with EOS. One that BOS and EOS shall fit into has two tokens fewer than the context.
    ///
    /// # Errors
    /// As [`Row::example`].
    ///
    /// # Panics
    /// If `max_tokens` is 0.
    pub fn split_texts(self, model: &Model, max_tokens: usize) -> Result<Self> {
        assert!(max_tokens > 0, "a row has at least one token");
        let mut rows = Vec::with_capacity(self.rows.len());
        for row in self.rows {
            match row.split_text(model, max_tokens)? {
                Some(parts) => rows.extend(parts),
                None => rows.push(row),
            }
        }
        Ok(Self { rows })
    }

    /// The tokens of all rows, in their order. For files of any size there is [`Examples::read_jsonl`], which keeps no texts.
    ///
    /// # Errors
    /// As [`Row::example`], for the first row that fails.
    pub fn examples(&self, model: &Model) -> Result<Vec<Example>> {
        self.rows
            .iter()
            .map(|row| Ok(row.example(model)?))
            .collect()
    }
}

/// Reads and checks all rows that `from` holds, which errors call `name`, and calls `each` with one after the other: none is kept.
///
/// # Errors
/// As [`Dataset::read_jsonl`], and those of `each`, which end the reading.
pub fn for_each_row(
    from: impl BufRead,
    name: impl AsRef<Path>,
    mut each: impl FnMut(Row) -> Result<()>,
) -> Result<()> {
    let name = name.as_ref();
    let mut there = false;
    read::rows(from, name, &mut |row| {
        there = true;
        each(row)
    })?;
    if !there {
        let source_name = name.display().to_string();
        return Err(DataError::NoRows { source_name }.into());
    }
    Ok(())
}

impl Row {
    /// A row of weight 1.
    pub fn new(content: Content) -> Self {
        Self {
            content,
            weight: 1.0,
            place: Place::default(),
            goes_on: false,
        }
    }

    /// Sets [`Row::weight`](#structfield.weight).
    pub fn weight(mut self, weight: f32) -> Self {
        self.weight = weight;
        self
    }

    /// Where it comes from, for messages.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Bytes of its texts, about.
    fn text_bytes(&self) -> usize {
        let length = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        match &self.content {
            Content::Completion { prompt, completion } => prompt.len() + length(completion),
            Content::Messages { conversation, .. } => {
                let messages = conversation.messages.iter();
                messages.map(|m| m.text().map_or(0, str::len)).sum()
            }
            Content::Instruction(instruction) => {
                let Instruction {
                    system,
                    instruction,
                    input,
                    output,
                } = instruction;
                length(system) + instruction.len() + input.len() + length(output)
            }
            Content::Text(text) => text.len(),
        }
    }
}

#[cfg(test)]
mod tests;
