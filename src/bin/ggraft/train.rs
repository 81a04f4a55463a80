//! `ggraft train`: an adapter learns from a data set.

use crate::args::load_adapter;
use crate::failure::{Failure, Result};
use crate::plot::{self, Curve};
use crate::train_log::Log;
use crate::{data, interrupt, io};
use clap::{Args, ValueEnum};
use ggraft::adapter::{AdapterKind, Parts, Precision, Template};
use ggraft::file::atomic::check_writable;
use ggraft::train::data::{Content, Dataset};
use ggraft::train::{
    Finish, Init, Objective, OptimizerKind, Reparam, Report, Schedule, TrainError, TrainOptions,
    Trainer,
};
use ggraft::{Adapter, Model, ModelOptions};
use indicatif::{ProgressBar, ProgressStyle};
use std::fmt::Display;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

const EXAMPLES: &str = "Examples:
  ggraft train -m model.gguf --method prefix --data train.jsonl -o pirate.gguf
  ggraft train -m model.gguf --method prompt --data train.jsonl --valid valid.jsonl --patience 5 -o task.gguf --plot loss.svg
  ggraft train -m model.gguf --method p-tuning --template \"{v:10} {prompt} {v:10}\" --data train.jsonl -o facts.gguf
  ggraft train -m model.gguf --data train.jsonl -o pirate.gguf --resume pirate.gguf.ckpt

Each line of the data is a JSON object, as `ggraft eval` reads it; other fields are ignored:
  {\"prompt\": \"...\", \"completion\": \"...\"}   the completion and EOS are learned
  {\"messages\": [{\"role\": \"user\", \"content\": \"...\"}, ...]}   the assistant's messages, in the model's chat template
  {\"text\": \"...\"}   all of it and EOS
A \"weight\" multiplies a row's part in the mean loss.

Ctrl-C saves the adapter and a checkpoint (OUT.gguf.ckpt) and says how to go on; a second one quits at once. The same seed,
threads and data give the same adapter, bit for bit, interrupted or not. SIZE is a number of bytes, or one with K, M or G
(powers of 1024, as KiB, MiB and GiB; KB, MB and GB are powers of 1000).";

/// Train an adapter on a frozen model
///
/// The model stays as it is, quantized and mapped: only the adapter's few numbers are trained, on the CPU. `ggraft run -a` uses
/// the file that is written.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Train {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    shape: ShapeArgs,
    #[command(flatten)]
    objective: ObjectiveArgs,
    #[command(flatten)]
    schedule: ScheduleArgs,
    #[command(flatten)]
    saving: SavingArgs,
    #[command(flatten)]
    computation: ComputationArgs,
}

#[derive(Args)]
#[command(next_help_heading = "Data")]
struct DataArgs {
    /// The base model, a GGUF file (of a split model: any part)
    #[arg(short, long, value_name = "FILE")]
    model: PathBuf,
    /// What is learned, one JSON object per line; `-` is standard input
    #[arg(long, value_name = "TRAIN.jsonl")]
    data: PathBuf,
    /// Rows that are not learned, to measure what has been: the adapter that predicts them best is the one that is kept
    /// [default: none, the adapter of the last step is kept]
    #[arg(long, value_name = "VALID.jsonl")]
    valid: Option<PathBuf>,
    /// Cut rows after N tokens, the adapter's not counted: bounds memory and time [default: what the model was trained on]
    #[arg(long, value_name = "N", value_parser = count, conflicts_with = "resume")]
    max_len: Option<usize>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Method {
    Prefix,
    Prompt,
    PTuning,
}

#[derive(Clone, Copy, ValueEnum)]
enum ReparamArg {
    None,
    Mlp,
    Lstm,
}

#[derive(Args)]
#[command(next_help_heading = "Adapter")]
struct ShapeArgs {
    /// prefix: K and V rows in every layer, the strongest; prompt: virtual tokens in front, the smallest file; p-tuning: virtual
    /// tokens from an encoder, anywhere in a template
    #[arg(
        long,
        value_name = "prefix|prompt|p-tuning",
        hide_possible_values = true,
        required_unless_present = "resume",
        conflicts_with = "resume"
    )]
    method: Option<Method>,
    /// Virtual tokens: more hold more, and cost context and time in every use [default: what --init or --template has, or 20,
    /// as PEFT's examples]
    #[arg(long, value_name = "N", value_parser = count, conflicts_with = "resume")]
    length: Option<usize>,
    /// Where training starts: random, zeros, vocab (embeddings of sampled tokens), text:"..." (the words' embeddings, for a
    /// prefix what the model makes of them) or adapter:FILE (trains it further) [default: for prefix and prompt a text, the
    /// first training prompts, which the model can read from the first step on; for p-tuning random, as its encoder mixes
    /// everything anyway]
    #[arg(long, value_name = "INIT", value_parser = InitArg::from_str, conflicts_with = "resume")]
    init: Option<InitArg>,
    /// Train the rows through a network, which is folded into them when saved: none, mlp or (p-tuning) lstm [default: mlp for
    /// p-tuning, which is defined by it; none otherwise, which trains faster and better from a text]
    #[arg(
        long,
        value_name = "none|mlp|lstm",
        hide_possible_values = true,
        conflicts_with = "resume"
    )]
    reparam: Option<ReparamArg>,
    /// Inner width of that network [default: the model's embedding width, as PEFT]
    #[arg(long, value_name = "N", value_parser = count, conflicts_with = "resume")]
    hidden: Option<usize>,
    /// P-tuning: where the virtual tokens stand, for example "{v:10} {prompt} {v:10}" [default: all in front]
    #[arg(long, value_name = "TEMPLATE", value_parser = Template::parse, conflicts_with = "resume")]
    template: Option<Template>,
    /// Prefix: leave the first N rows as --init made them; 1 keeps an attention sink where the model expects it
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "resume")]
    freeze_first: usize,
}

