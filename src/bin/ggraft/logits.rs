//! `ggraft logits`: raw logits for comparisons with other implementations.

use crate::args::{AdapterArgs, ModelArgs, SessionArgs, new_session};
use crate::failure::Result;
use crate::outputs::Files;
use crate::{interrupt, io};
use clap::Args;
use ggraft::infer::{KvType, SessionError};
use ggraft::{Model, Session};
use std::io::Write;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft logits -m model.gguf --ids 1,15043,3186 -o out.safetensors
  ggraft logits -m model.gguf -a adapter.gguf -p \"Once upon a time\" -o out.safetensors

OUT.safetensors holds `logits`, F32 [T, V] (row t: what the model expects behind token t), and `input_ids`, I64 [T]. Virtual \
tokens of an adapter have no rows. If the adapter has a template, the ids go where it says {prompt}, and the template's own \
text and BOS have rows, too. The KV cache is f32 here unless --kv-type says otherwise. Logits that are not finite are an \
error, and no file is written.";

/// Write the logits of every token of a text to a safetensors file
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Logits {
    #[command(flatten)]
    model: ModelArgs,
    /// Token ids, used exactly as given: no BOS is added
    #[arg(
        long,
        value_name = "1,2,3",
        value_delimiter = ',',
        allow_hyphen_values = true,
        required_unless_present = "prompt"
    )]
    ids: Vec<i32>,
    /// Text, tokenized with BOS where the model wants it
    #[arg(
        short,
        long,
        value_name = "TEXT",
        conflicts_with = "ids",
        allow_hyphen_values = true
    )]
    prompt: Option<String>,
    /// The file to write
    #[arg(short, long, value_name = "OUT.safetensors")]
    output: PathBuf,
    #[command(flatten)]
    adapter: AdapterArgs,
    #[command(flatten)]
    session: SessionArgs,
}

impl Logits {
    pub(crate) fn execute(self) -> Result<()> {
        Files::default()
            .reads("-m", Some(&self.model.model))
            .reads("-a", self.adapter.adapter.as_deref())
            .writes("-o", Some(&self.output))
            .check()?;
        let model = self.model.open()?;
        let ids = match &self.prompt {
            Some(text) => tokenize(&model, text)?,
            None => self.ids,
        };
        let adapter = self.adapter.load(&model)?;
        if ids.is_empty() && adapter.as_ref().is_none_or(|a| a.template().is_none()) {
            return Err(SessionError::EmptyPrompt.into());
        }
        let options = self.session.options(KvType::F32);
        let mut session = new_session(&model, options, adapter.as_ref(), self.adapter.force)?;
        let guard = interrupt::Guard::new(session.cancel_token());
        let (ids, logits) = compute(&mut session, &ids)?;
        // A pipe may wait for its reader for ever: from here on a signal ends that.
        drop(guard);
        io::write_file(&self.output, |out| write(out, &ids, &logits))
    }
}

/// BOS, where the model wants it, and the text; no EOS.
fn tokenize(model: &Model, text: &str) -> Result<Vec<i32>> {
    let vocab = model.vocab();
    let mut ids: Vec<i32> = vocab.leading_bos().into_iter().collect();
    ids.extend(vocab.tokenize_start(text)?);
    Ok(ids)
}

/// The real tokens in order of position, and their logits, `ne = [V, T]`.
fn compute(session: &mut Session, ids: &[i32]) -> Result<(Vec<i32>, Vec<f32>)> {
    let mut logits = Vec::new();
    let template = session.adapter().and_then(|a| a.template());
    if template.is_none() {
        session.feed_with_logits(ids, |_, row| logits.extend_from_slice(row))?;
        return Ok((ids.to_vec(), logits));
    }
    // The session places BOS as template and model want it: one that the ids begin with is that one.
    let bos = session.model().vocab().bos();
    let rest = match ids {
        [first, rest @ ..] if Some(*first) == bos => rest,
        _ => ids,
    };
    let mut placed = Vec::new();
    session.prompt_tokens_with_logits(rest, |id, row| {
        placed.push(id);
        logits.extend_from_slice(row);
    })?;
    Ok((placed, logits))
}

/// The safetensors format: length of the header in 8 bytes, header, data.
fn write(out: &mut dyn Write, ids: &[i32], logits: &[f32]) -> std::io::Result<()> {
    let (t, split) = (ids.len(), 8 * ids.len());
    let header = serde_json::json!({
        "input_ids": {"dtype": "I64", "shape": [t], "data_offsets": [0, split]},
        "logits": {"dtype": "F32", "shape": [t, logits.len() / t], "data_offsets": [split, split + 4 * logits.len()]},
    });
    let mut header = header.to_string();
    // Data starts at a multiple of 8.
    header.extend(std::iter::repeat_n(
        ' ',
        header.len().next_multiple_of(8) - header.len(),
    ));
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(header.as_bytes())?;
    for &id in ids {
        out.write_all(&i64::from(id).to_le_bytes())?;
    }
    for value in logits {
        out.write_all(&value.to_le_bytes())?;
    }
    Ok(())
}
