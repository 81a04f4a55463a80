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

/// Calls `each` for every row; its failure names the line.
pub(crate) fn for_each(data: &Dataset, mut each: impl FnMut(&Row) -> Result<()>) -> Result<()> {
    let progress = crate::io::progress(data.rows().len());
    let result = data.rows().iter().try_for_each(|row| {
        each(row).map_err(|why| Failure::at(row.place(), why))?;
        progress.inc(1);
        Ok(())
    });
    // An error line must not end up behind the bar.
    progress.finish_and_clear();
    result
}
