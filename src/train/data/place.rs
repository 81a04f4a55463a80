//! Where a row stands.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// Where a row stands: `file:line`, or `row n` of rows in memory or in an array. Both count from 1.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    pub(super) file: Option<Arc<Path>>,
    pub(super) number: usize,
    /// Rows are counted, not lines.
    pub(super) in_array: bool,
}

impl Place {
    /// The file, `None` for rows in memory.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// The line of the file, or the number of the row in memory or in the file's array; 0 for a row that is in no data set yet.
    pub fn number(&self) -> usize {
        self.number
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.number) {
            (Some(file), number) if self.in_array => {
                write!(f, "{}, row {number}", file.display())
            }
            (Some(file), number) => write!(f, "{}:{number}", file.display()),
            (None, 0) => f.write_str("row"),
            (None, number) => write!(f, "row {number}"),
        }
    }
}
