//! The log of a training run: one JSON object per step.

use crate::failure::{Failure, Result};
use crate::io::{read_text, write_file};
use crate::plot::Curve;
use ggraft::file::atomic::{is_stream, open_stream};
use ggraft::train::Report;
use serde::Deserialize;
use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

pub(super) struct Log {
    path: PathBuf,
    file: Box<dyn Write + Send>,
}

/// What a resumed run needs of a line.
#[derive(Deserialize)]
struct Line {
    step: u64,
    loss: f64,
    valid_loss: Option<f64>,
    best: bool,
}

impl Log {
    /// A new log, in place of what was there. A pipe or device gets the lines as they come.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let file = match open_stream(path) {
            Ok(Some(stream)) => Ok(stream),
            Ok(None) => File::create(path).map(|file| Box::new(file) as _),
            Err(e) => Err(e),
        };
        Ok(Self {
            path: path.to_owned(),
            file: file.map_err(|source| fail(path, source))?,
        })
    }

    /// Continues the log of a run that goes on after step `done`, and adds its steps to `curve`. Lines of later steps, which
    /// the run had computed before it ended and will compute again, are removed; so is a line that was not finished.
    pub(super) fn resume(path: &Path, done: u64, curve: &mut Curve) -> Result<Self> {
        if is_stream(path) {
            return Self::create(path);
        }
        if path.is_file() {
            let text = read_text(path)?;
            let mut kept = String::new();
            for text in text.lines() {
                match serde_json::from_str::<Line>(text) {
                    Ok(line) if line.step <= done => {
                        curve.add(line.step, line.loss, line.valid_loss, line.best);
                        kept += text;
                        kept.push('\n');
                    }
                    _ => {}
                }
            }
            if kept != text {
                write_file(path, |out| out.write_all(kept.as_bytes()))?;
            }
        }
        let file = OpenOptions::new().append(true).create(true).open(path);
        Ok(Self {
            path: path.to_owned(),
            file: Box::new(file.map_err(|source| fail(path, source))?),
        })
    }

    /// Adds a line, in one piece and at once.
    pub(super) fn write(&mut self, report: &Report) -> Result<()> {
        let line = json!({
            "step": report.step,
            "steps": report.steps,
            "epoch": report.epoch,
            "loss": report.loss,
            "valid_loss": report.valid_loss,
            "best": report.best,
            "lr": report.lr,
            "grad_norm": report.grad_norm,
            "tokens": report.tokens,
            "targets": report.targets,
            "seconds": report.seconds,
        });
        self.file
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| self.file.flush())
            .map_err(|source| fail(&self.path, source))
    }
}

fn fail(path: &Path, source: std::io::Error) -> Failure {
    Failure::File {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_ends_where_the_checkpoint_does() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log.jsonl");
        let line = |step: u64, valid: Option<f64>| {
            let best = valid.is_some();
            format!(
                "{}\n",
                json!({"step": step, "loss": 1.0, "valid_loss": valid, "best": best})
            )
        };
        let good = line(1, None) + &line(2, Some(0.5));
        std::fs::write(
            &path,
            format!("{good}{}{{\"step\": 4, \"lo", line(3, Some(0.1))),
        )
        .unwrap();
        let mut curve = Curve::default();
        drop(Log::resume(&path, 2, &mut curve).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), good);
        assert_eq!(curve.train, [(1, 1.0), (2, 1.0)]);
        assert_eq!(curve.best, Some((2, 0.5)));

        // A log that is not there begins with the step that comes.
        let path = folder.path().join("new.jsonl");
        drop(Log::resume(&path, 2, &mut Curve::default()).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "");
    }
}
