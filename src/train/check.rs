//! Which options make sense, alone and together.

use super::{Init, Objective, Reparam, TrainError, TrainOptions};
use crate::adapter::AdapterKind;

/// Rows of one step, beyond which nobody waits for it.
const MAX_ROWS: usize = 1 << 20;
/// Wider than any model.
const MAX_HIDDEN: usize = 1 << 16;
const MAX_LSTM_LAYERS: usize = 16;
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

pub(super) fn check(o: &TrainOptions) -> Result<(), TrainError> {
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
    if o.hidden.is_some() && reparam == Reparam::None {
        return conflict(
            "an inner width",
            "no encoder".to_owned(),
            "only networks have one",
        );
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
