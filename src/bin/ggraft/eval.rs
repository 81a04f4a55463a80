//! `ggraft eval`: loss, perplexity and exact match on a data set.

use crate::args::{AdapterArgs, ChatArgs, ModelArgs, SessionArgs};
use crate::data;
use crate::failure::{Failure, Result};
use crate::score::score;
use crate::{interrupt, io};
use clap::Args;
use ggraft::infer::KvType;
use ggraft::train::data::Content;
use serde_json::json;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft eval -m model.gguf --data test.jsonl
  ggraft eval -m model.gguf -a adapter.gguf --data test.jsonl --json

What training learns is what is scored, BOS (where the model wants it) comes in front. Exact match counts the completions that \
greedy decoding would write token for token, the end included. Rows that do not fit into the context or have the weight 0 are left \
out, and a warning names them. After Ctrl-C the figures are those of the rows that are done.";

/// Measure how well a model with an adapter predicts a data set
#[derive(Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", data::FORMS))]
pub(crate) struct Eval {
    #[command(flatten)]
    model: ModelArgs,
    /// The data, one JSON object per line; `-` is standard input
    #[arg(long, value_name = "FILE.jsonl")]
    data: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    chat_format: ChatArgs,
    #[command(flatten)]
    session: SessionArgs,
}

#[derive(Default)]
struct Totals {
    /// Sum over rows of weight * summed loss.
    nll: f64,
    /// Sum over rows of weight * tokens.
    weight: f64,
    tokens: usize,
    /// Rows of prompt and completion, and how many of them greedy decoding reproduces.
    completions: usize,
    exact: usize,
}

impl Eval {
    pub(crate) fn execute(self) -> Result<()> {
        let data = data::read_counted(&self.data)?;
        data::Kinds::of(&data).warn(&self.chat_format, false);
        let model = self.model.open_with(&self.chat_format)?;
        let options = self.session.options(KvType::F16);
        let mut session = self.adapter.session(&model, options)?;
        let _guard = interrupt::Guard::new(session.cancel_token());
        let mut totals = Totals::default();
        let done = data::for_each(&data, |row| {
            let score = score(&mut session, &row.example(&model)?)?;
            let weight = f64::from(row.weight);
            totals.nll += weight * score.nll;
            totals.weight += weight * score.tokens as f64;
            totals.tokens += score.tokens;
            if matches!(
                row.content,
                Content::Completion { .. } | Content::Instruction(_)
            ) {
                totals.completions += 1;
                totals.exact += usize::from(score.exact);
            }
            Ok(())
        })?;
        let stopped = match done.stopped {
            // Figures of rows that somebody did not choose would mislead.
            Some(why) if totals.weight == 0.0 || !why.is_cancelled() => return Err(why),
            stopped => stopped,
        };
        if totals.weight == 0.0 {
            return Err(Failure::Unsuitable(format!(
                "{}: no row has a token to predict",
                self.data.display()
            )));
        }
        self.print(done.rows, &totals)?;
        stopped.map_or(Ok(()), Err)
    }

    fn print(&self, rows: usize, totals: &Totals) -> Result<()> {
        let loss = totals.nll / totals.weight;
        let exact =
            (totals.completions > 0).then(|| totals.exact as f64 / totals.completions as f64);
        let tokens = totals.tokens;
        if self.json {
            let object = json!({
                "loss": loss,
                "perplexity": loss.exp(),
                "exact_match": exact,
                "rows": rows,
                "tokens": tokens,
            });
            return io::print(&format!("{object}\n"));
        }
        let mut text = format!(
            "loss        {loss:.4} per token\nperplexity  {:.4}\n",
            loss.exp()
        );
        if let Some(share) = exact {
            text += &format!(
                "exact match {:.1} % ({} of {})\n",
                100.0 * share,
                totals.exact,
                totals.completions
            );
        }
        io::print(&format!("{text}rows        {rows}\ntokens      {tokens}\n"))
    }
}
