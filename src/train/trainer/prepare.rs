//! What a run is made from.

use super::{State, Trainer};
use crate::adapter::AdapterKind;
use crate::error::Result;
use crate::ggml::CancelToken;
use crate::model::Model;
use crate::train::check::{check, length};
use crate::train::data::Examples;
use crate::train::encoder::Encoder;
use crate::train::layout::Layout;
use crate::train::optimizer::{Optimizer, OptimizerKind, OptimizerOptions};
use crate::train::pass::Passes;
use crate::train::rng::{Rng, Stream};
use crate::train::sequences::Sequences;
use crate::train::start::{default_init, start};
use crate::train::teacher::Teacher;
use crate::train::{Init, Objective, TrainError, TrainOptions};
use std::sync::OnceLock;

/// SGD without momentum hardly moves prompts.
const SGD_MOMENTUM: f64 = 0.9;

impl Trainer {
    /// As [`Trainer::new`], from `encoder` on if there is one.
    pub(in crate::train) fn prepare(
        model: &Model,
        mut options: TrainOptions,
        [train, valid]: [Examples; 2],
        encoder: Option<Encoder>,
    ) -> Result<Self> {
        if let (AdapterKind::PTuning, None, Some(Init::Adapter(adapter))) =
            (options.method, &options.template, &options.init)
        {
            options.template = adapter.template().cloned();
        }
        check(&options)?;
        let length = fitting_length(model, &options)?;
        let mut passes = Passes::new(model, &options)?;
        let layout = Layout::new(model, &options, length, [&train, &valid])?;
        let n_vocab = model.shape().n_vocab;
        let sequences = |examples, set| Sequences::new(examples, &layout, n_vocab, set);
        let (train, train_trimmed) = sequences(train, "training set")?;
        if train.is_empty() {
            return Err(layout
                .nothing_to_learn("training set", train.examples())
                .into());
        }
        let (valid, valid_trimmed) = sequences(valid, "validation set")?;
        let (steps, epochs) = duration(&options, train.len());
        let encoder = match encoder {
            Some(encoder) => encoder,
            None => {
                let default = default_init(&options, steps, epochs);
                let init = options.init.as_ref().unwrap_or(&default);
                start(model, &options, init, length, &mut passes, train.examples())?
            }
        };
        let lr = options.lr.unwrap_or_else(|| options.default_lr());
        let optimizer = Optimizer::new(optimizer_options(&options, lr, epochs), encoder.params());
        let teacher = match &options.loss {
            Objective::Distill { context, top_k } => {
                let sets = [&train, &valid];
                Some(Teacher::new(model, context, *top_k, &layout, sets)?)
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
            state: State::new(encoder, optimizer, options.seed),
            model: model.clone(),
            options,
            layout,
            train,
            valid,
            teacher,
            cancel: CancelToken::default(),
            recomputed: 0,
            identity: OnceLock::new(),
        })
    }
}

impl State {
    /// Before the first step.
    fn new(mut encoder: Encoder, optimizer: Optimizer, seed: u64) -> Self {
        Self {
            step: 0,
            good: encoder.forward(),
            encoder,
            optimizer,
            shuffle: Rng::new(seed, Stream::Shuffle),
            dropout: Rng::new(seed, Stream::Dropout),
            order: Vec::new(),
            used: 0,
            drawn: Vec::new(),
            best: None,
            stale: 0,
            first_loss: None,
            last_loss: None,
            tokens: 0,
            seconds: 0.0,
            broken: false,
            unevaluated: None,
            base_loss: None,
        }
    }
}

/// P, if it leaves room for text.
fn fitting_length(model: &Model, options: &TrainOptions) -> Result<usize> {
    let length = length(options)?;
    let wrong = |option, value: usize, why| TrainError::Option {
        option,
        value: value.to_string(),
        why,
    };
    if length >= model.n_ctx_train() {
        let why = "leaves no room for text in the context that the model was trained on";
        return Err(wrong("length", length, why).into());
    }
    if let Some(max_len) = options.max_len.filter(|&n| n <= length) {
        let why = "leaves no room for text beside the virtual tokens";
        return Err(wrong("longest row", max_len, why).into());
    }
    Ok(length)
}

/// Steps of a run over `rows` rows, and how often it reads them.
fn duration(options: &TrainOptions, rows: usize) -> (u64, f64) {
    let rows_per_step = options.batch * options.accum;
    let steps = options.steps.unwrap_or_else(|| match options.epochs {
        Some(epochs) => ((epochs * rows as f64 / rows_per_step as f64).ceil() as u64).max(1),
        None => TrainOptions::DEFAULT_STEPS,
    });
    (steps, steps as f64 * rows_per_step as f64 / rows as f64)
}

fn optimizer_options(options: &TrainOptions, lr: f64, epochs: f64) -> OptimizerOptions {
    let weight_decay = options
        .weight_decay
        .unwrap_or_else(|| options.default_weight_decay(lr, epochs));
    let chosen = OptimizerOptions::new(options.optimizer)
        .betas(options.betas.0, options.betas.1)
        .weight_decay(weight_decay);
    match options.optimizer {
        OptimizerKind::Sgd => chosen.momentum(SGD_MOMENTUM),
        OptimizerKind::AdamW | OptimizerKind::Adafactor => chosen,
    }
}
