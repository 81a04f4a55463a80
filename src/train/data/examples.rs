//! Rows as tokens, in the form that a run keeps.

use super::idle::Idle;
use super::{DataError, Example, Place, Row};
use crate::error::{Error, Result};
use crate::ggml::default_threads;
use crate::model::Model;
use crate::train::rng::{Rng, Stream};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;

/// Tokens of many rows, one behind the other: 4 bytes and a bit for each token and 24 bytes for each row, so that a set takes about
/// as much memory as the file that it comes from.
///
/// ```
/// use ggraft::train::data::{Example, Examples};
///
/// let row = Example { given: vec![5, 6], then: vec![(7, true), (8, false)], weight: 1.0, bos: true };
/// let examples = Examples::from(vec![row.clone(); 3]);
/// assert_eq!(examples.len(), 3);
/// assert_eq!(examples.get(2), row);
/// ```
#[derive(Clone, Debug, Default)]
pub struct Examples {
    ids: Vec<i32>,
    /// Which of `ids` count in the loss.
    counts: Bits,
    rows: Vec<Kept>,
    /// Where rows come from, each from the row of that index on.
    sources: Vec<(usize, Source)>,
}

/// What is kept of a row besides its tokens.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// Index of the token behind its last one.
    end: usize,
    /// So many of its tokens are given.
    given: u32,
    weight: f32,
    /// Of its place.
    number: u32,
    bos: bool,
}

/// What the places of neighbours have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Source {
    file: Option<Arc<Path>>,
    in_array: bool,
}

impl Examples {
    /// Reads all rows of a file and keeps their tokens. Rows of weight 0 are left out, with a warning.
    ///
    /// # Errors
    /// As [`Dataset::read_jsonl`](super::Dataset::read_jsonl) and [`Row::example`], for the first row that fails;
    /// [`DataError::NoWeight`] if all rows have the weight 0.
    pub fn read_jsonl(path: impl AsRef<Path>, model: &Model) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|source| Error::Io {
            path: path.to_owned(),
            source,
        })?;
        Self::from_reader(BufReader::new(file), path, model)
    }

    /// Reads all rows that `from` holds and keeps their tokens; errors call it `name`.
    ///
    /// # Errors
    /// As [`Examples::read_jsonl`].
    pub fn from_reader(from: impl BufRead, name: impl AsRef<Path>, model: &Model) -> Result<Self> {
        let mut builder = ExamplesBuilder::new(model);
        super::for_each_row(from, name, |row| builder.push(row))?;
        builder.finish()
    }

    /// Rows.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// There are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn get(&self, i: usize) -> Example {
        let row = self.rows[i];
        let start = i.checked_sub(1).map_or(0, |before| self.rows[before].end);
        let follows = start + row.given as usize;
        let counted = |at| (self.ids[at], self.counts.get(at));
        Example {
            given: self.ids[start..follows].to_vec(),
            then: (follows..row.end).map(counted).collect(),
            weight: row.weight,
            bos: row.bos,
        }
    }

    /// All rows, in their order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Example> + '_ {
        (0..self.len()).map(|i| self.get(i))
    }

    /// As many rows, drawn with replacement from a seed: 63 % of them, some more than once. What each member of a bagged ensemble learns (Breiman 1996).
    pub fn bag(&self, seed: u64) -> Self {
        let mut rng = Rng::new(seed, Stream::Bag);
        let mut bag = Self::default();
        let n = u32::try_from(self.len()).expect("rows fit into memory");
        for _ in 0..n {
            let i = rng.below(n) as usize;
            bag.push(&self.get(i), &self.place(i));
        }
        bag.shrink();
        bag
    }

    /// The tokens of all rows, as [`Example::ids`] has those of one.
    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// Part of row `i` in the mean loss.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn weight(&self, i: usize) -> f32 {
        self.rows[i].weight
    }

    /// Where row `i` comes from, for messages; examples that were given as such are numbered.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn place(&self, i: usize) -> Place {
        let source = self.sources.partition_point(|&(first, _)| first <= i) - 1;
        let (_, Source { file, in_array }) = &self.sources[source];
        Place {
            file: file.clone(),
            number: self.rows[i].number as usize,
            in_array: *in_array,
        }
    }

    /// The file, if all rows come from one.
    pub(in crate::train) fn file(&self) -> Option<&Path> {
        let (_, first) = self.sources.first()?;
        let same = self.sources.iter().all(|(_, s)| s.file == first.file);
        first.file.as_deref().filter(|_| same)
    }

    /// Whether there is a row whose [`Example::bos`] is `bos`.
    pub(in crate::train) fn any_begins(&self, bos: bool) -> bool {
        self.rows.iter().any(|row| row.bos == bos)
    }

    /// Gives back what was held for more rows.
    fn shrink(&mut self) {
        self.ids.shrink_to_fit();
        self.counts.words.shrink_to_fit();
        self.rows.shrink_to_fit();
    }

    /// Adds a row.
    ///
    /// # Panics
    /// If it has more than 2³² tokens: its memory would end before.
    fn push(&mut self, example: &Example, place: &Place) {
        let source = Source {
            file: place.file.clone(),
            in_array: place.in_array,
        };
        if self.sources.last().is_none_or(|(_, last)| *last != source) {
            self.sources.push((self.rows.len(), source));
        }
        self.ids.extend(example.ids());
        let given = std::iter::repeat_n(false, example.given.len());
        let then = example.then.iter().map(|&(_, counts)| counts);
        given
            .chain(then)
            .for_each(|counts| self.counts.push(counts));
        self.rows.push(Kept {
            end: self.ids.len(),
            given: u32::try_from(example.given.len()).expect("a row fits into memory"),
            weight: example.weight,
            // A message would name the wrong line of a file of more than 4 billion.
            number: u32::try_from(place.number).unwrap_or(u32::MAX),
            bos: example.bos,
        });
    }
}

