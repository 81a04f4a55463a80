//! What a checkpoint says besides its tensors.

use super::VERSION;
use crate::train::TrainOptions;
use crate::train::encoder::EncoderKind;
use crate::train::report::Report;
use crate::train::rng::RngState;
use crate::train::trainer::Trainer;
use serde::{Deserialize, Serialize};

/// Numbers come back as they were, bit for bit: a finite one has a decimal form of its own, and JSON is read exactly (see `serde_json` in
/// Cargo.toml). A loss that is none becomes null.
#[derive(Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) version: u32,
    /// Hexadecimal.
    pub(super) base: String,
    /// Of the base's weights as they are in its file.
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
    pub(super) best: Option<(u64, f64)>,
    pub(super) stale: u64,
    pub(super) first_loss: Option<f64>,
    pub(super) last_loss: Option<f64>,
    pub(super) tokens: u64,
    pub(super) seconds: f64,
    pub(super) broken: bool,
    pub(super) unevaluated: Option<Report>,
    pub(super) base_loss: Option<f64>,
}

impl Trainer {
    pub(super) fn saved(&self) -> Saved {
        let state = &self.state;
        Saved {
            version: VERSION,
            base: self.model.fingerprint().to_string(),
            weights: self.identity().weights.clone(),
            data: self.identity().data.clone(),
            options: self.resolved_options(),
            encoder: state.encoder.kind(),
            step: state.step,
            optimizer_steps: state.optimizer.steps(),
            shuffle: state.shuffle.state(),
            dropout: state.dropout.state(),
            used: state.used,
            best: state.best.as_ref().map(|b| (b.step, b.loss)),
            stale: state.stale,
            first_loss: state.first_loss,
            last_loss: state.last_loss,
            tokens: state.tokens,
            seconds: state.seconds,
            broken: state.broken,
            unevaluated: state.unevaluated,
            base_loss: state.base_loss,
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
