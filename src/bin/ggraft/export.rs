//! `ggraft export`: an adapter becomes a PEFT folder, or a slot of llama-server.

use crate::args::{ModelArgs, count, load_adapter_for, stem};
use crate::failure::{Failure, Result};
use crate::io;
use crate::outputs::Files;
use clap::Args;
use ggraft::Adapter;
use ggraft::adapter::export_peft;
use ggraft::file::peft::{CONFIG_FILE, TENSOR_FILE};
use ggraft::file::types::GgmlType;
use ggraft::host::{Llama, LlamaOptions};
use ggraft::model::Base;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft export adapter.gguf -m model.gguf -o peft-folder
  ggraft export adapter.gguf -m model.gguf --base-name meta-llama/Llama-3.2-1B -o peft-folder
  ggraft export --slot adapter.gguf -m model.gguf -o slots/adapter.slot
  llama-server -m model.gguf --slot-save-path slots
  curl -d '{\"filename\": \"adapter.slot\"}' 'localhost:8080/slots/0?action=restore'

The folder can be loaded with PeftModel.from_pretrained. Adapters with a template have no counterpart in PEFT.

The slot is for a llama-server whose cache is as the options say, of a llama.cpp whose files of slots have version 4. What a prompt has to begin with, so that the server \
goes on behind the adapter, is printed. The base may be of an architecture that ggraft itself does not run.";

/// Convert an adapter to a folder that PEFT loads, or to a slot of llama-server
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Export {
    /// The adapter file
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// The folder to write, or the file of a slot
    #[arg(short, long, value_name = "PATH")]
    output: PathBuf,
    /// Write a slot that llama-server restores, or llama_state_seq_load_file
    #[arg(long, conflicts_with_all = ["base_name", "overwrite", "force"])]
    slot: bool,
    /// Name or path under which Transformers knows the base model [default: the one in the adapter, or the model file's name]
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,
    /// Replace the adapter that the folder holds already
    #[arg(long)]
    overwrite: bool,
    /// Export the adapter even if it was made for another model of the same shape
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    cache: CacheArgs,
}

/// How llama-server keeps keys and values, by its own options.
#[derive(Args)]
#[command(next_help_heading = "Options of --slot")]
struct CacheArgs {
    /// Type of keys: f16, f32, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0 [default: f16]
    #[arg(long, value_name = "TYPE", requires = "slot", value_parser = cache_type)]
    cache_type_k: Option<GgmlType>,
    /// Type of values [default: f16]
    #[arg(long, value_name = "TYPE", requires = "slot", value_parser = cache_type)]
    cache_type_v: Option<GgmlType>,
    /// Fused attention, on or off [default: as libllama decides, which is on where it can]
    #[arg(long, value_name = "on|off", requires = "slot", value_parser = on_or_off)]
    flash_attn: Option<bool>,
    /// Caches, one for each slot: the server's --parallel, unless its slots share one (--kv-unified) [default: 1]
    #[arg(long, value_name = "N", requires = "slot", value_parser = count::<usize>)]
    parallel: Option<usize>,
    /// The server keeps all positions of layers that see windows
    #[arg(long, requires = "slot")]
    swa_full: bool,
    /// Token that stands for a row of the adapter in the server's memory of a slot: no other prompt should begin with it [default: the vocabulary's last one]
    #[arg(long, value_name = "ID", requires = "slot")]
    placeholder: Option<i32>,
}

fn cache_type(name: &str) -> Result<GgmlType, String> {
    use GgmlType::*;
    let known = [F16, F32, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0];
    let found = known.into_iter().find(|ty| ty.name() == name);
    found.ok_or_else(|| format!("one of {}", known.map(GgmlType::name).join(", ")))
}

fn on_or_off(word: &str) -> Result<bool, String> {
    match word {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".to_owned()),
    }
}

impl Export {
    pub(crate) fn execute(self) -> Result<()> {
        if self.slot {
            return self.write_slot();
        }
        Files::default()
            .reads("", Some(&self.adapter))
            .reads("-m", Some(&self.model.model))
            .writes_peft("-o", &self.output)
            .check()?;
        if let Some(old) = self.replaced().filter(|_| !self.overwrite) {
            return Err(Failure::Usage(format!(
                "{} is there already: --overwrite replaces it",
                old.display()
            )));
        }
        let base = Base::open(&self.model.model)?;
        let fits = |adapter: &Adapter| {
            Ok(adapter.check_fits(base.shape(), &base.fingerprint(), self.force)?)
        };
        let adapter = load_adapter_for(&self.adapter, (base.shape(), base.fingerprint()), None)
            .and_then(|adapter| fits(&adapter).map(|()| adapter))
            .map_err(|e| e.forced(self.force))?;
        let base_name = self
            .base_name
            .or_else(|| adapter.provenance().get("base_name").cloned())
            .unwrap_or_else(|| stem(&self.model.model));
        export_peft(&adapter, base.shape(), &self.output, &base_name)?;
        io::print(&format!(
            "{}: {}\n",
            self.output.display(),
            io::summary(&adapter)
        ))
    }

    /// Prepared in a context of libllama's that is like the server's.
    fn write_slot(self) -> Result<()> {
        Files::default()
            .reads("", Some(&self.adapter))
            .reads("-m", Some(&self.model.model))
            .writes("-o", Some(&self.output))
            .check()?;
        let mut options = LlamaOptions::default();
        options.type_k = self.cache.cache_type_k.unwrap_or(GgmlType::F16);
        options.type_v = self.cache.cache_type_v.unwrap_or(GgmlType::F16);
        options.flash_attention = self.cache.flash_attn;
        options.swa_full = self.cache.swa_full;
        options.n_sequences = self.cache.parallel.unwrap_or(1);
        options.kv_unified = self.cache.parallel.is_none();
        let base = Base::open(&self.model.model)?;
        let n_vocab = base.shape().n_vocab as i32;
        let token = self.cache.placeholder.unwrap_or(n_vocab - 1);
        if !(0..n_vocab).contains(&token) {
            return Err(Failure::Usage(format!(
                "--placeholder {token}: the vocabulary has tokens 0 to {}",
                n_vocab - 1
            )));
        }
        let adapter = load_adapter_for(&self.adapter, (base.shape(), base.fingerprint()), None)?;
        // Rows, and some of a text: nothing else is computed.
        options.n_ctx = adapter.length() + 64;
        let mut llama = Llama::open(&self.model.model, &options)?;
        let graft = llama.host().prepare(&adapter, 0)?;
        graft.save_slot(&self.output, token)?;
        let n = graft.length();
        let bos = llama.host().leading_bos();
        let first = bos.map(|id| format!(" {id},")).unwrap_or_default();
        io::print(&format!(
            "{}: {}\nA prompt goes on behind it if it begins with {n} times {token}{}:\n  {{\"prompt\": [{},{first} \"Your text\"]}}\n",
            self.output.display(),
            io::summary(&adapter),
            if bos.is_some() {
                ", then the token that begins a text"
            } else {
                ""
            },
            vec![token.to_string(); n].join(", "),
        ))
    }

    /// A file of another adapter that the folder holds.
    fn replaced(&self) -> Option<PathBuf> {
        [CONFIG_FILE, TENSOR_FILE]
            .map(|name| self.output.join(name))
            .into_iter()
            .find(|path| path.exists())
    }
}
