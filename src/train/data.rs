//! Rows of text, from JSONL files or from memory, and how they become tokens.
//!
//! A line of a file is a JSON object of one of three forms; other fields are ignored, and empty lines are skipped:
//!
//! ```text
//! {"prompt": "...", "completion": "..."}                        the completion and EOS are learned
//! {"messages": [{"role": "user", "content": "..."}, ...]}       the assistant's messages, in the model's chat template
//! {"text": "..."}                                               all of it and EOS
//! ```
//!
//! A `"weight"` multiplies a row's part in the mean loss.
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

use crate::error::{Error, Result};
use crate::model::Model;
use crate::model::vocab::{ChatMessage, VocabError};
use serde::Deserialize;
use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Longest line, in bytes: far beyond any context, and an endless device ends here.
const MAX_LINE: u64 = 64 << 20;

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
    #[error("{place}: not UTF-8 text (byte {byte} of the line)")]
    NotUtf8 {
        /// The row.
        place: Place,
        /// The first wrong byte.
        byte: usize,
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
    /// Nothing to read.
    #[error("{place}: no field 'prompt', 'messages' or 'text'")]
    NoContent {
        /// The row.
        place: Place,
    },
    /// Several texts in one row.
    #[error("{place}: more than one of 'prompt', 'messages' and 'text'")]
    ManyContents {
        /// The row.
        place: Place,
    },
    /// `completion` without `prompt`.
    #[error("{place}: a completion without prompt")]
    CompletionWithoutPrompt {
        /// The row.
        place: Place,
    },
    /// `prompt` without `completion`, where one is needed.
    #[error("{place}: no field 'completion': there is nothing to compare with")]
    NoCompletion {
        /// The row.
        place: Place,
    },
    /// `text` where a prompt is needed.
    #[error("{place}: a row of 'text' has no prompt to complete")]
    NoPrompt {
        /// The row.
        place: Place,
    },
    /// A conversation in which the model says nothing.
    #[error("{place}: no message has the role 'assistant'")]
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
    /// The template writes a conversation differently when it goes on, so that no part of it belongs to one message.
    #[error(
        "{place}: the chat template changes earlier messages when later ones are added: write the row as prompt and completion"
    )]
    TemplateNotAdditive {
        /// The row.
        place: Place,
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

/// Where a row stands: `file:line`, or `row n` of rows in memory. Both count from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    file: Option<Arc<Path>>,
    number: usize,
}

impl Place {
    /// The file, `None` for rows in memory.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// The line of the file, or the number of the row in memory; 0 for a row that is in no data set yet.
    pub fn number(&self) -> usize {
        self.number
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.number) {
            (Some(file), number) => write!(f, "{}:{number}", file.display()),
            (None, 0) => f.write_str("row"),
            (None, number) => write!(f, "row {number}"),
        }
    }
}

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
    Messages(Vec<ChatMessage>),
    /// A text of which nothing is given.
    Text(String),
}

/// One row of a data set.
#[derive(Clone, Debug)]
pub struct Row {
    /// What it holds.
    pub content: Content,
    /// Its part in the mean loss, 1 unless it says otherwise.
    pub weight: f32,
    place: Place,
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

#[derive(Deserialize)]
struct RawRow {
    prompt: Option<String>,
    completion: Option<String>,
    messages: Option<Vec<RawMessage>>,
    text: Option<String>,
    weight: Option<f64>,
}

#[derive(Deserialize)]
struct RawMessage {
    role: String,
    content: String,
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
    pub fn from_reader(mut from: impl BufRead, name: impl AsRef<Path>) -> Result<Self> {
        let name = name.as_ref();
        let mut place = Place {
            file: Some(name.into()),
            number: 0,
        };
        let mut rows = Vec::new();
        loop {
            place.number += 1;
            let line = read_line(&mut from, &place).map_err(|e| match e {
                LineError::Io(source) => Error::Io {
                    path: name.to_owned(),
                    source,
                },
                LineError::Data(e) => e.into(),
            })?;
            match line {
                None => break,
                Some(line) if line.trim().is_empty() => {}
                Some(line) => rows.push(Row::parse(&line, &place)?),
            }
        }
        if rows.is_empty() {
            let source_name = name.display().to_string();
            return Err(DataError::NoRows { source_name }.into());
        }
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
            check_weight(row.weight.into(), &row.place)?;
        }
        if rows.is_empty() {
            let source_name = "data set".to_owned();
            return Err(DataError::NoRows { source_name }.into());
        }
        Ok(Self { rows })
    }

