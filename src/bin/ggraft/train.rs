//! `ggraft train`: an adapter learns from a data set.

mod args;
mod log;
mod progress;

use crate::failure::{Failure, Result};
use crate::plot::{self, Curve};
use crate::{data, interrupt, io};
use args::{ComputationArgs, DataArgs, ObjectiveArgs, SavingArgs, ScheduleArgs, ShapeArgs};
use clap::Args;
use ggraft::adapter::{Parts, Precision};
use ggraft::file::atomic::check_writable;
use ggraft::train::data::{Content, Dataset};
use ggraft::train::{Finish, Summary, Trainer};
use ggraft::{Adapter, Model, ModelOptions};
use log::Log;
use progress::{Progress, duration};
use std::path::{Path, PathBuf};
use std::time::Duration;

const EXAMPLES: &str = "Examples:
  ggraft train -m model.gguf --method prefix --data train.jsonl -o pirate.gguf
  ggraft train -m model.gguf --method prompt --data train.jsonl --valid valid.jsonl -o task.gguf
  ggraft train -m model.gguf --method p-tuning --template \"{v:10} {prompt} {v:10}\" \\
      --data train.jsonl -o facts.gguf --plot loss.svg
  ggraft train -m model.gguf --data train.jsonl -o pirate.gguf --resume pirate.gguf.ckpt

Each line of the data is a JSON object, as `ggraft eval` reads it; other fields are ignored:
  {\"prompt\": \"...\", \"completion\": \"...\"}   the completion and EOS are learned
  {\"messages\": [{\"role\": \"user\", \"content\": \"...\"}, ...]}   the assistant's messages are learned
  {\"text\": \"...\"}   all of it and EOS
A \"weight\" multiplies a row's part in the mean loss.

Ctrl-C saves the adapter and a checkpoint (OUT.gguf.ckpt) and says how to go on; a second one
quits at once. The same seed, threads and data give the same adapter, bit for bit, interrupted or
not. SIZE is a number of bytes, or one with K, M or G (powers of 1024, as KiB, MiB and GiB; KB, MB
and GB are powers of 1000).";

/// Train an adapter on a frozen model
///
/// The model stays as it is, quantized and mapped: only the adapter's few numbers are trained, on the CPU. `ggraft run -a` uses
/// the file that is written.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Train {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    objective: ObjectiveArgs,
    #[command(flatten)]
    schedule: ScheduleArgs,
    #[command(flatten)]
    saving: SavingArgs,
    #[command(flatten)]
    computation: ComputationArgs,
}

impl Train {
    pub(crate) fn execute(self) -> Result<()> {
        self.check_outputs()?;
        let train = data::read(&self.data.data)?;
        let valid = self.data.valid.as_deref().map(data::read).transpose()?;
        let model = Model::open(&self.data.model, &ModelOptions::default())?;
        let sample = sample_prompt(&train);
        let trainer = self.trainer(&model, &train, valid.as_ref())?;
        drop((train, valid));
        Run::new(&self, trainer)?.execute(sample)
    }

    /// Before anything is computed: a long run shall not fail when it saves its result.
    fn check_outputs(&self) -> Result<()> {
        let SavingArgs {
            output, plot, log, ..
        } = &self.saving;
        let checkpoint = self.checkpoint();
        let inputs = [
            Some(&self.data.model),
            Some(&self.data.data),
            self.data.valid.as_ref(),
            // It is replaced by later checkpoints of its own run.
            self.saving
                .resume
                .as_ref()
                .filter(|&path| !same_file(path, &checkpoint)),
        ];
        let outputs = [Some(output), Some(&checkpoint), plot.as_ref(), log.as_ref()];
        for (i, path) in outputs.iter().enumerate() {
            let Some(path) = path else { continue };
            let same = |other: &&PathBuf| other == path || same_file(other, path);
            if inputs.iter().flatten().any(same) {
                return Err(Failure::Usage(format!(
                    "{} is read by this command: write to another file",
                    path.display()
                )));
            }
            if outputs[..i].iter().flatten().any(same) {
                return Err(Failure::Usage(format!(
                    "{} is to be written twice: use different names",
                    path.display()
                )));
            }
            if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty())
                && !folder.is_dir()
            {
                return Err(Failure::Unsuitable(format!(
                    "{}: there is no folder {}",
                    path.display(),
                    folder.display()
                )));
            }
            // A log may be a pipe or a device.
            if Some(*path) != log.as_ref() || path.is_file() || !path.exists() {
                check_writable(path).map_err(|source| Failure::File {
                    path: path.to_path_buf(),
                    source,
                })?;
            }
        }
        Ok(())
    }

    fn checkpoint(&self) -> PathBuf {
        let mut path = self.saving.output.clone().into_os_string();
        path.push(".ckpt");
        path.into()
    }

    fn trainer(&self, model: &Model, train: &Dataset, valid: Option<&Dataset>) -> Result<Trainer> {
        // All that can be refused at once comes before the rows are tokenized.
        let options = match &self.saving.resume {
            Some(_) => None,
            None => Some(self.options(model)?),
        };
        let train = train.examples(model)?;
        let valid = valid.map_or(Ok(Vec::new()), |valid| valid.examples(model))?;
        match (options, &self.saving.resume) {
            (Some(options), _) => Ok(Trainer::new(model, options, train, valid)?),
            (None, checkpoint) => {
                let checkpoint = checkpoint.as_deref().expect("there are options otherwise");
                let mut trainer = Trainer::resume(model, checkpoint, train, valid)?;
                if let Some(threads) = self.computation.threads {
                    trainer.set_threads(threads)?;
                }
                Ok(trainer)
            }
        }
    }

    /// The command that goes on with this run.
    fn resume_command(&self, checkpoint: &Path) -> String {
        let SavingArgs {
            output,
            checkpoint_every,
            log,
            plot,
            ..
        } = &self.saving;
        let mut words = vec!["ggraft train".to_owned()];
        let mut add = |flag: &str, value: Option<&Path>| {
            words.extend(value.map(|path| format!("{flag} {}", quote(&path.to_string_lossy()))));
        };
        add("-m", Some(&self.data.model));
        add("--data", Some(&self.data.data));
        add("--valid", self.data.valid.as_deref());
        add("-o", Some(output));
        add("--log", log.as_deref());
        add("--plot", plot.as_deref());
        add("--resume", Some(checkpoint));
        words.extend(checkpoint_every.map(|n| format!("--checkpoint-every {n}")));
        words.extend(self.computation.threads.map(|n| format!("-t {n}")));
        words.join(" ")
    }
}

/// A training run and what it shows and saves.
struct Run<'a> {
    args: &'a Train,
    trainer: Trainer,
    checkpoint: PathBuf,
    /// The checkpoint on disk is this run's own.
    owns_checkpoint: bool,
    log: Option<Log>,
    curve: Curve,
    progress: Progress,
}

