//! Placeholder of the trainer's interface, so that the command line compiles; deleted when the trainer is there.
#![allow(missing_docs)]

use super::data::Example;
use crate::adapter::{Adapter, AdapterKind, Template};
use crate::error::Result;
use crate::model::Model;
use std::path::Path;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    #[error("cancelled")]
    Cancelled,
    #[error(
        "the loss of step {step} is not a finite number: lower the learning rate, or look at the data of that step"
    )]
    NonFiniteLoss { step: u64 },
    #[error("this build cannot train")]
    NotBuilt,
}

#[derive(Clone, Debug, Default)]
pub struct CancelToken;

impl CancelToken {
    pub fn cancel(&self) {}
    pub fn is_cancelled(&self) -> bool {
        false
    }
}

#[derive(Clone, Debug)]
pub enum Init {
    Random,
    Zeros,
    Vocab,
    Text(String),
    Adapter(Adapter),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reparam {
    None,
    Mlp,
    Lstm,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    Constant,
    Linear,
    Cosine,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptimizerKind {
    AdamW,
    Adafactor,
    Sgd,
}

#[derive(Clone, Debug)]
pub enum Objective {
    Completion,
    All,
    Distill { context: String, top_k: usize },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    Steps,
    EarlyStop,
}

#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TrainOptions {
    pub method: AdapterKind,
    pub length: Option<usize>,
    pub init: Option<Init>,
    pub reparam: Option<Reparam>,
    pub hidden: Option<usize>,
    pub template: Option<Template>,
    pub freeze_first: usize,
    pub loss: Objective,
    pub label_smoothing: f32,
    pub steps: Option<u64>,
    pub epochs: Option<f64>,
    pub batch: usize,
    pub accum: usize,
    pub max_len: Option<usize>,
    pub lr: Option<f32>,
    pub schedule: Schedule,
    pub warmup: Option<u64>,
    pub optimizer: OptimizerKind,
    pub weight_decay: f32,
    pub clip: f32,
    pub dropout: f32,
    pub eval_every: Option<u64>,
    pub patience: Option<usize>,
    pub seed: u64,
    pub threads: Option<usize>,
    pub memory: Option<u64>,
}

impl TrainOptions {
    pub fn new(method: AdapterKind) -> Self {
        Self {
            method,
            length: None,
            init: None,
            reparam: None,
            hidden: None,
            template: None,
            freeze_first: 0,
            loss: Objective::Completion,
            label_smoothing: 0.0,
            steps: None,
            epochs: None,
            batch: 8,
            accum: 1,
            max_len: None,
            lr: None,
            schedule: Schedule::Linear,
            warmup: None,
            optimizer: OptimizerKind::AdamW,
            weight_decay: 0.0,
            clip: 1.0,
            dropout: 0.0,
            eval_every: None,
            patience: None,
            seed: 0,
            threads: None,
            memory: None,
        }
    }
}

#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    pub step: u64,
    pub steps: u64,
    pub loss: f64,
    pub lr: f64,
    pub grad_norm: f64,
    pub tokens: u64,
    pub targets: u64,
    pub seconds: f64,
    pub valid_loss: Option<f64>,
    pub best: bool,
    pub epoch: f64,
}

#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Summary {
    pub steps: u64,
    pub best_step: Option<u64>,
    pub best_valid_loss: Option<f64>,
    pub first_loss: Option<f64>,
    pub last_loss: Option<f64>,
    pub tokens: u64,
    pub seconds: f64,
    pub trained_parameters: u64,
    pub adapter_numbers: u64,
    pub peak_bytes: Option<u64>,
}

pub struct Trainer(std::convert::Infallible);

impl Trainer {
    pub fn new(
        _model: &Model,
        _options: TrainOptions,
        _train: Vec<Example>,
        _valid: Vec<Example>,
    ) -> Result<Self> {
        Err(TrainError::NotBuilt.into())
    }
    pub fn resume(
        _model: &Model,
        _checkpoint: &Path,
        _train: Vec<Example>,
        _valid: Vec<Example>,
    ) -> Result<Self> {
        Err(TrainError::NotBuilt.into())
    }
    pub fn set_threads(&mut self, _threads: usize) {
        match self.0 {}
    }
    pub fn step(&mut self) -> Result<Option<Report>> {
        match self.0 {}
    }
    pub fn finished(&self) -> Option<Finish> {
        match self.0 {}
    }
    pub fn adapter(&self) -> Result<Adapter> {
        match self.0 {}
    }
    pub fn save_checkpoint(&self, _path: &Path) -> Result<()> {
        match self.0 {}
    }
    pub fn cancel_token(&self) -> CancelToken {
        match self.0 {}
    }
    pub fn summary(&self) -> Summary {
        match self.0 {}
    }
    pub fn options(&self) -> &TrainOptions {
        match self.0 {}
    }
}
