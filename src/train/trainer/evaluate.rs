//! Losses without gradients.

use super::{Best, Trainer};
use crate::error::Result;
use crate::train::batch::{MAX_TOKENS, Packed, Sequence, groups};
use crate::train::pass::{Goal, Passes};
use crate::train::report::Report;
use crate::train::rng::{Rng, Stream};
use crate::train::variables::Variables;
use std::sync::atomic::AtomicBool;

impl Trainer {
    /// Mean cross-entropy of the training objective over the validation set, in nats, under the current rows, without label
    /// smoothing: comparable between runs that smooth and runs that do not.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`](crate::train::TrainError::Cancelled), [`TrainError::OutOfMemory`](crate::train::TrainError::OutOfMemory).
    pub fn valid_loss(&mut self) -> Result<Option<f64>> {
        if self.valid.is_empty() {
            return Ok(None);
        }
        self.finish_teaching()?;
        let rows = self.state.encoder.forward();
        let variables = self.variables(&rows)?;
        let valid = self.valid.iter(&self.layout);
        mean_loss(&mut self.passes, valid, &variables, self.cancel.flag())
    }

    /// As [`Trainer::valid_loss`], of the base without any adapter: what an adapter must be better than to be of use. Computed
    /// once in a run.
    ///
    /// # Errors
    /// As [`Trainer::valid_loss`].
    pub fn base_valid_loss(&mut self) -> Result<Option<f64>> {
        if self.valid.is_empty() || self.state.base_loss.is_some() {
            return Ok(self.state.base_loss);
        }
        self.finish_teaching()?;
        let valid = self.valid.iter(&self.layout);
        self.state.base_loss = mean_loss(
            &mut self.passes,
            valid.filter_map(|s| s.without_virtual()),
            &Variables::None,
            self.cancel.flag(),
        )?;
        Ok(self.state.base_loss)
    }

    /// The loss of the first step, which is that of the start, and the loss that [`Trainer::valid_loss`] would find on the same
    /// rows now: what a run without validation rows can be judged by after any number of steps, as two steps have different
    /// rows. `None` before the first step.
    ///
    /// # Errors
    /// As [`Trainer::valid_loss`].
    pub fn first_rows_losses(&mut self) -> Result<Option<(f64, f64)>> {
        let Some(first) = self.state.first_loss else {
            return Ok(None);
        };
        self.finish_teaching()?;
        let rows = self.state.encoder.forward();
        let variables = self.variables(&rows)?;
        let mut order: Vec<u32> = (0..self.train.len() as u32).collect();
        Rng::new(self.options.seed, Stream::Shuffle).shuffle(&mut order);
        let drawn = order.iter().take(self.rows_per_step());
        let sequences = drawn.map(|&i| self.train.get(&self.layout, i as usize));
        let now = mean_loss(&mut self.passes, sequences, &variables, self.cancel.flag())?;
        Ok(now.map(|now| (first, now)))
    }

    /// Completes the report of the step that was taken last.
    pub(super) fn evaluate(&mut self) -> Result<Report> {
        let loss = self.valid_loss()?.expect("there is a validation set");
        let state = &mut self.state;
        let mut report = state
            .unevaluated
            .take()
            .expect("a step awaits its evaluation");
        report.valid_loss = Some(loss);
        if loss.is_finite() && state.best.as_ref().is_none_or(|best| loss < best.loss) {
            report.best = true;
            state.stale = 0;
            state.best = Some(Best {
                step: state.step,
                loss,
                rows: state.encoder.forward(),
            });
        } else {
            state.stale += 1;
        }
        Ok(report)
    }
}

/// Mean cross-entropy of `sequences`, in nats and without label smoothing; `None` if there are none.
///
/// # Errors
/// [`TrainError::Cancelled`](crate::train::TrainError::Cancelled), [`TrainError::OutOfMemory`](crate::train::TrainError::OutOfMemory).
fn mean_loss(
    passes: &mut Passes,
    sequences: impl Iterator<Item = Sequence>,
    variables: &Variables,
    cancel: &AtomicBool,
) -> Result<Option<f64>> {
    let (mut sum, mut mass) = (0.0, 0.0);
    let mut there = false;
    for group in groups(sequences, MAX_TOKENS) {
        there = true;
        let packed = Packed::new(&group);
        let outcome = passes.run(&packed, variables, 1.0, 0.0, Goal::Losses, Some(cancel))?;
        for (&l, &w) in outcome.losses.iter().zip(&packed.weights) {
            sum += f64::from(l) * f64::from(w);
            mass += f64::from(w);
        }
    }
    Ok(there.then(|| sum / mass))
}
