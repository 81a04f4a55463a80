//! The arguments of `ggraft train`: every default, and why.

use super::Train;
use super::values::{
    Every, InitArg, LossArg, Members, fraction, not_negative, parse_size, positive,
};
use crate::args::{ChatArgs, count, whole};
use crate::failure::{Failure, Result};
use clap::{Args, ValueEnum};
use ggraft::Model;
use ggraft::adapter::{AdapterKind, Template};
use ggraft::train::{Mezo, OptimizerKind, Reparam, Schedule, TrainOptions};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Defaults that do not depend on the method.
fn defaults() -> TrainOptions {
    TrainOptions::new(AdapterKind::Prefix)
}

/// The learning rates that stand for `--lr`.
fn default_rates() -> String {
    let rate = |method, reparam, optimizer| {
        let mut options = TrainOptions::new(method);
        options.reparam = reparam;
        options.optimizer = optimizer;
        options.default_lr()
    };
    let adamw = |method, reparam| rate(method, reparam, OptimizerKind::AdamW);
    format!(
        "{} for prefix, {} with an MLP; {} for prompt; {} for p-tuning, {} without a network; {} with adafactor, {} with sgd",
        adamw(AdapterKind::Prefix, None),
        adamw(AdapterKind::Prefix, Some(Reparam::Mlp)),
        adamw(AdapterKind::Prompt, None),
        adamw(AdapterKind::PTuning, None),
        adamw(AdapterKind::PTuning, Some(Reparam::None)),
        rate(AdapterKind::Prefix, None, OptimizerKind::Adafactor),
        rate(AdapterKind::Prefix, None, OptimizerKind::Sgd),
    )
}

/// [`TrainOptions::default_weight_decay`] in words.
fn default_decays() -> String {
    let decay = |method, reparam, lr| {
        let mut options = TrainOptions::new(method);
        options.reparam = reparam;
        options.default_weight_decay(lr, TrainOptions::MANY_EPOCHS)
    };
    format!(
        "with adamw, if the data is read {} times or more, {} / rate for prefix (at most {}) and {} / rate for prompt; for prefix \
         with an MLP always {} / rate; otherwise 0",
        TrainOptions::MANY_EPOCHS,
        decay(AdapterKind::Prefix, None, 1.0),
        decay(AdapterKind::Prefix, None, f64::MIN_POSITIVE),
        decay(AdapterKind::Prompt, None, 1.0),
        decay(AdapterKind::Prefix, Some(Reparam::Mlp), 1.0),
    )
}

