//! `ggraft predict`: greedy completions of a data set.

use crate::args::{AdapterArgs, ChatArgs, Limit, ModelArgs, SessionArgs, parse_limit};
use crate::data;
use crate::failure::{Failure, Result};
use crate::outputs::Files;
use crate::score::score;
use crate::{interrupt, io};
use clap::Args;
use ggraft::Session;
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{GenerateOptions, KvType};
use ggraft::train::data::Prompt;
use serde_json::{Value, json};
use std::ops::ControlFlow;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft predict -m model.gguf -a adapter.gguf --data test.jsonl -o predictions.jsonl
  ggraft predict -m model.gguf --data prompts.jsonl -n 16 -o predictions.jsonl

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
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    chat_format: ChatArgs,
    #[command(flatten)]
    session: SessionArgs,
}

impl Predict {
    pub(crate) fn execute(self) -> Result<()> {
        Files::default()
            .reads("-m", Some(&self.model.model))
            .reads("-a", self.adapter.adapter.as_deref())
            .reads_data("--data", Some(&self.data))
            .reads("--chat-template", self.chat_format.chat_template.as_deref())
            .writes("-o", Some(&self.output))
            .check()?;
        let data = data::read(&self.data)?;
        data::Kinds::of(&data).warn(&self.chat_format, false);
        let model = self.model.open_with(&self.chat_format)?;
        let options = self.session.options(KvType::F16);
        let mut session = self.adapter.session(&model, options)?;
        let guard = interrupt::Guard::new(session.cancel_token());
        let mut greedy = GenerateOptions::default().sampler(SamplerParams::greedy());
        greedy.max_tokens = self.n.0;
        let mut out = String::new();
        let done = data::for_each(&data, |row| {
            let prompt = row.prompt(&model)?;
            let result = complete(&mut session, &prompt, &greedy);
            if matches!(&result, Err(e) if e.is_context_full()) {
                // Rows keep their places.
                let object = json!({"prompt": prompt.text, "prediction": null});
                out += &format!("{object}\n");
            }
            out += &format!("{}\n", result?);
            Ok(())
        })?;
        if out.is_empty()
            && let Some(why) = done.stopped
        {
            return Err(why);
        }
        // A pipe may wait for its reader for ever: from here on a signal ends that.
        drop(guard);
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
fn complete(session: &mut Session, prompt: &Prompt, greedy: &GenerateOptions) -> Result<Value> {
    let answer = prompt.answer.as_ref();
    let score = answer.map(|row| score(session, row)).transpose()?;
    session.reset();
    session.prompt_tokens(&prompt.tokens)?;
    let done = session.generate(greedy, |_| ControlFlow::Continue(()))?;
    let mut object = json!({"prompt": prompt.text, "prediction": done.text});
    if let Some(score) = score {
        object["nll"] = score.nll.into();
        object["tokens"] = score.tokens.into();
    }
    Ok(object)
}
