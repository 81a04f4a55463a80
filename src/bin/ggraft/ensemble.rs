//! `ggraft ensemble`: what several adapters are worth together.

use crate::args::{ChatArgs, EnsembleArgs, ModelArgs, PARALLEL, SessionArgs, count};
use crate::failure::{Failure, Result};
use crate::{data, interrupt, io};
use clap::{Args, Subcommand};
use ggraft::infer::{CancelToken, Combine, KvType, Losses, Sample};
use ggraft::train::data::Example;
use serde_json::json;
use std::path::PathBuf;

/// Weigh adapters that speak together
///
/// `ggraft train --ensemble` trains such adapters, `ggraft run`, `predict` and `eval` let them speak.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Ensemble {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Fit(Fit),
}

const EXAMPLES: &str = "Examples:
  ggraft ensemble fit -m model.gguf -a one.gguf -a two.gguf -a three.gguf \\
      --ensemble mean-prob --data valid.jsonl
  ggraft ensemble fit -m model.gguf -a one.gguf -a none --ensemble mean-logit --data valid.jsonl

The rows should be others than those that were learned: an adapter that knows its rows by heart would get all the weight. What is printed are the losses of the members, of all together \
with the weights that were given (equal ones without --weights), and with the fitted ones, which go to the --weights of `ggraft run`, `predict` and `eval`. A vote has no loss to fit.";

/// Find the weights with which an ensemble predicts a data set best
#[derive(Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", data::FORMS))]
struct Fit {
    #[command(flatten)]
    model: ModelArgs,
    /// Rows that were not learned, one JSON object per line; `-` is standard input
    #[arg(long, value_name = "VALID.jsonl")]
    data: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Rows that are computed at a time
    #[arg(long, value_name = "N", default_value_t = PARALLEL, value_parser = count::<usize>)]
    parallel: usize,
    #[command(flatten)]
    adapter: EnsembleArgs,
    #[command(flatten)]
    chat_format: ChatArgs,
    #[command(flatten)]
    session: SessionArgs,
}

impl Ensemble {
    pub(crate) fn execute(self) -> Result<()> {
        match self.command {
            Command::Fit(fit) => fit.execute(),
        }
    }
}

/// A row as an ensemble is measured by it.
pub(crate) fn sample(row: Example) -> Sample {
    Sample {
        prompt: row.given,
        answer: row.then,
        weight: row.weight,
    }
}

impl Fit {
    fn execute(self) -> Result<()> {
        if self.adapter.combine().is_none() {
            return Err(Failure::Usage(format!(
                "--ensemble says how the adapters speak together: one of {}",
                Combine::ALL.map(Combine::name).join(", ")
            )));
        }
        let data = data::read_counted(&self.data)?;
        data::Kinds::of(&data).warn(&self.chat_format, false);
        let model = self.model.open_with(&self.chat_format)?;
        let ensemble = self.adapter.load(&model)?;
        let session = self.session.options(KvType::F16);
        // What does not fit is said before a row is read.
        (self.adapter).scheduler(&model, &ensemble, session.clone(), self.parallel)?;
        let options = self.adapter.engine(session, self.parallel);
        let samples: Vec<_> = data.examples(&model)?.into_iter().map(sample).collect();
        let cancel = CancelToken::default();
        let _guard = interrupt::Guard::new(cancel.clone());
        let fit = ensemble.fit(&model, &options, &samples, &cancel)?;
        let Losses {
            together,
            members,
            tokens,
            left_out,
        } = fit.before;
        if left_out > 0 {
            tracing::warn!(
                "left out: {} not fit into the context (a longer one: --ctx)",
                data::rows_do(left_out)
            );
        }
        let weights = fit.ensemble.member_weights();
        if self.json {
            let object = json!({
                "weights": weights,
                "loss": fit.loss,
                "loss_before": together,
                "member_losses": members,
                "rows": samples.len() - left_out,
                "tokens": tokens,
            });
            return io::print(&format!("{object}\n"));
        }
        let mut text = String::new();
        for ((path, loss), weight) in self.adapter.adapter.iter().zip(&members).zip(weights) {
            text += &format!("{loss:.4} alone, weight {weight:.4}  {}\n", path.display());
        }
        let weights: Vec<_> = weights.iter().map(|w| format!("{w:.4}")).collect();
        text += &format!(
            "{together:.4} together, with the weights before\n{:.4} together, with --weights {}\n",
            fit.loss,
            weights.join(",")
        );
        io::print(&text)
    }
}
