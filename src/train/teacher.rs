//! Distillation: the base reads a context in front of each row, and the adapter learns to predict the same without it
//! (Eyuboglu et al. 2025, Cartridges).

use super::TrainError;
use super::batch::{Expected, MAX_TOKENS, Packed, Sequence, Slot, Target, first_group};
use super::data::Example;
use super::pass::Passes;
use crate::error::Result;
use crate::model::Model;
use std::ops::Range;
use std::sync::atomic::AtomicBool;

/// The base that reads a context, with the rows that wait for its predictions.
pub(super) struct Teacher {
    model: Model,
    context: Vec<i32>,
    top_k: usize,
    /// What the sequences of each set were made from.
    examples: [Vec<Example>; 2],
    /// Sequences of each set that have no targets of it yet.
    waiting: [Range<usize>; 2],
    /// Tokens in one graph, if the rows are not longer.
    limit: usize,
}

impl Teacher {
    /// Of the sets `sequences`, which were made from `examples`.
    ///
    /// # Errors
    /// If the context cannot be tokenized, or does not fit into the model's context together with the longest row.
    pub(super) fn new(
        model: &Model,
        context: &str,
        top_k: usize,
        examples: [Vec<Example>; 2],
        sequences: [&[Sequence]; 2],
    ) -> Result<Self> {
        let context = model.vocab().tokenize_start(context)?;
        let teacher = Self {
            model: model.clone(),
            top_k: top_k.min(model.shape().n_vocab),
            examples,
            waiting: sequences.map(|s| 0..s.len()),
            // The context is computed once in each graph: the more rows share it, the better.
            limit: MAX_TOKENS.max(2 * context.len()),
            context,
        };
        let n_ctx = model.n_ctx_train();
        let too_long = |(set, s): (usize, &Sequence)| teacher.read(set, s).slots.len() > n_ctx;
        let mut all = (0..2).flat_map(|set| sequences[set].iter().map(move |s| (set, s)));
        if all.any(too_long) {
            return Err(TrainError::Option {
                option: "context to distill",
                value: format!("{} tokens long", teacher.context.len()),
                why: "with the longest row it must fit into the model's context",
            }
            .into());
        }
        Ok(teacher)
    }

    /// Sequences that wait.
    pub(super) fn left(&self) -> usize {
        self.waiting.iter().map(ExactSizeIterator::len).sum()
    }

    /// Replaces the targets of some of `sequences` that wait by what the base predicts there.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`], [`TrainError::OutOfMemory`]; nothing has changed then.
    pub(super) fn teach(
        &mut self,
        passes: &mut Passes,
        sequences: [&mut [Sequence]; 2],
        cancel: &AtomicBool,
    ) -> Result<()> {
        let Some(set) = (0..2).find(|&set| !self.waiting[set].is_empty()) else {
            return Ok(());
        };
        let rest = &mut sequences[set][self.waiting[set].clone()];
        let (n, packed) = loop {
            let read = first_group(rest.iter().map(|s| self.read(set, s)), self.limit);
            let packed = Packed::new(&read.iter().collect::<Vec<_>>());
            if read.len() == 1 || passes.can_predict(&packed, self.top_k) {
                break (read.len(), packed);
            }
            self.limit /= 2;
        };
        let mut found = passes.predict(&packed, self.top_k, cancel)?.into_iter();
        for target in rest[..n].iter_mut().flat_map(|s| &mut s.targets) {
            let tokens = found.next().expect("one prediction per target");
            target.tokens = Expected::Many(tokens.into());
        }
        self.waiting[set].start += n;
        Ok(())
    }

    /// What the base reads, and where it has to predict, for a sequence of the adapter.
    fn read(&self, set: usize, s: &Sequence) -> Sequence {
        let example = &self.examples[set][s.example];
        let bos = self.model.vocab().leading_bos_if(example.bos);
        let given = bos.iter().chain(&self.context).chain(&example.given);
        let mut slots: Vec<_> = given.map(|&id| Slot::Token(id)).collect();
        let follows = slots.len();
        slots.extend(example.then.iter().map(|&(id, _)| Slot::Token(id)));
        // The first token of a text without BOS has nothing in front of it for the teacher either.
        let target = |t: &Target| Target {
            at: (t.at + follows).saturating_sub(s.follows),
            tokens: t.tokens.clone(),
        };
        let targets: Vec<_> = s.targets.iter().map(target).collect();
        // A row that is cut for the adapter is cut for the teacher.
        slots.truncate(targets.last().map_or(0, |t| t.at + 1));
        Sequence {
            slots,
            targets,
            weight: 1.0,
            example: s.example,
            follows,
        }
    }
}