#[derive(Args)]
#[command(next_help_heading = "Objective")]
struct ObjectiveArgs {
    /// completion: the tokens that the model shall write; all: the prompt, too, for style and knowledge in texts;
    /// distill:CONTEXT.txt: predict what the model predicts that has read this text, to put the text into the adapter
    #[arg(
        long,
        value_name = "completion|all|distill:FILE",
        default_value = "completion",
        value_parser = LossArg::from_str,
        conflicts_with = "resume"
    )]
    loss: LossArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum ScheduleArg {
    Constant,
    Linear,
    Cosine,
}

#[derive(Clone, Copy, ValueEnum)]
enum OptimizerArg {
    Adamw,
    Adafactor,
    Sgd,
}

#[derive(Args)]
#[command(next_help_heading = "Schedule")]
struct ScheduleArgs {
    /// Steps, each of --batch x --accum rows [default: 300, or three epochs if those are more: adapters are small and learn fast]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with_all = ["epochs", "resume"])]
    steps: Option<u64>,
    /// Passes over the data instead of --steps; may be a fraction
    #[arg(long, value_name = "N", value_parser = positive::<f64>, conflicts_with = "resume")]
    epochs: Option<f64>,
    /// Rows computed together. More make steps smoother and slower; 8 is what the defaults are tuned for
    #[arg(
        long,
        value_name = "N",
        default_value_t = 8,
        value_parser = count,
        conflicts_with = "resume"
    )]
    batch: usize,
    /// Batches added up to one step: larger batches without more memory
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        value_parser = count,
        conflicts_with = "resume"
    )]
    accum: usize,
    /// Learning rate at its highest [default: depends on method, --reparam and --optimizer, 0.003 to 0.3: adapters take far
    /// higher rates than the weights of a model]
    #[arg(long, value_name = "X", value_parser = positive::<f32>, conflicts_with = "resume")]
    lr: Option<f32>,
    /// How the rate goes down after the warm-up: constant, linear or cosine. Linear ends at 0, which settles the last steps
    #[arg(
        long,
        value_name = "constant|linear|cosine",
        hide_possible_values = true,
        default_value = "linear",
        conflicts_with = "resume"
    )]
    schedule: ScheduleArg,
    /// Steps in which the rate rises from 0, so that the optimizer knows the gradients before it takes large steps [default: one
    /// in 15 of all steps]
    #[arg(long, value_name = "N", conflicts_with = "resume")]
    warmup: Option<u64>,
    /// adamw needs the least tuning; adafactor (without parameter scaling) is Lester's for prompts; sgd is for experiments
    #[arg(
        long,
        value_name = "adamw|adafactor|sgd",
        hide_possible_values = true,
        default_value = "adamw",
        conflicts_with = "resume"
    )]
    optimizer: OptimizerArg,
    /// Pull all numbers towards 0 by X times the rate in each step. 0: the rows have no reason to be near 0
    #[arg(long, value_name = "X", default_value_t = 0.0, value_parser = not_negative, conflicts_with = "resume")]
    weight_decay: f32,
    /// Largest norm of a step's gradient; 0 does not clip. 1, as usual: a single odd row cannot ruin the adapter
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = not_negative, conflicts_with = "resume")]
    clip: f32,
    /// Equal seeds give equal adapters
    #[arg(long, value_name = "N", default_value_t = 0, conflicts_with = "resume")]
    seed: u64,
    /// Measure the validation loss every N steps [default: ten times in all, which costs little]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), requires = "valid", conflicts_with = "resume")]
    eval_every: Option<u64>,
    /// Stop when N measurements in a row have not been the best one [default: never, the best adapter is kept anyway]
    #[arg(long, value_name = "N", value_parser = count, requires = "valid", conflicts_with = "resume")]
    patience: Option<usize>,
}