    /// All rows, in their order.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// The tokens of all rows, in their order.
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

enum LineError {
    Io(io::Error),
    Data(DataError),
}

/// The next line; `None` at the end.
fn read_line(from: &mut impl BufRead, place: &Place) -> Result<Option<String>, LineError> {
    let mut bytes = Vec::new();
    let read = from.take(MAX_LINE + 1).read_until(b'\n', &mut bytes);
    if read.map_err(LineError::Io)? == 0 {
        return Ok(None);
    }
    let place = || place.clone();
    if bytes.len() as u64 > MAX_LINE {
        let (place, max) = (place(), MAX_LINE);
        return Err(LineError::Data(DataError::LineTooLong { place, max }));
    }
    match String::from_utf8(bytes) {
        Ok(line) => Ok(Some(line)),
        Err(e) => Err(LineError::Data(DataError::NotUtf8 {
            place: place(),
            byte: e.utf8_error().valid_up_to(),
        })),
    }
}

fn check_weight(weight: f64, place: &Place) -> Result<(), DataError> {
    if (0.0..=f64::from(f32::MAX)).contains(&weight) {
        return Ok(());
    }
    Err(DataError::Weight {
        place: place.clone(),
        weight,
    })
}

/// Token ids, and whether each counts.
type Counted = Vec<(i32, bool)>;

const ASSISTANT: &str = "assistant";

impl Row {
    /// A row of weight 1.
    pub fn new(content: Content) -> Self {
        Self {
            content,
            weight: 1.0,
            place: Place::default(),
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

    fn parse(line: &str, place: &Place) -> Result<Self, DataError> {
        let raw: RawRow = serde_json::from_str(line).map_err(|e| {
            // Every row is one line to the parser.
            let text = e.to_string();
            DataError::Json {
                place: place.clone(),
                what: text
                    .split(" at line ")
                    .next()
                    .unwrap_or_default()
                    .to_owned(),
                column: e.column(),
            }
        })?;
        let weight = raw.weight.unwrap_or(1.0);
        check_weight(weight, place)?;
        let place = place.clone();
        let content = match (raw.prompt, raw.completion, raw.messages, raw.text) {
            (Some(prompt), completion, None, None) => Content::Completion { prompt, completion },
            (None, None, Some(messages), None) => Content::Messages(
                messages
                    .into_iter()
                    .map(|m| ChatMessage::new(m.role, m.content))
                    .collect(),
            ),
            (None, None, None, Some(text)) => Content::Text(text),
            (None, Some(_), None, None) => {
                return Err(DataError::CompletionWithoutPrompt { place });
            }
            (None, None, None, None) => return Err(DataError::NoContent { place }),
            _ => return Err(DataError::ManyContents { place }),
        };
        Ok(Self {
            content,
            weight: weight as f32,
            place,
        })
    }

    /// What the row gives and what it asks for, for a loss.
    ///
    /// Special tokens in the text are recognised, as Transformers' tokenizers do.
    ///
    /// # Errors
    /// If nothing can be predicted, if the text cannot be tokenized, or if there are messages and the model's chat template
    /// cannot tell them apart.
    pub fn example(&self, model: &Model) -> Result<Example, DataError> {
        let place = || self.place.clone();
        match &self.content {
            Content::Completion {
                prompt,
                completion: Some(completion),
            } => self.completion(model, self.tokens(model, prompt)?, completion),
            Content::Completion { .. } => Err(DataError::NoCompletion { place: place() }),
            Content::Text(text) => self.completion(model, Vec::new(), text),
            Content::Messages(messages) => {
                let mut runs = self.assistant_runs(model, messages)?.into_iter();
                let (text, answer) = runs.next().ok_or(DataError::NoAnswer { place: place() })?;
                let mut then = answer;
                for (text, answer) in runs {
                    then.extend(self.tokens(model, &text)?.into_iter().map(|id| (id, false)));
                    then.extend(answer);
                }
                self.start(model, self.tokens(model, &text)?, then)
            }
        }
    }

    /// What the row asks for, for a completion: of a conversation, the message that comes next or the assistant's last.
    ///
    /// # Errors
    /// As [`Row::example`].
    pub fn prompt(&self, model: &Model) -> Result<Prompt, DataError> {
        match &self.content {
            Content::Completion { prompt, completion } => {
                let tokens = self.tokens(model, prompt)?;
                let answer = completion.as_ref();
                Ok(Prompt {
                    text: prompt.clone(),
                    answer: answer
                        .map(|text| self.completion(model, tokens.clone(), text))
                        .transpose()?,
                    tokens,
                })
            }
            Content::Messages(messages) => {
                let (given, answered) = match messages.split_last() {
                    Some((last, given)) if last.role == ASSISTANT => (given, true),
                    _ => (&messages[..], false),
                };
                let text = self.render(model, given, true)?;
                let tokens = self.tokens(model, &text)?;
                let answer = answered
                    .then(|| {
                        let mut answer = self.answer_tokens(model, given, messages)?;
                        // What the template puts behind the end of the turn is not the model's to write.
                        answer.retain(|&(_, counts)| counts);
                        self.start(model, tokens.clone(), answer)
                    })
                    .transpose()?;
                Ok(Prompt {
                    text,
                    tokens,
                    answer,
                })
            }
            Content::Text(_) => Err(DataError::NoPrompt {
                place: self.place.clone(),
            }),
        }
    }

    /// `text` and EOS behind `given`, all of it counted.
    fn completion(&self, model: &Model, given: Vec<i32>, text: &str) -> Result<Example, DataError> {
        let mut ids = self.tokens(model, text)?;
        ids.extend(model.vocab().eos());
        self.start(model, given, ids.into_iter().map(|id| (id, true)).collect())
    }

    /// Where nothing stands before the first token (no prompt, no BOS), nothing can predict it: it is given.
    fn start(
        &self,
        model: &Model,
        mut given: Vec<i32>,
        mut then: Counted,
    ) -> Result<Example, DataError> {
        if given.is_empty() && !model.vocab().add_bos() && !then.is_empty() {
            given.push(then.remove(0).0);
        }
        if then.is_empty() {
            return Err(DataError::NoTargets {
                place: self.place.clone(),
            });
        }
        Ok(Example {
            given,
            then,
            weight: self.weight,
            bos: true,
        })
    }

    /// For each message of the assistant: the text from the end of the one before up to where it begins, and its tokens.
    fn assistant_runs(
        &self,
        model: &Model,
        messages: &[ChatMessage],
    ) -> Result<Vec<(String, Counted)>, DataError> {
        let mut runs = Vec::new();
        let mut done = String::new();
        for (i, message) in messages.iter().enumerate() {
            if message.role == ASSISTANT {
                let before = self.render(model, &messages[..i], true)?;
                let new = self.strip_prefix(&before, &done)?;
                let answer = self.answer_tokens(model, &messages[..i], &messages[..=i])?;
                runs.push((new.to_owned(), answer));
                done = self.render(model, &messages[..=i], false)?;
            }
        }
        Ok(runs)
    }

    /// The tokens of the last of `all`, which follows `given`, and of what the template puts behind it. The end of the turn
    /// counts as part of the answer, what follows it does not.
    fn answer_tokens(
        &self,
        model: &Model,
        given: &[ChatMessage],
        all: &[ChatMessage],
    ) -> Result<Counted, DataError> {
        let before = self.render(model, given, true)?;
        let after = self.render(model, all, false)?;
        let ids = self.tokens(model, self.strip_prefix(&after, &before)?)?;
        let end = ids.iter().position(|&id| model.vocab().is_eog(id));
        let counted = end.map_or(ids.len(), |at| at + 1);
        Ok(ids
            .into_iter()
            .enumerate()
            .map(|(i, id)| (id, i < counted))
            .collect())
    }

    fn strip_prefix<'a>(&self, text: &'a str, prefix: &str) -> Result<&'a str, DataError> {
        text.strip_prefix(prefix)
            .ok_or_else(|| DataError::TemplateNotAdditive {
                place: self.place.clone(),
            })
    }

