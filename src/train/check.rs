//! Which options make sense, alone and together.

use super::{Init, Objective, Reparam, TrainError, TrainOptions};
use crate::adapter::AdapterKind;

/// Rows of one step, beyond which nobody waits for it.
const MAX_ROWS: usize = 1 << 20;
/// Wider than any model.
const MAX_HIDDEN: usize = 1 << 16;
const MAX_LSTM_LAYERS: usize = 16;
/// Directions of a step: more would be more exact than any batch.
const MAX_DIRECTIONS: usize = 1 << 12;
/// As for sessions; ggml has the same limit.
pub(super) const MAX_THREADS: usize = 512;

pub(super) fn check_range(
    option: &'static str,
    value: usize,
    max: usize,
) -> Result<(), TrainError> {
    if (1..=max).contains(&value) {
        return Ok(());
    }
    let why = match value {
        0 => "must be at least 1",
        _ => "is more than is supported",
    };
    Err(wrong(option, value, why))
}

/// What is wrong with one option.
fn wrong(option: &'static str, value: impl ToString, why: &'static str) -> TrainError {
    TrainError::Option {
        option,
        value: value.to_string(),
        why,
    }
}

/// Why two of them exclude each other.
fn conflict(first: &str, second: String, why: &'static str) -> TrainError {
    TrainError::Conflict {
        first: first.to_owned(),
        second,
        why,
    }
}

fn method(o: &TrainOptions) -> String {
    format!("method {}", o.method)
}

/// Everything that is known without a model or data.
pub(super) fn check(o: &TrainOptions) -> Result<(), TrainError> {
    sizes(o)?;
    duration(o)?;
    optimizer(o)?;
    mezo(o)?;
    regularization(o)?;
    evaluation(o)?;
    encoder(o)?;
    placement(o)?;
    start(o)
}

fn sizes(o: &TrainOptions) -> Result<(), TrainError> {
    check_range("batch", o.batch, MAX_ROWS)?;
    check_range("accum", o.accum, MAX_ROWS / o.batch)?;
    check_range("hidden width", o.hidden.unwrap_or(1), MAX_HIDDEN)?;
    check_range("LSTM layers", o.lstm_layers, MAX_LSTM_LAYERS)?;
    check_range("threads", o.threads.unwrap_or(1), MAX_THREADS)
}

fn positive(x: f64) -> bool {
    x.is_finite() && x > 0.0
}

fn duration(o: &TrainOptions) -> Result<(), TrainError> {
    if o.steps == Some(0) {
        return Err(wrong("steps", 0, "at least one"));
    }
    if let Some(epochs) = o.epochs.filter(|&e| !positive(e)) {
        return Err(wrong("epochs", epochs, "must be positive"));
    }
    Ok(())
}

fn optimizer(o: &TrainOptions) -> Result<(), TrainError> {
    if let Some(lr) = o.lr.filter(|&lr| !positive(lr)) {
        return Err(wrong("learning rate", lr, "must be positive"));
    }
    below_1("beta", o.betas.0)?;
    below_1("beta", o.betas.1)?;
    if let Some(decay) = o.weight_decay.filter(|d| !(d.is_finite() && *d >= 0.0)) {
        return Err(wrong("weight decay", decay, "must not be negative"));
    }
    if !(o.clip.is_finite() && o.clip >= 0.0) {
        let why = "must not be negative; 0 for no limit";
        return Err(wrong("clip", o.clip, why));
    }
    Ok(())
}

/// What forward passes alone cannot do.
fn mezo(o: &TrainOptions) -> Result<(), TrainError> {
    let Some(mezo) = o.mezo else {
        return Ok(());
    };
    check_range("directions", mezo.directions, MAX_DIRECTIONS)?;
    if !positive(f64::from(mezo.epsilon)) {
        return Err(wrong("epsilon", mezo.epsilon, "must be positive"));
    }
    match o.loss {
        Objective::Distill { .. } => Err(conflict(
            "distillation",
            "forward passes only (mezo)".to_owned(),
            "what the base predicts is read by passes with a tape",
        )),
        Objective::Completion | Objective::All => Ok(()),
    }
}