#[derive(Args)]
#[command(next_help_heading = "Saving")]
struct SavingArgs {
    /// The adapter file to write; it is replaced in one piece, so that it can always be read
    #[arg(short, long, value_name = "OUT.gguf")]
    output: PathBuf,
    /// Save the adapter to OUT.gguf and a checkpoint to OUT.gguf.ckpt every N steps; the checkpoint is removed when the training
    /// has ended well [default: only Ctrl-C saves one]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    checkpoint_every: Option<u64>,
    /// Go on with the run that saved this checkpoint, with its options: apart from it, only -m, --data and --valid (the same
    /// ones), -o, -t, --log, --plot and --checkpoint-every can be given
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// Write one JSON object per step: losses, rate, gradient norm, tokens, seconds. With --resume it is continued
    #[arg(long, value_name = "FILE.jsonl")]
    log: Option<PathBuf>,
    /// Draw the loss curves, at every evaluation and at the end. A resumed run shows its first part if --log is there, too
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Args)]
#[command(next_help_heading = "Computation")]
struct ComputationArgs {
    /// Threads that compute [default: all cores]
    #[arg(short, long, value_name = "N", value_parser = count)]
    threads: Option<usize>,
    /// Memory for what the backward pass needs of the forward pass, for example 256M or 1.5G. What does not fit is computed
    /// again, with equal results: less memory, up to a third more time [default: half of what is free]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "resume")]
    memory: Option<u64>,
}

/// `--init`, before any file is read.
#[derive(Clone)]
enum InitArg {
    Random,
    Zeros,
    Vocab,
    Text(String),
    Adapter(PathBuf),
}

impl FromStr for InitArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "random" => Ok(Self::Random),
            None if text == "zeros" => Ok(Self::Zeros),
            None if text == "vocab" => Ok(Self::Vocab),
            Some(("text", "")) => Err("no text behind 'text:'".to_owned()),
            Some(("text", text)) => Ok(Self::Text(text.to_owned())),
            Some(("adapter", "")) => Err("no file behind 'adapter:'".to_owned()),
            Some(("adapter", path)) => Ok(Self::Adapter(path.into())),
            _ => Err("must be random, zeros, vocab, text:\"...\" or adapter:FILE".to_owned()),
        }
    }
}

