//! `ggraft concat`: two adapters become one.

use crate::args::load_adapter_file;
use crate::failure::Result;
use crate::import::PrecisionArgs;
use crate::io;
use crate::outputs::Files;
use clap::Args;
use ggraft::adapter::concat;
use std::path::PathBuf;

const EXAMPLES: &str = "Example:
  ggraft concat manual.gguf style.gguf -o both.gguf

The adapters must be of one kind and for one model. The rows of A come first. How well two adapters work together depends on \
what they were trained for: measure with `ggraft eval`.";

/// Join two adapters of one model into one
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Concat {
    /// The adapter file whose rows come first
    #[arg(value_name = "A")]
    first: PathBuf,
    /// The adapter file whose rows follow
    #[arg(value_name = "B")]
    second: PathBuf,
    /// The adapter file to write
    #[arg(short, long, value_name = "OUT.gguf")]
    output: PathBuf,
    #[command(flatten)]
    precision: PrecisionArgs,
}

impl Concat {
    pub(crate) fn execute(self) -> Result<()> {
        Files::default()
            .reads("", Some(&self.first))
            .reads("", Some(&self.second))
            .writes("-o", Some(&self.output))
            .check()?;
        let adapter = concat(
            &load_adapter_file(&self.first)?,
            &load_adapter_file(&self.second)?,
        )?;
        adapter.save(&self.output, self.precision.get())?;
        io::report(&self.output, &io::summary(&adapter))
    }
}
