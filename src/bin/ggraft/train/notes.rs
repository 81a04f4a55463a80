//! What is odd about a run, said before its first step.

use crate::args::warn_of_threads;
use crate::data;
use ggraft::train::data::Examples;
use ggraft::train::{OptimizerKind, TrainOptions, Trainer};

/// Warns of what may not be meant.
pub(super) fn warn(trainer: &Trainer) {
    let options = trainer.options();
    let limit = match options.max_len {
        Some(n) => format!("--max-len {n}"),
        None => "the context that the model was trained on".to_owned(),
    };
    let sets = trainer.examples();
    for (trimmed, rows) in trainer.trimmed().iter().zip(sets) {
        if !trimmed.cut.is_empty() {
            let (rows_do, names) = (data::rows_do(trimmed.cut.len()), names(rows, &trimmed.cut));
            tracing::warn!("{rows_do} not fit into {limit}, the rest is cut off: {names}");
        }
        if !trimmed.lost.is_empty() {
            let (n, names) = (trimmed.lost.len(), names(rows, &trimmed.lost));
            tracing::warn!(
                "{n} of them left out, as nothing remains that is to be predicted: {names}"
            );
        }
    }
    if options.optimizer != OptimizerKind::AdamW
        && options.betas != TrainOptions::new(options.method).betas
    {
        tracing::warn!("--beta1 and --beta2 have no effect: they are options of adamw");
    }
    let (taken, there) = (options.batch * options.accum, sets[0].len());
    if taken > there {
        tracing::warn!(
            "a step takes {taken} rows (--batch x --accum), the data has {there}: it reads some of them twice"
        );
    }
    let steps = trainer.steps();
    if let Some(warmup) = options.warmup.filter(|&n| n >= steps) {
        tracing::warn!(
            "the rate rises for {warmup} steps (--warmup) of {steps}: it never reaches its highest"
        );
    }
    warn_of_threads(options.threads);
}

/// Where the first of the rows `found` stand.
fn names(rows: &Examples, found: &[usize]) -> String {
    data::names(found.iter().map(|&i| rows.place(i)))
}
