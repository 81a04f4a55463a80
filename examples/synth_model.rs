//! Writes a random-weight model of a real shape, for benchmarks:
//!
//!     cargo run --release --example synth_model -- --shape llama-1b --type q4_k -o llama-1b-q4_k.gguf

use clap::Parser;
use ggraft::file::types::GgmlType;
use ggraft_testkit::quantize::can_quantize;
use ggraft_testkit::synth::{self, SHAPES, Shape};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

/// Writes a random-weight model of a real shape: a file that loads and runs like the real one and says nothing sensible.
#[derive(Parser)]
struct Args {
    /// smollm-135m, qwen2-0.5b, llama-1b, llama-8b, or tiny
    #[arg(long, value_parser = parse_shape)]
    shape: &'static Shape,
    /// Type of the matrices: f32, f16, bf16, q8_0, q4_0, q4_k, q5_k, q6_k, ...; as in llama.cpp the output matrix of quantized files is
    /// q6_k, unless the type is q8_0
    #[arg(long = "type", value_parser = parse_type)]
    ty: GgmlType,
    /// Give the output matrix that type too
    #[arg(long)]
    pure: bool,
    /// The file to write
    #[arg(short, long)]
    output: PathBuf,
}

fn parse_shape(name: &str) -> Result<&'static Shape, String> {
    let known = || SHAPES.iter().map(|s| s.name).collect::<Vec<_>>().join(", ");
    synth::shape(name).ok_or_else(|| format!("choose one of {}", known()))
}

fn parse_type(name: &str) -> Result<GgmlType, String> {
    (0..64)
        .filter_map(GgmlType::from_u32)
        .find(|ty| ty.name().eq_ignore_ascii_case(name) && can_quantize(*ty))
        .ok_or_else(|| "not a weight type that can be made without an importance matrix".to_owned())
}

fn main() -> ExitCode {
    let args = Args::parse();
    let start = Instant::now();
    match synth::write(&args.output, args.shape, args.ty, args.pure) {
        Ok(bytes) => {
            let (gb, seconds) = (bytes as f64 / 1e9, start.elapsed().as_secs_f64());
            println!(
                "{}: {} {}, {gb:.3} GB in {seconds:.1} s",
                args.output.display(),
                args.shape.name,
                args.ty.name()
            );
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("error: {}: {e}", args.output.display());
            ExitCode::FAILURE
        }
    }
}
