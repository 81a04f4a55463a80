//! Examples become sequences: virtual tokens, text and targets in their places.

use super::batch::{Expected, Sequence, Slot, Target};
use super::data::Example;
use super::{Objective, TrainError, TrainOptions, Trimmed};
use crate::adapter::{AdapterKind, Item, arrange};
use crate::error::Result;
use crate::model::Model;

/// How examples become sequences.
pub(super) struct Layout<'a> {
    model: &'a Model,
    options: &'a TrainOptions,
    length: usize,
    max_len: usize,
}

impl<'a> Layout<'a> {
    pub(super) fn new(model: &'a Model, options: &'a TrainOptions, length: usize) -> Self {
        let prefix = if options.method == AdapterKind::Prefix {
            length
        } else {
            0
        };
        let limit = options
            .max_len
            .unwrap_or(usize::MAX)
            .min(model.n_ctx_train());
        Self {
            model,
            options,
            length,
            max_len: limit.saturating_sub(prefix),
        }
    }

    /// All examples, and which of them were too long.
    pub(super) fn sequences(
        &self,
        examples: &[Example],
        set: &'static str,
    ) -> Result<(Vec<Sequence>, Trimmed)> {
        let n_vocab = self.model.shape().n_vocab;
        let mut trimmed = Trimmed::default();
        let mut out = Vec::with_capacity(examples.len());
        for (row, example) in examples.iter().enumerate() {
            let unknown = |&id: &i32| id < 0 || id as usize >= n_vocab;
            if let Some(token) = example.ids().find(unknown) {
                let row = row + 1;
                return Err(TrainError::Token {
                    set,
                    row,
                    token,
                    n_vocab,
                }
                .into());
            }
            let mut s = self.sequence(row, example)?;
            if s.slots.len() > self.max_len {
                trimmed.cut.push(row);
                s.slots.truncate(self.max_len);
                s.targets.retain(|t| t.at + 1 < self.max_len);
                if s.targets.is_empty() {
                    trimmed.lost.push(row);
                }
            }
            out.push(s);
        }
        // Rows that have nothing to learn any more only cost time.
        out.retain(|s| !s.targets.is_empty());
        if out.is_empty() && !examples.is_empty() {
            return Err(self.nothing_to_learn(set).into());
        }
        if !out.is_empty() && out.iter().all(|s| s.weight == 0.0) {
            return Err(TrainError::NoWeight { set }.into());
        }
        Ok((out, trimmed))
    }

    pub(super) fn nothing_to_learn(&self, set: &'static str) -> TrainError {
        let max_len = self.max_len;
        TrainError::NothingToLearn { set, max_len }
    }

    /// What is computed for an example, and what it shall predict.
    fn sequence(&self, row: usize, example: &Example) -> Result<Sequence> {
        let o = self.options;
        let mut slots = Vec::new();
        if o.method != AdapterKind::Prefix && o.template.is_none() {
            slots.extend((0..self.length).map(Slot::Virtual));
        }
        let vocab = self.model.vocab();
        for item in arrange(vocab, o.template.as_ref(), &example.given, example.bos)? {
            match item {
                Item::Tokens(ids) => slots.extend(ids.into_iter().map(Slot::Token)),
                Item::Virtual(rows) => slots.extend(rows.map(Slot::Virtual)),
            }
        }
        let follows = slots.len();
        slots.extend(example.then.iter().map(|&(id, _)| Slot::Token(id)));
        let counts = |i: usize| match o.loss {
            Objective::All => true,
            Objective::Completion | Objective::Distill { .. } => {
                i >= follows && example.then[i - follows].1
            }
        };
        let target = |i: usize| match slots[i] {
            Slot::Token(id) if counts(i) => Some(Target {
                at: i - 1,
                tokens: Expected::One(id),
            }),
            _ => None,
        };
        Ok(Sequence {
            targets: (1..slots.len()).filter_map(target).collect(),
            slots,
            weight: example.weight,
            example: row,
            follows,
        })
    }
}
