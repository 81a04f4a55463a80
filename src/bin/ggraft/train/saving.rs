//! Room for the files of a run, and places for those that find none.

use crate::failure::{Failure, Result};
use ggraft::file::atomic::target;
use ggraft::train::Summary;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// What headers take at most: metadata, names of tensors.
const HEADER: u64 = 64 << 10;

/// Room on the disk that is held until the files are written: files of zeros that have no names where the system can do that.
pub(super) struct Room {
    adapter: Held,
    checkpoint: Held,
}

struct Held {
    folder: PathBuf,
    bytes: u64,
    file: Option<File>,
}

impl Room {
    /// For an adapter and a checkpoint of a run on so many `rows`.
    ///
    /// Fails if there is none for the adapter. A run without room for a checkpoint can do its work, so it is only warned.
    pub(super) fn new(
        adapter: &Path,
        checkpoint: &Path,
        run: &Summary,
        rows: usize,
    ) -> Result<Self> {
        let held = |path: &Path, values: u64| Held {
            folder: match target(path).unwrap_or_default().parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
                _ => PathBuf::from("."),
            },
            bytes: 4 * values + HEADER,
            file: None,
        };
        // Parameters with two moments; rows, the best and the last good ones; the order of the data and what is drawn of it.
        let values = 3 * run.trained_parameters + 6 * run.adapter_values + 2 * rows as u64;
        let mut room = Self {
            adapter: held(adapter, run.adapter_values),
            checkpoint: held(checkpoint, values),
        };
        room.adapter.hold().map_err(|source| Failure::File {
            path: adapter.to_owned(),
            source,
        })?;
        if let Err(e) = room.checkpoint.hold() {
            tracing::warn!(
                "{}: {e}: no room for a checkpoint, the run cannot go on if it is stopped",
                checkpoint.display()
            );
        }
        Ok(room)
    }

    /// The adapter is about to be written.
    pub(super) fn give_up_adapter(&mut self) {
        self.adapter.file = None;
    }

    /// The checkpoint is about to be written.
    pub(super) fn give_up_checkpoint(&mut self) {
        self.checkpoint.file = None;
    }

    /// For the next time, if it can be had: the files that are there keep what they have.
    pub(super) fn hold_again(&mut self) {
        for held in [&mut self.adapter, &mut self.checkpoint] {
            if held.file.is_none() {
                let _ = held.hold();
            }
        }
    }
}

impl Held {
    fn hold(&mut self) -> io::Result<()> {
        let mut file = tempfile::tempfile_in(&self.folder)?;
        io::copy(&mut io::Read::take(io::repeat(0), self.bytes), &mut file)?;
        file.flush()?;
        self.file = Some(file);
        Ok(())
    }
}

/// Gives the file at `path` the first free name of `NAME.old`, `NAME.old2`, ..., and returns that. `path` stays as it is until
/// it is replaced: there is no moment without it.
pub(super) fn keep(path: &Path) -> Result<PathBuf> {
    let fail = |source| Failure::File {
        path: path.to_owned(),
        source,
    };
    let path = path.canonicalize().map_err(fail)?;
    let mut n = 1;
    loop {
        let mut name = path.clone().into_os_string();
        name.push(".old");
        if n > 1 {
            name.push(n.to_string());
        }
        let kept = PathBuf::from(name);
        match std::fs::hard_link(&path, &kept) {
            Ok(()) => return Ok(kept),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => n += 1,
            // Not all file systems have links.
            Err(_) if !kept.exists() => {
                std::fs::copy(&path, &kept).map_err(fail)?;
                return Ok(kept);
            }
            Err(e) => return Err(fail(e)),
        }
    }
}

/// Where `save` succeeded: in the current folder or in that for temporary files, under the name of `path` or, if that is
/// taken, with a number in front. `None` if nowhere.
pub(super) fn rescue(path: &Path, save: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let name = path.file_name()?.to_string_lossy();
    let folders = [std::env::current_dir().ok(), Some(std::env::temp_dir())];
    for folder in folders.into_iter().flatten() {
        let names =
            std::iter::once(name.to_string()).chain((2..100).map(|n| format!("{n}-{name}")));
        let free = names
            .map(|name| folder.join(name))
            .find(|place| place != path && !place.exists());
        if let Some(place) = free
            && save(&place)
        {
            return Some(place);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_taken_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap().join("a.gguf");
        for (text, expected) in [
            ("1", "a.gguf.old"),
            ("2", "a.gguf.old2"),
            ("3", "a.gguf.old3"),
        ] {
            std::fs::remove_file(&path).ok();
            std::fs::write(&path, text).unwrap();
            let kept = keep(&path).unwrap();
            assert_eq!(kept, path.with_file_name(expected));
            assert_eq!(std::fs::read_to_string(kept).unwrap(), text);
            assert!(path.exists());
        }
    }
}
