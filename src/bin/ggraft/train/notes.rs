//! What is odd about a run, said before its first step.

use crate::args::warn_of_threads;
use crate::data;
use crate::failure::Result;
use crate::io;
use ggraft::train::data::Examples;
use ggraft::train::{OptimizerKind, TrainOptions, Trainer};
use std::time::Instant;

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

/// How long a run by forward passes will take, found out with some of its rows: nobody shall wait for it by mistake.
pub(super) fn estimate(trainer: &mut Trainer) -> Result<()> {
    let Some(mezo) = trainer.options().mezo else {
        return Ok(());
    };
    let rows = trainer.options().batch;
    let examples: Vec<_> = trainer.examples()[0].iter().take(rows).collect();
    let share = trainer.workload().rows_per_step as f64 / examples.len().max(1) as f64;
    let begin = Instant::now();
    trainer.gradient(&examples)?;
    let step = begin.elapsed().as_secs_f64() * share;
    let steps = trainer.steps() - trainer.summary().steps;
    io::note(&format!(
        "MeZO: {} forward passes a step instead of one forward and one backward pass, about {step:.1} s a step and {:.0} min for {steps} steps; \
         expect to need ten to a hundred times as many steps as backpropagation does",
        2 * mezo.directions,
        step * steps as f64 / 60.0
    ));
    Ok(())
}
