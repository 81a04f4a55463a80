//! The training loop.

use super::batch::{Packed, Sequence, Slot, Target};
use super::data::Example;
use super::encoder::{Encoder, normal_rows};
use super::optimizer::{Optimizer, OptimizerOptions, clip_grad_norm};
use super::pass::{Goal, Passes, Variables};
use super::rng::{Rng, Stream};
use super::{Init, Objective, Reparam, TrainError, TrainOptions};
use crate::adapter::{
    Adapter, AdapterKind, BaseSignature, Item, Parts, Payload, PrefixLayer, Rows, arrange,
    prefix_from_peft, prefix_to_peft,
};
use crate::error::Result;
use crate::model::Model;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Tokens in one graph, if the rows are not longer: enough to multiply matrices at full speed. Larger batches are computed
/// in several graphs, so that memory does not grow with the batch.
const MAX_TOKENS: usize = 1024;

/// Tokens whose keys and values [`Init::Mean`] looks at: enough for a mean, and less than a step costs.
const MEAN_TOKENS: usize = 512;

/// Noise of [`Init::Mean`] as a part of the deviation of the tokens' values.
const MEAN_NOISE: f32 = 0.2;

/// Stops a trainer from another thread.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Makes the step that runs, or the next one, return [`TrainError::Cancelled`]. The trainer is then as before the step.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Lets the trainer go on.
    pub fn reset(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// Why a run is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// All steps were taken.
    Steps,
    /// The validation loss has not improved for as many evaluations as [`TrainOptions::patience`] says.
    EarlyStop,
    /// A step ended with [`TrainError::NonFinite`].
    Failed,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct Report {
    /// Steps taken, this one included.
    pub step: u64,
    /// Steps of the run.
    pub steps: u64,
    /// Mean cross-entropy of the step's targets before the step, in nats.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens computed, virtual ones included.
    pub tokens: u64,
    /// Tokens predicted.
    pub targets: u64,
    /// Duration of the step without the evaluation.
    pub seconds: f64,
    /// Mean cross-entropy of the validation set after the step, if it was evaluated.
    pub valid_loss: Option<f64>,
    /// It is the lowest so far.
    pub best: bool,
    /// Passes over the training set so far.
    pub epoch: f64,
}

/// A run so far.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// Steps taken.
    pub steps: u64,
    /// Steps that were reported: one less while the evaluation of the last one was cancelled and not made up for.
    pub reported: u64,
    /// The step with the lowest validation loss.
    pub best_step: Option<u64>,
    /// The lowest validation loss.
    pub best_valid_loss: Option<f64>,
    /// Training loss of the first step.
    pub first_loss: Option<f64>,
    /// Training loss of the last step.
    pub last_loss: Option<f64>,
    /// Tokens computed in training steps.
    pub tokens: u64,
    /// Duration of all training steps.
    pub seconds: f64,
    /// Values that the optimizer moves, those of an encoder included.
    pub trained_parameters: u64,
    /// Values of the adapter.
    pub adapter_values: u64,
    /// Rows of the training set that were cut to the longest length.
    pub cut_rows: usize,
    /// Most layers that were computed twice in a step to stay within the memory budget.
    pub recomputed_layers: usize,
}

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
    pub(super) weight_decay: f64,
    pub(super) warmup: u64,
    pub(super) eval_every: u64,
    pub(super) train: Vec<Sequence>,
    pub(super) valid: Vec<Sequence>,
    cut_rows: usize,
    passes: Passes,
    pub(super) state: State,
    cancel: CancelToken,
    recomputed: usize,
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
        train: Vec<Example>,
        valid: Vec<Example>,
    ) -> Result<Self> {
        Self::prepare(model, options, train, valid, None)
    }

    /// As [`Trainer::new`], from `state` on if there is one.
    pub(super) fn prepare(
        model: &Model,
        mut options: TrainOptions,
        train: Vec<Example>,
        valid: Vec<Example>,
        encoder: Option<Encoder>,
    ) -> Result<Self> {
        if let (AdapterKind::PTuning, None, Some(Init::Adapter(adapter))) =
            (options.method, &options.template, &options.init)
        {
            options.template = adapter.template().cloned();
        }
        check(&options)?;
        let length = length(&options)?;
        let n_threads = options.threads.unwrap_or_else(|| {
            std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
        });
        let memory = options.memory.unwrap_or(TrainOptions::DEFAULT_MEMORY);
        let n_ctx = options.n_ctx.unwrap_or(model.n_ctx_train());
        let mut passes = Passes::new(
            model,
            model.pool(n_threads),
            usize::try_from(memory).unwrap_or(usize::MAX),
            model.has_long_context(n_ctx),
        );
        let layout = Layout::new(model, &options, length);
        let (mut train_rows, cut_rows) = layout.sequences(&train, "training set")?;
        if train_rows.is_empty() {
            return Err(layout.nothing_to_learn("training set").into());
        }
        let (mut valid_rows, _) = layout.sequences(&valid, "validation set")?;
        if let Objective::Distill { context, top_k } = &options.loss {
            let teacher = Teacher {
                layout: &layout,
                context: model.vocab().tokenize(context, false, true)?,
                top_k: *top_k,
            };
            teacher.teach(&mut passes, &train, &mut train_rows)?;
            teacher.teach(&mut passes, &valid, &mut valid_rows)?;
        }
        let rows_per_step = options.batch * options.accum;
        let steps = options.steps.unwrap_or_else(|| match options.epochs {
            Some(epochs) => {
                ((epochs * train_rows.len() as f64 / rows_per_step as f64).ceil() as u64).max(1)
            }
            None => TrainOptions::DEFAULT_STEPS,
        });
        let epochs = steps as f64 * rows_per_step as f64 / train_rows.len() as f64;
        let mut encoder = match encoder {
            Some(encoder) => encoder,
            None => {
                let default = default_init(&options, steps, epochs);
                let init = options.init.as_ref().unwrap_or(&default);
                start(model, &options, init, length, &mut passes, &train)?
            }
        };
        let lr = options.lr.unwrap_or_else(|| options.default_lr());
        let weight_decay = options
            .weight_decay
            .unwrap_or_else(|| options.default_weight_decay(lr, epochs));
        let mut optimizer_options = OptimizerOptions::new(options.optimizer)
            .betas(options.betas.0, options.betas.1)
            .weight_decay(weight_decay);
        if options.optimizer == super::OptimizerKind::Sgd {
            optimizer_options = optimizer_options.momentum(SGD_MOMENTUM);
        }
        let good = encoder.forward();
        Ok(Self {
            length,
            steps,
            lr,
            weight_decay,
            warmup: options.warmup.unwrap_or((steps / 15).min(100)),
            eval_every: options
                .eval_every
                .unwrap_or(steps.div_ceil(TrainOptions::DEFAULT_EVALUATIONS)),
            cut_rows,
            passes,
            state: State {
                step: 0,
                optimizer: Optimizer::new(optimizer_options, encoder.params()),
                encoder,
                shuffle: Rng::new(options.seed, Stream::Shuffle),
                dropout: Rng::new(options.seed, Stream::Dropout),
                order: Vec::new(),
                used: 0,
                drawn: Vec::new(),
                best: None,
                stale: 0,
                good,
                first_loss: None,
                last_loss: None,
                tokens: 0,
                seconds: 0.0,
                broken: false,
                unevaluated: None,
            },
            model: model.clone(),
            options,
            train: train_rows,
            valid: valid_rows,
            cancel: CancelToken::default(),
            recomputed: 0,
        })
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
        let start = Instant::now();
        self.draw();
        let dropout = self.state.dropout.clone();
        let result = self.forward_backward();
        let (loss, tokens, targets) = match result {
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

    /// The adapter: that of the lowest validation loss, or of the last step without a validation set.
    ///
    /// # Errors
    /// [`crate::adapter::AdapterError`] if its values are not finite.
    pub fn adapter(&self) -> Result<Adapter> {
        let state = &self.state;
        match &state.best {
            Some(best) => self.folded(&best.rows, best.step),
            None if state.broken => self.folded(&state.good, state.step),
            None => self.latest(),
        }
    }

    /// The adapter of the last step, whatever its validation loss.
    ///
    /// # Errors
    /// [`crate::adapter::AdapterError`] if its values are not finite.
    pub fn latest(&self) -> Result<Adapter> {
        let rows = self.state.encoder.clone().forward();
        self.folded(&rows, self.state.step)
    }

    /// Mean cross-entropy of the training objective over the validation set, in nats, under the current rows, without label
    /// smoothing: comparable between runs that smooth and runs that do not.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`], [`TrainError::OutOfMemory`].
    pub fn valid_loss(&mut self) -> Result<Option<f64>> {
        if self.valid.is_empty() {
            return Ok(None);
        }
        let rows = self.state.encoder.forward();
        let variables = self.variables(&rows)?;
        let (mut sum, mut mass) = (0.0, 0.0);
        for group in groups(&self.valid.iter().collect::<Vec<_>>()) {
            let packed = Packed::new(group);
            let outcome = self.passes.run(
                &packed,
                &variables,
                1.0,
                0.0,
                Goal::Losses,
                Some(&self.cancel.0),
            )?;
            for (&l, &w) in outcome.losses.iter().zip(&packed.weights) {
                sum += f64::from(l) * f64::from(w);
                mass += f64::from(w);
            }
        }
        Ok(Some(sum / mass))
    }

    /// Mean cross-entropy of `examples` under the current parameters, and its gradient with respect to each of them by PEFT's
    /// name, in PyTorch's shapes; `prompt_embeddings` stands for the rows that an encoder produces. Nothing is changed.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn gradient(&mut self, examples: &[Example]) -> Result<(f64, BTreeMap<String, Vec<f32>>)> {
        let layout = Layout::new(&self.model, &self.options, self.length);
        let (sequences, _) = layout.sequences(examples, "examples")?;
        let rows = self.state.encoder.forward();
        let batch: Vec<_> = sequences.iter().collect();
        let (loss, _, _, d_rows) = self.accumulate(&batch, &rows)?;
        self.state
            .encoder
            .params_mut()
            .iter_mut()
            .for_each(|p| p.zero_grad());
        self.state.encoder.backward(&d_rows);
        let mut found: BTreeMap<_, _> = self
            .state
            .encoder
            .params()
            .iter()
            .map(|p| (p.name.clone(), p.grad.clone()))
            .collect();
        found.insert("prompt_embeddings".to_owned(), d_rows);
        Ok((loss, found))
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
            .ok_or_else(|| super::StateError::Unexpected {
                tensor: name.to_owned(),
            })?;
        if param.value.len() != values.len() {
            return Err(super::StateError::Shape {
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
        self.passes.set_pool(self.model.pool(n));
        Ok(())
    }

    /// The run so far.
    pub fn summary(&self) -> Summary {
        let state = &self.state;
        let trained = |p: &super::param::Param| p.trainable_grad().len() as u64;
        Summary {
            steps: state.step,
            reported: state.step - u64::from(state.unevaluated.is_some()),
            best_step: state.best.as_ref().map(|b| b.step),
            best_valid_loss: state.best.as_ref().map(|b| b.loss),
            first_loss: state.first_loss,
            last_loss: state.last_loss,
            tokens: state.tokens,
            seconds: state.seconds,
            trained_parameters: state.encoder.params().iter().map(trained).sum(),
            adapter_values: state.good.len() as u64,
            cut_rows: self.cut_rows,
            recomputed_layers: self.recomputed,
        }
    }

    fn rows_per_step(&self) -> usize {
        self.options.batch * self.options.accum
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

    /// Leaves gradients in the encoder's parameters; returns the mean loss, tokens computed and targets.
    fn forward_backward(&mut self) -> Result<(f64, u64, u64)> {
        let rows = self.state.encoder.forward();
        let mask = self.dropout_mask(rows.len());
        let used: Cow<[f32]> = match &mask {
            Some(mask) => rows.iter().zip(mask).map(|(r, m)| r * m).collect(),
            None => rows.as_slice().into(),
        };
        let train = std::mem::take(&mut self.train);
        let batch: Vec<_> = self
            .state
            .drawn
            .iter()
            .map(|&i| &train[i as usize])
            .collect();
        let result = self.accumulate(&batch, &used);
        self.train = train;
        let (loss, tokens, targets, mut d_rows) = result?;
        if let Some(mask) = &mask {
            d_rows.iter_mut().zip(mask).for_each(|(d, m)| *d *= m);
        }
        let encoder = &mut self.state.encoder;
        encoder.params_mut().iter_mut().for_each(|p| p.zero_grad());
        encoder.backward(&d_rows);
        drop(used);
        if loss.is_finite() {
            self.state.good = rows;
        }
        Ok((loss, tokens, targets))
    }

    /// 0 with the probability of dropout, otherwise what keeps the mean.
    fn dropout_mask(&mut self, n: usize) -> Option<Vec<f32>> {
        let p = self.options.dropout;
        let rng = &mut self.state.dropout;
        let mut draw = || {
            if rng.uniform(0.0, 1.0) < p {
                0.0
            } else {
                1.0 / (1.0 - p)
            }
        };
        (p > 0.0).then(|| (0..n).map(|_| draw()).collect())
    }

    /// Mean loss of `batch`, tokens computed, targets, gradient with respect to `rows`.
    fn accumulate(
        &mut self,
        batch: &[&Sequence],
        rows: &[f32],
    ) -> Result<(f64, u64, u64, Vec<f32>)> {
        let variables = self.variables(rows)?;
        let mass: f64 = batch.iter().map(|s| s.mass()).sum();
        // A batch of rows without weight teaches nothing.
        let scale = if mass > 0.0 { 1.0 / mass } else { 0.0 };
        let mut d_rows = vec![0.0; rows.len()];
        let (mut loss, mut tokens, mut targets) = (0.0, 0, 0);
        for group in groups(batch) {
            let packed = Packed::new(group);
            let outcome = self.passes.run(
                &packed,
                &variables,
                scale,
                self.options.label_smoothing,
                Goal::Gradients,
                Some(&self.cancel.0),
            )?;
            for (&l, &w) in outcome.losses.iter().zip(&packed.weights) {
                loss += f64::from(l) * f64::from(w) * scale;
            }
            tokens += packed.n_tokens() as u64;
            targets += packed.outputs.len() as u64;
            self.recomputed = self.recomputed.max(outcome.recomputed);
            let found = self.in_encoder_layout(outcome.gradients.expect("asked for"))?;
            d_rows.iter_mut().zip(found).for_each(|(d, f)| *d += f);
        }
        Ok((loss, tokens, targets, d_rows))
    }

    /// Rows in PEFT's layout as the graph reads them.
    fn variables(&self, rows: &[f32]) -> Result<Variables> {
        let length = self.length;
        Ok(match self.options.method {
            AdapterKind::Prefix => match prefix_from_peft(rows, self.model.shape())? {
                Payload::Prefix { layers } => Variables::Prefix {
                    length,
                    layers: layers
                        .iter()
                        .map(|l| [l.k.to_f32(), l.v.to_f32()])
                        .collect(),
                },
                Payload::Rows(_) => unreachable!("made from a prefix"),
            },
            AdapterKind::Prompt | AdapterKind::PTuning => Variables::Rows {
                length,
                values: rows.to_vec(),
            },
        })
    }

    /// The inverse of [`Trainer::variables`].
    fn in_encoder_layout(&self, variables: Variables) -> Result<Vec<f32>> {
        match variables {
            Variables::Rows { values, .. } => Ok(values),
            Variables::Prefix { layers, .. } => prefix_rows(&self.model, layers),
            Variables::None => unreachable!("something is trained"),
        }
    }

    /// Completes the report of the step that was taken last.
    fn evaluate(&mut self) -> Result<Report> {
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

    /// The adapter that `rows` make.
    fn folded(&self, rows: &[f32], step: u64) -> Result<Adapter> {
        let o = &self.options;
        let shape = self.model.shape();
        let payload = match o.method {
            AdapterKind::Prefix => prefix_from_peft(rows, shape)?,
            AdapterKind::Prompt | AdapterKind::PTuning => {
                Payload::Rows(Rows::from_f32(shape.n_embd, rows.to_vec())?)
            }
        };
        let reparam = match o.effective_reparam() {
            Reparam::None => "none",
            Reparam::Mlp => "mlp",
            Reparam::Lstm => "lstm",
        };
        let objective = match &o.loss {
            Objective::Completion => "completion",
            Objective::All => "all",
            Objective::Distill { .. } => "distill",
        };
        let valid = self.state.best.as_ref().filter(|b| b.step == step);
        let facts = [
            (
                "source",
                Some(format!("ggraft {}", env!("CARGO_PKG_VERSION"))),
            ),
            ("method", Some(o.method.name().to_owned())),
            ("reparam", Some(reparam.to_owned())),
            ("loss", Some(objective.to_owned())),
            ("steps", Some(step.to_string())),
            ("rows", Some(self.train.len().to_string())),
            ("learning_rate", Some(self.lr.to_string())),
            ("seed", Some(o.seed.to_string())),
            ("valid_loss", valid.map(|b| format!("{:.4}", b.loss))),
        ];
        Ok(Adapter::new(Parts {
            kind: o.method,
            payload,
            template: o.template.clone(),
            name: o.name.clone(),
            fingerprint: Some(self.model.fingerprint()),
            base: BaseSignature::from(shape),
            provenance: facts
                .into_iter()
                .filter_map(|(key, value)| Some((key.to_owned(), value?)))
                .collect(),
        })?)
    }
}

/// SGD without momentum hardly moves prompts.
const SGD_MOMENTUM: f64 = 0.9;

/// Keys and values of each layer in PEFT's layout `ne = [2 L Hk d, P]`.
fn prefix_rows(model: &Model, layers: Vec<[Vec<f32>; 2]>) -> Result<Vec<f32>> {
    let width = model.shape().kv_width();
    let layers = layers
        .into_iter()
        .map(|[k, v]| {
            Ok(PrefixLayer {
                k: Rows::from_f32(width, k)?,
                v: Rows::from_f32(width, v)?,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(prefix_to_peft(&layers, model.shape())?)
}

/// Runs of sequences for one graph each.
fn groups<'a, 'b>(batch: &'b [&'a Sequence]) -> impl Iterator<Item = &'b [&'a Sequence]> {
    let mut rest = batch;
    std::iter::from_fn(move || {
        let mut tokens = 0;
        let fits = rest
            .iter()
            .take_while(|s| {
                tokens += s.slots.len();
                tokens <= MAX_TOKENS
            })
            .count();
        let (group, after) = rest.split_at(fits.max(1).min(rest.len()));
        rest = after;
        (!group.is_empty()).then_some(group)
    })
}

/// Rows of one step, beyond which nobody waits for it.
const MAX_ROWS: usize = 1 << 20;
/// Wider than any model.
const MAX_HIDDEN: usize = 1 << 16;
const MAX_LSTM_LAYERS: usize = 16;
/// As for sessions; ggml has the same limit.
const MAX_THREADS: usize = 512;

fn check_range(option: &'static str, value: usize, max: usize) -> Result<(), TrainError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    Err(TrainError::Option {
        option,
        value: value.to_string(),
        why: if value == 0 {
            "must be at least 1"
        } else {
            "is more than is supported"
        },
    })
}

fn check(o: &TrainOptions) -> Result<(), TrainError> {
    let wrong = |option, value: &dyn ToString, why| {
        Err(TrainError::Option {
            option,
            value: value.to_string(),
            why,
        })
    };
    let positive = |x: f64| x.is_finite() && x > 0.0;
    let conflict = |first: &str, second: String, why| {
        Err(TrainError::Conflict {
            first: first.to_owned(),
            second,
            why,
        })
    };
    let reparam = o.effective_reparam();
    check_range("batch", o.batch, MAX_ROWS)?;
    check_range("accum", o.accum, MAX_ROWS / o.batch)?;
    check_range("hidden width", o.hidden.unwrap_or(1), MAX_HIDDEN)?;
    check_range("LSTM layers", o.lstm_layers, MAX_LSTM_LAYERS)?;
    check_range("threads", o.threads.unwrap_or(1), MAX_THREADS)?;
    if o.steps == Some(0) {
        return wrong("steps", &0, "at least one");
    }
    if let Some(epochs) = o.epochs.filter(|&e| !positive(e)) {
        return wrong("epochs", &epochs, "must be positive");
    }
    if let Some(lr) = o.lr.filter(|&lr| !positive(lr)) {
        return wrong("learning rate", &lr, "must be positive");
    }
    for beta in [o.betas.0, o.betas.1] {
        if !(0.0..1.0).contains(&beta) {
            return wrong("beta", &beta, "must be from 0 to below 1");
        }
    }
    if let Some(decay) = o.weight_decay.filter(|d| !(d.is_finite() && *d >= 0.0)) {
        return wrong("weight decay", &decay, "must not be negative");
    }
    if !(o.clip.is_finite() && o.clip >= 0.0) {
        return wrong("clip", &o.clip, "must not be negative; 0 for no limit");
    }
    if !(0.0..1.0).contains(&o.label_smoothing) {
        return wrong(
            "label smoothing",
            &o.label_smoothing,
            "must be from 0 to below 1",
        );
    }
    if !(0.0..1.0).contains(&o.dropout) {
        return wrong("dropout", &o.dropout, "must be from 0 to below 1");
    }
    if o.eval_every == Some(0) {
        return wrong("evaluation interval", &0, "at least one step");
    }
    if o.patience == Some(0) {
        return wrong("patience", &0, "at least one evaluation");
    }
    if let Objective::Distill { top_k: 0, .. } = o.loss {
        return wrong("top k", &0, "at least one token");
    }
    let method = || format!("method {}", o.method);
    match (o.method, reparam) {
        (AdapterKind::Prompt, Reparam::Mlp | Reparam::Lstm) => {
            return conflict(
                "an encoder",
                method(),
                "prompt tuning trains the rows themselves; P-tuning has encoders",
            );
        }
        (AdapterKind::Prefix, Reparam::Lstm) => {
            return conflict("an LSTM", method(), "prefixes have the MLP");
        }
        _ => {}
    }
    if o.template.is_some() && o.method != AdapterKind::PTuning {
        return conflict(
            "a template",
            method(),
            "only P-tuning places virtual tokens within the text",
        );
    }
    if o.freeze_first > 0 && (o.method != AdapterKind::Prefix || reparam != Reparam::None) {
        return conflict(
            "frozen rows",
            if o.method == AdapterKind::Prefix {
                "an encoder".to_owned()
            } else {
                method()
            },
            "only rows of a prefix that are trained themselves can be kept",
        );
    }
    match (&o.init, o.method) {
        (Some(Init::Vocab), AdapterKind::Prefix) => {
            return conflict(
                "initial rows from the vocabulary",
                method(),
                "a prefix has no embeddings; start from a text",
            );
        }
        (Some(Init::Mean), AdapterKind::Prompt | AdapterKind::PTuning) => {
            return conflict(
                "initial rows at the mean key",
                method(),
                "virtual tokens have no keys; start from a text",
            );
        }
        (Some(Init::Zeros), _) if reparam != Reparam::None => {
            return conflict(
                "initial zeros",
                "an encoder".to_owned(),
                "nothing would ever move",
            );
        }
        _ => {}
    }
    Ok(())
}

/// P.
fn length(o: &TrainOptions) -> Result<usize, TrainError> {
    let template = o.template.as_ref().map(|t| t.virtual_tokens());
    let adapter = match &o.init {
        Some(Init::Adapter(a)) => Some(a.length()),
        _ => None,
    };
    let length = o
        .length
        .or(template)
        .or(adapter)
        .unwrap_or(TrainOptions::DEFAULT_LENGTH);
    let wrong = |why| TrainError::Option {
        option: "length",
        value: length.to_string(),
        why,
    };
    if length == 0 || length > crate::adapter::MAX_LENGTH {
        return Err(wrong("from 1 to 65536 virtual tokens"));
    }
    if template.is_some_and(|n| n != length) {
        return Err(wrong(
            "the template places another number of virtual tokens",
        ));
    }
    if o.freeze_first >= length {
        return Err(TrainError::Option {
            option: "number of frozen rows",
            value: o.freeze_first.to_string(),
            why: "at least one row must be left to train",
        });
    }
    Ok(length)
}

/// How examples become sequences.
struct Layout<'a> {
    model: &'a Model,
    options: &'a TrainOptions,
    length: usize,
    max_len: usize,
}

impl<'a> Layout<'a> {
    fn new(model: &'a Model, options: &'a TrainOptions, length: usize) -> Self {
        let prefix = if options.method == AdapterKind::Prefix {
            length
        } else {
            0
        };
        let limit = options
            .max_len
            .unwrap_or(usize::MAX)
            .min(model.n_ctx_train());
        Self {
            model,
            options,
            length,
            max_len: limit.saturating_sub(prefix),
        }
    }

    /// All examples; how many were cut.
    fn sequences(&self, examples: &[Example], set: &'static str) -> Result<(Vec<Sequence>, usize)> {
        let n_vocab = self.model.shape().n_vocab;
        let mut cut = 0;
        let mut out = Vec::with_capacity(examples.len());
        for (row, example) in examples.iter().enumerate() {
            let unknown = |&id: &i32| id < 0 || id as usize >= n_vocab;
            if let Some(token) = example.ids().find(unknown) {
                let row = row + 1;
                return Err(TrainError::Token {
                    set,
                    row,
                    token,
                    n_vocab,
                }
                .into());
            }
            let mut s = self.sequence(row, example)?;
            if s.slots.len() > self.max_len {
                cut += 1;
                s.slots.truncate(self.max_len);
                s.targets.retain(|t| t.at + 1 < self.max_len);
            }
            out.push(s);
        }
        // Rows that have nothing to learn any more only cost time.
        out.retain(|s| !s.targets.is_empty());
        if out.is_empty() && !examples.is_empty() {
            return Err(self.nothing_to_learn(set).into());
        }
        Ok((out, cut))
    }

    fn nothing_to_learn(&self, set: &'static str) -> TrainError {
        let max_len = self.max_len;
        TrainError::NothingToLearn { set, max_len }
    }

    /// What is computed for an example, and what it shall predict.
    fn sequence(&self, row: usize, example: &Example) -> Result<Sequence> {
        let o = self.options;
        let mut slots = Vec::new();
        if o.method != AdapterKind::Prefix && o.template.is_none() {
            slots.extend((0..self.length).map(Slot::Virtual));
        }
        let vocab = self.model.vocab();
        for item in arrange(vocab, o.template.as_ref(), &example.given, example.bos)? {
            match item {
                Item::Tokens(ids) => slots.extend(ids.into_iter().map(Slot::Token)),
                Item::Virtual(rows) => slots.extend(rows.map(Slot::Virtual)),
            }
        }
        let follows = slots.len();
        slots.extend(example.then.iter().map(|&(id, _)| Slot::Token(id)));
        let counts = |i: usize| match o.loss {
            Objective::All => true,
            Objective::Completion | Objective::Distill { .. } => {
                i >= follows && example.then[i - follows].1
            }
        };
        let target = |i: usize| match slots[i] {
            Slot::Token(id) if counts(i) => Some(Target {
                at: i - 1,
                tokens: vec![(id, 1.0)],
            }),
            _ => None,
        };
        Ok(Sequence {
            targets: (1..slots.len()).filter_map(target).collect(),
            slots,
            weight: example.weight,
            example: row,
            follows,
        })
    }
}

/// The base reading a context, whose predictions the adapter learns.
struct Teacher<'a> {
    layout: &'a Layout<'a>,
    context: Vec<i32>,
    top_k: usize,
}

impl Teacher<'_> {
    /// Replaces the targets of `sequences`, which were made from `examples`, by what the teacher predicts there.
    fn teach(
        &self,
        passes: &mut Passes,
        examples: &[Example],
        sequences: &mut [Sequence],
    ) -> Result<()> {
        let vocab = self.layout.model.vocab();
        let read = |s: &Sequence| {
            let example = &examples[s.example];
            let bos = vocab.leading_bos_if(example.bos);
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
        };
        let taught: Vec<_> = sequences.iter().map(read).collect();
        let n_ctx = self.layout.model.n_ctx_train();
        if taught.iter().any(|s| s.slots.len() > n_ctx) {
            return Err(TrainError::Option {
                option: "context to distill",
                value: format!("{} tokens long", self.context.len()),
                why: "with the longest row it must fit into the model's context",
            }
            .into());
        }
        let all: Vec<_> = taught.iter().collect();
        let mut sequences = sequences.iter_mut();
        for group in groups(&all) {
            let mut found = passes.predict(&Packed::new(group), self.top_k)?.into_iter();
            for (_, s) in group.iter().zip(sequences.by_ref()) {
                for target in &mut s.targets {
                    target.tokens = found.next().expect("one prediction per target");
                }
            }
        }
        Ok(())
    }
}

/// [`TrainOptions::init`] if it is not given, for a run of so many steps and passes over the data.
fn default_init(o: &TrainOptions, steps: u64, epochs: f64) -> Init {
    match (o.method, o.effective_reparam(), &o.loss) {
        (AdapterKind::Prefix, Reparam::None, Objective::Distill { context, .. })
            if !context.is_empty() =>
        {
            Init::Text(context.clone())
        }
        // Frozen rows have to mean something.
        (AdapterKind::Prefix, Reparam::None, _)
            if steps >= TrainOptions::DEFAULT_STEPS && o.freeze_first == 0 =>
        {
            if epochs >= TrainOptions::MANY_EPOCHS {
                Init::Random
            } else {
                Init::Mean
            }
        }
        (AdapterKind::Prefix, Reparam::Mlp | Reparam::Lstm, _) => Init::Random,
        _ => Init::Prompts,
    }
}

/// The encoder before the first step.
fn start(
    model: &Model,
    o: &TrainOptions,
    init: &Init,
    length: usize,
    passes: &mut Passes,
    train: &[Example],
) -> Result<Encoder> {
    let shape = model.shape();
    let mut rng = Rng::new(o.seed, Stream::Init);
    let reparam = o.effective_reparam();
    let width = match o.method {
        AdapterKind::Prefix => 2 * shape.n_layer * shape.kv_width(),
        AdapterKind::Prompt | AdapterKind::PTuning => shape.n_embd,
    };
    let rows = match init {
        Init::Random => None,
        Init::Zeros => Some(vec![0.0; length * width]),
        Init::Adapter(adapter) => Some(adapter_rows(model, o, length, adapter)?),
        Init::Vocab => {
            let n = shape.n_vocab as f32;
            let ids: Vec<i32> = (0..length).map(|_| rng.uniform(0.0, n) as i32).collect();
            Some(passes.embeddings(&ids)?)
        }
        Init::Text(text) => {
            // With BOS, as PEFT tokenizes it.
            let ids = model
                .vocab()
                .tokenize(text, o.method != AdapterKind::Prefix, true)?;
            Some(text_rows(model, o.method, length, &ids, passes)?)
        }
        Init::Prompts => {
            let ids: Vec<i32> = train.iter().flat_map(Example::ids).take(length).collect();
            Some(text_rows(model, o.method, length, &ids, passes)?)
        }
        Init::Mean => Some(mean_rows(model, length, train, passes, &mut rng)?),
    };
    let encoder = match (o.method, reparam) {
        (_, Reparam::None) => {
            let rows = rows.unwrap_or_else(|| normal_rows(length, width, &mut rng));
            return Ok(Encoder::rows(rows, length, width, o.freeze_first));
        }
        (AdapterKind::Prefix, _) => {
            let input = shape.kv_width();
            Encoder::prefix_mlp(length, input, o.hidden.unwrap_or(input), width, &mut rng)
        }
        (_, Reparam::Mlp) => {
            Encoder::ptuning_mlp(length, width, o.hidden.unwrap_or(width), &mut rng)
        }
        (_, Reparam::Lstm) => {
            let hidden = o.hidden.unwrap_or(width);
            Encoder::ptuning_lstm(length, width, hidden, o.lstm_layers, &mut rng)
        }
    };
    Ok(match rows {
        Some(rows) => encoder.starting_at(&rows),
        None => encoder,
    })
}

/// The rows of an adapter to go on with.
fn adapter_rows(
    model: &Model,
    o: &TrainOptions,
    length: usize,
    adapter: &Adapter,
) -> Result<Vec<f32>> {
    adapter.check_fits(model.shape(), &model.fingerprint(), false)?;
    let describe =
        |kind: AdapterKind, length: usize| format!("a {kind} adapter of {length} virtual tokens");
    // Prompt and P-tuning rows are the same thing in different places.
    let same = (adapter.kind() == AdapterKind::Prefix) == (o.method == AdapterKind::Prefix);
    if !same || adapter.length() != length {
        return Err(TrainError::InitAdapter {
            got: describe(adapter.kind(), adapter.length()),
            expected: describe(o.method, length),
        }
        .into());
    }
    Ok(match adapter.payload() {
        Payload::Rows(rows) => rows.to_f32(),
        Payload::Prefix { layers } => prefix_to_peft(layers, model.shape())?,
    })
}

/// Rows of a prefix for [`Init::Mean`].
fn mean_rows(
    model: &Model,
    length: usize,
    train: &[Example],
    passes: &mut Passes,
    rng: &mut Rng,
) -> Result<Vec<f32>> {
    let width = model.shape().kv_width();
    // Keys, then values of each layer, one token behind the other.
    let mut seen: Vec<[Vec<f32>; 2]> = vec![Default::default(); model.shape().n_layer];
    for example in train {
        let left = MEAN_TOKENS - seen[0][0].len() / width;
        if left == 0 {
            break;
        }
        let first = model.vocab().leading_bos_if(example.bos);
        let longest = model.n_ctx_train().min(1 + left);
        let ids: Vec<i32> = first
            .into_iter()
            .chain(example.ids())
            .take(longest)
            .collect();
        if ids.len() < 2 {
            continue;
        }
        // The first token is the attention sink, like no other.
        for (all, new) in seen.iter_mut().zip(passes.keys_values(&ids)?) {
            for (all, new) in all.iter_mut().zip(new) {
                all.extend(&new[width..]);
            }
        }
    }
    if seen[0][0].is_empty() {
        return Err(TrainError::EmptyInit.into());
    }
    let layers = seen.into_iter().map(|kv| {
        let [k, v] = kv.map(|tokens| Moments::of(&tokens, width));
        let mut rows = |around: &[f32], deviation: f32| -> Vec<f32> {
            let around = around.iter().cycle().take(length * width);
            around
                .map(|x| x + MEAN_NOISE * deviation * rng.normal())
                .collect()
        };
        let k = rows(&k.mean, k.deviation);
        [k, rows(&[0.0], v.deviation)]
    });
    let layers = layers.collect();
    prefix_rows(model, layers)
}

/// Mean and spread of rows.
struct Moments {
    mean: Vec<f32>,
    /// Root mean square distance of a value from the mean of its column; of a single row, from 0.
    deviation: f32,
}

impl Moments {
    /// Of rows of `width` values, one behind the other; at least one.
    fn of(rows: &[f32], width: usize) -> Self {
        let n = (rows.len() / width) as f64;
        let (mut sum, mut squares) = (vec![0.0; width], 0.0);
        for row in rows.chunks_exact(width) {
            for (sum, &x) in sum.iter_mut().zip(row) {
                *sum += f64::from(x);
                squares += f64::from(x) * f64::from(x);
            }
        }
        let of_means: f64 = match n {
            1.0 => 0.0,
            _ => sum.iter().map(|s| s * s / n).sum(),
        };
        Self {
            mean: sum.iter().map(|s| (s / n) as f32).collect(),
            deviation: ((squares - of_means).max(0.0) / rows.len() as f64).sqrt() as f32,
        }
    }
}

/// Rows made from a text, cut or repeated to `length` tokens.
fn text_rows(
    model: &Model,
    method: AdapterKind,
    length: usize,
    ids: &[i32],
    passes: &mut Passes,
) -> Result<Vec<f32>> {
    if ids.is_empty() {
        return Err(TrainError::EmptyInit.into());
    }
    match method {
        AdapterKind::Prompt | AdapterKind::PTuning => {
            let ids: Vec<i32> = ids.iter().cycle().take(length).copied().collect();
            passes.embeddings(&ids)
        }
        AdapterKind::Prefix => {
            // The base expects its attention sink first.
            let bos = model.vocab().leading_bos();
            let text = ids.iter().cycle();
            let ids: Vec<i32> = bos.iter().chain(text).take(length).copied().collect();
            prefix_rows(model, passes.keys_values(&ids)?)
        }
    }
}
