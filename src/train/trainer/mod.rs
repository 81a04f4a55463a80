//! The training loop: what a run is prepared from ([`prepare`]), gradients ([`gradient`]), losses of what is not learned
//! ([`evaluate`]) and the adapters that come out ([`result`]).

mod evaluate;
mod gradient;
mod prepare;
mod result;

use super::check::{MAX_THREADS, check_range};
use super::checkpoint::Identity;
use super::data::Examples;
use super::encoder::Encoder;
use super::layout::Layout;
use super::optimizer::{Optimizer, clip_grad_norm};
use super::param::Param;
use super::pass::Passes;
use super::report::{Finish, Report, Summary};
use super::rng::Rng;
use super::sequences::Sequences;
use super::teacher::Teacher;
use super::{StateError, TrainError, TrainOptions, Trimmed};
use crate::error::Result;
use crate::ggml::CancelToken;
use crate::model::Model;
use gradient::Sums;
use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::time::Instant;

/// Rows that are kept because of their validation loss.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Best {
    pub(super) step: u64,
    pub(super) loss: f64,
    pub(super) rows: Vec<f32>,
}

/// What changes from step to step; a checkpoint holds all of it.
pub(super) struct State {
    pub(super) step: u64,
    pub(super) encoder: Encoder,
    pub(super) optimizer: Optimizer,
    pub(super) shuffle: Rng,
    pub(super) dropout: Rng,
    /// Order of the training rows in this pass over the data, and how many of them were used.
    pub(super) order: Vec<u32>,
    pub(super) used: usize,
    /// Rows of the step that comes next, if they were drawn but not used: a step was cancelled.
    pub(super) drawn: Vec<u32>,
    pub(super) best: Option<Best>,
    /// Evaluations since then.
    pub(super) stale: u64,
    /// The rows that the last loss was computed with, before dropout.
    pub(super) good: Vec<f32>,
    pub(super) first_loss: Option<f64>,
    pub(super) last_loss: Option<f64>,
    pub(super) tokens: u64,
    pub(super) seconds: f64,
    /// A step went wrong: the parameters are of no use.
    pub(super) broken: bool,
    /// The last step, if its evaluation was cancelled.
    pub(super) unevaluated: Option<Report>,
    /// Validation loss of the base alone, once it was asked for.
    pub(super) base_loss: Option<f64>,
}

/// Trains one adapter on one frozen base.
///
/// ```
/// use ggraft::adapter::AdapterKind;
/// use ggraft::train::data::Dataset;
/// use ggraft::train::{TrainOptions, Trainer};
/// use ggraft::{Model, ModelOptions};
///
/// let model = Model::open("models/tinylm-q8_0.gguf", &ModelOptions::default())?;
/// let rows = br#"{"prompt": "A cat sat by the door.\n", "completion": "\"Arr, a cat!\""}"#;
/// let data = Dataset::from_reader(&rows[..], "cat.jsonl")?.examples(&model)?;
///
/// let mut options = TrainOptions::new(AdapterKind::Prefix);
/// options.steps = Some(20);
/// options.threads = Some(1);
/// let mut trainer = Trainer::new(&model, options, data, Vec::new())?;
/// let losses: Vec<f64> = trainer.reports().map(|r| Ok(r?.loss)).collect::<ggraft::Result<_>>()?;
/// assert!(losses[19] < 0.5 * losses[0]);
///
/// let adapter = trainer.adapter()?;
/// assert_eq!(adapter.length(), 20);
/// # Ok::<(), ggraft::Error>(())
/// ```
pub struct Trainer {
    pub(super) model: Model,
    pub(super) options: TrainOptions,
    /// P.
    pub(super) length: usize,
    pub(super) steps: u64,
    pub(super) lr: f64,
    pub(super) warmup: u64,
    pub(super) eval_every: u64,
    pub(super) layout: Layout,
    pub(super) train: Sequences,
    pub(super) valid: Sequences,
    /// Who has yet to say what some of the rows shall predict, if anybody.
    teacher: Option<Teacher>,
    trimmed: [Trimmed; 2],
    pub(super) passes: Passes,
    pub(super) state: State,
    cancel: CancelToken,
    recomputed: usize,
    /// What checkpoints know the data and weights by, once one was asked for.
    pub(super) identity: OnceLock<Identity>,
}

impl Trainer {
    /// Prepares a run: `train` is learned, `valid` (may be empty) decides which step is kept.
    ///
    /// # Errors
    /// If an option is out of range or contradicts another, if an example has nothing to learn, or if the initial rows cannot
    /// be computed.
    pub fn new(
        model: &Model,
        options: TrainOptions,
        train: impl Into<Examples>,
        valid: impl Into<Examples>,
    ) -> Result<Self> {
        Self::prepare(model, options, [train.into(), valid.into()], None)
    }

