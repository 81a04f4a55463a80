//! `ggraft export`: an adapter becomes a PEFT folder.

use crate::args::{ModelArgs, load_adapter, stem};
use crate::failure::Result;
use crate::io;
use clap::Args;
use ggraft::Adapter;
use ggraft::adapter::export_peft;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft export adapter.gguf -m model.gguf -o peft-folder
  ggraft export adapter.gguf -m model.gguf --base-name meta-llama/Llama-3.2-1B -o peft-folder

The folder can be loaded with PeftModel.from_pretrained. Adapters with a template have no counterpart in PEFT.";

/// Convert an adapter to a folder that PEFT loads
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Export {
    /// The adapter file
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// The folder to write
    #[arg(short, long, value_name = "PEFT_FOLDER")]
    output: PathBuf,
    /// Name or path under which Transformers knows the base model [default: the one in the adapter, or the model file's name]
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,
    /// Export the adapter even if it was made for another model of the same shape
    #[arg(long)]
    force: bool,
}

impl Export {
    pub(crate) fn execute(self) -> Result<()> {
        let model = self.model.open()?;
        let fits = |adapter: &Adapter| {
            Ok(adapter.check_fits(model.shape(), &model.fingerprint(), self.force)?)
        };
        let adapter = load_adapter(&self.adapter, &model, None)
            .and_then(|adapter| fits(&adapter).map(|()| adapter))
            .map_err(|e| e.forced(self.force))?;
        let base_name = self
            .base_name
            .or_else(|| adapter.provenance().get("base_name").cloned())
            .unwrap_or_else(|| stem(model.path()));
        export_peft(&adapter, model.shape(), &self.output, &base_name)?;
        io::print(&format!(
            "{}: {}\n",
            self.output.display(),
            io::summary(&adapter)
        ))
    }
}
