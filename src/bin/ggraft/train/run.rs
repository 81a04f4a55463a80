//! A run from its first step to its last file.

use super::log::Log;
use super::progress::{Progress, duration};
use super::saving::{self, Room};
use super::{SavingArgs, Train, quote, size};
use crate::failure::{Failure, Result};
use crate::outputs::same_file;
use crate::plot::{self, Curve};
use crate::{interrupt, io};
use ggraft::Adapter;
use ggraft::adapter::{Parts, Precision};
use ggraft::file::atomic::is_stream;
use ggraft::train::{Finish, Trainer};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// What to do about an adapter that is of no use.
const ADVICE: &str = "try a lower --lr, more steps or other data";

/// What the rows of the first step may lose, in nats per token, while others are learned: up to 0.2 in short runs whose adapters
/// are of use, one and more in runs that diverge.
const SLACK: f64 = 0.5;

/// What is said once in a run at most.
#[derive(Clone, Copy)]
enum Trouble {
    Saving,
    Plot,
}

#[derive(Default)]
struct Warned([bool; 2]);

impl Warned {
    fn once(&mut self, about: Trouble, text: impl FnOnce() -> String) {
        if !std::mem::replace(&mut self.0[about as usize], true) {
            tracing::warn!("{}", text());
        }
    }
}

/// A training run and what it shows and saves.
pub(super) struct Run<'a> {
    args: &'a Train,
    trainer: Trainer,
    checkpoint: PathBuf,
    /// The checkpoint on disk is this run's own.
    owns_checkpoint: bool,
    log: Option<Log>,
    /// When the last checkpoint was written, or the run began.
    saved: Instant,
    /// What is there to be replaced by the first adapter that is saved is somebody else's.
    foreign: bool,
    /// Where that is kept.
    kept: Option<PathBuf>,
    room: Room,
    warned: Warned,
    curve: Curve,
    progress: Progress,
}

impl<'a> Run<'a> {
    pub(super) fn new(args: &'a Train, trainer: Trainer) -> Result<Self> {
        let checkpoint = args.checkpoint();
        let resumed = args.saving.resume.as_ref();
        let owns_checkpoint = resumed.is_some_and(|path| same_file(path, &checkpoint));
        if checkpoint.exists() && !owns_checkpoint {
            tracing::warn!(
                "{} is the checkpoint of another run, which --resume would continue; this run may replace it",
                checkpoint.display()
            );
        }
        let done = trainer.summary().reported;
        let mut curve = Curve::default();
        let log = match (&args.saving.log, resumed) {
            (Some(path), Some(_)) => Some(Log::resume(path, done, &mut curve)?),
            (Some(path), None) => Some(Log::create(path)?),
            (None, _) => None,
        };
        let rows = trainer.examples()[0].len();
        let room = Room::new(&args.saving.output, &checkpoint, &trainer.summary(), rows)?;
        Ok(Self {
            args,
            saved: Instant::now(),
            foreign: !owns_checkpoint && !args.saving.overwrite,
            kept: None,
            room,
            warned: Warned::default(),
            trainer,
            checkpoint,
            owns_checkpoint,
            log,
            curve,
            progress: Progress::new(done, args.data.valid.is_some()),
        })
    }

    pub(super) fn execute(mut self, sample: Option<String>) -> Result<()> {
        let token = self.trainer.cancel_token();
        let _guard = interrupt::Guard::calling(move || token.cancel());
        let result = self.train();
        self.progress.finish();
        match result {
            Ok(()) => {}
            Err(e) if e.is_cancelled() => return Err(self.interrupted()?),
            Err(e) => return Err(self.failed(e)),
        }
        let adapter = self.save_last("the adapter");
        self.draw();
        let adapter = adapter?;
        let checkpoint = match self.args.saving.keep_checkpoint {
            true => self.save_checkpoint(),
            false => {
                if self.owns_checkpoint {
                    // What remains after a failure is only in the way.
                    let _ = std::fs::remove_file(&self.checkpoint);
                }
                Ok(())
            }
        };
        self.judge();
        io::print(&self.summary(&adapter, sample))?;
        checkpoint.map_err(|e| {
            Failure::Unsuitable(format!(
                "{}: the run cannot be given more steps, as its checkpoint was not written; {} has the adapter",
                e.line(),
                self.args.saving.output.display()
            ))
        })
    }

