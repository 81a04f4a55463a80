//! What a checkpoint says besides its tensors.

use super::{VERSION, hash, weights};
use crate::train::TrainOptions;
use crate::train::encoder::EncoderKind;
use crate::train::report::Report;
use crate::train::rng::RngState;
use crate::train::trainer::Trainer;
use serde::{Deserialize, Serialize};

/// Floating-point numbers by their bits: JSON would round some.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Bits(u64);

impl From<f64> for Bits {
    fn from(x: f64) -> Self {
        Self(x.to_bits())
    }
}

impl From<Bits> for f64 {
    fn from(x: Bits) -> Self {
        Self::from_bits(x.0)
    }
}

#[derive(Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) version: u32,
    /// Hexadecimal.
    pub(super) base: String,
    /// Of the base's weights as they are in its file, see [`weights`].
    pub(super) weights: String,
    /// Of training and validation set.
    pub(super) data: [String; 2],
    /// With what the defaults stood for: they may be others in a later version.
    pub(super) options: TrainOptions,
    pub(super) encoder: EncoderKind,
    pub(super) step: u64,
    pub(super) optimizer_steps: u64,
    pub(super) shuffle: RngState,
    pub(super) dropout: RngState,
    pub(super) used: usize,
    pub(super) best: Option<(u64, Bits)>,
    pub(super) stale: u64,
    pub(super) first_loss: Option<Bits>,
    pub(super) last_loss: Option<Bits>,
    pub(super) tokens: u64,
    pub(super) seconds: Bits,
    pub(super) broken: bool,
    pub(super) unevaluated: Option<SavedReport>,
    pub(super) base_loss: Option<Bits>,
}

/// A report that has no validation loss yet.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(super) struct SavedReport {
    pub(super) step: u64,
    pub(super) steps: u64,
    pub(super) loss: Bits,
    pub(super) lr: Bits,
    pub(super) grad_norm: Bits,
    pub(super) tokens: u64,
    pub(super) targets: u64,
    pub(super) seconds: Bits,
    pub(super) epoch: Bits,
}

impl From<Report> for SavedReport {
    fn from(r: Report) -> Self {
        Self {
            step: r.step,
            steps: r.steps,
            loss: r.loss.into(),
            lr: r.lr.into(),
            grad_norm: r.grad_norm.into(),
            tokens: r.tokens,
            targets: r.targets,
            seconds: r.seconds.into(),
            epoch: r.epoch.into(),
        }
    }
}

impl From<SavedReport> for Report {
    fn from(r: SavedReport) -> Self {
        Self {
            step: r.step,
            steps: r.steps,
            loss: r.loss.into(),
            lr: r.lr.into(),
            grad_norm: r.grad_norm.into(),
            tokens: r.tokens,
            targets: r.targets,
            seconds: r.seconds.into(),
            valid_loss: None,
            best: false,
            epoch: r.epoch.into(),
        }
    }
}

impl Trainer {
    pub(super) fn saved(&self) -> Saved {
        let state = &self.state;
        Saved {
            version: VERSION,
            base: self.model.fingerprint().to_string(),
            weights: weights(&self.model),
            data: [hash(&self.train), hash(&self.valid)],
            options: self.resolved_options(),
            encoder: state.encoder.kind(),
            step: state.step,
            optimizer_steps: state.optimizer.steps(),
            shuffle: state.shuffle.state(),
            dropout: state.dropout.state(),
            used: state.used,
            best: state.best.as_ref().map(|b| (b.step, b.loss.into())),
            stale: state.stale,
            first_loss: state.first_loss.map(Into::into),
            last_loss: state.last_loss.map(Into::into),
            tokens: state.tokens,
            seconds: state.seconds.into(),
            broken: state.broken,
            unevaluated: state.unevaluated.map(Into::into),
            base_loss: state.base_loss.map(Into::into),
        }
    }

    /// The options of the run, each of them a value and not a default.
    fn resolved_options(&self) -> TrainOptions {
        TrainOptions {
            length: Some(self.length),
            reparam: Some(self.options.effective_reparam()),
            steps: Some(self.steps),
            epochs: None,
            lr: Some(self.lr),
            warmup: Some(self.warmup),
            weight_decay: Some(self.state.optimizer.options().weight_decay),
            eval_every: Some(self.eval_every),
            ..self.options.clone()
        }
    }
}