    /// Rows of both sets that wait for [`Trainer::teach`]; 0 unless [`Objective::Distill`](super::Objective::Distill) is the objective.
    pub fn untaught(&self) -> usize {
        match &self.teacher {
            Some(_) => self.left_to_teach(),
            None => 0,
        }
    }

    /// Lets the base read the context in front of some rows that wait for it, as many as fit into one graph. What is left
    /// [`Trainer::step`] does at once before the first step: this is for those who want to do something else in between.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`], [`TrainError::OutOfMemory`]; nothing has changed then.
    pub fn teach(&mut self) -> Result<()> {
        if let Some(teacher) = &mut self.teacher {
            let sets = [&mut self.train, &mut self.valid];
            teacher.teach(&mut self.passes, &self.layout, sets, self.cancel.flag())?;
            if self.left_to_teach() == 0 {
                self.teacher = None;
            }
        }
        Ok(())
    }

    /// Takes one step; `None` if the run is over.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`]: the step was not taken, or only its evaluation is missing; the next call takes up what was
    /// left. [`TrainError::NonFinite`]: the run
    /// cannot go on, and [`Trainer::adapter`] returns the last rows that gave a finite loss.
    pub fn step(&mut self) -> Result<Option<Report>> {
        if self.state.unevaluated.is_some() {
            return self.evaluate().map(Some);
        }
        if self.finished().is_some() {
            return Ok(None);
        }
        self.finish_teaching()?;
        let start = Instant::now();
        self.draw();
        let dropout = self.state.dropout.clone();
        let Sums {
            loss,
            tokens,
            targets,
            ..
        } = match self.forward_backward() {
            Ok(found) => found,
            Err(e) => {
                self.state.dropout = dropout;
                return Err(e);
            }
        };
        let step = self.state.step + 1;
        self.finite(step, "loss", loss)?;
        let max_norm = match self.options.clip {
            0.0 => f64::INFINITY,
            clip => clip,
        };
        let grad_norm = clip_grad_norm(self.state.encoder.params_mut(), max_norm);
        self.finite(step, "norm of the gradient", grad_norm)?;
        let factor = self.options.schedule.factor(
            (step - 1) as usize,
            self.steps as usize,
            self.warmup as usize,
        );
        let lr = self.lr * factor;
        let state = &mut self.state;
        state.optimizer.step(state.encoder.params_mut(), lr);
        state.drawn.clear();
        state.step = step;
        state.first_loss.get_or_insert(loss);
        state.last_loss = Some(loss);
        state.tokens += tokens;
        let seconds = start.elapsed().as_secs_f64();
        state.seconds += seconds;
        let report = Report {
            step,
            steps: self.steps,
            loss,
            lr,
            grad_norm,
            tokens,
            targets,
            seconds,
            valid_loss: None,
            best: false,
            epoch: step as f64 * self.rows_per_step() as f64 / self.train.len() as f64,
        };
        if !self.valid.is_empty() && (step.is_multiple_of(self.eval_every) || step == self.steps) {
            self.state.unevaluated = Some(report);
            return self.evaluate().map(Some);
        }
        Ok(Some(report))
    }

