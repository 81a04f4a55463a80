//! `ggraft eval`: loss, perplexity and exact match on a data set.

use crate::args::{ChatArgs, EnsembleArgs, ModelArgs, PARALLEL, SessionArgs, count};
use crate::data;
use crate::failure::{Failure, Result};
use crate::io;
use crate::score::{self, Score};
use clap::Args;
use ggraft::infer::{Combine, KvType};
use ggraft::train::data::{Content, Row};
use serde_json::json;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft eval -m model.gguf --data test.jsonl
  ggraft eval -m model.gguf -a adapter.gguf --data test.jsonl --json
  ggraft eval -m model.gguf -a one.gguf -a two.gguf --ensemble mean-prob --data test.jsonl

What training learns is what is scored, BOS (where the model wants it) comes in front. Exact match counts the completions that \
greedy decoding would write token for token, the end included. Rows that do not fit into the context or have the weight 0 are left \
out, and a warning names them. After Ctrl-C the figures are those of the rows that are done. A vote has no loss: what nobody votes for has no probability.";

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

#[derive(Default)]
struct Totals {
    /// Sum over rows of weight * summed loss.
    nll: f64,
    /// The same of each member of an ensemble.
    members: Vec<f64>,
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
        let ensemble = self.adapter.load(&model)?;
        let options = self.session.options(KvType::F16);
        let mut scheduler = self
            .adapter
            .scheduler(&model, &ensemble, options, self.parallel)?;
        let mut totals = Totals::default();
        let ask = |row: &Row| {
            let example = row.example(&model)?;
            let request = score::request(&example, &ensemble);
            Ok((example, vec![request]))
        };
        let done = data::for_each(&data, &mut scheduler, ask, |row, example, answers| {
            let answers = answers?;
            let score = Score::new(&example, &answers[0]);
            let weight = f64::from(row.weight);
            totals.nll += weight * score.nll;
            totals.members.resize(score.members.len(), 0.0);
            for (sum, nll) in totals.members.iter_mut().zip(&score.members) {
                *sum += weight * nll;
            }
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
        // What nobody votes for is infinitely unlikely.
        let has_loss = self.adapter.combine() != Some(Combine::Vote);
        let loss = has_loss.then(|| totals.nll / totals.weight);
        let exact =
            (totals.completions > 0).then(|| totals.exact as f64 / totals.completions as f64);
        let tokens = totals.tokens;
        let of_members = totals.members.iter().map(|nll| nll / totals.weight);
        let of_members: Vec<f64> = of_members.collect();
        if self.json {
            let mut object = json!({
                "loss": loss,
                "perplexity": loss.map(f64::exp),
                "exact_match": exact,
                "rows": rows,
                "tokens": tokens,
            });
            if !of_members.is_empty() {
                object["member_losses"] = of_members.into();
            }
            return io::print(&format!("{object}\n"));
        }
        let mut text = match loss {
            Some(loss) => format!(
                "loss        {loss:.4} per token\nperplexity  {:.4}\n",
                loss.exp()
            ),
            None => String::new(),
        };
        if !of_members.is_empty() {
            let losses = of_members.iter().map(|loss| format!("{loss:.4}"));
            text += &format!("members     {}\n", losses.collect::<Vec<_>>().join(" "));
        }
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
