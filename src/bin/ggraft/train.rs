//! `ggraft train`: an adapter learns from a data set.

mod args;
mod dry_run;
mod log;
mod members;
mod notes;
mod progress;
mod run;
mod saving;
mod values;

use crate::failure::{Failure, Result};
use crate::outputs::{Files, same_file};
use crate::{data, io};
use args::{
    ComputationArgs, DataArgs, MembersArgs, ObjectiveArgs, SavingArgs, ScheduleArgs, ShapeArgs,
};
use clap::Args;
use ggraft::file::atomic::is_stream;
use ggraft::train::Trainer;
use ggraft::train::data::{Content, Examples, ExamplesBuilder, Row};
use ggraft::{DecoderChoice, Model, ModelOptions};
use run::Run;
use std::path::{Path, PathBuf};
pub(crate) use values::Every;

const EXAMPLES: &str = "Examples:
  ggraft train -m model.gguf --method prefix --data train.jsonl -o pirate.gguf
  ggraft train -m model.gguf --method prompt --data train.jsonl --valid valid.jsonl -o task.gguf
  ggraft train -m model.gguf --method p-tuning --template \"{v:10} {prompt} {v:10}\" \\
      --data train.jsonl -o facts.gguf --plot loss.svg
  ggraft train -m model.gguf --method prefix --data train.jsonl -o pirate.gguf --dry-run
  ggraft train -m model.gguf --method prefix --data train.jsonl --valid valid.jsonl \\
      --ensemble 4 -o team.gguf
  ggraft train -m model.gguf --data train.jsonl -o pirate.gguf --resume pirate.gguf.ckpt

Ctrl-C, SIGTERM, SIGHUP and SIGXCPU save the adapter and a checkpoint (OUT.gguf.ckpt) and say how to go on; another one, more than a second \
later, quits at once. The same seed, threads and data give the same adapter, bit for bit, interrupted or not. SIZE is a number of \
bytes, or one with K, M or G (powers of 1024, as KiB, MiB and GiB; KB, MB and GB are powers of 1000).";

/// Train an adapter on a frozen model
///
/// The model stays as it is, quantized and mapped: only the adapter's few numbers are trained, on the CPU. `ggraft run -a` uses
/// the file that is written.
#[derive(Args, Clone)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", data::FORMS))]
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
    members: MembersArgs,
    #[command(flatten)]
    saving: SavingArgs,
    #[command(flatten)]
    computation: ComputationArgs,
}

/// What is learned, and what that is measured by.
struct Rows {
    train: Examples,
    valid: Examples,
    /// Arguments of `ggraft run` for a prompt like those that are learned.
    prompt: Option<String>,
}

impl Train {
    pub(crate) fn execute(self) -> Result<()> {
        if let Some(path) = self.saving.resume.as_ref().filter(|path| !path.exists()) {
            return Err(Failure::Unsuitable(format!(
                "{}: there is no such checkpoint: a run that has ended well removes its own, unless it has --keep-checkpoint",
                path.display()
            )));
        }
        let members = self.members();
        members.iter().try_for_each(Self::check_outputs)?;
        let stdin = Path::new("-");
        if self.data.data == stdin && self.data.valid.as_deref() == Some(stdin) {
            return Err(Failure::Usage(
                "--data and --valid cannot both be standard input: give one of them a file"
                    .to_owned(),
            ));
        }
        if let Some(valid) = self.data.valid.as_deref()
            && same_file(valid, &self.data.data)
        {
            tracing::warn!(
                "--valid is the file of --data: the loss of rows that are learned says nothing about others"
            );
        }
        let chat = self.data.chat_format.options()?;
        // Whether a checkpoint goes on by forward passes is not known yet.
        let options = ModelOptions::default().decoder(DecoderChoice::Auto);
        let model = Model::open(&self.data.model, &options.chat(chat))?;
        // All that can be refused at once comes before the rows are tokenized.
        if self.saving.resume.is_none() {
            self.options(&model)?;
        }
        let rows = self.rows(&model)?;
        if self.computation.dry_run {
            let trainer = members[0].trainer(&model, &rows)?;
            notes::warn(&trainer);
            return io::print(&dry_run::report(&trainer, &model)?);
        }
        match self.members.ensemble {
            None => self.train(&model, &rows),
            Some(_) => members::train(&self, &members, &model, &rows),
        }
    }

    /// One run.
    fn train(&self, model: &Model, rows: &Rows) -> Result<()> {
        let mut trainer = self.trainer(model, rows)?;
        notes::warn(&trainer);
        notes::estimate(&mut trainer)?;
        Run::new(self, trainer)?.execute(rows.prompt.clone())
    }