impl InitArg {
    fn load(&self, model: &Model) -> Result<Init> {
        Ok(match self {
            Self::Random => Init::Random,
            Self::Zeros => Init::Zeros,
            Self::Vocab => Init::Vocab,
            Self::Text(text) => Init::Text(text.clone()),
            Self::Adapter(path) => Init::Adapter(load_adapter(path, model, None)?),
        })
    }
}

/// Tokens whose probabilities the adapter learns to reproduce at each position: they hold nearly all of the mass.
const DISTILL_TOP_K: usize = 20;

/// `--loss`, before any file is read.
#[derive(Clone)]
enum LossArg {
    Completion,
    All,
    Distill(PathBuf),
}

impl FromStr for LossArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "completion" => Ok(Self::Completion),
            None if text == "all" => Ok(Self::All),
            Some(("distill", "")) => Err("no file behind 'distill:'".to_owned()),
            Some(("distill", path)) => Ok(Self::Distill(path.into())),
            _ => Err("must be completion, all or distill:CONTEXT.txt".to_owned()),
        }
    }
}

impl LossArg {
    fn load(&self) -> Result<Objective> {
        Ok(match self {
            Self::Completion => Objective::Completion,
            Self::All => Objective::All,
            Self::Distill(path) => Objective::Distill {
                context: io::read_text(path)?,
                top_k: DISTILL_TOP_K,
            },
        })
    }
}

/// A number above 0.
fn count(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".to_owned()),
        Ok(n) => Ok(n),
        Err(e) => Err(e.to_string()),
    }
}

/// A finite number above 0.
fn positive<T: FromStr<Err: Display> + Into<f64> + Copy>(text: &str) -> Result<T, String> {
    let x: T = text.parse().map_err(|e: T::Err| e.to_string())?;
    match x.into() {
        value if value.is_finite() && value > 0.0 => Ok(x),
        _ => Err("must be a finite number above 0".to_owned()),
    }
}

/// A finite number, 0 or more.
fn not_negative(text: &str) -> Result<f32, String> {
    match text.parse() {
        Ok(x) if (0.0..=f32::MAX).contains(&x) => Ok(x),
        Ok(_) => Err("must be a finite number, 0 or more".to_owned()),
        Err(e) => Err(e.to_string()),
    }
}

/// Bytes, with a unit as GNU's tools have them.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || "must be a number of bytes, or one with K, M or G, for example 256M".to_owned();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..end].parse().map_err(|_| wrong())?;
    let unit: f64 = match text[end..].trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err(wrong()),
    };
    match (number * unit).round() {
        bytes if bytes < 1.0 => Err("must be at least one byte".to_owned()),
        // Sizes beyond are none of this world, and the conversion is exact enough below.
        bytes if bytes > 1e18 => Err("is more than any machine has".to_owned()),
        bytes => Ok(bytes as u64),
    }
}

impl Train {
    pub(crate) fn execute(self) -> Result<()> {
        self.check_outputs()?;
        let train = data::read(&self.data.data)?;
        let valid = self.data.valid.as_deref().map(data::read).transpose()?;
        let model = Model::open(&self.data.model, &ModelOptions::default())?;
        let sample = sample_prompt(&train);
        let trainer = self.trainer(&model, &train, valid.as_ref())?;
        drop((train, valid));
        Run::new(&self, trainer)?.execute(sample)
    }

