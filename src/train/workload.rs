//! What a run will compute, told before it does.

use super::batch::{MAX_TOKENS, Packed, Slot, first_group};
use super::layout::Layout;
use super::sequences::Sequences;
use super::{TrainOptions, Trainer};
use crate::error::Result;
use std::cmp::Reverse;

/// A set of rows as they will be computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SetWorkload {
    /// Rows, without those that lose all that they have to predict.
    pub rows: usize,
    /// Tokens of all rows, virtual ones among or in front of the text included, the rows of a prefix not.
    pub tokens: u64,
    /// Tokens among them that are predicted.
    pub targets: u64,
    /// Tokens of the longest row.
    pub longest: usize,
}

/// What a run will compute.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Workload {
    /// The training rows, read once.
    pub train: SetWorkload,
    /// The validation rows, if there are any.
    pub valid: Option<SetWorkload>,
    /// Steps of the run.
    pub steps: u64,
    /// Rows of a step.
    pub rows_per_step: usize,
    /// Passes over the training rows.
    pub epochs: f64,
    /// Learning rate behind the warm-up.
    pub lr: f64,
    /// Most bytes that the backward pass may keep of the forward pass.
    pub memory: u64,
}

/// A position of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The token that stands there; `None` for a virtual one.
    pub token: Option<i32>,
    /// It is predicted: it counts in the loss.
    pub predicted: bool,
}

impl Trainer {
    /// What the run will compute in all its steps, those that were taken included.
    pub fn workload(&self) -> Workload {
        let rows_per_step = self.rows_per_step();
        Workload {
            train: SetWorkload::of(&self.train, &self.layout),
            valid: (!self.valid.is_empty()).then(|| SetWorkload::of(&self.valid, &self.layout)),
            steps: self.steps,
            rows_per_step,
            epochs: self.steps as f64 * rows_per_step as f64 / self.train.len() as f64,
            lr: self.lr,
            memory: self.options.memory.unwrap_or(TrainOptions::DEFAULT_MEMORY),
        }
    }

    /// Bytes that a graph of the longest training rows needs, as many as are computed at once: activations, gradients and logits.
    /// More than [`Workload::memory`] where that is less than one layer and the logits take. The graph is planned, nothing is
    /// computed.
    ///
    /// # Errors
    /// If the rows of the adapter do not fit the base.
    pub fn graph_memory(&self) -> Result<u64> {
        let length = |&i: &usize| self.train.get(&self.layout, i).slots.len();
        let mut rows: Vec<usize> = (0..self.train.len()).collect();
        rows.sort_by_cached_key(|i| Reverse(length(i)));
        let longest = rows.iter().take(self.options.batch);
        let sequences = longest.map(|&i| self.train.get(&self.layout, i));
        let group = first_group(&mut sequences.peekable(), MAX_TOKENS);
        let variables = self.variables(&self.state.good)?;
        let smoothing = self.options.label_smoothing;
        Ok(self
            .passes
            .gradient_memory(&Packed::new(&group), &variables, smoothing) as u64)
    }

    /// The positions of a training row as they will be computed, and which example it is made of; `None` behind the last row.
    pub fn positions(&self, row: usize) -> Option<(usize, Vec<Position>)> {
        let sequence = (row < self.train.len()).then(|| self.train.get(&self.layout, row))?;
        let mut positions: Vec<_> = sequence
            .slots
            .iter()
            .map(|slot| Position {
                token: match slot {
                    Slot::Token(id) => Some(*id),
                    Slot::Virtual(_) => None,
                },
                predicted: false,
            })
            .collect();
        for target in &sequence.targets {
            positions[target.at + 1].predicted = true;
        }
        Some((sequence.example, positions))
    }
}

impl SetWorkload {
    fn of(set: &Sequences, layout: &Layout) -> Self {
        let mut sums = Self {
            rows: set.len(),
            tokens: 0,
            targets: 0,
            longest: 0,
        };
        for s in set.iter(layout) {
            sums.tokens += s.slots.len() as u64;
            sums.targets += s.targets.len() as u64;
            sums.longest = sums.longest.max(s.slots.len());
        }
        sums
    }
}
