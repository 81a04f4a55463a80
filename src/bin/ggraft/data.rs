//! JSONL rows and how they become tokens.

use crate::failure::{Failure, Result};
use crate::io::Lines;
use crate::run::require_template;
use ggraft::Model;
use ggraft::model::vocab::ChatMessage;
use serde::Deserialize;
use std::path::{Path, PathBuf};

/// The rows of a file.
pub(crate) struct Data {
    path: PathBuf,
    pub(crate) rows: Vec<Row>,
}

/// One row, with where it stands.
pub(crate) struct Row {
    line: usize,
    pub(crate) content: Content,
    pub(crate) weight: f64,
}

pub(crate) enum Content {
    Completion {
        prompt: String,
        completion: Option<String>,
    },
    Messages(Vec<ChatMessage>),
    Text(String),
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

impl Data {
    /// Reads and checks all rows; empty lines are skipped.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut data = Self {
            path: path.to_owned(),
            rows: Vec::new(),
        };
        for (i, line) in Lines::open(path)?.enumerate() {
            let line = line?;
            if line.trim().is_empty() {
                continue;
            }
            let row = Row::parse(&line, i + 1).map_err(|why| data.wrong(i + 1, why))?;
            data.rows.push(row);
        }
        if data.rows.is_empty() {
            return Err(Failure::Unsuitable(format!(
                "{}: there are no rows",
                path.display()
            )));
        }
        Ok(data)
    }

    fn wrong(&self, line: usize, why: String) -> Failure {
        self.at(line, Failure::Unsuitable(why))
    }

    fn at(&self, line: usize, why: Failure) -> Failure {
        Failure::Row {
            path: self.path.clone(),
            line,
            why: Box::new(why),
        }
    }

    /// Calls `each` for every row; its failure names the line.
    pub(crate) fn for_each(&self, mut each: impl FnMut(&Row) -> Result<()>) -> Result<()> {
        let progress = crate::io::progress(self.rows.len());
        let result = self.rows.iter().try_for_each(|row| {
            each(row).map_err(|e| self.at(row.line, e))?;
            progress.inc(1);
            Ok(())
        });
        // An error line must not end up behind the bar.
        progress.finish_and_clear();
        result
    }
}

impl Row {
    fn parse(line: &str, number: usize) -> Result<Self, String> {
        let raw: RawRow = serde_json::from_str(line).map_err(|e| {
            // Every row is one line to the parser.
            let text = e.to_string();
            let what = text.split(" at line ").next().unwrap_or_default();
            format!("{what} (column {})", e.column())
        })?;
        let weight = raw.weight.unwrap_or(1.0);
        if !weight.is_finite() || weight < 0.0 {
            return Err(format!("the weight is {weight}, it must not be negative"));
        }
        let content = match (raw.prompt, raw.completion, raw.messages, raw.text) {
            (Some(prompt), completion, None, None) => Content::Completion { prompt, completion },
            (None, None, Some(messages), None) => Content::Messages(
                messages
                    .into_iter()
                    .map(|m| ChatMessage::new(m.role, m.content))
                    .collect(),
            ),
            (None, None, None, Some(text)) => Content::Text(text),
            (None, Some(_), None, None) => return Err("a completion without prompt".to_owned()),
            (None, None, None, None) => {
                return Err("no field 'prompt', 'messages' or 'text'".to_owned());
            }
            _ => return Err("more than one of 'prompt', 'messages' and 'text'".to_owned()),
        };
        Ok(Self {
            line: number,
            content,
            weight,
        })
    }
}

/// Token ids, and whether each counts.
type Counted = Vec<(i32, bool)>;

/// A row to be scored: what is given and what must be predicted.
pub(crate) struct Scored {
    /// Tokens that are given, without BOS: the session places it.
    pub(crate) given: Vec<i32>,
    /// Tokens that follow.
    pub(crate) then: Counted,
}

/// A row to be completed.
pub(crate) struct Prompt {
    pub(crate) text: String,
    /// Without BOS.
    pub(crate) tokens: Vec<i32>,
    /// The right answer with its end, if the row has it.
    pub(crate) answer: Option<Vec<i32>>,
}

impl Prompt {
    /// Its answer, to be scored.
    pub(crate) fn scored(&self, model: &Model) -> Option<Scored> {
        let answer = self.answer.as_ref()?;
        let then = answer.iter().map(|&id| (id, true)).collect();
        Some(start(model, self.tokens.clone(), then))
    }
}

