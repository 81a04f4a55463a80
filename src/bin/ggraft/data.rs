//! Rows of a JSONL file, one after the other.

use crate::args::ChatArgs;
use crate::failure::{Failure, Result};
use ggraft::train::data::{Content, Dataset, Examples, ExamplesBuilder, Row, for_each_row};
use std::fmt::Display;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// What rows look like, for the help of the commands that read them.
pub(crate) const FORMS: &str = "Rows are JSON objects, one per line or all of them in one array; other fields are ignored:
  {\"prompt\": \"...\", \"completion\": \"...\"}                   the completion and EOS are learned
  {\"messages\": [{\"role\": \"user\", \"content\": \"...\"}, ...]}  the assistant's messages are learned
  {\"prompt\": [messages], \"completion\": [messages]}         those of the completion are learned
  {\"text\": \"...\"}                                           all of it and EOS; .txt: one such row
Those of others are read as
  Alpaca:    instruction (and input) -> the user's message, output -> the assistant's,
             system -> the system message; Alpaca's own prompt for a model without chat template
  Dolly:     as Alpaca, with context -> input and response -> output
  pairs:     question or query, input or user beside an answer -> instruction;
             answer, response, assistant -> output; source -> prompt, target -> completion;
             response, answer or output beside a prompt -> completion
  ShareGPT:  conversations -> messages, from -> role (human: user, gpt, bot, model: assistant),
             value -> content, system, tools
Messages and \"tools\" go to the model's chat template; one with \"weight\": 0 or \"train\": false is not learned. \"weight\" \
multiplies a row's part in the mean loss, rows of weight 0 are left out. The text of control tokens (<|im_end|>) inside messages \
and instructions stays text, unless --parse-special; in prompt, completion and text it becomes tokens.";

/// The rows of a file; `-` is stdin.
pub(crate) fn read(path: &Path) -> Result<Dataset> {
    with_reader(path, |from, name| Dataset::from_reader(from, name))
}

/// The rows of a file that count; `-` is stdin. A warning names those of weight 0.
pub(crate) fn read_counted(path: &Path) -> Result<Dataset> {
    Ok(read(path)?.counted()?)
}

/// The tokens of the rows of a file, as `builder` makes them; `-` is stdin. `see` sees the rows.
pub(crate) fn read_tokens(
    path: &Path,
    mut builder: ExamplesBuilder<'_>,
    mut see: impl FnMut(&Row),
) -> Result<Examples> {
    with_reader(path, |from, name| {
        for_each_row(from, name, |row| {
            see(&row);
            builder.push(row)
        })?;
        builder.finish()
    })
}

/// Which rows there are that options are about.
#[derive(Default)]
pub(crate) struct Kinds {
    conversations: bool,
    texts: bool,
}

impl Kinds {
    /// Of all rows of `data`.
    pub(crate) fn of(data: &Dataset) -> Self {
        let mut kinds = Self::default();
        data.rows().iter().for_each(|row| kinds.add(row));
        kinds
    }

    pub(crate) fn add(&mut self, row: &Row) {
        match row.content {
            Content::Messages { .. } | Content::Instruction(_) => self.conversations = true,
            Content::Text(_) => self.texts = true,
            Content::Completion { .. } => {}
        }
    }

    /// Warns of options that were given and have no effect on any row.
    pub(crate) fn warn(&self, chat: &ChatArgs, split_text: bool) {
        let idle = |option: &str, rows: &str| {
            tracing::warn!("{option} has no effect: the data has no {rows}");
        };
        if !self.conversations && chat.chat_template.is_some() {
            idle("--chat-template", "conversations");
        }
        if !self.conversations && chat.parse_special {
            idle("--parse-special", "conversations");
        }
        if !self.texts && split_text {
            idle("--split-text", "{\"text\"} rows");
        }
    }
}

/// `1 row does` or `7 rows do`: where a warning counts what they do not.
pub(crate) fn rows_do(n: usize) -> String {
    match n {
        1 => "1 row does".to_owned(),
        n => format!("{n} rows do"),
    }
}

/// Opens a file, or stdin for `-`; `read` gets it and its name in messages. Shows how far it is.
fn with_reader<T>(
    path: &Path,
    read: impl FnOnce(&mut dyn BufRead, &Path) -> ggraft::Result<T>,
) -> Result<T> {
    if path == Path::new("-") {
        return Ok(read(
            &mut std::io::stdin().lock(),
            Path::new("standard input"),
        )?);
    }
    let file = File::open(path).map_err(|source| Failure::File {
        path: path.to_owned(),
        source,
    })?;
    let size = file.metadata().map_or(0, |meta| meta.len());
    let progress = crate::io::reading(path, size);
    let done = read(&mut BufReader::new(progress.wrap_read(file)), path);
    progress.finish_and_clear();
    Ok(done?)
}

/// What became of the rows.
pub(crate) struct Done {
    /// Rows that were computed.
    pub(crate) rows: usize,
    /// Why the rows behind them were not: Ctrl-C or a signal, or one that cannot be computed, which it names.
    pub(crate) stopped: Option<Failure>,
}

/// Rows that a warning names.
const NAMED: usize = 5;

/// The first of some rows by their places, and how many more there are.
pub(crate) fn names(places: impl ExactSizeIterator<Item = impl Display>) -> String {
    let more = match places.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let named: Vec<_> = places.take(NAMED).map(|place| place.to_string()).collect();
    named.join(", ") + &more
}

/// Calls `each` for every row. Rows that do not fit into the context are left out with a warning. A failure and Ctrl-C end the
/// loop: what was computed is kept.
pub(crate) fn for_each<'a>(
    data: &'a Dataset,
    mut each: impl FnMut(&'a Row) -> Result<()>,
) -> Result<Done> {
    let progress = crate::io::progress(data.rows().len());
    let mut long = Vec::new();
    let mut done = Done {
        rows: 0,
        stopped: None,
    };
    let result = data.rows().iter().try_for_each(|row| {
        match each(row) {
            Ok(()) => done.rows += 1,
            Err(why) if why.is_context_full() => long.push(row.place()),
            Err(why) => return Err(Failure::at(row.place(), why)),
        }
        progress.inc(1);
        Ok(())
    });
    // An error line must not end up behind the bar.
    progress.finish_and_clear();
    if !long.is_empty() {
        let text = format!(
            "into the context (a longer one: --ctx): {}",
            names(long.iter())
        );
        if done.rows == 0 && result.is_ok() {
            return Err(Failure::Unsuitable(format!("no row fits {text}")));
        }
        tracing::warn!("left out: {} not fit {text}", rows_do(long.len()));
    }
    done.stopped = match result {
        Err(why) if why.is_cancelled() => Some(Failure::Interrupted(format!(
            "interrupted after {} of {} rows",
            done.rows,
            data.rows().len()
        ))),
        result => result.err(),
    };
    Ok(done)
}