impl<'a> Run<'a> {
    fn new(args: &'a Train, trainer: Trainer) -> Result<Self> {
        let checkpoint = args.checkpoint();
        let resumed = args.saving.resume.as_ref();
        let owns_checkpoint = resumed.is_some_and(|path| same_file(path, &checkpoint));
        if checkpoint.exists() && !owns_checkpoint {
            tracing::warn!(
                "{} is the checkpoint of another run, which --resume would continue; this run may replace it",
                checkpoint.display()
            );
        }
        let Summary {
            reported: done,
            cut_rows,
            ..
        } = trainer.summary();
        if cut_rows > 0 {
            tracing::warn!(
                "{cut_rows} rows of {} do not fit into {} and lose their ends",
                args.data.data.display(),
                match trainer.options().max_len {
                    Some(n) => format!("--max-len {n}"),
                    None => "the context that the model was trained on".to_owned(),
                }
            );
        }
        let mut curve = Curve::default();
        let log = match (&args.saving.log, resumed) {
            (Some(path), Some(_)) => Some(Log::resume(path, done, &mut curve)?),
            (Some(path), None) => Some(Log::create(path)?),
            (None, _) => None,
        };
        Ok(Self {
            args,
            trainer,
            checkpoint,
            owns_checkpoint,
            log,
            curve,
            progress: Progress::new(done, args.data.valid.is_some()),
        })
    }