    /// The reports of all steps that are left. Ends behind the first error.
    pub fn reports(&mut self) -> impl Iterator<Item = Result<Report>> + '_ {
        let mut failed = false;
        std::iter::from_fn(move || {
            if failed {
                return None;
            }
            let report = self.step().transpose();
            failed = matches!(report, Some(Err(_)));
            report
        })
    }

    /// Why the run is over, if it is.
    pub fn finished(&self) -> Option<Finish> {
        if self.state.broken {
            return Some(Finish::Failed);
        }
        if self.state.unevaluated.is_some() {
            return None;
        }
        if self.state.step >= self.steps {
            return Some(Finish::Steps);
        }
        let patience = self.options.patience? as u64;
        (self.state.stale >= patience).then_some(Finish::EarlyStop)
    }

    /// Steps of the whole run.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Makes the run one of `steps` steps, also one that is over: the parameters and the optimizer's state stay, the learning
    /// rate follows the schedule of a run of that length (with the warm-up as it was), and the patience begins anew.
    ///
    /// # Errors
    /// [`TrainError::Option`] unless that is more than the run has taken.
    pub fn set_steps(&mut self, steps: u64) -> Result<(), TrainError> {
        if steps <= self.state.step {
            return Err(TrainError::Option {
                option: "steps",
                value: steps.to_string(),
                why: "the run has taken as many already",
            });
        }
        self.steps = steps;
        self.state.stale = 0;
        Ok(())
    }

    /// The trained values by PEFT's names, in PyTorch's shapes.
    pub fn parameters(&self) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let params = self.state.encoder.params().iter();
        params
            .map(|p| (p.name.clone(), (p.shape.clone(), p.value.clone())))
            .collect()
    }

    /// Replaces trained values: training starts from those of another implementation. Names as in [`Trainer::parameters`].
    ///
    /// # Errors
    /// [`TrainError::State`] for a name that is not among the parameters or a wrong number of values.
    pub fn set_parameter(&mut self, name: &str, values: &[f32]) -> Result<(), TrainError> {
        let param = self
            .state
            .encoder
            .params_mut()
            .iter_mut()
            .find(|p| p.name == name)
            .ok_or_else(|| StateError::Unexpected {
                tensor: name.to_owned(),
            })?;
        if param.value.len() != values.len() {
            return Err(StateError::Shape {
                tensor: name.to_owned(),
                expected: param.shape.clone(),
                got: vec![values.len()],
            }
            .into());
        }
        param.value.copy_from_slice(values);
        let rows = self.state.encoder.forward();
        if rows.iter().all(|x| x.is_finite()) {
            self.state.good = rows;
        }
        Ok(())
    }

    /// Stops this trainer from another thread.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// The options that the run was made with.
    pub fn options(&self) -> &TrainOptions {
        &self.options
    }

    /// Computes with `n` threads, 1 to 512, from now on. Results may depend on it in the last bits.
    ///
    /// # Errors
    /// [`TrainError::Option`].
    pub fn set_threads(&mut self, n: usize) -> Result<()> {
        check_range("threads", n, MAX_THREADS)?;
        self.options.threads = Some(n);
        self.passes
            .set_threads(&self.model, n, self.options.background);
        Ok(())
    }

    /// Rows of the training and of the validation set that are too long.
    pub fn trimmed(&self) -> &[Trimmed; 2] {
        &self.trimmed
    }

    /// The run so far.
    pub fn summary(&self) -> Summary {
        let state = &self.state;
        let trained = |p: &Param| p.trainable_grad().len() as u64;
        Summary {
            steps: state.step,
            reported: state.step - u64::from(state.unevaluated.is_some()),
            best_step: state.best.as_ref().map(|b| b.step),
            best_valid_loss: state.best.as_ref().map(|b| b.loss),
            first_loss: state.first_loss,
            last_loss: state.last_loss,
            tokens: state.tokens,
            seconds: state.seconds,
            base_valid_loss: state.base_loss,
            trained_parameters: state.encoder.params().iter().map(trained).sum(),
            adapter_values: state.good.len() as u64,
            cut_rows: self.trimmed[0].cut.len(),
            recomputed_layers: self.recomputed,
        }
    }

    /// The training and the validation rows that the run was made with, those included that are not used.
    pub fn examples(&self) -> [&Examples; 2] {
        [self.train.examples(), self.valid.examples()]
    }

    pub(super) fn rows_per_step(&self) -> usize {
        self.options.batch * self.options.accum
    }

    /// Sequences of both sets that no teacher has spoken of.
    fn left_to_teach(&self) -> usize {
        let sets = [&self.train, &self.valid];
        sets.iter().map(|set| set.len() - set.n_taught()).sum()
    }

    /// No row is left without what it shall predict.
    fn finish_teaching(&mut self) -> Result<()> {
        while self.untaught() > 0 {
            self.teach()?;
        }
        Ok(())
    }

    fn finite(&mut self, step: u64, what: &'static str, value: f64) -> Result<(), TrainError> {
        if value.is_finite() {
            return Ok(());
        }
        self.state.broken = true;
        Err(TrainError::NonFinite { step, what, value })
    }

    /// Draws the rows of the next step, each once in every pass over the data.
    fn draw(&mut self) {
        let (n, wanted) = (self.train.len(), self.rows_per_step());
        let state = &mut self.state;
        while state.drawn.len() < wanted {
            if state.used == state.order.len() {
                state.order = (0..n as u32).collect();
                state.shuffle.shuffle(&mut state.order);
                state.used = 0;
            }
            let take = (wanted - state.drawn.len()).min(state.order.len() - state.used);
            let range = state.used..state.used + take;
            state.drawn.extend_from_slice(&state.order[range]);
            state.used += take;
        }
    }
}