    fn train(&mut self) -> Result<()> {
        self.teach()?;
        if self.trainer.summary().steps == 0
            && let Some(loss) = self.trainer.base_valid_loss()?
        {
            self.progress
                .line(&format!("validation loss of the model alone: {loss:.4}"));
        }
        while let Some(report) = self.trainer.step()? {
            if let Some(log) = &mut self.log
                && let Err(e) = log.write(&report)
            {
                // The adapter is worth more than its log.
                tracing::warn!("{}: the log ends here, the run goes on", e.line());
                self.log = None;
            }
            self.curve
                .add(report.step, report.loss, report.valid_loss, report.best);
            self.progress.show(&report, self.curve.best);
            // A reader gets one picture, the last.
            let is_stream = || self.args.saving.plot.as_deref().is_some_and(is_stream);
            if report.valid_loss.is_some() && !is_stream() {
                self.draw();
            }
            let every = self.args.saving.checkpoint_every;
            if every.is_due(report.step, self.saved) && self.trainer.finished().is_none() {
                self.save_both();
            }
        }
        Ok(())
    }

    /// Lets the base read the context that is distilled, if there is one.
    fn teach(&mut self) -> Result<()> {
        let rows = self.trainer.untaught();
        if rows == 0 || self.trainer.finished().is_some() {
            return Ok(());
        }
        loop {
            let left = self.trainer.untaught();
            self.progress.show_teaching(rows - left, rows);
            if left == 0 {
                return Ok(());
            }
            self.trainer.teach()?;
        }
    }

    /// Saves what Ctrl-C left, and returns the failure that says so.
    fn interrupted(&mut self) -> Result<Failure> {
        let done = self.trainer.summary().steps;
        if done == 0 {
            let text = "interrupted before the first step: nothing was saved";
            return Ok(Failure::Interrupted(text.to_owned()));
        }
        // The adapter first: it needs less room, and is what the run is for.
        let adapter = self.save_last("the adapter");
        let checkpoint = self.save_checkpoint();
        self.draw();
        adapter?;
        if let Err(e) = checkpoint {
            return Ok(Failure::Interrupted(format!(
                "interrupted after step {done}; {} has the adapter; the run cannot go on, as its checkpoint was not written: {e}",
                self.args.saving.output.display()
            )));
        }
        Ok(Failure::Interrupted(format!(
            "interrupted after step {done}; go on with: {}",
            self.args.resume_command(&self.checkpoint)
        )))
    }

    /// Saves the adapter as it was before the step that failed, if there is any, and returns the failure that says so.
    fn failed(&mut self, why: Failure) -> Failure {
        if self.trainer.summary().reported == self.progress.start {
            return why;
        }
        let adapter = "the last good adapter";
        Failure::Unsuitable(match self.save_last(adapter) {
            Ok(_) => format!("{why}; {} has {adapter}", self.args.saving.output.display()),
            Err(unsaved) => format!("{why}; {unsaved}"),
        })
    }

    /// While the run goes on: what cannot be saved now may be later.
    fn save_both(&mut self) {
        let result = self.save_adapter().and_then(|_| self.save_checkpoint());
        if let Err(e) = result {
            self.warned.once(Trouble::Saving, || {
                format!(
                    "{}: nothing could be saved in between, the run goes on",
                    e.line()
                )
            });
        }
        self.room.hold_again();
        self.saved = Instant::now();
    }

    fn save_checkpoint(&mut self) -> Result<()> {
        self.room.give_up_checkpoint();
        self.trainer.save_checkpoint(&self.checkpoint)?;
        self.owns_checkpoint = true;
        Ok(())
    }

    /// As [`Run::save_adapter`]; where that cannot be written, in another folder. The error says what became of the adapter, which
    /// it calls `name`.
    fn save_last(&mut self, name: &str) -> Result<Adapter> {
        let why = match self.save_adapter() {
            Ok(adapter) => return Ok(adapter),
            Err(why) => why,
        };
        let adapter = self.trainer.adapter()?;
        let rescued = saving::rescue(&self.args.saving.output, |path| {
            adapter.save(path, Precision::F16).is_ok()
        });
        let fate = match rescued {
            Some(path) => format!("{name} is in {} instead", path.display()),
            None => format!("{name} could not be saved elsewhere"),
        };
        Err(Failure::Unsuitable(format!("{}; {fate}", why.line())))
    }

