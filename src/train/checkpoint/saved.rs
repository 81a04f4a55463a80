//! What a checkpoint says besides its tensors.

use super::{VERSION, hash, weights};
use crate::adapter::{AdapterKind, Template};
use crate::train::encoder::EncoderKind;
use crate::train::report::Report;
use crate::train::rng::RngState;
use crate::train::trainer::Trainer;
use crate::train::{Init, Objective, OptimizerKind, Reparam, Schedule, TrainOptions};
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

/// Options without what only matters before the first step.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct SavedOptions {
    pub(super) method: String,
    pub(super) length: usize,
    pub(super) reparam: Reparam,
    pub(super) hidden: Option<usize>,
    pub(super) lstm_layers: usize,
    pub(super) template: Option<String>,
    pub(super) freeze_first: usize,
    pub(super) loss: SavedObjective,
    pub(super) label_smoothing: Bits,
    pub(super) steps: u64,
    pub(super) batch: usize,
    pub(super) accum: usize,
    pub(super) max_len: Option<usize>,
    pub(super) lr: Bits,
    pub(super) schedule: Schedule,
    pub(super) warmup: u64,
    pub(super) optimizer: OptimizerKind,
    pub(super) betas: [Bits; 2],
    pub(super) weight_decay: Bits,
    pub(super) clip: Bits,
    pub(super) dropout: Bits,
    pub(super) eval_every: u64,
    pub(super) patience: Option<usize>,
    pub(super) seed: u64,
    pub(super) threads: Option<usize>,
    pub(super) memory: Option<u64>,
    pub(super) n_ctx: Option<usize>,
    pub(super) name: Option<String>,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum SavedObjective {
    Completion,
    All,
    Distill { context: String, top_k: usize },
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
    pub(super) options: SavedOptions,
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
        let (state, o) = (&self.state, &self.options);
        Saved {
            version: VERSION,
            base: self.model.fingerprint().to_string(),
            weights: weights(&self.model),
            data: [hash(&self.train), hash(&self.valid)],
            options: SavedOptions {
                method: o.method.name().to_owned(),
                length: self.length,
                reparam: o.effective_reparam(),
                hidden: o.hidden,
                lstm_layers: o.lstm_layers,
                template: o.template.as_ref().map(ToString::to_string),
                freeze_first: o.freeze_first,
                loss: match &o.loss {
                    Objective::Completion => SavedObjective::Completion,
                    Objective::All => SavedObjective::All,
                    Objective::Distill { context, top_k } => SavedObjective::Distill {
                        context: context.clone(),
                        top_k: *top_k,
                    },
                },
                label_smoothing: f64::from(o.label_smoothing).into(),
                steps: self.steps,
                batch: o.batch,
                accum: o.accum,
                max_len: o.max_len,
                lr: self.lr.into(),
                schedule: o.schedule,
                warmup: self.warmup,
                optimizer: o.optimizer,
                betas: [o.betas.0.into(), o.betas.1.into()],
                weight_decay: state.optimizer.options().weight_decay.into(),
                clip: o.clip.into(),
                dropout: f64::from(o.dropout).into(),
                eval_every: self.eval_every,
                patience: o.patience,
                seed: o.seed,
                threads: o.threads,
                memory: o.memory,
                n_ctx: o.n_ctx,
                name: o.name.clone(),
            },
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
}

impl SavedOptions {
    pub(super) fn restore(self) -> Result<TrainOptions, String> {
        let method = AdapterKind::from_name(&self.method)
            .ok_or_else(|| format!("unknown method '{}'", self.method))?;
        let template = self.template.map(|t| Template::parse(&t)).transpose();
        let mut o = TrainOptions::new(method);
        o.length = Some(self.length);
        // The rows come from the file.
        o.init = Some(Init::Random);
        o.reparam = Some(self.reparam);
        o.hidden = self.hidden;
        o.lstm_layers = self.lstm_layers;
        o.template = template.map_err(|e| e.to_string())?;
        o.freeze_first = self.freeze_first;
        o.loss = match self.loss {
            SavedObjective::Completion => Objective::Completion,
            SavedObjective::All => Objective::All,
            SavedObjective::Distill { context, top_k } => Objective::Distill { context, top_k },
        };
        o.label_smoothing = f64::from(self.label_smoothing) as f32;
        o.steps = Some(self.steps);
        o.batch = self.batch;
        o.accum = self.accum;
        o.max_len = self.max_len;
        o.lr = Some(self.lr.into());
        o.schedule = self.schedule;
        o.warmup = Some(self.warmup);
        o.optimizer = self.optimizer;
        o.betas = (self.betas[0].into(), self.betas[1].into());
        o.weight_decay = Some(self.weight_decay.into());
        o.clip = self.clip.into();
        o.dropout = f64::from(self.dropout) as f32;
        o.eval_every = Some(self.eval_every);
        o.patience = self.patience;
        o.seed = self.seed;
        o.threads = self.threads;
        o.memory = self.memory;
        o.n_ctx = self.n_ctx;
        o.name = self.name;
        Ok(o)
    }
}
