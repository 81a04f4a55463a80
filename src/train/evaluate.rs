//! Losses without gradients.

use super::batch::{MAX_TOKENS, Packed, Sequence, groups};
use super::pass::{Goal, Passes, Variables};
use crate::error::Result;
use std::sync::atomic::AtomicBool;

/// Mean cross-entropy of `sequences`, in nats and without label smoothing.
///
/// # Errors
/// [`TrainError::Cancelled`](super::TrainError::Cancelled), [`TrainError::OutOfMemory`](super::TrainError::OutOfMemory).
pub(super) fn mean_loss(
    passes: &mut Passes,
    sequences: &[&Sequence],
    variables: &Variables,
    cancel: &AtomicBool,
) -> Result<f64> {
    let (mut sum, mut mass) = (0.0, 0.0);
    for group in groups(sequences, MAX_TOKENS) {
        let packed = Packed::new(&group);
        let outcome = passes.run(&packed, variables, 1.0, 0.0, Goal::Losses, Some(cancel))?;
        for (&l, &w) in outcome.losses.iter().zip(&packed.weights) {
            sum += f64::from(l) * f64::from(w);
            mass += f64::from(w);
        }
    }
    Ok(sum / mass)
}
