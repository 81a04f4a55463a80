//! One forward and backward pass through the frozen base: the layers ([`forward`]), the loss over a few rows of logits at
//! a time ([`loss`]), the way back ([`backward`]), and what is computed twice to save memory ([`recompute`]); or forward passes only ([`blind`]), where the base has no
//! way back.

mod backward;
mod base;
mod blind;
mod cache;
mod forward;
mod io;
mod loss;
mod recompute;
mod taped;

use super::TrainOptions;
use super::batch::Packed;
use super::variables::Variables;
use crate::error::Result;
use crate::ggml::{ThreadPool, default_threads};
use crate::model::Model;
use blind::Blind;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use taped::Taped;

/// What a pass is for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// The loss of each target.
    Losses,
    /// Losses, and the gradient of their weighted sum.
    Gradients,
    /// The most probable tokens at each target.
    Predictions(usize),
}

/// What a pass found.
pub(crate) struct Outcome {
    /// Cross-entropy of each target, in the order of the batch's targets.
    pub(crate) losses: Vec<f32>,
    /// Gradients of the weighted sum of the losses, in the shape of the variables; `None` if not asked for.
    pub(crate) gradients: Option<Variables>,
    /// For each target the most probable tokens with their probabilities, most probable first; empty if not asked for.
    pub(crate) predictions: Vec<Vec<(i32, f32)>>,
    /// Layers whose activations were computed twice.
    pub(crate) recomputed: usize,
}

/// The model's threads, which sessions use as well, or some of the trainer's own.
fn pool(model: &Model, n: usize, background: bool) -> Arc<ThreadPool> {
    match background {
        true => Arc::new(ThreadPool::new(n)),
        false => model.pool(n),
    }
}

/// Who runs passes over the base.
pub(crate) enum Passes {
    /// Our own decoder, with a tape.
    Taped(Box<Taped>),
    /// libllama's, which has none.
    Blind(Box<Blind>),
}

impl Passes {
    /// As the options say.
    ///
    /// # Errors
    /// [`ModelError::NoBackward`](crate::model::ModelError::NoBackward) if they ask for backpropagation, and libllama computes the model.
    pub(crate) fn new(model: &Model, options: &TrainOptions) -> Result<Self> {
        let n_threads = options.threads.unwrap_or_else(default_threads);
        if let Some(mezo) = options.mezo {
            let blind = Blind::new(model, mezo, options.seed, n_threads)?;
            return Ok(Self::Blind(Box::new(blind)));
        }
        let memory = options.memory.unwrap_or(TrainOptions::DEFAULT_MEMORY);
        let taped = Taped::new(
            model,
            pool(model, n_threads, options.background),
            usize::try_from(memory).unwrap_or(usize::MAX),
            options.n_ctx.unwrap_or(model.n_ctx_train()),
        )?;
        Ok(Self::Taped(Box::new(taped)))
    }

    /// Computes with so many threads from now on.
    pub(crate) fn set_threads(&mut self, model: &Model, n: usize, background: bool) {
        match self {
            Self::Taped(taped) => taped.set_pool(pool(model, n, background)),
            Self::Blind(blind) => blind.set_threads(n),
        }
    }

    /// What follows belongs to this step of the run.
    pub(crate) fn begin_step(&mut self, step: u64) {
        if let Self::Blind(blind) = self {
            blind.begin_step(step);
        }
    }

    /// Computes the losses of `batch` and, if asked for, the gradient of `sum(scale * weight * loss)`, or an estimate of it.
    pub(crate) fn run(
        &mut self,
        batch: &Packed,
        variables: &Variables,
        scale: f64,
        smoothing: f32,
        goal: Goal,
        cancel: Option<&AtomicBool>,
    ) -> Result<Outcome> {
        match self {
            Self::Taped(taped) => taped.run(batch, variables, scale, smoothing, goal, cancel),
            Self::Blind(blind) => blind.run(batch, variables, scale, smoothing, goal, cancel),
        }
    }

    /// Bytes that [`Passes::run`] computes gradients in.
    pub(crate) fn gradient_memory(
        &self,
        batch: &Packed,
        variables: &Variables,
        smoothing: f32,
    ) -> usize {
        match self {
            Self::Taped(taped) => taped.gradient_memory(batch, variables, smoothing),
            Self::Blind(blind) => blind.memory(batch, variables),
        }
    }

    /// Embeddings of tokens as virtual tokens: `ne = [D, n]`.
    pub(crate) fn embeddings(&mut self, ids: &[i32]) -> Result<Vec<f32>> {
        match self {
            Self::Taped(taped) => taped.embeddings(ids),
            Self::Blind(blind) => blind.embeddings(ids),
        }
    }

    /// Keys and values that the base computes for a text, for each layer keys, then values `ne = [Hk d, n]`.
    pub(crate) fn keys_values(&mut self, ids: &[i32]) -> Result<Vec<[Vec<f32>; 2]>> {
        match self {
            Self::Taped(taped) => taped.keys_values(ids),
            Self::Blind(blind) => blind.keys_values(ids),
        }
    }

    /// Whether [`Passes::predict`] stays within the budget.
    ///
    /// # Panics
    /// As [`Passes::predict`].
    pub(crate) fn can_predict(&self, batch: &Packed, k: usize) -> bool {
        match self {
            Self::Taped(taped) => taped.can_predict(batch, k),
            Self::Blind(_) => panic!("options that distil by forward passes are refused"),
        }
    }

    /// The `k <= V` most probable tokens at each target of `batch`, with probabilities that sum to 1: what the base alone says.
    ///
    /// # Panics
    /// Without a tape: who learns what the base predicts has one.
    pub(crate) fn predict(
        &mut self,
        batch: &Packed,
        k: usize,
        cancel: &AtomicBool,
    ) -> Result<Vec<Vec<(i32, f32)>>> {
        match self {
            Self::Taped(taped) => taped.predict(batch, k, cancel),
            Self::Blind(_) => panic!("options that distil by forward passes are refused"),
        }
    }
}

#[cfg(test)]
mod tests;
