//! What is odd about a run, said before its first step.

use ggraft::train::Trainer;
use ggraft::train::data::{Dataset, Row};

/// Rows that a warning names.
const NAMED: usize = 5;

/// Warns of what may not be meant: `sets` are the training and the validation rows.
pub(super) fn warn(trainer: &Trainer, sets: [Option<&Dataset>; 2]) {
    let options = trainer.options();
    let limit = match options.max_len {
        Some(n) => format!("--max-len {n}"),
        None => "the context that the model was trained on".to_owned(),
    };
    for (trimmed, set) in trainer.trimmed().iter().zip(sets) {
        let Some(rows) = set.map(Dataset::rows) else {
            continue;
        };
        let named = |found: &[usize]| names(&found.iter().map(|&i| &rows[i]).collect::<Vec<_>>());
        if !trimmed.cut.is_empty() {
            let (n, names) = (trimmed.cut.len(), named(&trimmed.cut));
            tracing::warn!("{n} rows do not fit into {limit} and lose their ends: {names}");
        }
        if !trimmed.lost.is_empty() {
            let (n, names) = (trimmed.lost.len(), named(&trimmed.lost));
            tracing::warn!(
                "{n} of them lose all that they have to predict and are not used: {names}"
            );
        }
        let idle: Vec<_> = rows.iter().filter(|row| row.weight == 0.0).collect();
        if !idle.is_empty() {
            let (n, names) = (idle.len(), names(&idle));
            tracing::warn!("{n} rows have the weight 0 and count for nothing: {names}");
        }
    }
    let (taken, there) = (
        options.batch * options.accum,
        sets[0].map_or(0, |set| set.rows().len()),
    );
    if taken > there {
        tracing::warn!(
            "a step takes {taken} rows (--batch x --accum), the data has {there}: it reads some of them twice"
        );
    }
    let cores = std::thread::available_parallelism().map_or(usize::MAX, std::num::NonZero::get);
    if let Some(threads) = options.threads.filter(|&n| n > cores) {
        tracing::warn!(
            "{threads} threads on {cores} cores wait for each other: use -t {cores} or fewer"
        );
    }
}

/// Where the first of `rows` stand.
fn names(rows: &[&Row]) -> String {
    let named: Vec<_> = rows
        .iter()
        .take(NAMED)
        .map(|row| row.place().to_string())
        .collect();
    match rows.len() - named.len() {
        0 => named.join(", "),
        n => format!("{} and {n} more", named.join(", ")),
    }
}
