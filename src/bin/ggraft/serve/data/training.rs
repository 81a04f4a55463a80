//! A job from its first step to its adapter.

use super::Store;
use super::files;
use super::records::{CheckpointRecord, FileRecord, JobRecord, Status};
use super::worker::Shared;
use crate::failure::{Failure, Result};
use crate::serve::catalog::seconds;
use crate::train::Every;
use ggraft::adapter::Precision;
use ggraft::train::data::Examples;
use ggraft::train::{Report, Trainer};
use ggraft::{Adapter, Model};
use serde_json::{Value, json};
use std::fs;
use std::io::BufReader;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

/// Adapters of checkpoints that are kept of a job.
const KEPT: usize = 3;
/// What steps did is written so often: each time waits for the disk.
const NOTES: Duration = Duration::from_millis(500);
/// Jobs that the records could not be asked for, on a full disk perhaps, are looked for again so often.
const AGAIN: Duration = Duration::from_secs(60);
/// Training gets the processor time that serving leaves.
#[cfg(unix)]
const NICE: i32 = 15;

/// What the worker's thread works with.
pub(super) struct Work {
    pub(super) store: Arc<Store>,
    pub(super) model: Model,
    /// How often a job saves what it goes on from.
    pub(super) every: Every,
    pub(super) shared: Arc<Shared>,
}

fn now() -> u64 {
    seconds(SystemTime::now())
}

