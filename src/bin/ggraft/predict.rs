//! `ggraft predict`: greedy completions of a data set.

use crate::args::{
    ChatArgs, EnsembleArgs, Limit, ModelArgs, PARALLEL, SessionArgs, count, parse_limit,
};
use crate::data;
use crate::failure::{Failure, Result};
use crate::io;
use crate::outputs::Files;
use crate::score::{self, Score};
use clap::Args;
use ggraft::infer::engine::Request;
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{Combine, GenerateOptions, Generated, KvType, StopReason};
use ggraft::train::data::{Prompt, Row};
use serde_json::{Value, json};
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft predict -m model.gguf -a adapter.gguf --data test.jsonl -o predictions.jsonl
  ggraft predict -m model.gguf --data prompts.jsonl -n 16 -o predictions.jsonl
  ggraft predict -m model.gguf -a one.gguf -a two.gguf -a three.gguf --ensemble vote \\
      --data test.jsonl -o predictions.jsonl

Rows need no completion; of a conversation it is the assistant's last message, if that ends the row. The output has a row \
{\"prompt\", \"prediction\"} for each of them, in their order. Where there is a completion it also has \"nll\", the summed negative \
log-likelihood of the completion and its end, and \"tokens\", their number. Of rows that do not fit into the context the prediction is \
null, and a warning names them. Ctrl-C and a row that cannot be computed keep the rows before.";

/// Complete every prompt of a data set with the most likely text
#[derive(Args)]
#[command(after_help = format!("{EXAMPLES}\n\n{}", data::FORMS))]
pub(crate) struct Predict {
    #[command(flatten)]
    model: ModelArgs,
    /// The prompts, one JSON object per line; `-` is standard input
    #[arg(long, value_name = "FILE.jsonl")]
    data: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "OUT.jsonl")]
    output: PathBuf,
    /// Tokens of one completion at most; -1: until the text ends
    #[arg(short, value_name = "N", default_value = "64", value_parser = parse_limit)]
    n: Limit,
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

impl Predict {
    pub(crate) fn execute(self) -> Result<()> {
        Files::default()
            .reads("-m", Some(&self.model.model))
            .reads("-a", self.adapter.paths())
            .reads_data("--data", Some(&self.data))
            .reads("--chat-template", self.chat_format.chat_template.as_deref())
            .writes("-o", Some(&self.output))
            .check()?;
        let data = data::read(&self.data)?;
        data::Kinds::of(&data).warn(&self.chat_format, false);
        let model = self.model.open_with(&self.chat_format)?;
        let ensemble = self.adapter.load(&model)?;
        let options = self.session.options(KvType::F16);
        let mut scheduler = self
            .adapter
            .scheduler(&model, &ensemble, options, self.parallel)?;
        let mut greedy = GenerateOptions::default().sampler(SamplerParams::greedy());
        greedy.max_tokens = self.n.0;
        let has_loss = self.adapter.combine() != Some(Combine::Vote);
        let ask = |row: &Row| {
            let prompt = row.prompt(&model)?;
            let complete = Request::tokens(prompt.tokens.clone())
                .ensemble(&ensemble)
                .generate(greedy.clone())
                .until_full(true);
            let mut requests = vec![complete];
            // What nobody votes for is infinitely unlikely.
            if let Some(answer) = prompt.answer.as_ref().filter(|_| has_loss) {
                requests.push(score::request(answer, &ensemble));
            }
            Ok((prompt, requests))
        };
        let mut out = String::new();
        let done = data::for_each(&data, &mut scheduler, ask, |_, prompt, answers| {
            let row = answers.and_then(|answers| row(&prompt, &answers));
            if matches!(&row, Err(e) if e.is_context_full()) {
                // Rows keep their places.
                let object = json!({"prompt": prompt.text, "prediction": null});
                out += &format!("{object}\n");
            }
            out += &format!("{}\n", row?);
            Ok(())
        })?;
        if out.is_empty()
            && let Some(why) = done.stopped
        {
            return Err(why);
        }
        io::write_file(&self.output, |file| file.write_all(out.as_bytes()))?;
        let output = self.output.display();
        match done.stopped {
            Some(Failure::Interrupted(why)) => {
                Err(Failure::Interrupted(format!("{why}, which {output} has")))
            }
            Some(why) => Err(Failure::Unsuitable(format!(
                "{}; {output} has the rows before it",
                why.line()
            ))),
            None => Ok(()),
        }
    }
}

/// The row of the output.
fn row(prompt: &Prompt, answers: &[Generated]) -> Result<Value> {
    let done = &answers[0];
    if done.reason == StopReason::ContextFull {
        return Err(Failure::NoRoom);
    }
    let mut object = json!({"prompt": prompt.text, "prediction": done.text});
    if let (Some(answer), Some(scored)) = (&prompt.answer, answers.get(1)) {
        let score = Score::new(answer, scored);
        object["nll"] = score.nll.into();
        object["tokens"] = score.tokens.into();
    }
    Ok(object)
}
