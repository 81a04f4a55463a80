//! The `ggraft` command: a frozen GGUF model, tiny trained adapters, one file per sub-command. Public API of the library only.

mod args;
mod batch;
mod bench;
mod chat;
mod concat;
mod data;
mod ensemble;
mod eval;
mod export;
mod failure;
mod import;
mod inspect;
mod interrupt;
mod io;
mod log;
mod logits;
mod outputs;
mod plot;
mod predict;
mod run;
mod score;
#[cfg(feature = "serve")]
mod serve;
mod train;

use clap::error::ErrorKind;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use failure::{Failure, Result};
use ggraft::CpuLevel;
use std::process::ExitCode;
use std::sync::LazyLock;

/// Run a frozen GGUF language model with tiny trained adapters, and train them (prefix, prompt and P-tuning).
///
/// The base model is mapped, never copied or changed; an adapter of a few hundred kilobytes makes it do one task well, and
/// adapters are swapped in microseconds.
#[derive(Parser)]
#[command(name = "ggraft", version, long_version = version(), after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Say more on stderr: -v for information, -vv for debugging. RUST_LOG=debug works as well
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
}

const EXAMPLES: &str = "Examples:
  ggraft run -m model.gguf -p \"Once upon a time\"
  ggraft run -m model.gguf -a pirate.gguf -p \"The rain has not stopped.\"
  ggraft chat -m model.gguf -a pirate.gguf -a butler.gguf
  ggraft train -m model.gguf --method prefix --data train.jsonl -o mine.gguf
  ggraft import my-peft-folder -m model.gguf -o adapter.gguf

`ggraft COMMAND --help` explains a command and shows examples.
Exit status: 0 success, 1 failure (one line `error: ...` on stderr), 2 wrong usage (also an option's value that this model or file \
does not allow), 130 interrupted by Ctrl-C, SIGTERM, SIGHUP or SIGXCPU (what was computed until then is delivered).";

/// The version, and what this CPU's kernels are.
fn version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let levels: Vec<_> = CpuLevel::available().map(CpuLevel::name).collect();
        let version = env!("CARGO_PKG_VERSION");
        format!(
            "{version}\nCPU levels: {} (the last one is used, unless {} names another one)",
            levels.join(" "),
            CpuLevel::VARIABLE
        )
    });
    &TEXT
}

#[derive(Subcommand)]
enum Command {
    Run(run::Run),
    Chat(chat::Chat),
    Train(Box<train::Train>),
    Logits(logits::Logits),
    Eval(eval::Eval),
    Predict(predict::Predict),
    Batch(Box<batch::Batch>),
    #[cfg(feature = "serve")]
    Serve(Box<serve::Serve>),
    Ensemble(ensemble::Ensemble),
    Import(import::Import),
    Export(export::Export),
    Concat(concat::Concat),
    Inspect(inspect::Inspect),
    Bench(bench::Bench),
}

impl Command {
    fn execute(self) -> Result<()> {
        match self {
            Self::Run(command) => command.execute(),
            Self::Chat(command) => command.execute(),
            Self::Train(command) => command.execute(),
            Self::Logits(command) => command.execute(),
            Self::Eval(command) => command.execute(),
            Self::Predict(command) => command.execute(),
            Self::Batch(command) => command.execute(),
            #[cfg(feature = "serve")]
            Self::Serve(command) => command.execute(),
            Self::Ensemble(command) => command.execute(),
            Self::Import(command) => command.execute(),
            Self::Export(command) => command.execute(),
            Self::Concat(command) => command.execute(),
            Self::Inspect(command) => command.execute(),
            Self::Bench(command) => command.execute(),
        }
    }
}

/// The command line. What looks like a negative number is one: an option says itself whether it takes it.
fn parse() -> Result<Cli, clap::Error> {
    let number = |arg: Arg| match arg.get_action().takes_values() {
        true => arg.allow_negative_numbers(true),
        false => arg,
    };
    let command = Cli::command().mut_subcommands(|command| command.mut_args(number));
    Cli::from_arg_matches(&command.try_get_matches()?)
}

fn main() -> ExitCode {
    interrupt::prepare();
    let cli = match parse() {
        Ok(cli) => cli,
        Err(e) if e.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            return Failure::Usage("no command given: `ggraft --help` lists them".to_owned())
                .report();
        }
        Err(e) => {
            // Help that nobody reads to its end is no failure.
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2));
        }
    };
    log::init(cli.verbose);
    match cli.command.execute() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