    /// Before anything is computed: a long run shall not fail when it saves its result.
    fn check_outputs(&self) -> Result<()> {
        let SavingArgs { output, plot, .. } = &self.saving;
        for path in [Some(output), Some(&self.checkpoint()), plot.as_ref()] {
            let Some(path) = path else { continue };
            if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty())
                && !folder.is_dir()
            {
                return Err(Failure::Unsuitable(format!(
                    "{}: there is no folder {}",
                    path.display(),
                    folder.display()
                )));
            }
            check_writable(path).map_err(|source| Failure::File {
                path: path.clone(),
                source,
            })?;
        }
        Ok(())
    }

    fn checkpoint(&self) -> PathBuf {
        let mut path = self.saving.output.clone().into_os_string();
        path.push(".ckpt");
        path.into()
    }

    fn trainer(&self, model: &Model, train: &Dataset, valid: Option<&Dataset>) -> Result<Trainer> {
        // All that can be refused at once comes before the rows are tokenized.
        let options = match &self.saving.resume {
            Some(_) => None,
            None => Some(self.options(model)?),
        };
        let train = train.examples(model)?;
        let valid = valid.map_or(Ok(Vec::new()), |valid| valid.examples(model))?;
        match (options, &self.saving.resume) {
            (Some(options), _) => Ok(Trainer::new(model, options, train, valid)?),
            (None, checkpoint) => {
                let checkpoint = checkpoint.as_deref().expect("there are options otherwise");
                let mut trainer = Trainer::resume(model, checkpoint, train, valid)?;
                if let Some(threads) = self.computation.threads {
                    trainer.set_threads(threads);
                }
                Ok(trainer)
            }
        }
    }

    fn options(&self, model: &Model) -> Result<TrainOptions> {
        let Self {
            data,
            shape,
            schedule,
            ..
        } = self;
        let mut options = TrainOptions::new(match shape.method {
            Some(Method::Prefix) => AdapterKind::Prefix,
            Some(Method::Prompt) => AdapterKind::Prompt,
            Some(Method::PTuning) => AdapterKind::PTuning,
            None => return Err(Failure::Usage("--method is missing".to_owned())),
        });
        options.length = shape.length;
        let init = shape.init.as_ref();
        options.init = init.map(|init| init.load(model)).transpose()?;
        options.reparam = shape.reparam.map(|reparam| match reparam {
            ReparamArg::None => Reparam::None,
            ReparamArg::Mlp => Reparam::Mlp,
            ReparamArg::Lstm => Reparam::Lstm,
        });
        options.hidden = shape.hidden;
        options.template = shape.template.clone();
        options.freeze_first = shape.freeze_first;
        options.loss = self.objective.loss.load()?;
        options.steps = schedule.steps;
        options.epochs = schedule.epochs;
        options.batch = schedule.batch;
        options.accum = schedule.accum;
        options.max_len = data.max_len;
        options.lr = schedule.lr;
        options.schedule = match schedule.schedule {
            ScheduleArg::Constant => Schedule::Constant,
            ScheduleArg::Linear => Schedule::Linear,
            ScheduleArg::Cosine => Schedule::Cosine,
        };
        options.warmup = schedule.warmup;
        options.optimizer = match schedule.optimizer {
            OptimizerArg::Adamw => OptimizerKind::AdamW,
            OptimizerArg::Adafactor => OptimizerKind::Adafactor,
            OptimizerArg::Sgd => OptimizerKind::Sgd,
        };
        options.weight_decay = schedule.weight_decay;
        options.clip = schedule.clip;
        options.eval_every = schedule.eval_every;
        options.patience = schedule.patience;
        options.seed = schedule.seed;
        options.threads = self.computation.threads;
        options.memory = self.computation.memory;
        Ok(options)
    }

    /// The command that goes on with this run.
    fn resume_command(&self, checkpoint: &Path) -> String {
        let SavingArgs {
            output,
            checkpoint_every,
            log,
            plot,
            ..
        } = &self.saving;
        let mut words = vec!["ggraft train".to_owned()];
        let mut add = |flag: &str, value: Option<&Path>| {
            words.extend(value.map(|path| format!("{flag} {}", quote(&path.to_string_lossy()))));
        };
        add("-m", Some(&self.data.model));
        add("--data", Some(&self.data.data));
        add("--valid", self.data.valid.as_deref());
        add("-o", Some(output));
        add("--log", log.as_deref());
        add("--plot", plot.as_deref());
        add("--resume", Some(checkpoint));
        words.extend(checkpoint_every.map(|n| format!("--checkpoint-every {n}")));
        words.extend(self.computation.threads.map(|n| format!("-t {n}")));
        words.join(" ")
    }
}

