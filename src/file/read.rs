//! Whole small files from strangers.

use crate::{Error, Result};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Reads the regular file at `path`, or fails with `too_large(size)` if it has more than `max` bytes.
///
/// Devices and pipes are refused: they have no size and may never end.
pub(crate) fn read_capped(
    path: &Path,
    max: u64,
    too_large: impl FnOnce(u64) -> Error,
) -> Result<Vec<u8>> {
    let io = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let meta = std::fs::metadata(path).map_err(io)?;
    if !meta.is_file() {
        return Err(io(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        )));
    }
    if meta.len() > max {
        return Err(too_large(meta.len()));
    }
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::with_capacity(usize::try_from(meta.len()).unwrap_or(0));
    // The file may have grown since: never more than was measured.
    file.take(meta.len()).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}