#[derive(Args, Clone)]
#[command(next_help_heading = "Data")]
pub(super) struct DataArgs {
    /// The base model, a GGUF file (of a split model: any part)
    #[arg(short, long, value_name = "FILE")]
    pub(super) model: PathBuf,
    /// What is learned, one JSON object per line; `-` is standard input
    #[arg(long, value_name = "TRAIN.jsonl")]
    pub(super) data: PathBuf,
    /// Rows that are not learned, to measure what has been: the adapter that predicts them best is the one that is kept
    /// [default: none, the adapter of the last step is kept]
    #[arg(long, value_name = "VALID.jsonl")]
    pub(super) valid: Option<PathBuf>,
    /// Cut rows at their end, so that they have N tokens with the virtual ones: bounds memory and time [default: the context
    /// that the model was trained on]
    #[arg(long, value_name = "N", value_parser = count::<usize>, conflicts_with = "resume")]
    max_len: Option<usize>,
    /// Cut {"text"} rows that have more than N tokens into rows of so many, instead of losing what does not fit
    #[arg(long, value_name = "N", value_parser = count::<usize>)]
    pub(super) split_text: Option<usize>,
    #[command(flatten)]
    pub(super) chat_format: ChatArgs,
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

#[derive(Args, Clone)]
#[command(next_help_heading = "Adapter")]
pub(super) struct ShapeArgs {
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
    #[arg(
        long,
        value_name = "N",
        value_parser = count::<usize>,
        conflicts_with = "resume",
        help = format!(
            "Virtual tokens: more hold more, and cost context and time in every use [default: what --template or --init \
             adapter:FILE has, otherwise {}, which is enough for most tasks]",
            TrainOptions::DEFAULT_LENGTH
        )
    )]
    length: Option<usize>,
    #[arg(
        long,
        value_name = "INIT",
        value_parser = InitArg::from_str,
        conflicts_with = "resume",
        help = format!(
            "Where training starts: random, zeros, vocab (embeddings of sampled tokens), text:\"...\" (the words' embeddings, for \
             a prefix what the model makes of them), prompts (as text, from the first training rows), mean (prefix: keys at the \
             mean key of the training rows, values near 0) or adapter:FILE (trains it further) [default: prompts, which the model \
             can read from the first step on; for a prefix, if there are {} steps or more and no frozen rows, mean, or random if \
             the data is read {} times or more, which are slower and end better; random with --reparam mlp, the context with \
             --loss distill]",
            TrainOptions::DEFAULT_STEPS,
            TrainOptions::MANY_EPOCHS,
        )
    )]
    init: Option<InitArg>,
    /// Train the rows through a network, which is folded into them when saved: none, mlp or (p-tuning) lstm [default: mlp for
    /// p-tuning, which is defined by it; none otherwise, which is faster and as good]
    #[arg(
        long,
        value_name = "none|mlp|lstm",
        hide_possible_values = true,
        conflicts_with = "resume"
    )]
    reparam: Option<ReparamArg>,
    /// Inner width of that network [default: the width of its input, as PEFT: for p-tuning that of the model's embeddings, for
    /// prefix that of a layer's keys]
    #[arg(long, value_name = "N", value_parser = count::<usize>, conflicts_with = "resume")]
    hidden: Option<usize>,
    /// P-tuning: where the virtual tokens stand, for example "{v:10} {prompt} {v:10}" [default: where --init
    /// adapter:FILE has them, otherwise all in front]
    #[arg(long, value_name = "TEMPLATE", value_parser = Template::parse, conflicts_with = "resume")]
    template: Option<Template>,
    /// Prefix: leave the first N rows as --init made them; 1 keeps an attention sink where the model expects it
    #[arg(long, value_name = "N", default_value_t = defaults().freeze_first, value_parser = whole::<usize>, conflicts_with = "resume")]
    freeze_first: usize,
}