/// A training run and what it shows and saves.
struct Run<'a> {
    args: &'a Train,
    trainer: Trainer,
    checkpoint: PathBuf,
    /// The checkpoint on disk is this run's own.
    owns_checkpoint: bool,
    log: Option<Log>,
    curve: Curve,
    progress: Progress,
}

impl<'a> Run<'a> {
    fn new(args: &'a Train, trainer: Trainer) -> Result<Self> {
        let checkpoint = args.checkpoint();
        let resumed = args.saving.resume.as_ref();
        let owns_checkpoint = resumed.is_some_and(|path| same_file(path, &checkpoint));
        if checkpoint.exists() && !owns_checkpoint {
            tracing::warn!(
                "{} is the checkpoint of another run, which --resume would continue; this run may replace it",
                checkpoint.display()
            );
        }
        let done = trainer.summary().steps;
        let mut curve = Curve::default();
        let log = match (&args.saving.log, resumed) {
            (Some(path), Some(_)) => Some(Log::resume(path, done, &mut curve)?),
            (Some(path), None) => Some(Log::create(path)?),
            (None, _) => None,
        };
        Ok(Self {
            args,
            trainer,
            checkpoint,
            owns_checkpoint,
            log,
            curve,
            progress: Progress::new(done),
        })
    }

    fn execute(mut self, sample: Option<String>) -> Result<()> {
        let token = self.trainer.cancel_token();
        let guard = interrupt::Guard::calling(move || token.cancel());
        let result = self.train();
        self.progress.finish();
        match result {
            Ok(()) => {}
            Err(Failure::Library(ggraft::Error::Train(TrainError::Cancelled))) => {
                return Err(self.interrupted()?);
            }
            Err(Failure::Library(ggraft::Error::Train(e @ TrainError::NonFiniteLoss { .. }))) => {
                return Err(self.diverged(&e)?);
            }
            Err(e) => return Err(e),
        }
        let adapter = self.save_adapter()?;
        self.draw()?;
        if self.owns_checkpoint {
            // What remains after a failure is only in the way.
            let _ = std::fs::remove_file(&self.checkpoint);
        }
        drop(guard);
        io::print(&self.summary(&adapter, sample))
    }

    fn train(&mut self) -> Result<()> {
        while let Some(report) = self.trainer.step()? {
            if let Some(log) = &mut self.log {
                log.write(&report)?;
            }
            self.curve
                .add(report.step, report.loss, report.valid_loss, report.best);
            self.progress.show(&report, self.curve.best);
            if report.valid_loss.is_some() {
                self.draw()?;
            }
            let every = self.args.saving.checkpoint_every;
            if every.is_some_and(|n| report.step % n == 0) && self.trainer.finished().is_none() {
                self.save_checkpoint()?;
                self.save_adapter()?;
            }
        }
        Ok(())
    }

    /// Saves what Ctrl-C left, and returns the failure that says so.
    fn interrupted(&mut self) -> Result<Failure> {
        let done = self.trainer.summary().steps;
        if done == self.progress.start {
            let text = "interrupted before the first step: nothing was saved";
            return Ok(Failure::Interrupted(text.to_owned()));
        }
        self.save_checkpoint()?;
        self.save_adapter()?;
        self.draw()?;
        Ok(Failure::Interrupted(format!(
            "interrupted after step {done}; go on with: {}",
            self.args.resume_command(&self.checkpoint)
        )))
    }

    /// Saves the adapter from before the step that failed, and returns the failure that says so.
    fn diverged(&mut self, e: &TrainError) -> Result<Failure> {
        let done = self.trainer.summary().steps;
        if done == self.progress.start {
            return Ok(Failure::Unsuitable(e.to_string()));
        }
        self.save_adapter()?;
        self.draw()?;
        Ok(Failure::Unsuitable(format!(
            "{e}; {} has the last good adapter",
            self.args.saving.output.display()
        )))
    }

