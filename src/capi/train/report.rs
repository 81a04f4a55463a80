//! What a step has done.

use ggraft::train::{Finish, Report, Trainer};

/// Whether a run goes on.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_train_state {
    /// There are steps left.
    GGRAFT_TRAIN_RUNNING = 0,
    /// All steps were taken.
    GGRAFT_TRAIN_STEPS = 1,
    /// The validation loss has not improved for `patience` evaluations.
    GGRAFT_TRAIN_EARLY_STOP = 2,
    /// A step ended with GGRAFT_ERROR_NON_FINITE: there is nothing to go on with. The adapter is the best one or, without
    /// evaluations, the last one with a finite loss.
    GGRAFT_TRAIN_FAILED = 3,
}

/// What a step did, and how the run stands.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_train_report {
    /// Steps taken so far.
    pub step: u64,
    /// Steps of the run; 0 before the first step if the params left them open.
    pub steps: u64,
    /// Tokens computed in the step, virtual ones included.
    pub tokens: u64,
    /// Tokens predicted in the step.
    pub targets: u64,
    /// Mean cross-entropy of those before the step, in nats. NaN before the first step, as the next three.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Norm of the step's gradient before clipping.
    pub grad_norm: f64,
    /// Duration of the step without the evaluation.
    pub seconds: f64,
    /// Mean cross-entropy of the validation set after the step; NaN if it was not evaluated.
    pub valid_loss: f64,
    /// Passes over the training set so far.
    pub epoch: f64,
    /// 1 if `valid_loss` is the lowest so far: `ggraft_trainer_adapter` returns the adapter of this step.
    pub best: i32,
    /// A `ggraft_train_state`.
    pub state: i32,
}

impl ggraft_train_report {
    /// Before the first step of a handle.
    pub(super) fn start(trainer: &Trainer) -> Self {
        Self {
            step: trainer.summary().steps,
            steps: trainer.steps(),
            tokens: 0,
            targets: 0,
            loss: f64::NAN,
            lr: f64::NAN,
            grad_norm: f64::NAN,
            seconds: f64::NAN,
            valid_loss: f64::NAN,
            epoch: 0.0,
            best: 0,
            state: state(trainer.finished()) as i32,
        }
    }

    pub(super) fn new(report: &Report, finished: Option<Finish>) -> Self {
        Self {
            step: report.step,
            steps: report.steps,
            tokens: report.tokens,
            targets: report.targets,
            loss: report.loss,
            lr: report.lr,
            grad_norm: report.grad_norm,
            seconds: report.seconds,
            valid_loss: report.valid_loss.unwrap_or(f64::NAN),
            epoch: report.epoch,
            best: report.best.into(),
            state: state(finished) as i32,
        }
    }
}

pub(super) fn state(finished: Option<Finish>) -> ggraft_train_state {
    match finished {
        None => ggraft_train_state::GGRAFT_TRAIN_RUNNING,
        Some(Finish::Steps) => ggraft_train_state::GGRAFT_TRAIN_STEPS,
        Some(Finish::EarlyStop) => ggraft_train_state::GGRAFT_TRAIN_EARLY_STOP,
        Some(Finish::Failed) => ggraft_train_state::GGRAFT_TRAIN_FAILED,
    }
}
