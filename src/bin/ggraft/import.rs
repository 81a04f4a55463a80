//! `ggraft import`: a PEFT folder becomes an adapter file.

use crate::args::{ModelArgs, import_folder, stem, whole};
use crate::failure::Result;
use crate::io;
use crate::outputs::Files;
use clap::Args;
use ggraft::adapter::{ImportOptions, Precision};
use ggraft::model::Base;
use std::path::PathBuf;

const EXAMPLES: &str = "Examples:
  ggraft import my-peft-folder -m model.gguf -o adapter.gguf
  ggraft import multitask-folder -m model.gguf --task 3 -o third.gguf

The folder holds adapter_config.json and adapter_model.safetensors as PEFT writes them. PREFIX_TUNING, PROMPT_TUNING, P_TUNING, \
MULTITASK_PROMPT_TUNING (with --task), CPT and CARTRIDGE can be imported. PEFT does not record which weights an adapter was \
trained on: make sure that MODEL is the same model, in any quantization.";

/// Convert a PEFT folder to a GGUF adapter file
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Import {
    /// The folder that PEFT saved
    #[arg(value_name = "PEFT_FOLDER")]
    folder: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// The adapter file to write
    #[arg(short, long, value_name = "OUT.gguf")]
    output: PathBuf,
    /// Which task of a multitask adapter, counted from 0
    #[arg(long, value_name = "N", value_parser = whole::<usize>)]
    task: Option<usize>,
    /// Multiply the virtual tokens by X: sqrt(embedding width) for gemma adapters trained with Transformers before version 5
    #[arg(long, value_name = "X")]
    row_factor: Option<f32>,
    /// Name kept in the file [default: the folder's]
    #[arg(long, value_name = "TEXT")]
    name: Option<String>,
    #[command(flatten)]
    precision: PrecisionArgs,
}

/// Precision of the rows in an adapter file.
#[derive(Args)]
pub(crate) struct PrecisionArgs {
    /// Keep the rows in single precision: twice the size, exactly the values given
    #[arg(long, conflicts_with = "f16")]
    f32: bool,
    /// Keep the rows in half precision (the default)
    #[arg(long)]
    f16: bool,
}

impl PrecisionArgs {
    pub(crate) fn get(&self) -> Precision {
        if self.f32 {
            Precision::F32
        } else {
            Precision::F16
        }
    }
}

impl Import {
    pub(crate) fn execute(self) -> Result<()> {
        Files::default()
            .reads("", Some(&self.folder))
            .reads("-m", Some(&self.model.model))
            .writes("-o", Some(&self.output))
            .check()?;
        let base = Base::open(&self.model.model)?;
        let options = ImportOptions {
            task: self.task,
            row_factor: self.row_factor,
            name: Some(self.name.unwrap_or_else(|| stem(&self.folder))),
        };
        let adapter = import_folder(&self.folder, (base.shape(), base.fingerprint()), &options)?;
        adapter.save(&self.output, self.precision.get())?;
        io::report(&self.output, &io::summary(&adapter))
    }
}
