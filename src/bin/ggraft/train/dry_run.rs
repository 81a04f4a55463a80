//! `ggraft train --dry-run`: what a run would do.

use super::size;
use crate::failure::Result;
use ggraft::Model;
use ggraft::model::vocab::Vocab;
use ggraft::train::{Position, SetWorkload, Trainer};

/// What `trainer` would do, one fact per line; the last line is a row's tokens.
pub(super) fn report(trainer: &Trainer, model: &Model) -> Result<String> {
    let work = trainer.workload();
    let summary = trainer.summary();
    let mut out = String::new();
    let mut row = |name: &str, text: String| out += &format!("{name:<16} {text}\n");
    row("training", set(&work.train));
    row(
        "validation",
        work.valid.as_ref().map_or("no rows".to_owned(), set),
    );
    row(
        "steps",
        format!(
            "{} of {} rows: {:.1} passes over the data, learning rate {}",
            work.steps, work.rows_per_step, work.epochs, work.lr
        ),
    );
    row(
        "adapter",
        format!(
            "{}, {} numbers ({} trained)",
            trainer.options().method,
            summary.adapter_values,
            summary.trained_parameters
        ),
    );
    let file = std::fs::metadata(model.path()).map_or(0, |meta| meta.len());
    let graph = trainer.graph_memory()?;
    let exceeded = match graph > work.memory {
        true => ", which one layer and the logits exceed",
        false => "",
    };
    row(
        "memory",
        format!(
            "{} of the model's file, mapped, and {} to compute the longest rows (--memory {}{exceeded})",
            size(file),
            size(graph),
            size(work.memory)
        ),
    );
    if let Some((example, positions)) = trainer.positions(0) {
        let place = trainer.examples()[0].place(example);
        row("a row", format!("{place}, what is predicted in [ ]"));
        row("", marked(&positions, model.vocab()));
    }
    Ok(out)
}

fn set(set: &SetWorkload) -> String {
    let SetWorkload {
        rows,
        tokens,
        targets,
        longest,
        ..
    } = set;
    format!(
        "{rows} rows, {tokens} tokens, {targets} of them predicted; the longest row has {longest}"
    )
}

/// The tokens one behind the other with `|` between them, `[...]` around those that are predicted, and `{v}` for virtual ones.
fn marked(positions: &[Position], vocab: &Vocab) -> String {
    let shown = |position: &Position| {
        let text = match position.token {
            None => "{v}".to_owned(),
            Some(id) => String::from_utf8_lossy(&vocab.token_bytes(id, true))
                .escape_debug()
                .to_string(),
        };
        match position.predicted {
            true => format!("[{text}]"),
            false => text,
        }
    };
    positions.iter().map(shown).collect::<Vec<_>>().join("|")
}