    fn render(
        &self,
        model: &Model,
        messages: &[ChatMessage],
        answer_next: bool,
    ) -> Result<String, DataError> {
        let place = || self.place.clone();
        let vocab = model.vocab();
        if vocab.chat_template().is_none() {
            return Err(DataError::NoChatTemplate {
                place: place(),
                model: model.path().to_owned(),
            });
        }
        vocab
            .apply_chat(messages, answer_next)
            .map_err(|source| DataError::Vocab {
                place: place(),
                source,
            })
    }

    fn tokens(&self, model: &Model, text: &str) -> Result<Vec<i32>, DataError> {
        model
            .vocab()
            .tokenize(text, false, true)
            .map_err(|source| DataError::Vocab {
                place: self.place.clone(),
                source,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &[u8]) -> Result<Dataset> {
        Dataset::from_reader(text, "rows")
    }

    fn completion(prompt: &str) -> Row {
        Row::new(Content::Completion {
            prompt: prompt.to_owned(),
            completion: Some("b".to_owned()),
        })
    }

    #[test]
    fn lines_are_counted_and_empty_ones_skipped() {
        let data =
            read(b"{\"text\": \"a\"}\r\n\n  \n{\"prompt\": \"b\", \"weight\": 0.5}").unwrap();
        let places: Vec<_> = data.rows().iter().map(|r| r.place().to_string()).collect();
        assert_eq!(places, ["rows:1", "rows:4"]);
        assert_eq!(data.rows()[1].weight, 0.5);
    }

    #[test]
    fn every_fault_of_a_line_names_it() {
        for (line, expected) in [
            (
                &b"{\"text\": "[..],
                "rows:1: EOF while parsing a value (column 9)",
            ),
            (
                b"{\"text\": \"\xff\"}",
                "rows:1: not UTF-8 text (byte 10 of the line)",
            ),
            (b"{}", "rows:1: no field 'prompt', 'messages' or 'text'"),
            (
                b"{\"text\": \"a\", \"weight\": 1e39}",
                "rows:1: the weight is 1000000000000000000000000000000000000000, it must not be negative or beyond single precision",
            ),
            (b"\n \n", "rows: there are no rows"),
        ] {
            assert_eq!(read(line).unwrap_err().to_string(), expected);
        }
        // An endless line ends the reading, not the memory.
        let endless = BufReader::new(io::repeat(b' '));
        let error = Dataset::from_reader(endless, "rows").unwrap_err();
        assert!(
            error.to_string().starts_with("rows:1: longer than "),
            "{error}"
        );
    }

    #[test]
    fn rows_in_memory_are_numbered() {
        let from_file = read(b"\n\n{\"text\": \"a\"}").unwrap().rows()[0].clone();
        let data = Dataset::from_rows(vec![completion("a"), from_file, completion("c")]).unwrap();
        let places: Vec<_> = data.rows().iter().map(|r| r.place().to_string()).collect();
        assert_eq!(places, ["row 1", "rows:3", "row 3"]);

        let error = Dataset::from_rows(vec![completion("a"), completion("b").weight(f32::NAN)]);
        assert!(
            error
                .unwrap_err()
                .to_string()
                .starts_with("row 2: the weight is NaN")
        );
        let error = Dataset::from_rows(Vec::new()).unwrap_err();
        assert_eq!(error.to_string(), "data set: there are no rows");
    }
}