    fn save_checkpoint(&mut self) -> Result<()> {
        self.trainer.save_checkpoint(&self.checkpoint)?;
        self.owns_checkpoint = true;
        Ok(())
    }

    /// Half precision: what the KV cache makes of the rows anyway.
    fn save_adapter(&self) -> Result<Adapter> {
        let path = &self.args.saving.output;
        let adapter = Adapter::new(Parts {
            name: Some(crate::args::stem(path)),
            ..self.trainer.adapter()?.parts().clone()
        })?;
        adapter.save(path, Precision::F16)?;
        Ok(adapter)
    }

    fn draw(&self) -> Result<()> {
        let Some(path) = &self.args.saving.plot else {
            return Ok(());
        };
        let name = crate::args::stem(&self.args.saving.output);
        let model = crate::args::stem(&self.args.data.model);
        let method = self.trainer.options().method;
        plot::write(path, &self.curve, &format!("{name}: {method} on {model}"))
    }

    fn summary(&self, adapter: &Adapter, sample: Option<String>) -> String {
        let summary = self.trainer.summary();
        let SavingArgs { output, .. } = &self.args.saving;
        let mut out = String::new();
        let mut row = |name: &str, text: String| out += &format!("{name:<16} {text}\n");
        let early = match self.trainer.finished() {
            Some(Finish::EarlyStop) => ", stopped early: the validation loss falls no more",
            _ => "",
        };
        row("steps", format!("{}{early}", summary.steps));
        row(
            "time",
            format!(
                "{}, {:.0} tok/s",
                duration(Duration::from_secs_f64(summary.seconds)),
                summary.tokens as f64 / summary.seconds.max(f64::MIN_POSITIVE)
            ),
        );
        if let Some((first, last)) = summary.first_loss.zip(summary.last_loss) {
            row("training loss", format!("{first:.4} -> {last:.4}"));
        }
        if let Some((loss, step)) = summary.best_valid_loss.zip(summary.best_step) {
            row(
                "validation loss",
                format!("{loss:.4} at step {step}, whose adapter was kept"),
            );
        }
        if let Some(bytes) = summary.peak_bytes {
            row("peak memory", size(bytes));
        }
        let bytes = std::fs::metadata(output).map_or(0, |meta| meta.len());
        row(
            "adapter",
            format!(
                "{}: {}, {} numbers ({} trained), {}",
                output.display(),
                io::summary(adapter),
                summary.adapter_numbers,
                summary.trained_parameters,
                size(bytes)
            ),
        );
        let model = quote(&self.args.data.model.to_string_lossy());
        let adapter = quote(&output.to_string_lossy());
        let prompt = sample.unwrap_or_else(|| "-p \"...\"".to_owned());
        row(
            "use it",
            format!("ggraft run -m {model} -a {adapter} {prompt}"),
        );
        out
    }
}

/// Whether both paths lead to one file that exists.
fn same_file(a: &Path, b: &Path) -> bool {
    match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => false,
    }
}

/// Arguments of `ggraft run` for a prompt like those that were learned, if one fits into a line.
fn sample_prompt(data: &Dataset) -> Option<String> {
    let (text, chat) = match &data.rows()[0].content {
        Content::Completion { prompt, .. } => (prompt, ""),
        Content::Messages(messages) => match &messages[..] {
            [user, ..] if user.role == "user" => (&user.content, "--chat "),
            _ => return None,
        },
        Content::Text(_) => return None,
    };
    let escaped = text
        .replace('\\', "\\\\")
        .replace('\n', "\\n")
        .replace('\t', "\\t");
    if escaped.is_empty() || escaped.len() > 80 || escaped.contains(char::is_control) {
        return None;
    }
    let escape = if escaped == *text { "" } else { "-e " };
    Some(format!("{chat}{escape}-p {}", quote(&escaped)))
}

