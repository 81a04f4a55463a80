//! Rows of a JSONL file, one after the other.

use crate::args::ChatArgs;
use crate::failure::{Failure, Result};
use crate::interrupt;
use ggraft::infer::Generated;
use ggraft::infer::engine::{Jobs, Request, Scheduler};
use ggraft::train::data::{Content, Dataset, Examples, ExamplesBuilder, Row, for_each_row};
use indicatif::ProgressBar;
use std::collections::VecDeque;
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

/// Computes the requests that `ask` makes of each row, many rows at a time, and calls `each` with a row, what `ask` remembers of it and the answers, in the order of the rows.
/// Rows that do not fit into the context are left out with a warning, if `each` fails for them. Any other failure and Ctrl-C end it: what was computed of the rows before is
/// kept.
pub(crate) fn for_each<T>(
    data: &Dataset,
    scheduler: &mut Scheduler,
    ask: impl FnMut(&Row) -> Result<(T, Vec<Request>)>,
    each: impl FnMut(&Row, T, Result<Vec<Generated>>) -> Result<()>,
) -> Result<Done> {
    let _guard = interrupt::Guard::new(scheduler.cancel_token());
    let mut rows = Rows {
        data: data.rows(),
        ask,
        each,
        asked: Vec::new(),
        begun: VecDeque::new(),
        next: 0,
        ended: 0,
        enough: false,
        failed: None,
        long: Vec::new(),
        done: 0,
        progress: crate::io::progress(data.rows().len()),
    };
    scheduler.serve(&mut rows);
    // An error line must not end up behind the bar.
    rows.progress.finish_and_clear();
    let (n, done, long) = (data.rows().len(), rows.done, rows.long);
    if !long.is_empty() {
        let text = format!(
            "into the context (a longer one: --ctx): {}",
            names(long.iter().map(|row| row.place()))
        );
        if done == 0 && rows.failed.is_none() && rows.ended == n {
            return Err(Failure::Unsuitable(format!("no row fits {text}")));
        }
        tracing::warn!("left out: {} not fit {text}", rows_do(long.len()));
    }
    let interrupted = || Failure::Interrupted(format!("interrupted after {done} of {n} rows"));
    let stopped = match rows.failed {
        None => (rows.ended < n).then(interrupted),
        failed => failed,
    };
    Ok(Done {
        rows: done,
        stopped,
    })
}

/// Rows on their way.
struct Rows<'a, T, Ask, Each> {
    data: &'a [Row],
    ask: Ask,
    each: Each,
    /// Requests of rows that have begun which were not submitted yet, by row and number.
    asked: Vec<((usize, usize), Request)>,
    /// Rows that have begun, from row `ended` on.
    begun: VecDeque<Begun<T>>,
    /// The first row that has not.
    next: usize,
    /// Rows that are over.
    ended: usize,
    /// A row is known to fail, perhaps behind others that are not over: no more of them begin.
    enough: bool,
    failed: Option<Failure>,
    long: Vec<&'a Row>,
    /// Rows that were computed.
    done: usize,
    progress: ProgressBar,
}

struct Begun<T> {
    /// What `ask` remembers, or why it failed.
    asked: Result<T>,
    answers: Vec<Option<Result<Generated>>>,
}

impl<T, Ask, Each> Jobs for Rows<'_, T, Ask, Each>
where
    Ask: FnMut(&Row) -> Result<(T, Vec<Request>)>,
    Each: FnMut(&Row, T, Result<Vec<Generated>>) -> Result<()>,
{
    /// Row, and number of its request.
    type Key = (usize, usize);

    fn next(&mut self) -> Option<(Self::Key, Request)> {
        while self.asked.is_empty() {
            if self.enough {
                return None;
            }
            let row = self.data.get(self.next)?;
            let (asked, requests) = match (self.ask)(row) {
                Ok((asked, requests)) => (Ok(asked), requests),
                Err(why) => {
                    self.enough = true;
                    (Err(why), Vec::new())
                }
            };
            self.begun.push_back(Begun {
                asked,
                answers: requests.iter().map(|_| None).collect(),
            });
            let keys = (0..requests.len()).map(|i| (self.next, i));
            self.asked = keys.zip(requests).rev().collect();
            self.next += 1;
            self.settle();
        }
        self.asked.pop()
    }

    fn end(&mut self, (row, number): Self::Key, outcome: ggraft::Result<Generated>) {
        let outcome = outcome.map_err(Failure::from);
        self.enough |= matches!(&outcome, Err(why) if !why.is_context_full());
        // Behind a row that failed nobody wants to know.
        if let Some(row) = row
            .checked_sub(self.ended)
            .and_then(|i| self.begun.get_mut(i))
        {
            row.answers[number] = Some(outcome);
        }
        self.settle();
    }
}

impl<T, Ask, Each> Rows<'_, T, Ask, Each>
where
    Each: FnMut(&Row, T, Result<Vec<Generated>>) -> Result<()>,
{
    /// Hands over rows that are complete, up to the first one that is not.
    fn settle(&mut self) {
        let is_complete = |row: &mut Begun<T>| row.answers.iter().all(Option::is_some);
        while self.failed.is_none() && self.begun.front_mut().is_some_and(is_complete) {
            let row = self.begun.pop_front().expect("there is a first one");
            let place = &self.data[self.ended];
            let answers: Result<Vec<_>> = row.answers.into_iter().flatten().collect();
            let outcome = row
                .asked
                .and_then(|asked| (self.each)(place, asked, answers));
            match outcome {
                Ok(()) => self.done += 1,
                Err(why) if why.is_context_full() => self.long.push(place),
                Err(why) => {
                    self.enough = true;
                    self.failed = Some(Failure::at(place.place(), why));
                    return;
                }
            }
            self.ended += 1;
            self.progress.inc(1);
        }
    }
}