impl FromIterator<Example> for Examples {
    fn from_iter<I: IntoIterator<Item = Example>>(rows: I) -> Self {
        let mut examples = Self::default();
        for (i, example) in rows.into_iter().enumerate() {
            let place = Place {
                number: i + 1,
                ..Place::default()
            };
            examples.push(&example, &place);
        }
        examples.shrink();
        examples
    }
}

impl From<Vec<Example>> for Examples {
    fn from(rows: Vec<Example>) -> Self {
        rows.into_iter().collect()
    }
}

/// Turns rows into tokens as they come, on all physical cores, and drops their texts.
pub struct ExamplesBuilder<'m> {
    model: &'m Model,
    split_texts: Option<usize>,
    threads: usize,
    examples: Examples,
    /// Rows whose texts are still there, and about how many bytes these have.
    waiting: Vec<Row>,
    bytes: usize,
    idle: Idle,
}

/// Bytes of text that are tokenized at a time: more work than threads cost, and little memory.
const CHUNK: usize = 128 << 10;
/// Bytes of text that one thread is done with soon enough.
const SMALL: usize = 32 << 10;

impl<'m> ExamplesBuilder<'m> {
    /// Tokens for `model`.
    pub fn new(model: &'m Model) -> Self {
        Self {
            model,
            split_texts: None,
            threads: default_threads(),
            examples: Examples::default(),
            waiting: Vec::new(),
            bytes: 0,
            idle: Idle::default(),
        }
    }

    /// Cuts texts as [`Dataset::split_texts`](super::Dataset::split_texts) does.
    ///
    /// # Panics
    /// If `max_tokens` is 0.
    pub fn split_texts(mut self, max_tokens: usize) -> Self {
        assert!(max_tokens > 0, "a row has at least one token");
        self.split_texts = Some(max_tokens);
        self
    }

    /// Adds a row, unless its weight is 0.
    ///
    /// # Errors
    /// As [`Row::example`], perhaps for a row that was added before.
    pub fn push(&mut self, row: Row) -> Result<()> {
        if !self.idle.counts(&row) {
            return Ok(());
        }
        self.bytes += row.text_bytes();
        self.waiting.push(row);
        match self.bytes >= CHUNK {
            true => self.tokenize(),
            false => Ok(()),
        }
    }

    /// The tokens of all rows that were added. A warning names those of weight 0, which were not.
    ///
    /// # Errors
    /// As [`ExamplesBuilder::push`], and [`DataError::NoWeight`] if all rows have the weight 0.
    pub fn finish(mut self) -> Result<Examples> {
        self.tokenize()?;
        self.idle.finish(!self.examples.is_empty())?;
        self.examples.shrink();
        Ok(self.examples)
    }

    /// Turns the rows that wait into tokens.
    fn tokenize(&mut self) -> Result<()> {
        let rows = std::mem::take(&mut self.waiting);
        let bytes = std::mem::take(&mut self.bytes);
        let threads = if bytes < SMALL { 1 } else { self.threads };
        let part = rows.len().div_ceil(threads).max(1);
        let done = std::thread::scope(|scope| {
            let (mine, others) = rows.split_at(part.min(rows.len()));
            let others: Vec<_> = others
                .chunks(part)
                .map(|rows| {
                    let work = || self.tokenize_part(rows);
                    let thread = std::thread::Builder::new().name("tokenize".into());
                    (rows, thread.spawn_scoped(scope, work))
                })
                .collect();
            // The first rows on this thread: whoever listens to its warnings hears of them.
            let mut done = vec![self.tokenize_part(mine)];
            done.extend(others.into_iter().map(|(rows, thread)| {
                match thread {
                    Ok(thread) => thread
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
                    // A system that has no more threads.
                    Err(_) => self.tokenize_part(rows),
                }
            }));
            done
        });
        for part in done {
            for (place, example) in part? {
                self.examples.push(&example, &place);
            }
        }
        Ok(())
    }

    fn tokenize_part(&self, rows: &[Row]) -> Result<Vec<(Place, Example)>, DataError> {
        let mut done = Vec::with_capacity(rows.len());
        for row in rows {
            let parts = match self.split_texts {
                Some(n) => row.split_text(self.model, n)?,
                None => None,
            };
            for row in parts.as_deref().unwrap_or(std::slice::from_ref(row)) {
                done.push((row.place.clone(), row.example(self.model)?));
            }
        }
        Ok(done)
    }
}

/// A list of bits.
#[derive(Clone, Debug, Default)]
struct Bits {
    words: Vec<u64>,
    len: usize,
}

impl Bits {
    fn push(&mut self, bit: bool) {
        if self.len.is_multiple_of(64) {
            self.words.push(0);
        }
        self.words[self.len / 64] |= u64::from(bit) << (self.len % 64);
        self.len += 1;
    }

    fn get(&self, i: usize) -> bool {
        self.words[i / 64] >> (i % 64) & 1 == 1
    }
}