/// `text` as one word of a shell.
fn quote(text: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+=:,@%".contains(c);
    match !text.is_empty() && text.chars().all(plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// Two parts at most: people compare, they do not calculate.
fn duration(time: Duration) -> String {
    match time.as_secs() {
        0..60 => format!("{:.1} s", time.as_secs_f64()),
        s @ 60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        s => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

fn size(bytes: u64) -> String {
    match bytes as f64 / 1024.0 {
        kib if kib < 1024.0 => format!("{kib:.1} KiB"),
        kib if kib < 1024.0 * 1024.0 => format!("{:.1} MiB", kib / 1024.0),
        kib => format!("{:.2} GiB", kib / 1024.0 / 1024.0),
    }
}

/// Steps that the training loss shown is about the mean of.
const SMOOTH: f64 = 20.0;
/// Lines that a run without validation prints where there is no terminal.
const LINES: u64 = 10;

/// What is seen while it runs: a bar on a terminal, otherwise a line per evaluation.
struct Progress {
    /// `None` where stderr is no terminal.
    bar: Option<ProgressBar>,
    /// Steps done before this run.
    start: u64,
    begin: Instant,
    tokens: u64,
    seconds: f64,
    /// Sums of losses and of their weights, older ones fading.
    loss: f64,
    weight: f64,
    valid: Option<f64>,
}

impl Progress {
    fn new(start: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{wide_bar} {pos}/{len} {msg}")
                .expect("a constant template");
            ProgressBar::new(0).with_style(style).with_position(start)
        });
        Self {
            bar,
            start,
            begin: Instant::now(),
            tokens: 0,
            seconds: 0.0,
            loss: 0.0,
            weight: 0.0,
            valid: None,
        }
    }

    fn show(&mut self, report: &Report, best: Option<(u64, f64)>) {
        let keep = 1.0 - 1.0 / SMOOTH;
        self.loss = keep * self.loss + report.loss;
        self.weight = keep * self.weight + 1.0;
        self.tokens += report.tokens;
        self.seconds += report.seconds;
        self.valid = report.valid_loss.or(self.valid);

        let mut text = format!("loss {:.4}", self.loss / self.weight);
        if let Some(valid) = self.valid {
            text += &format!(", validation {valid:.4}");
            match best {
                Some((step, _)) if step == report.step => text += " (best)",
                Some((step, loss)) => text += &format!(" (best {loss:.4} at step {step})"),
                None => {}
            }
        }
        let rate = self.tokens as f64 / self.seconds.max(f64::MIN_POSITIVE);
        let per_step = self.begin.elapsed().as_secs_f64() / (report.step - self.start) as f64;
        let left = report.steps.saturating_sub(report.step) as f64 * per_step;
        let left = duration(Duration::from_secs_f64(left.round()));
        text += &format!(", {rate:.0} tok/s, {left} left");

        if let Some(bar) = &self.bar {
            bar.set_length(report.steps);
            bar.set_position(report.step);
            bar.set_message(text);
            return;
        }
        let due = match self.valid {
            Some(_) => report.valid_loss.is_some(),
            None => report.step % report.steps.div_ceil(LINES).max(1) == 0,
        };
        if due {
            io::note(&format!("step {}/{}: {text}", report.step, report.steps));
        }
    }

    /// Nothing may end up behind the bar.
    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("1", 1),
            ("256M", 256 << 20),
            ("256m", 256 << 20),
            ("800MiB", 800 << 20),
            ("800 MB", 800_000_000),
            ("1.5G", 3 << 29),
            ("64k", 64 << 10),
            ("2GB", 2_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "0",
            "0.0001K",
            "-1M",
            "1T1",
            "1e3",
            "1.2.3M",
            "999999999999G",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(quote("a/b-c_1.gguf"), "a/b-c_1.gguf");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's $HOME"), "'it'\\''s $HOME'");
    }

    #[test]
    fn durations_are_short() {
        let text = |s| duration(Duration::from_secs(s));
        assert_eq!(
            [text(7), text(61), text(3725)],
            ["7.0 s", "1 min 01 s", "1 h 02 min"]
        );
    }
}
