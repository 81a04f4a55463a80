//! Rows of a JSONL file, one after the other.

use crate::failure::{Failure, Result};
use ggraft::train::data::{Dataset, Row};
use std::path::Path;

/// The rows of a file; `-` is stdin.
pub(crate) fn read(path: &Path) -> Result<Dataset> {
    Ok(match path == Path::new("-") {
        true => Dataset::from_reader(std::io::stdin().lock(), "standard input")?,
        false => Dataset::read_jsonl(path)?,
    })
}

/// What became of the rows.
pub(crate) struct Done {
    /// Rows that were computed.
    pub(crate) rows: usize,
    /// Why the rows behind them were not, if Ctrl-C or a signal stopped the command.
    pub(crate) stopped: Option<Failure>,
}

/// Rows that a warning names.
const NAMED: usize = 5;

/// Calls `each` for every row; its failure names the line. Rows that do not fit into the context are left out with a warning,
/// and Ctrl-C ends the loop: what was computed is kept.
pub(crate) fn for_each(data: &Dataset, mut each: impl FnMut(&Row) -> Result<()>) -> Result<Done> {
    let progress = crate::io::progress(data.rows().len());
    let mut long = Vec::new();
    let mut done = Done {
        rows: 0,
        stopped: None,
    };
    let result = data.rows().iter().try_for_each(|row| {
        match each(row) {
            Ok(()) => done.rows += 1,
            Err(why) if why.is_context_full() => long.push(row.place()),
            Err(why) => return Err(Failure::at(row.place(), why)),
        }
        progress.inc(1);
        Ok(())
    });
    // An error line must not end up behind the bar.
    progress.finish_and_clear();
    if !long.is_empty() {
        let names: Vec<_> = long.iter().take(NAMED).map(ToString::to_string).collect();
        let more = match long.len() - names.len() {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        let text = format!(
            "{} rows do not fit into the context (a longer one: --ctx): {}{more}",
            long.len(),
            names.join(", ")
        );
        if done.rows == 0 && result.is_ok() {
            return Err(Failure::Unsuitable(format!("all {text}")));
        }
        tracing::warn!("left out: {text}");
    }
    match result {
        Err(why) if why.is_cancelled() => {
            done.stopped = Some(Failure::Interrupted(format!(
                "interrupted after {} of {} rows",
                done.rows,
                data.rows().len()
            )));
            Ok(done)
        }
        result => result.map(|()| done),
    }
}