    /// Before anything is computed: a long run shall not fail when it saves its result.
    fn check_outputs(&self) -> Result<()> {
        let SavingArgs {
            output,
            plot,
            log,
            resume,
            ..
        } = &self.saving;
        let checkpoint = self.checkpoint();
        // It is replaced by later checkpoints of its own run.
        let other = resume
            .as_deref()
            .filter(|path| !same_file(path, &checkpoint));
        // An adapter that is trained further may be replaced by what becomes of it: without --overwrite it is kept.
        let init = self
            .shape
            .init_file()
            .filter(|path| !same_file(path, output));
        let template = self.data.chat_format.chat_template.as_deref();
        Files::default()
            .reads("-m", Some(&self.data.model))
            .reads_data("--data", Some(&self.data.data))
            .reads_data("--valid", self.data.valid.as_deref())
            .reads("--init", init)
            .reads("--loss", self.objective.loss_file())
            .reads("--chat-template", template)
            .reads("--resume", other)
            .writes("-o", Some(output))
            .writes("the checkpoint", Some(&checkpoint))
            .writes("--plot", plot.as_deref())
            .writes("--log", log.as_deref())
            .check()?;
        if is_stream(output) {
            return Err(Failure::Unsuitable(format!(
                "{} is not a regular file, and the adapter is saved more than once: name a file with -o",
                output.display()
            )));
        }
        Ok(())
    }

    fn checkpoint(&self) -> PathBuf {
        let mut path = self.saving.output.clone().into_os_string();
        path.push(".ckpt");
        path.into()
    }

    /// Reads the rows, the smaller set first.
    fn rows(&self, model: &Model) -> Result<Rows> {
        let builder = || match self.data.split_text {
            Some(n) => ExamplesBuilder::new(model).split_texts(n),
            None => ExamplesBuilder::new(model),
        };
        let mut kinds = data::Kinds::default();
        let valid = match &self.data.valid {
            Some(path) => data::read_tokens(path, builder(), |row| kinds.add(row))?,
            None => Examples::default(),
        };
        let mut prompt = None;
        let train = data::read_tokens(&self.data.data, builder(), |row| {
            kinds.add(row);
            prompt.get_or_insert_with(|| sample_prompt(row));
        })?;
        kinds.warn(&self.data.chat_format, self.data.split_text.is_some());
        Ok(Rows {
            train,
            valid,
            prompt: prompt.flatten(),
        })
    }

    /// The seed that rows are drawn from, if they are.
    fn bag(&self) -> Option<u64> {
        let bagging = self.members.bagging?;
        Some(bagging.unwrap_or(self.schedule.seed))
    }

    fn trainer(&self, model: &Model, rows: &Rows) -> Result<Trainer> {
        let train = match self.bag() {
            Some(seed) => rows.train.bag(seed),
            None => rows.train.clone(),
        };
        let valid = rows.valid.clone();
        let Some(checkpoint) = self.saving.resume.as_deref() else {
            return Ok(Trainer::new(model, self.options(model)?, train, valid)?);
        };
        let mut trainer = Trainer::resume(model, checkpoint, train, valid)?;
        if let Some(threads) = self.computation.threads {
            trainer.set_threads(threads)?;
        }
        match self.schedule.steps {
            Some(steps) => trainer.set_steps(steps).map_err(ggraft::Error::from)?,
            None if trainer.finished().is_some() => {
                let done = trainer.summary().steps;
                return Err(Failure::Usage(format!(
                    "{}: this run is finished after {done} steps: --steps N, with more than {done}, goes on with it",
                    checkpoint.display()
                )));
            }
            None => {}
        }
        Ok(trainer)
    }

    /// The command that goes on with this run.
    fn resume_command(&self, checkpoint: &Path) -> String {
        let SavingArgs {
            output,
            checkpoint_every,
            keep_checkpoint,
            overwrite,
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
        if *checkpoint_every != Every::DEFAULT {
            words.push(format!("--checkpoint-every {checkpoint_every}"));
        }
        for (flag, given) in [
            ("--keep-checkpoint", keep_checkpoint),
            ("--overwrite", overwrite),
        ] {
            words.extend(given.then(|| flag.to_owned()));
        }
        let DataArgs {
            split_text,
            chat_format,
            ..
        } = &self.data;
        words.extend(split_text.map(|n| format!("--split-text {n}")));
        if let Some(template) = &chat_format.chat_template {
            let template = quote(&template.to_string_lossy());
            words.push(format!("--chat-template {template}"));
        }
        words.extend(
            chat_format
                .parse_special
                .then(|| "--parse-special".to_owned()),
        );
        words.extend(self.bag().map(|seed| format!("--bagging={seed}")));
        words.extend(self.computation.threads.map(|n| format!("-t {n}")));
        words.join(" ")
    }
}

/// Arguments of `ggraft run` for the prompt of `row`, if it fits into a line.
fn sample_prompt(row: &Row) -> Option<String> {
    let (text, chat) = match &row.content {
        Content::Completion { prompt, .. } => (prompt.as_str(), ""),
        Content::Messages { conversation, .. } => match &conversation.messages[..] {
            [user, ..] if user.role() == "user" => (user.text()?, "--chat "),
            _ => return None,
        },
        Content::Instruction(_) | Content::Text(_) => return None,
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
