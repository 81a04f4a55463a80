//! The sequences of a set, made from its tokens whenever they are needed: kept, they would take ten times the memory.

use super::batch::{Expected, Sequence};
use super::data::{Example, Examples};
use super::layout::Layout;
use super::{TrainError, Trimmed};
use std::path::Path;

/// The sequences of a set of examples.
pub(super) struct Sequences {
    examples: Examples,
    /// Examples that have something to learn and a weight, one for each sequence.
    used: Vec<u32>,
    /// What a teacher says of the targets of the first sequences.
    taught: Vec<Box<[Expected]>>,
}

impl Sequences {
    /// Of all `examples` of the set that errors call `set`, and which of them are too long.
    ///
    /// # Errors
    /// [`TrainError::Token`], [`TrainError::NothingToLearn`] and [`TrainError::NoWeight`] unless the set is empty.
    pub(super) fn new(
        examples: Examples,
        layout: &Layout,
        n_vocab: usize,
        set: &'static str,
    ) -> Result<(Self, Trimmed), TrainError> {
        let mut trimmed = Trimmed::default();
        let mut used = Vec::with_capacity(examples.len());
        let mut all_idle = true;
        for (row, example) in examples.iter().enumerate() {
            let unknown = |&id: &i32| id < 0 || id as usize >= n_vocab;
            if let Some(token) = example.ids().find(unknown) {
                let row = row + 1;
                return Err(TrainError::Token {
                    set,
                    row,
                    token,
                    n_vocab,
                });
            }
            // Rows of no weight count for nothing, and those that have nothing to learn, perhaps not any more, neither: they only
            // cost time.
            if example.weight == 0.0 {
                continue;
            }
            all_idle = false;
            let s = layout.whole(row, &example);
            let max_len = layout.max_len();
            let is_long = s.slots.len() > max_len;
            if is_long {
                trimmed.cut.push(row);
            }
            if s.targets.iter().any(|t| t.at + 1 < max_len) {
                used.push(row as u32);
            } else if is_long {
                trimmed.lost.push(row);
            }
        }
        if used.is_empty() && !examples.is_empty() {
            return Err(match all_idle {
                true => TrainError::NoWeight {
                    set,
                    file: examples.file().map(Path::to_path_buf),
                },
                false => layout.nothing_to_learn(set, &examples),
            });
        }
        let sequences = Self {
            examples,
            used,
            taught: Vec::new(),
        };
        Ok((sequences, trimmed))
    }

    /// Sequences.
    pub(super) fn len(&self) -> usize {
        self.used.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.used.is_empty()
    }

    /// What they are made from.
    pub(super) fn examples(&self) -> &Examples {
        &self.examples
    }

    /// The example that a sequence is made from.
    pub(super) fn example(&self, i: usize) -> Example {
        self.examples.get(self.used[i] as usize)
    }

    /// Sequence `i`, laid out as the set was checked.
    pub(super) fn get(&self, layout: &Layout, i: usize) -> Sequence {
        let mut s = layout.sequence(self.used[i] as usize, &self.example(i));
        if let Some(taught) = self.taught.get(i) {
            for (target, tokens) in s.targets.iter_mut().zip(taught) {
                target.tokens = tokens.clone();
            }
        }
        s
    }

    /// All of them, one after the other.
    pub(super) fn iter<'a>(
        &'a self,
        layout: &'a Layout,
    ) -> impl ExactSizeIterator<Item = Sequence> + 'a {
        (0..self.len()).map(|i| self.get(layout, i))
    }

    /// Sequences whose targets a teacher has replaced: the first ones.
    pub(super) fn n_taught(&self) -> usize {
        self.taught.len()
    }

    /// Replaces the targets of the first sequence that was not taught yet, one distribution for each.
    pub(super) fn teach(&mut self, targets: Box<[Expected]>) {
        self.taught.push(targets);
    }
}