#[derive(Args, Clone)]
#[command(next_help_heading = "Objective")]
pub(super) struct ObjectiveArgs {
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
    /// Spread this much of the probability over the whole vocabulary: the adapter becomes less sure of itself. The validation
    /// loss stays that of the tokens themselves
    #[arg(long, value_name = "P", default_value_t = defaults().label_smoothing, value_parser = fraction::<f32>, conflicts_with = "resume")]
    label_smoothing: f32,
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

#[derive(Args, Clone)]
#[command(next_help_heading = "Schedule")]
pub(super) struct ScheduleArgs {
    #[arg(
        long,
        value_name = "N",
        value_parser = count::<u64>,
        conflicts_with = "epochs",
        help = format!(
            "Steps, each of --batch x --accum rows [default: {}, as adapters learn fast]",
            TrainOptions::DEFAULT_STEPS
        )
    )]
    pub(super) steps: Option<u64>,
    /// Passes over the data instead of --steps; may be a fraction
    #[arg(long, value_name = "N", value_parser = positive::<f64>, conflicts_with = "resume")]
    epochs: Option<f64>,
    /// Rows of one batch, which are computed together as far as they fit into a graph of 1024 tokens. More make steps smoother and slower; 8 is what the defaults are tuned for
    #[arg(
        long,
        value_name = "N",
        default_value_t = defaults().batch,
        value_parser = count::<usize>,
        conflicts_with = "resume"
    )]
    batch: usize,
    /// Batches computed one after the other and added up to one step: the steps of a larger batch in the memory of this one
    #[arg(
        long,
        value_name = "N",
        default_value_t = defaults().accum,
        value_parser = count::<usize>,
        conflicts_with = "resume"
    )]
    accum: usize,
    #[arg(
        long,
        value_name = "X",
        value_parser = positive::<f64>,
        conflicts_with = "resume",
        help = format!(
            "Learning rate at its highest. Adapters take far higher rates than the weights of a model [default: {}]",
            default_rates()
        )
    )]
    lr: Option<f64>,
    /// How the rate goes down after the warm-up: constant, linear or cosine. Both end near 0, which settles the last steps
    #[arg(
        long,
        value_name = "constant|linear|cosine",
        hide_possible_values = true,
        default_value = "linear",
        conflicts_with = "resume"
    )]
    schedule: ScheduleArg,
    /// Steps in which the rate rises from 0, so that the optimizer knows the gradients before it takes large steps [default: one
    /// in 15 of all steps, at most 100]
    #[arg(long, value_name = "N", value_parser = whole::<u64>, conflicts_with = "resume")]
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
    /// AdamW: how much of the mean of gradients is kept per step. More overshoots at the large rates of adapters
    #[arg(long, value_name = "X", default_value_t = defaults().betas.0, value_parser = fraction::<f64>, conflicts_with = "resume")]
    beta1: f64,
    /// AdamW: how much of the mean of squared gradients is kept per step. 0.9 forgets the large first gradients soon, which
    /// PyTorch's 0.999 would carry through a short run
    #[arg(long, value_name = "X", default_value_t = defaults().betas.1, value_parser = fraction::<f64>, conflicts_with = "resume")]
    beta2: f64,
    #[arg(
        long,
        value_name = "X",
        value_parser = not_negative,
        conflicts_with = "resume",
        help = format!(
            "Pull all numbers towards 0 by X times the rate in each step: against learning the rows by heart [default: {}]",
            default_decays()
        )
    )]
    weight_decay: Option<f64>,
    /// Leave each number of the adapter out of a step with this probability, as PEFT's prefix dropout: against learning a
    /// small data set by heart
    #[arg(long, value_name = "P", default_value_t = defaults().dropout, value_parser = fraction::<f32>, conflicts_with = "resume")]
    dropout: f32,
    /// Largest norm of a step's gradient; 0 does not clip. 1, as usual: a single odd row cannot ruin the adapter
    #[arg(long, value_name = "X", default_value_t = defaults().clip, value_parser = not_negative, conflicts_with = "resume")]
    clip: f64,
    /// Estimate gradients by forward passes in N random directions a step (MeZO), by libllama, for models of architectures that ggraft cannot train otherwise: of the
    /// thousands of numbers of an adapter each direction tells about one, and a run takes ten to a hundred times as long as by backpropagation, or learns nothing. Lower rates
    /// and many steps [default: backpropagation; 8 if N is left out]
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "8", value_parser = count::<usize>, conflicts_with = "resume")]
    mezo: Option<usize>,
    /// Of everything random: initial values, the order of the rows. Equal seeds give equal adapters
    #[arg(long, value_name = "N", default_value_t = defaults().seed, value_parser = whole::<u64>, conflicts_with = "resume")]
    pub(super) seed: u64,
    #[arg(
        long,
        value_name = "N",
        value_parser = count::<u64>,
        requires = "valid",
        conflicts_with = "resume",
        help = format!(
            "Measure the validation loss every N steps and after the last one [default: {} times in all]",
            TrainOptions::DEFAULT_EVALUATIONS
        )
    )]
    eval_every: Option<u64>,
    /// Stop when N measurements in a row have not been the best one [default: never, the best adapter is kept anyway]
    #[arg(long, value_name = "N", value_parser = count::<usize>, requires = "valid", conflicts_with = "resume")]
    patience: Option<usize>,
}

#[derive(Args, Clone)]
#[command(next_help_heading = "Ensemble")]
pub(super) struct MembersArgs {
    /// Train N adapters, OUT-1.gguf to OUT-N.gguf, that differ in their --seed, and so in their first values and the order of the rows; or those FROM..TO only. They speak
    /// together with `ggraft run --ensemble`
    #[arg(long, value_name = "N|FROM..TO", conflicts_with = "resume")]
    pub(super) ensemble: Option<Members>,
    /// Learn as many rows, drawn with replacement from SEED: 63 % of them, some more than once. Members of an ensemble draw with seeds of their own, and differ more.
    /// Without SEED it is that of --seed
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true, value_parser = whole::<u64>)]
    pub(super) bagging: Option<Option<u64>>,
}

