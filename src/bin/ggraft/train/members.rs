//! `ggraft train --ensemble`: adapters that differ, one after the other.

use super::args::{MembersArgs, SavingArgs};
use super::{Rows, Train, quote};
use crate::ensemble::sample;
use crate::failure::{Failure, Result};
use crate::{interrupt, io};
use ggraft::infer::engine::EngineOptions;
use ggraft::infer::{CancelToken, Combine, Ensemble, KvType};
use ggraft::{Adapter, Model, SessionOptions};
use std::path::{Path, PathBuf};

impl Train {
    /// The runs of the members that are trained, or this one.
    pub(super) fn members(&self) -> Vec<Self> {
        match self.members.ensemble {
            Some(members) => (members.first..=members.last)
                .map(|i| self.member(i))
                .collect(),
            None => vec![self.clone()],
        }
    }

    /// The run of member `i`, counted from 1.
    fn member(&self, i: usize) -> Self {
        let further = |seed: u64| seed.wrapping_add(i as u64 - 1);
        let mut run = self.clone();
        run.schedule.seed = further(self.schedule.seed);
        run.members = MembersArgs {
            ensemble: None,
            bagging: (self.members.bagging).map(|seed| seed.map(further)),
        };
        let SavingArgs {
            output, log, plot, ..
        } = &mut run.saving;
        *output = numbered(output, i);
        for path in [log, plot].into_iter().flatten() {
            *path = numbered(path, i);
        }
        run
    }
}

/// `name.gguf` with a number: `name-2.gguf`.
fn numbered(path: &Path, i: usize) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(format!("-{i}"));
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    path.with_file_name(name)
}

/// Trains the members and says what they are worth, each alone and all together, those of an earlier call included.
pub(super) fn train(all: &Train, members: &[Train], model: &Model, rows: &Rows) -> Result<()> {
    let range = all.members.ensemble.expect("there are members");
    for (i, member) in (range.first..).zip(members) {
        io::note(&format!(
            "member {i} of {}: {}",
            range.last,
            member.saving.output.display()
        ));
        member.train(model, rows).map_err(|why| match why {
            Failure::Interrupted(text) if i < range.last => Failure::Interrupted(format!(
                "{text}; the members behind it: this command with --ensemble {}..{}",
                i + 1,
                range.last
            )),
            why => why,
        })?;
    }
    let outputs: Vec<_> = (1..=range.last)
        .map(|i| numbered(&all.saving.output, i))
        .collect();
    let outputs: Vec<_> = outputs.into_iter().filter(|path| path.exists()).collect();
    let adapters = outputs.iter().map(|path| Adapter::load(path).map(Some));
    let adapters: Vec<_> = adapters.collect::<ggraft::Result<_>>()?;
    let ensemble = Ensemble::new(adapters, Combine::MeanProb)?;
    let mut text = String::new();
    let mut row = |name: &str, value: String| text += &format!("{name:<16} {value}\n");
    // Other objectives have losses that answers say nothing of.
    if !rows.valid.is_empty() && all.objective.is_completion() {
        let samples: Vec<_> = rows.valid.iter().map(sample).collect();
        let mut session = SessionOptions::default().kv_type(KvType::F16);
        session.n_threads = all.computation.threads;
        let options = EngineOptions::from(&session);
        let cancel = CancelToken::default();
        let _guard = interrupt::Guard::new(cancel.clone());
        let losses = ensemble.measure(model, &options, &samples, &cancel)?;
        for (output, loss) in outputs.iter().zip(&losses.members) {
            row(
                "member",
                format!("{}: {loss:.4} on the validation rows", output.display()),
            );
        }
        let best = losses.members.iter().copied().fold(f64::INFINITY, f64::min);
        row(
            "together",
            format!("{:.4}, the best alone {best:.4}", losses.together),
        );
    }
    let model = quote(&all.data.model.to_string_lossy());
    let adapters = outputs
        .iter()
        .map(|path| format!("-a {}", quote(&path.to_string_lossy())));
    let prompt = rows
        .prompt
        .clone()
        .unwrap_or_else(|| "-p \"...\"".to_owned());
    row(
        "use them",
        format!(
            "ggraft run -m {model} {} --ensemble {} {prompt}",
            adapters.collect::<Vec<_>>().join(" "),
            Combine::MeanProb.name()
        ),
    );
    io::print(&text)
}