    /// Says so if the result is of no use: no better than the model alone on the validation rows or, without any, far worse than
    /// the start on the rows of the first step.
    fn judge(&mut self) {
        let summary = self.trainer.summary();
        if let Some((base, best)) = summary.base_valid_loss.zip(summary.best_valid_loss)
            && best >= base
        {
            tracing::warn!(
                "the adapter predicts the validation rows no better than the model alone ({best:.4} against {base:.4}): {ADVICE}"
            );
        } else if self.args.data.valid.is_none()
            // Whatever stops this, the adapter is there: it is not judged then.
            && let Ok(Some((first, now))) = self.trainer.first_rows_losses()
            && (now > first + SLACK || !now.is_finite())
        {
            tracing::warn!(
                "the adapter predicts the rows of the first step worse than the start of this run did ({now:.4} against {first:.4}): {ADVICE}"
            );
        }
    }

    /// Half precision: what the KV cache makes of the rows anyway.
    fn save_adapter(&mut self) -> Result<Adapter> {
        let path = &self.args.saving.output;
        self.room.give_up_adapter();
        let adapter = Adapter::new(Parts {
            name: Some(crate::args::stem(path)),
            ..self.trainer.adapter()?.parts().clone()
        })?;
        if self.foreign && path.exists() {
            let kept = saving::keep(path)?;
            tracing::warn!(
                "{} was there before and is now {} (--overwrite replaces it)",
                path.display(),
                kept.display()
            );
            self.kept = Some(kept);
        }
        // Whatever becomes of the new one, the old one is kept.
        self.foreign = false;
        adapter.save(path, Precision::F16)?;
        Ok(adapter)
    }

    /// A picture that cannot be written is no reason to stop.
    fn draw(&mut self) {
        let Some(path) = &self.args.saving.plot else {
            return;
        };
        let name = crate::args::stem(&self.args.saving.output);
        let model = crate::args::stem(&self.args.data.model);
        let method = self.trainer.options().method;
        let title = format!("{name}: {method} adapter for {model}");
        if let Err(e) = plot::write(path, &self.curve, &title) {
            self.warned.once(Trouble::Plot, || {
                format!("{}: the plot is not there, the run goes on", e.line())
            });
        }
    }

    fn summary(&self, adapter: &Adapter, sample: Option<String>) -> String {
        let summary = self.trainer.summary();
        let SavingArgs { output, .. } = &self.args.saving;
        let mut out = String::new();
        let mut row = |name: &str, text: String| out += &format!("{name:<16} {text}\n");
        let early = match self.trainer.finished() {
            Some(Finish::EarlyStop) => ", stopped early: the validation loss falls no more",
            _ => "",
        };
        row("steps", format!("{}{early}", summary.steps));
        row(
            "time",
            format!(
                "{} in steps, {:.0} tok/s",
                duration(Duration::from_secs_f64(summary.seconds)),
                summary.tokens as f64 / summary.seconds.max(f64::MIN_POSITIVE)
            ),
        );
        if summary.recomputed_layers > 0 {
            let n = summary.recomputed_layers;
            row(
                "memory",
                format!("up to {n} layers were computed twice to save memory"),
            );
        }
        if let Some((first, last)) = summary.first_loss.zip(summary.last_loss) {
            row("training loss", format!("{first:.4} -> {last:.4}"));
        }
        if let Some((loss, step)) = summary.best_valid_loss.zip(summary.best_step) {
            row(
                "validation loss",
                format!("{loss:.4} at step {step}, whose adapter was kept"),
            );
        }
        if let Some(base) = summary.base_valid_loss {
            row("model alone", format!("{base:.4} on the validation rows"));
        }
        let bytes = std::fs::metadata(output).map_or(0, |meta| meta.len());
        row(
            "adapter",
            format!(
                "{}: {}, {} numbers ({} trained), {}",
                output.display(),
                io::summary(adapter),
                summary.adapter_values,
                summary.trained_parameters,
                size(bytes)
            ),
        );
        if let Some(kept) = &self.kept {
            row("before", format!("{}: what was there", kept.display()));
        }
        let model = quote(&self.args.data.model.to_string_lossy());
        let adapter = quote(&output.to_string_lossy());
        let prompt = sample.unwrap_or_else(|| "-p \"...\"".to_owned());
        row(
            "use it",
            format!("ggraft run -m {model} -a {adapter} {prompt}"),
        );
        out
    }
}