#[derive(Args, Clone)]
#[command(next_help_heading = "Saving")]
pub(super) struct SavingArgs {
    /// The adapter file to write; it is replaced in one piece, so that it can always be read
    #[arg(short, long, value_name = "OUT.gguf")]
    pub(super) output: PathBuf,
    /// Save the adapter to OUT.gguf and a checkpoint to OUT.gguf.ckpt every N steps or, as 30s, 10m or 2h, so often; never: only
    /// when the run is stopped. The checkpoint is removed when the training has ended well
    #[arg(long, value_name = "N|TIME|never", default_value_t = Every::DEFAULT)]
    pub(super) checkpoint_every: Every,
    /// Leave a checkpoint of the end, to give the run more steps with --resume and --steps
    #[arg(long)]
    pub(super) keep_checkpoint: bool,
    /// Replace an OUT.gguf of another run. Without it that is kept as OUT.gguf.old, OUT.gguf.old2, ...
    #[arg(long)]
    pub(super) overwrite: bool,
    /// Go on with the run that saved this checkpoint, with its options: apart from it, only -m, --data and --valid (the same
    /// ones), --steps (all steps of the run, to give it more), -t and what is under Saving can be given
    #[arg(long, value_name = "FILE")]
    pub(super) resume: Option<PathBuf>,
    /// Write one JSON object per step: losses, rate, gradient norm, tokens, seconds. With --resume it is continued
    #[arg(long, value_name = "FILE.jsonl")]
    pub(super) log: Option<PathBuf>,
    /// Draw the loss curves, at every evaluation and at the end. A resumed run shows its first part if --log is there, too
    #[arg(long, value_name = "FILE.svg")]
    pub(super) plot: Option<PathBuf>,
}

#[derive(Args, Clone)]
#[command(next_help_heading = "Computation")]
pub(super) struct ComputationArgs {
    /// Print what would be computed, rows, tokens, steps, memory, and one row's tokens as they would be learned; train nothing
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Threads that compute. More than there are cores are of no use [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N", value_parser = count::<usize>)]
    pub(super) threads: Option<usize>,
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = parse_size,
        conflicts_with = "resume",
        help = format!(
            "Memory for what the backward pass needs of the forward pass, for example 256M or 1.5G. What does not fit is \
             computed again, with equal results: less memory, up to a third more time [default: {}M, which holds all of a \
             model of a billion parameters at 512 tokens]",
            TrainOptions::DEFAULT_MEMORY >> 20
        )
    )]
    memory: Option<u64>,
}

impl ShapeArgs {
    /// The adapter that training starts from.
    pub(super) fn init_file(&self) -> Option<&Path> {
        match &self.init {
            Some(InitArg::Adapter(path)) => Some(path),
            _ => None,
        }
    }
}

impl ObjectiveArgs {
    /// Completions are learned, and nothing else.
    pub(super) fn is_completion(&self) -> bool {
        matches!(self.loss, LossArg::Completion)
    }

    /// The text that is distilled.
    pub(super) fn loss_file(&self) -> Option<&Path> {
        match &self.loss {
            LossArg::Distill(path) => Some(path),
            _ => None,
        }
    }
}

impl Train {
    /// What a new run is asked to do; reads the files that `--init` and `--loss` name.
    pub(super) fn options(&self, model: &Model) -> Result<TrainOptions> {
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
        options.label_smoothing = self.objective.label_smoothing;
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
        options.betas = (schedule.beta1, schedule.beta2);
        options.weight_decay = schedule.weight_decay;
        options.clip = schedule.clip;
        options.dropout = schedule.dropout;
        options.eval_every = schedule.eval_every;
        options.patience = schedule.patience;
        options.seed = schedule.seed;
        options.mezo = (schedule.mezo).map(|n| Mezo::default().directions(n));
        options.threads = self.computation.threads;
        options.memory = self.computation.memory;
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_given_is_left_to_the_library() {
        #[derive(clap::Parser)]
        struct Command {
            #[command(flatten)]
            train: Train,
        }
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tinylm-q8_0.gguf");
        let model = Model::open(path, &ggraft::ModelOptions::default()).unwrap();
        for (name, method) in [
            ("prefix", AdapterKind::Prefix),
            ("prompt", AdapterKind::Prompt),
            ("p-tuning", AdapterKind::PTuning),
        ] {
            let line = format!("train -m model --data rows -o out --method {name}");
            let command: Command = clap::Parser::parse_from(line.split(' '));
            let options = command.train.options(&model).unwrap();
            let expected = TrainOptions::new(method);
            assert_eq!(format!("{options:?}"), format!("{expected:?}"));
        }
    }
}
