//! Examples become sequences: virtual tokens, text and targets in their places.

use super::batch::{Expected, Sequence, Slot, Target};
use super::data::{Example, Examples};
use super::{Objective, TrainError, TrainOptions};
use crate::adapter::{AdapterKind, Item, arrange};
use crate::error::Result;
use crate::model::Model;
use std::path::Path;

/// Stands for the tokens of an example where they are not known yet; no token has that id.
const GIVEN: i32 = -1;

/// What stands in front of what follows.
enum Part {
    Slot(Slot),
    /// The tokens that are given.
    Given,
}

/// How examples become sequences.
pub(super) struct Layout {
    /// What comes in front of what follows, for examples without and with `bos`; only for those that there are.
    frames: [Option<Vec<Part>>; 2],
    /// Everything is predicted, the prompt included.
    all: bool,
    max_len: usize,
}

impl Layout {
    /// For `sets` of examples and an adapter of `length` virtual tokens.
    ///
    /// # Errors
    /// If the template's text cannot be tokenized.
    pub(super) fn new(
        model: &Model,
        options: &TrainOptions,
        length: usize,
        sets: [&Examples; 2],
    ) -> Result<Self> {
        let prefix = options.method == AdapterKind::Prefix;
        let frame = |bos: bool| {
            let occurs = sets.iter().any(|set| set.any_begins(bos));
            occurs
                .then(|| frame(model, options, length, bos))
                .transpose()
        };
        let limit = options
            .max_len
            .unwrap_or(usize::MAX)
            .min(model.n_ctx_train());
        Ok(Self {
            frames: [frame(false)?, frame(true)?],
            all: matches!(options.loss, Objective::All),
            max_len: limit.saturating_sub(if prefix { length } else { 0 }),
        })
    }

    /// A set of which no row has anything to predict.
    pub(super) fn nothing_to_learn(&self, set: &'static str, examples: &Examples) -> TrainError {
        TrainError::NothingToLearn {
            set,
            file: examples.file().map(Path::to_path_buf),
            max_len: self.max_len,
        }
    }

    /// Longest sequence: the rest of a longer one is cut off.
    pub(super) fn max_len(&self) -> usize {
        self.max_len
    }

    /// What is computed for example `index` of a set, and what it shall predict; whole, however long it is.
    pub(super) fn whole(&self, index: usize, example: &Example) -> Sequence {
        let frame = self.frames[usize::from(example.bos)]
            .as_ref()
            .expect("made for all kinds of examples that occur");
        let mut slots = Vec::with_capacity(frame.len() + example.given.len() + example.then.len());
        for part in frame {
            match part {
                Part::Slot(slot) => slots.push(*slot),
                Part::Given => slots.extend(example.given.iter().map(|&id| Slot::Token(id))),
            }
        }
        let follows = slots.len();
        slots.extend(example.then.iter().map(|&(id, _)| Slot::Token(id)));
        let counts = |i: usize| self.all || i >= follows && example.then[i - follows].1;
        let target = |i: usize| match slots[i] {
            Slot::Token(id) if counts(i) => Some(Target {
                at: i - 1,
                tokens: Expected::One(id),
            }),
            _ => None,
        };
        Sequence {
            targets: (1..slots.len()).filter_map(target).collect(),
            slots,
            weight: example.weight,
            example: index,
            follows,
        }
    }

    /// As [`Layout::whole`], without what does not fit.
    pub(super) fn sequence(&self, index: usize, example: &Example) -> Sequence {
        let mut s = self.whole(index, example);
        s.slots.truncate(self.max_len);
        s.targets.retain(|t| t.at + 1 < self.max_len);
        s
    }
}

fn frame(model: &Model, options: &TrainOptions, length: usize, bos: bool) -> Result<Vec<Part>> {
    let in_front = match (options.method, &options.template) {
        (AdapterKind::Prompt | AdapterKind::PTuning, None) => length,
        _ => 0,
    };
    let mut parts: Vec<_> = (0..in_front)
        .map(|row| Part::Slot(Slot::Virtual(row)))
        .collect();
    for item in arrange(model.vocab(), options.template.as_ref(), &[GIVEN], bos)? {
        match item {
            Item::Tokens(ids) => parts.extend(ids.into_iter().map(|id| match id {
                GIVEN => Part::Given,
                id => Part::Slot(Slot::Token(id)),
            })),
            Item::Virtual(rows) => parts.extend(rows.map(|row| Part::Slot(Slot::Virtual(row)))),
        }
    }
    Ok(parts)
}
