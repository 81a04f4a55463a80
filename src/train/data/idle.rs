//! Rows that count for nothing.

use super::{DataError, Place, Row};

/// Rows that a warning names.
const NAMED: usize = 5;

/// Rows of weight 0 that were left out.
#[derive(Default)]
pub(super) struct Idle {
    rows: usize,
    /// Where the first of them stand.
    first: Vec<Place>,
}

impl Idle {
    /// Whether `row` counts. One that does not is remembered.
    pub(super) fn counts(&mut self, row: &Row) -> bool {
        if row.weight != 0.0 {
            return true;
        }
        self.rows += 1;
        if self.first.len() < NAMED {
            self.first.push(row.place.clone());
        }
        false
    }

    /// Warns of the rows that were left out, if `any` other is there.
    ///
    /// # Errors
    /// [`DataError::NoWeight`] if none is.
    pub(super) fn finish(self, any: bool) -> Result<(), DataError> {
        let Some(first) = self.first.first() else {
            return Ok(());
        };
        if !any {
            let file = first.file().map(|file| file.display().to_string());
            return Err(DataError::NoWeight {
                source_name: file.unwrap_or_else(|| "data set".to_owned()),
            });
        }
        let names: Vec<_> = self.first.iter().map(ToString::to_string).collect();
        let more = match self.rows - names.len() {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        let names = names.join(", ");
        let rows = match self.rows {
            1 => "1 row has the weight 0 and counts".to_owned(),
            n => format!("{n} rows have the weight 0 and count"),
        };
        tracing::warn!("{rows} for nothing: {names}{more}");
        Ok(())
    }
}
