//! Distillation: the base reads a context in front of each row, and the adapter learns to predict the same without it
//! (Eyuboglu et al. 2025, Cartridges).

use super::TrainError;
use super::batch::{Expected, MAX_TOKENS, Packed, Sequence, Slot, Target, first_group};
use super::layout::Layout;
use super::pass::Passes;
use super::sequences::Sequences;
use crate::error::Result;
use crate::model::Model;
use std::sync::atomic::AtomicBool;

/// The base that reads a context.
pub(super) struct Teacher {
    model: Model,
    context: Vec<i32>,
    top_k: usize,
    /// Tokens in one graph, if the rows are not longer.
    limit: usize,
}

impl Teacher {
    /// For the sequences of `sets`.
    ///
    /// # Errors
    /// If the context cannot be tokenized, or does not fit into the model's context together with the longest row.
    pub(super) fn new(
        model: &Model,
        context: &str,
        top_k: usize,
        layout: &Layout,
        sets: [&Sequences; 2],
    ) -> Result<Self> {
        let context = model.vocab().tokenize_start(context)?;
        let teacher = Self {
            model: model.clone(),
            top_k: top_k.min(model.shape().n_vocab),
            // The context is computed once in each graph: the more rows share it, the better.
            limit: MAX_TOKENS.max(2 * context.len()),
            context,
        };
        let n_ctx = model.n_ctx_train();
        let too_long = |set: &Sequences| {
            let mut read = (0..set.len()).map(|i| teacher.read(layout, set, i));
            read.any(|s| s.slots.len() > n_ctx)
        };
        if sets.into_iter().any(too_long) {
            return Err(TrainError::Option {
                option: "context to distill",
                value: format!("{} tokens long", teacher.context.len()),
                why: "with the longest row it must fit into the model's context",
            }
            .into());
        }
        Ok(teacher)
    }

    /// Replaces the targets of some sequences that were not taught yet by what the base predicts there.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`], [`TrainError::OutOfMemory`]; nothing has changed then.
    pub(super) fn teach(
        &mut self,
        passes: &mut Passes,
        layout: &Layout,
        sets: [&mut Sequences; 2],
        cancel: &AtomicBool,
    ) -> Result<()> {
        let Some(set) = sets.into_iter().find(|set| set.n_taught() < set.len()) else {
            return Ok(());
        };
        let (read, packed) = loop {
            let rest = (set.n_taught()..set.len()).map(|i| self.read(layout, set, i));
            let read = first_group(&mut rest.peekable(), self.limit);
            let packed = Packed::new(&read);
            if read.len() == 1 || passes.can_predict(&packed, self.top_k) {
                break (read, packed);
            }
            self.limit /= 2;
        };
        let mut found = passes.predict(&packed, self.top_k, cancel)?.into_iter();
        for s in read {
            let targets = found.by_ref().take(s.targets.len());
            set.teach(targets.map(|t| Expected::Many(t.into())).collect());
        }
        Ok(())
    }

    /// What the base reads, and where it has to predict, for sequence `i` of the adapter.
    fn read(&self, layout: &Layout, set: &Sequences, i: usize) -> Sequence {
        let (s, example) = (set.get(layout, i), set.example(i));
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