impl Work {
    /// The life of the thread: it ends when nobody can wake it any more.
    pub(super) fn run(&self, woken: &Receiver<()>) {
        // Threads that it starts inherit it.
        #[cfg(unix)]
        if let Err(e) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!("training keeps its priority: {e}");
        }
        while woken.recv_timeout(AGAIN) != Err(RecvTimeoutError::Disconnected) {
            if let Err(e) = self.work_off() {
                tracing::error!("{}", e.line());
            }
        }
    }

    /// Trains all jobs that wait. An error is one of the records, which leaves the job as it is.
    fn work_off(&self) -> Result<()> {
        while !self.is_ending()
            && let Some(job) = self.store.records.next_job()?
        {
            self.train(&job)?;
        }
        Ok(())
    }

    fn is_ending(&self) -> bool {
        self.shared.is_ending()
    }

    fn train(&self, job: &JobRecord) -> Result<()> {
        let done = self.try_train(job);
        self.shared.set(None);
        match done {
            Ok(()) => {}
            // It goes on at the next start.
            Err(e) if e.is_cancelled() && self.is_ending() => return Ok(()),
            Err(e) if e.is_cancelled() => self.note(job, "info", "The job was cancelled.")?,
            Err(e) => self.record_failure(job, &e.line())?,
        }
        // Files that stay are no harm: nothing goes on from them.
        for path in [
            self.store.checkpoint(&job.id),
            self.store.starting_point(&job.id),
        ] {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    fn record_failure(&self, job: &JobRecord, why: &str) -> Result<()> {
        let error = json!({"code": "training_failed", "message": why, "param": null});
        self.store.records.fail_job(&job.id, &error, now())?;
        self.note(job, "error", &format!("The job has failed: {why}"))
    }

    fn note(&self, job: &JobRecord, level: &str, message: &str) -> Result<()> {
        self.store.records.add_event(&job.id, level, message, now())
    }

    fn try_train(&self, job: &JobRecord) -> Result<()> {
        if job.status == Status::Queued {
            self.store
                .records
                .set_status(&job.id, Status::Running, now())?;
            self.note(job, "info", "The job has begun.")?;
        }
        let mut trainer = self.trainer(job)?;
        let token = trainer.cancel_token();
        self.shared.set(Some((job.id.clone(), token.clone())));
        // It may have been cancelled before there was a token.
        let current = self.store.records.job(None, &job.id)?;
        if self.is_ending() || current.is_none_or(|job| job.is_over()) {
            token.cancel();
        }
        let stepped = self.steps(job, &mut trainer);
        match stepped {
            Err(e) if e.is_cancelled() && self.is_ending() => {
                let saved = trainer.save_checkpoint(&self.store.checkpoint(&job.id));
                self.go_on(saved.map_err(Failure::from));
                Err(e)
            }
            Err(e) => Err(e),
            Ok(()) => self.deliver(job, &trainer),
        }
    }

    /// From the start, or from where the job was interrupted.
    fn trainer(&self, job: &JobRecord) -> Result<Trainer> {
        let spec = &job.spec;
        let train = self.rows(&spec.training_file)?;
        let valid = match &spec.validation_file {
            Some(id) => self.rows(id)?,
            None => Examples::default(),
        };
        let checkpoint = self.store.checkpoint(&job.id);
        if checkpoint.exists() {
            let resumed = Trainer::resume(&self.model, &checkpoint, train.clone(), valid.clone());
            match resumed {
                Ok(trainer) => {
                    let step = trainer.summary().steps;
                    self.note(job, "info", &format!("The job goes on after step {step}."))?;
                    return Ok(trainer);
                }
                Err(e) => self.note(job, "warn", &format!("The job begins anew: {e}"))?,
            }
        }
        let from = files::starting_point(&self.store, job)?;
        let mut options =
            (spec.options(from.as_ref())).map_err(|e| Failure::Unsuitable(e.to_string()))?;
        options.name = spec.suffix.clone();
        Ok(Trainer::new(&self.model, options, train, valid)?)
    }

    fn rows(&self, id: &str) -> Result<Examples> {
        let record = self.store.records.file(None, id)?;
        // Errors name the file as its owner knows it.
        let name = record.map_or_else(|| id.to_owned(), |file| file.name);
        let file = fs::File::open(self.store.file(id)).map_err(|source| Failure::File {
            path: PathBuf::from(&name),
            source,
        })?;
        Ok(Examples::from_reader(
            BufReader::new(file),
            &name,
            &self.model,
        )?)
    }

    fn steps(&self, job: &JobRecord, trainer: &mut Trainer) -> Result<()> {
        let (mut saved, mut noted) = (Instant::now(), Instant::now());
        let mut notes = Vec::new();
        loop {
            let report = trainer.step();
            let mut due = true;
            if let Ok(Some(report)) = &report {
                notes.push(step_note(report));
                due = self.every.is_due(report.step, saved);
            }
            // Before the checkpoint: steps in front of it are not computed once more.
            if due || noted.elapsed() >= NOTES {
                let kept = self.store.records.add_steps(&job.id, &notes, now());
                if kept.is_ok() {
                    notes.clear();
                }
                self.go_on(kept);
                noted = Instant::now();
            }
            let Some(report) = report? else { return Ok(()) };
            if due && trainer.finished().is_none() {
                self.go_on(self.save(job, trainer, &report));
                saved = Instant::now();
            }
        }
    }

    /// What cannot be saved in between, on a full disk perhaps, may be later: it is no reason to stop.
    fn go_on(&self, saved: Result<()>) {
        if let Err(e) = saved {
            tracing::warn!("a job's progress could not be saved: {}", e.line());
        }
    }

    /// What the job goes on from, and an adapter to try meanwhile.
    fn save(&self, job: &JobRecord, trainer: &Trainer, report: &Report) -> Result<()> {
        let path = self.store.checkpoint_adapter(&job.id, report.step);
        trainer.latest()?.save(&path, Precision::F16)?;
        trainer.save_checkpoint(&self.store.checkpoint(&job.id))?;
        let checkpoint = CheckpointRecord {
            step: report.step,
            created: now(),
            metrics: metrics(report),
        };
        self.store.records.add_checkpoint(&job.id, &checkpoint)?;
        self.store.tuned.add(&job.step_name(report.step), job, path);
        for old in self.store.records.checkpoints(&job.id)?.iter().skip(KEPT) {
            self.store.records.remove_checkpoint(&job.id, old.step)?;
            self.store.tuned.remove(&job.step_name(old.step));
            // A file that stays is no harm.
            let _ = fs::remove_file(self.store.checkpoint_adapter(&job.id, old.step));
        }
        Ok(())
    }

    /// The result, under its name, the moment the job ends.
    fn deliver(&self, job: &JobRecord, trainer: &Trainer) -> Result<()> {
        let adapter: Adapter = trainer.adapter()?;
        let id = files::new_id();
        let path = self.store.file(&id);
        adapter.save(&path, Precision::F16)?;
        let bytes = fs::metadata(&path).map_or(0, |meta| meta.len());
        let name = job.model_name();
        let result = FileRecord {
            id,
            owner: job.owner.clone(),
            name: format!("{}.gguf", name.replace(':', "-")),
            purpose: files::RESULTS.to_owned(),
            bytes,
            created: now(),
        };
        let tokens = trainer.summary().tokens;
        if !self.store.records.succeed(job, &result, tokens)? {
            let _ = fs::remove_file(&path);
            return Ok(());
        }
        self.store.tuned.add(&name, job, path);
        self.note(
            job,
            "info",
            &format!("The job has ended well: {name} can be used."),
        )
    }
}

fn metrics(report: &Report) -> Value {
    json!({
        "step": report.step,
        "train_loss": report.loss,
        "valid_loss": report.valid_loss,
    })
}

fn step_note(report: &Report) -> (u64, String, Value) {
    let message = format!(
        "Step {}/{}: training loss={:.4}",
        report.step, report.steps, report.loss
    );
    let mut data = metrics(report);
    data["total_steps"] = report.steps.into();
    data["learning_rate"] = report.lr.into();
    (report.step, message, data)
}
