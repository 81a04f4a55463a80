//! The training loop.

use super::batch::{MAX_TOKENS, Packed, Sequence, groups};
use super::check::{MAX_THREADS, check, check_range, length};
use super::data::Example;
use super::encoder::Encoder;
use super::evaluate::mean_loss;
use super::layout::Layout;
use super::optimizer::{Optimizer, OptimizerOptions, clip_grad_norm};
use super::pass::{Goal, Passes, Variables};
use super::report::{CancelToken, Finish, Report, Summary};
use super::rng::{Rng, Stream};
use super::start::{default_init, prefix_rows, start};
use super::teacher::Teacher;
use super::{Init, Objective, Reparam, TrainError, TrainOptions, Trimmed};
use crate::adapter::{Adapter, AdapterKind, BaseSignature, Parts, Payload, Rows, prefix_from_peft};
use crate::error::Result;
use crate::ggml::default_threads;
use crate::model::Model;
use std::borrow::Cow;
use std::collections::BTreeMap;
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
    pub(super) train: Vec<Sequence>,
    pub(super) valid: Vec<Sequence>,
    /// Who has yet to say what some of the rows shall predict, if anybody.
    teacher: Option<Teacher>,
    trimmed: [Trimmed; 2],
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
        if length >= model.n_ctx_train() {
            return Err(TrainError::Option {
                option: "length",
                value: length.to_string(),
                why: "leaves no room for text in the context that the model was trained on",
            }
            .into());
        }
        let n_threads = options.threads.unwrap_or_else(default_threads);
        let memory = options.memory.unwrap_or(TrainOptions::DEFAULT_MEMORY);
        let n_ctx = options.n_ctx.unwrap_or(model.n_ctx_train());
        let mut passes = Passes::new(
            model,
            model.pool(n_threads),
            usize::try_from(memory).unwrap_or(usize::MAX),
            model.has_long_context(n_ctx),
        );
        let layout = Layout::new(model, &options, length);
        let (train_rows, train_trimmed) = layout.sequences(&train, "training set")?;
        if train_rows.is_empty() {
            return Err(layout.nothing_to_learn("training set").into());
        }
        let (valid_rows, valid_trimmed) = layout.sequences(&valid, "validation set")?;
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
        let teacher = match &options.loss {
            Objective::Distill { context, top_k } => {
                let sequences = [&train_rows[..], &valid_rows[..]];
                let examples = [train, valid];
                Some(Teacher::new(model, context, *top_k, examples, sequences)?)
            }
            Objective::Completion | Objective::All => None,
        };
        Ok(Self {
            length,
            steps,
            lr,
            warmup: options.warmup.unwrap_or((steps / 15).min(100)),
            eval_every: options
                .eval_every
                .unwrap_or(steps.div_ceil(TrainOptions::DEFAULT_EVALUATIONS)),
            trimmed: [train_trimmed, valid_trimmed],
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
                base_loss: None,
            },
            model: model.clone(),
            options,
            train: train_rows,
            valid: valid_rows,
            teacher,
            cancel: CancelToken::default(),
            recomputed: 0,
        })
    }

    /// Rows of both sets that wait for [`Trainer::teach`]; 0 unless [`Objective::Distill`] is the objective.
    pub fn untaught(&self) -> usize {
        self.teacher.as_ref().map_or(0, Teacher::left)
    }

    /// Lets the base read the context in front of some rows that wait for it, as many as fit into one graph. What is left
    /// [`Trainer::step`] does at once before the first step: this is for those who want to do something else in between.
    ///
    /// # Errors
    /// [`TrainError::Cancelled`], [`TrainError::OutOfMemory`]; nothing has changed then.
    pub fn teach(&mut self) -> Result<()> {
        if let Some(teacher) = &mut self.teacher {
            let sequences = [&mut self.train[..], &mut self.valid[..]];
            teacher.teach(&mut self.passes, sequences, &self.cancel.0)?;
            if teacher.left() == 0 {
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
        self.finish_teaching()?;
        let rows = self.state.encoder.forward();
        let variables = self.variables(&rows)?;
        let valid: Vec<_> = self.valid.iter().collect();
        mean_loss(&mut self.passes, &valid, &variables, &self.cancel.0).map(Some)
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
        let valid: Vec<_> = self
            .valid
            .iter()
            .filter_map(Sequence::without_virtual)
            .collect();
        if valid.is_empty() {
            return Ok(None);
        }
        let valid: Vec<_> = valid.iter().collect();
        let loss = mean_loss(&mut self.passes, &valid, &Variables::None, &self.cancel.0)?;
        self.state.base_loss = Some(loss);
        Ok(Some(loss))
    }

    /// Mean cross-entropy of `examples` under the current parameters, and its gradient with respect to each of them by PEFT's
    /// name, in PyTorch's shapes; `prompt_embeddings` stands for the rows that an encoder produces. Nothing is changed. The
    /// targets are the examples' own tokens whatever the objective: the teacher of [`Objective::Distill`] is not asked.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn gradient(&mut self, examples: &[Example]) -> Result<(f64, BTreeMap<String, Vec<f32>>)> {
        let layout = Layout::new(&self.model, &self.options, self.length);
        let (sequences, _) = layout.sequences(examples, "examples")?;
        let rows = self.state.encoder.forward();
        let batch: Vec<_> = sequences.iter().collect();
        let (loss, _, _, d_rows) = self.accumulate(&batch, batch.len(), &rows)?;
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

    /// Rows of the training and of the validation set that are too long.
    pub fn trimmed(&self) -> &[Trimmed; 2] {
        &self.trimmed
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
            base_valid_loss: state.base_loss,
            trained_parameters: state.encoder.params().iter().map(trained).sum(),
            adapter_values: state.good.len() as u64,
            cut_rows: self.trimmed[0].cut.len(),
            recomputed_layers: self.recomputed,
        }
    }

    pub(super) fn rows_per_step(&self) -> usize {
        self.options.batch * self.options.accum
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
        let result = self.accumulate(&batch, self.options.batch, &used);
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

    /// Mean loss of `batch`, of which `at_once` rows are computed together if they fit into a graph; tokens computed, targets,
    /// gradient with respect to `rows`.
    fn accumulate(
        &mut self,
        batch: &[&Sequence],
        at_once: usize,
        rows: &[f32],
    ) -> Result<(f64, u64, u64, Vec<f32>)> {
        let variables = self.variables(rows)?;
        let mass: f64 = batch.iter().map(|s| s.mass()).sum();
        // A batch of rows without weight teaches nothing.
        let scale = if mass > 0.0 { 1.0 / mass } else { 0.0 };
        let mut d_rows = vec![0.0; rows.len()];
        let (mut loss, mut tokens, mut targets) = (0.0, 0, 0);
        let parts = batch.chunks(at_once);
        for group in parts.flat_map(|part| groups(part, MAX_TOKENS)) {
            let packed = Packed::new(&group);
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
