//! What outlives the server: uploads, fine-tuning jobs and what came of them, in one folder.
//!
//! Records are in an SQLite database, files beside it. A file is complete and on the disk before the record that tells of it, so that whatever was
//! acknowledged is there after a crash; a file without a record is one whose writing was cut off, and is removed at the next start.

pub(super) mod files;
pub(super) mod hyperparameters;
pub(super) mod jobs;
mod records;
mod training;
mod tuned;
mod worker;

use super::keys::Caller;
use crate::failure::{Failure, Result};
use crate::train::Every;
use ggraft::{Adapter, Model};
use records::{JobRecord, Records, Status};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tuned::Tuned;
pub(super) use tuned::TunedEntry;
use worker::Worker;

/// Folders of the data directory.
const FILES: &str = "files";
const CHECKPOINTS: &str = "checkpoints";

/// The data directory, opened.
pub(super) struct Data {
    store: Arc<Store>,
    worker: Worker,
}

/// What requests and the worker share.
struct Store {
    folder: PathBuf,
    records: Records,
    tuned: Tuned,
}

impl Data {
    /// Makes the folder if there is none, and goes on with the jobs that are not over.
    pub(super) fn open(folder: &Path, model: &Model, checkpoint_every: Every) -> Result<Self> {
        let fail = |path: &Path, source| Failure::File {
            path: path.to_owned(),
            source,
        };
        for name in [FILES, CHECKPOINTS] {
            let path = folder.join(name);
            make_folder(&path).map_err(|e| fail(&path, e))?;
        }
        let records = Records::open(&folder.join("records.sqlite3"))?;
        let store = Store {
            tuned: Tuned::new(model),
            folder: folder.to_owned(),
            records,
        };
        store.sweep()?;
        store.find_tuned()?;
        let store = Arc::new(store);
        Ok(Self {
            worker: Worker::start(store.clone(), model, checkpoint_every)?,
            store,
        })
    }

    /// The adapter of that name, if a job of the caller's has made it.
    pub(super) fn adapter(&self, caller: &Caller, name: &str) -> Option<Adapter> {
        self.store.tuned.get(caller, name)
    }

    /// All that jobs of the caller's have made.
    pub(super) fn models(&self, caller: &Caller) -> Vec<TunedEntry> {
        self.store.tuned.list(caller)
    }

    /// Ends the job that runs, which goes on at the next start.
    pub(super) fn stop(&self) {
        self.worker.stop();
    }
}

/// Makes a folder that other users of the machine cannot look into.
fn make_folder(path: &Path) -> std::io::Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path)
}

impl Store {
    fn file(&self, id: &str) -> PathBuf {
        self.folder.join(FILES).join(id)
    }

    /// What a job goes on from.
    fn checkpoint(&self, job: &str) -> PathBuf {
        self.folder.join(CHECKPOINTS).join(format!("{job}.ckpt"))
    }

    /// The adapter that a job trains further.
    fn starting_point(&self, job: &str) -> PathBuf {
        let name = format!("{job}-from.gguf");
        self.folder.join(CHECKPOINTS).join(name)
    }

    /// The adapter of a job's checkpoint.
    fn checkpoint_adapter(&self, job: &str, step: u64) -> PathBuf {
        let name = format!("{job}-{step}.gguf");
        self.folder.join(CHECKPOINTS).join(name)
    }

    /// Removes files that no record tells of.
    fn sweep(&self) -> Result<()> {
        let known = self.records.file_ids()?;
        let path = self.folder.join(FILES);
        let fail = |source| Failure::File {
            path: path.clone(),
            source,
        };
        for entry in fs::read_dir(&path).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            if !known.iter().any(|id| name == id.as_str()) {
                // What cannot be removed is in nobody's way.
                let _ = fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    /// Names what jobs have made until now.
    fn find_tuned(&self) -> Result<()> {
        for job in self.records.jobs(None)? {
            if let (Some(name), Some(file)) = (&job.model, &job.result_file) {
                self.tuned.add(name, &job, self.file(file));
            }
            for checkpoint in self.records.checkpoints(&job.id)? {
                let path = self.checkpoint_adapter(&job.id, checkpoint.step);
                self.tuned.add(&job.step_name(checkpoint.step), &job, path);
            }
        }
        Ok(())
    }
}

impl JobRecord {
    /// The name of what it makes.
    fn model_name(&self) -> String {
        let suffix = self.spec.suffix.as_deref().unwrap_or("");
        let id = self.id.trim_start_matches(jobs::PREFIX);
        format!(
            "ft:{}:{suffix}:{}",
            super::catalog::BASE,
            &id[..12.min(id.len())]
        )
    }

    /// The name of what it has made after some steps.
    fn step_name(&self, step: u64) -> String {
        format!("{}:ckpt-step-{step}", self.model_name())
    }

    fn is_over(&self) -> bool {
        !matches!(self.status, Status::Queued | Status::Running)
    }
}