/// What a row gives and what it asks for, for a loss.
pub(crate) fn scored(model: &Model, content: &Content) -> Result<Scored> {
    match content {
        Content::Completion {
            completion: Some(_),
            ..
        } => Ok(prompt(model, content)?
            .scored(model)
            .expect("the row has a completion")),
        Content::Completion { .. } => Err(Failure::Unsuitable(
            "no field 'completion': there is nothing to compare with".to_owned(),
        )),
        Content::Text(text) => {
            let then = with_eos(model, text)?.into_iter().map(|id| (id, true));
            Ok(start(model, Vec::new(), then.collect()))
        }
        Content::Messages(messages) => {
            let mut runs = assistant_runs(model, messages)?.into_iter();
            let (text, answer) = runs.next().ok_or_else(no_answer)?;
            let mut then = answer;
            for (text, answer) in runs {
                then.extend(tokens(model, &text)?.into_iter().map(|id| (id, false)));
                then.extend(answer);
            }
            Ok(start(model, tokens(model, &text)?, then))
        }
    }
}

/// What a row asks for, for a greedy completion.
pub(crate) fn prompt(model: &Model, content: &Content) -> Result<Prompt> {
    match content {
        Content::Completion { prompt, completion } => Ok(Prompt {
            tokens: tokens(model, prompt)?,
            answer: completion
                .as_ref()
                .map(|text| with_eos(model, text))
                .transpose()?,
            text: prompt.clone(),
        }),
        Content::Messages(messages) => {
            let (given, answer) = match messages.split_last() {
                Some((last, given)) if last.role == ASSISTANT => {
                    let answer = answer_tokens(model, given, messages)?;
                    let counted = answer.into_iter().filter(|&(_, counts)| counts);
                    (given, Some(counted.map(|(id, _)| id).collect()))
                }
                _ => (&messages[..], None),
            };
            let text = render(model, given, true)?;
            Ok(Prompt {
                tokens: tokens(model, &text)?,
                text,
                answer,
            })
        }
        Content::Text(_) => Err(Failure::Unsuitable(
            "a row of 'text' has no prompt to complete".to_owned(),
        )),
    }
}

const ASSISTANT: &str = "assistant";

fn no_answer() -> Failure {
    Failure::Unsuitable("no message has the role 'assistant'".to_owned())
}

/// Special tokens in the text are recognised, as Transformers' tokenizers do.
fn tokens(model: &Model, text: &str) -> Result<Vec<i32>> {
    Ok(model.vocab().tokenize(text, false, true)?)
}

fn with_eos(model: &Model, text: &str) -> Result<Vec<i32>> {
    let mut ids = tokens(model, text)?;
    ids.extend(model.vocab().eos());
    Ok(ids)
}

/// Where nothing stands before the first token (no prompt, no BOS), nothing can predict it: it is given.
fn start(model: &Model, mut given: Vec<i32>, mut then: Counted) -> Scored {
    if given.is_empty() && !model.vocab().add_bos() && !then.is_empty() {
        given.push(then.remove(0).0);
    }
    Scored { given, then }
}

fn render(model: &Model, messages: &[ChatMessage], answer_next: bool) -> Result<String> {
    require_template(model)?;
    Ok(model.vocab().apply_chat(messages, answer_next)?)
}

/// For each message of the assistant: the text from the end of the one before up to where it begins, and its tokens.
fn assistant_runs(model: &Model, messages: &[ChatMessage]) -> Result<Vec<(String, Counted)>> {
    let mut runs = Vec::new();
    let mut done = String::new();
    for (i, message) in messages.iter().enumerate() {
        if message.role == ASSISTANT {
            let before = render(model, &messages[..i], true)?;
            let new = before
                .strip_prefix(done.as_str())
                .ok_or_else(not_additive)?;
            let answer = answer_tokens(model, &messages[..i], &messages[..=i])?;
            runs.push((new.to_owned(), answer));
            done = render(model, &messages[..=i], false)?;
        }
    }
    Ok(runs)
}

/// The tokens of the last of `all`, which follows `given`, and of what the template puts behind it. The end of the turn
/// counts as part of the answer, what follows it does not.
fn answer_tokens(model: &Model, given: &[ChatMessage], all: &[ChatMessage]) -> Result<Counted> {
    let (before, after) = (render(model, given, true)?, render(model, all, false)?);
    let answer = after.strip_prefix(&before).ok_or_else(not_additive)?;
    let ids = tokens(model, answer)?;
    let end = ids.iter().position(|&id| model.vocab().is_eog(id));
    let counted = end.map_or(ids.len(), |at| at + 1);
    Ok(ids
        .into_iter()
        .enumerate()
        .map(|(i, id)| (id, i < counted))
        .collect())
}

fn not_additive() -> Failure {
    Failure::Unsuitable(
        "the chat template changes earlier messages when later ones are added: write the row as prompt and completion"
            .to_owned(),
    )
}