fn below_1(
    option: &'static str,
    value: impl Into<f64> + Copy + ToString,
) -> Result<(), TrainError> {
    match (0.0..1.0).contains(&value.into()) {
        true => Ok(()),
        false => Err(wrong(option, value, "must be from 0 to below 1")),
    }
}

fn regularization(o: &TrainOptions) -> Result<(), TrainError> {
    below_1("label smoothing", o.label_smoothing)?;
    below_1("dropout", o.dropout)
}

fn evaluation(o: &TrainOptions) -> Result<(), TrainError> {
    if o.eval_every == Some(0) {
        return Err(wrong("evaluation interval", 0, "at least one step"));
    }
    if o.patience == Some(0) {
        return Err(wrong("patience", 0, "at least one evaluation"));
    }
    if let Objective::Distill { top_k: 0, .. } = o.loss {
        return Err(wrong("top k", 0, "at least one token"));
    }
    Ok(())
}

/// The encoder against the method.
fn encoder(o: &TrainOptions) -> Result<(), TrainError> {
    let reparam = o.effective_reparam();
    match (o.method, reparam) {
        (AdapterKind::Prompt, Reparam::Mlp | Reparam::Lstm) => {
            let why = "prompt tuning trains the rows themselves; P-tuning has encoders";
            return Err(conflict("an encoder", method(o), why));
        }
        (AdapterKind::Prefix, Reparam::Lstm) => {
            return Err(conflict("an LSTM", method(o), "prefixes have the MLP"));
        }
        _ => {}
    }
    if o.hidden.is_some() && reparam == Reparam::None {
        let (no_encoder, why) = ("no encoder".to_owned(), "only networks have one");
        return Err(conflict("an inner width", no_encoder, why));
    }
    Ok(())
}

/// Where virtual tokens stand, and which of them are trained, against the method.
fn placement(o: &TrainOptions) -> Result<(), TrainError> {
    if o.template.is_some() && o.method != AdapterKind::PTuning {
        let why = "only P-tuning places virtual tokens within the text";
        return Err(conflict("a template", method(o), why));
    }
    if o.freeze_first == 0 {
        return Ok(());
    }
    let why = "only rows of a prefix that are trained themselves can be kept";
    if o.method != AdapterKind::Prefix {
        return Err(conflict("frozen rows", method(o), why));
    }
    if o.effective_reparam() != Reparam::None {
        return Err(conflict("frozen rows", "an encoder".to_owned(), why));
    }
    Ok(())
}

/// The initial values against the method and the encoder.
fn start(o: &TrainOptions) -> Result<(), TrainError> {
    Err(match (&o.init, o.method) {
        (Some(Init::Vocab), AdapterKind::Prefix) => conflict(
            "initial rows from the vocabulary",
            method(o),
            "a prefix has no embeddings; start from a text",
        ),
        (Some(Init::Mean), AdapterKind::Prompt | AdapterKind::PTuning) => conflict(
            "initial rows at the mean key",
            method(o),
            "virtual tokens have no keys; start from a text",
        ),
        (Some(Init::Zeros), _) if o.effective_reparam() != Reparam::None => conflict(
            "initial zeros",
            "an encoder".to_owned(),
            "nothing would ever move",
        ),
        _ => return Ok(()),
    })
}

/// P.
pub(super) fn length(o: &TrainOptions) -> Result<usize, TrainError> {
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
    if length == 0 || length > crate::adapter::MAX_LENGTH {
        return Err(wrong("length", length, "from 1 to 65536 virtual tokens"));
    }
    if template.is_some_and(|n| n != length) {
        let why = "the template places another number of virtual tokens";
        return Err(wrong("length", length, why));
    }
    if o.freeze_first >= length {
        let why = "at least one row must be left to train";
        return Err(wrong("number of frozen rows", o.freeze_first, why));
    }
    Ok(length)
}
