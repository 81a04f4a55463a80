//! `ggraft export`: an adapter becomes a PEFT folder.

use crate::args::{ModelArgs, load_adapter, stem};
use crate::failure::{Failure, Result};
use crate::io;
use crate::outputs::Files;
use clap::Args;
use ggraft::Adapter;
use ggraft::adapter::export_peft;
use ggraft::file::peft::{CONFIG_FILE, TENSOR_FILE};
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
    /// Replace the adapter that the folder holds already
    #[arg(long)]
    overwrite: bool,
    /// Export the adapter even if it was made for another model of the same shape
    #[arg(long)]
    force: bool,
}

impl Export {
    pub(crate) fn execute(self) -> Result<()> {
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

    /// A file of another adapter that the folder holds.
    fn replaced(&self) -> Option<PathBuf> {
        [CONFIG_FILE, TENSOR_FILE]
            .map(|name| self.output.join(name))
            .into_iter()
            .find(|path| path.exists())
    }
}