    fn execute(mut self, sample: Option<String>) -> Result<()> {
        let token = self.trainer.cancel_token();
        let _guard = interrupt::Guard::calling(move || token.cancel());
        let result = self.train();
        self.progress.finish();
        match result {
            Ok(()) => {}
            Err(e) if e.is_cancelled() => return Err(self.interrupted()?),
            Err(e) => return Err(self.failed(e)),
        }
        let adapter = self.save_adapter()?;
        self.draw()?;
        if self.owns_checkpoint {
            // What remains after a failure is only in the way.
            let _ = std::fs::remove_file(&self.checkpoint);
        }
        io::print(&self.summary(&adapter, sample))
    }

    fn train(&mut self) -> Result<()> {
        self.teach()?;
        while let Some(report) = self.trainer.step()? {
            if let Some(log) = &mut self.log {
                log.write(&report)?;
            }
            self.curve
                .add(report.step, report.loss, report.valid_loss, report.best);
            self.progress.show(&report, self.curve.best);
            if report.valid_loss.is_some() {
                self.draw()?;
            }
            let every = self.args.saving.checkpoint_every;
            if every.is_some_and(|n| report.step.is_multiple_of(n))
                && self.trainer.finished().is_none()
            {
                self.save_checkpoint()?;
                self.save_adapter()?;
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
        self.save_checkpoint()?;
        self.save_adapter()?;
        self.draw()?;
        Ok(Failure::Interrupted(format!(
            "interrupted after step {done}; go on with: {}",
            self.args.resume_command(&self.checkpoint)
        )))
    }

    /// Saves the adapter as it was before the step that failed, if there is any, and returns the failure that says so.
    fn failed(&self, why: Failure) -> Failure {
        let done = self.trainer.summary().reported;
        if done == self.progress.start || self.save_adapter().is_err() {
            return why;
        }
        Failure::Unsuitable(format!(
            "{why}; {} has the last good adapter",
            self.args.saving.output.display()
        ))
    }

    fn save_checkpoint(&mut self) -> Result<()> {
        self.trainer.save_checkpoint(&self.checkpoint)?;
        self.owns_checkpoint = true;
        Ok(())
    }

    /// Half precision: what the KV cache makes of the rows anyway.
    fn save_adapter(&self) -> Result<Adapter> {
        let path = &self.args.saving.output;
        let adapter = Adapter::new(Parts {
            name: Some(crate::args::stem(path)),
            ..self.trainer.adapter()?.parts().clone()
        })?;
        adapter.save(path, Precision::F16)?;
        Ok(adapter)
    }

    fn draw(&self) -> Result<()> {
        let Some(path) = &self.args.saving.plot else {
            return Ok(());
        };
        let name = crate::args::stem(&self.args.saving.output);
        let model = crate::args::stem(&self.args.data.model);
        let method = self.trainer.options().method;
        plot::write(
            path,
            &self.curve,
            &format!("{name}: {method} adapter for {model}"),
        )
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

/// Whether both paths lead to one file that exists.
fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// Arguments of `ggraft run` for a prompt like those that were learned, if one fits into a line.
fn sample_prompt(data: &Dataset) -> Option<String> {
    let (text, chat) = match &data.rows()[0].content {
        Content::Completion { prompt, .. } => (prompt, ""),
        Content::Messages(messages) => match &messages[..] {
            [user, ..] if user.role == "user" => (&user.content, "--chat "),
            _ => return None,
        },
        Content::Text(_) => return None,
    };
    let escaped = text
        .replace('\\', "\\\\")
        .replace('\n', "\\n")
        .replace('\t', "\\t");
    if escaped.is_empty() || escaped.len() > 80 || escaped.contains(char::is_control) {
        return None;
    }
    let escape = if escaped == *text { "" } else { "-e " };
    Some(format!("{chat}{escape}-p {}", quote(&escaped)))
}

/// `text` as one word of a shell.
fn quote(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

fn size(bytes: u64) -> String {
    match bytes as f64 / 1024.0 {
        kib if kib < 1024.0 => format!("{kib:.1} KiB"),
        kib if kib < 1024.0 * 1024.0 => format!("{:.1} MiB", kib / 1024.0),
        kib => format!("{:.2} GiB", kib / 1024.0 / 1024.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(quote("a/b-c_1.gguf"), "a/b-c_1.gguf");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's $HOME"), "'it'\\''s $HOME'");
    }
}
