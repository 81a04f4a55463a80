//! Arguments that several commands share, and what they open.

use crate::failure::{Failure, Result};
use crate::io;
use clap::{Args, ValueEnum};
use ggraft::adapter::{ImportOptions, import_peft};
use ggraft::file::peft::PeftFolder;
use ggraft::infer::engine::{EngineOptions, Scheduler};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{Combine, Ensemble, FlashAttention, KvType};
use ggraft::model::chat::{built_in_names, built_in_template};
use ggraft::model::vocab::ChatOptions;
use ggraft::model::{BaseShape, DecoderChoice, Fingerprint};
use ggraft::{Adapter, CpuLevel, Kernels, Model, ModelOptions, Session, SessionOptions};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::str::FromStr;

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Args)]
pub(crate) struct ModelArgs {
    /// The base model, a GGUF file (of a split model: any part)
    #[arg(short, long, value_name = "FILE")]
    pub(crate) model: PathBuf,
    /// Copy the weights into layouts for ggml's kernels: more memory and a slower start, and more speed at most on CPUs without AVX-512 VNNI or Arm's dot products
    #[arg(
        long,
        value_name = "on|off",
        hide_possible_values = true,
        num_args = 0..=1,
        default_value = "off",
        default_missing_value = "on"
    )]
    repack: Switch,
    /// Whose kernels multiply with the weights and compute attention: ggraft's own, ggml's (logits are llama.cpp's, bit for bit), or the faster ones
    #[arg(
        long,
        value_name = "auto|own|ggml",
        hide_possible_values = true,
        default_value = "auto"
    )]
    kernels: KernelsArg,
    /// Whose decoder computes: ggraft's own, libllama's, or libllama's for architectures that ggraft's own does not know
    #[arg(
        long,
        value_name = "auto|own|llama",
        hide_possible_values = true,
        default_value = "auto"
    )]
    decoder: DecoderArg,
}

#[derive(Clone, Copy, ValueEnum)]
enum DecoderArg {
    Auto,
    Own,
    Llama,
}

#[derive(Clone, Copy, ValueEnum)]
enum KernelsArg {
    Auto,
    Own,
    Ggml,
}

impl ModelArgs {
    pub(crate) fn open(&self) -> Result<Model> {
        self.open_as(&self.options())
    }

    pub(crate) fn open_with(&self, chat: &ChatArgs) -> Result<Model> {
        self.open_as(&self.options().chat(chat.options()?))
    }

    fn open_as(&self, options: &ModelOptions) -> Result<Model> {
        let model = Model::open(&self.model, options)?;
        if !model.is_native() && !matches!(self.decoder, DecoderArg::Llama) {
            io::note(&format!(
                "libllama computes this model: ggraft's own decoder does not know the architecture '{}' in full",
                model.shape().architecture
            ));
        }
        Ok(model)
    }

    /// Whose kernels compute, and for what CPU they are made.
    pub(crate) fn kernels(&self) -> Result<String> {
        let level = CpuLevel::current()?;
        Ok(match (self.kernels, self.repack) {
            (KernelsArg::Ggml, _) => "ggml's".to_owned(),
            (KernelsArg::Own, _) => format!("ggraft's, {level}"),
            (KernelsArg::Auto, Switch::Off) => format!("the faster ones, {level}"),
            (KernelsArg::Auto, Switch::On) => {
                format!("ggml's for products, ggraft's for the rest, {level}")
            }
        })
    }

    fn options(&self) -> ModelOptions {
        ModelOptions::default()
            .repack(matches!(self.repack, Switch::On))
            .decoder(match self.decoder {
                DecoderArg::Auto => DecoderChoice::Auto,
                DecoderArg::Own => DecoderChoice::Own,
                DecoderArg::Llama => DecoderChoice::Llama,
            })
            .kernels(match self.kernels {
                KernelsArg::Auto => Kernels::Auto,
                KernelsArg::Own => Kernels::Own,
                KernelsArg::Ggml => Kernels::Ggml,
            })
    }
}

/// How conversations are formatted.
#[derive(Args, Clone)]
#[command(next_help_heading = "Conversations")]
pub(crate) struct ChatArgs {
    /// Chat template instead of the model's own: a file of Jinja source, or chatml, gemma, llama2, llama3, phi3 or zephyr
    #[arg(long, value_name = "FILE|NAME")]
    pub(crate) chat_template: Option<PathBuf>,
    /// The text of control tokens (<|im_end|>) in messages becomes those tokens: never with messages from strangers, who could
    /// end theirs and speak for others
    #[arg(long)]
    pub(crate) parse_special: bool,
}

impl ChatArgs {
    pub(crate) fn options(&self) -> Result<ChatOptions> {
        let options = ChatOptions::default().parse_special(self.parse_special);
        let Some(given) = &self.chat_template else {
            return Ok(options);
        };
        let known = given.to_str().and_then(built_in_template);
        let source = match known {
            Some(source) => source.to_owned(),
            None if given.exists() => io::read_text(given)?,
            None => {
                let names: Vec<_> = built_in_names().collect();
                return Err(Failure::Usage(format!(
                    "--chat-template {}: there is no such file, and no template of that name ({})",
                    given.display(),
                    names.join(", ")
                )));
            }
        };
        Ok(options.template(source))
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum KvArg {
    F16,
    F32,
    #[value(name = "q8_0")]
    Q8_0,
}

#[derive(Clone, Copy, ValueEnum)]
enum FlashArg {
    Auto,
    On,
    Off,
}

/// How a session computes.
#[derive(Args)]
#[command(next_help_heading = "Computation")]
pub(crate) struct SessionArgs {
    /// Context length in tokens, the adapter's included [default: what the model was trained on]
    #[arg(short, long = "ctx", value_name = "TOKENS", value_parser = count::<usize>)]
    pub(crate) ctx: Option<usize>,
    /// Threads that compute. More than there are cores are of no use; with `--kernels ggml` they wait for each other by spinning, and are a
    /// disaster where other programs keep cores busy [default: the physical cores that this process may use]
    #[arg(short, long, value_name = "N", value_parser = count::<usize>)]
    threads: Option<usize>,
    /// Type of the KV cache: f16 (the usual), f32 (exact) or q8_0 (half the memory) [default: f16, for logits f32]
    #[arg(long, value_name = "TYPE", hide_possible_values = true)]
    kv_type: Option<KvArg>,
    /// Fused attention: auto, on or off
    #[arg(
        long,
        value_name = "auto|on|off",
        hide_possible_values = true,
        default_value = "auto"
    )]
    flash_attn: FlashArg,
}

impl SessionArgs {
    /// `kv_type` holds where none was given.
    pub(crate) fn options(&self, kv_type: KvType) -> SessionOptions {
        let mut options = SessionOptions::default()
            .kv_type(match self.kv_type {
                Some(KvArg::F16) => KvType::F16,
                Some(KvArg::F32) => KvType::F32,
                Some(KvArg::Q8_0) => KvType::Q8_0,
                None => kv_type,
            })
            .flash_attention(match self.flash_attn {
                FlashArg::Auto | FlashArg::On => FlashAttention::On,
                FlashArg::Off => FlashAttention::Off,
            });
        options.n_ctx = self.ctx;
        options.n_threads = self.threads;
        options
    }
}

/// Of more threads than there are physical cores: two that share one do not compute faster, and wait for each other.
pub(crate) fn warn_of_threads(threads: Option<usize>) {
    let cores = ggraft::default_threads();
    if let Some(threads) = threads.filter(|&n| n > cores) {
        tracing::warn!(
            "{threads} threads on {} wait for each other: use -t {cores} or fewer",
            match cores {
                1 => "1 core".to_owned(),
                n => format!("{n} cores"),
            }
        );
    }
}

/// At most one adapter.
#[derive(Args)]
#[command(next_help_heading = "Adapter")]
pub(crate) struct AdapterArgs {
    /// Adapter to graft onto the model: a GGUF adapter file or a PEFT folder
    #[arg(short, long, value_name = "FILE|FOLDER")]
    pub(crate) adapter: Option<PathBuf>,
    /// Which task of a multitask PEFT folder, counted from 0
    #[arg(long, value_name = "N", requires = "adapter", value_parser = whole::<usize>)]
    task: Option<usize>,
    /// Use the adapter even if it was made for another model of the same shape
    #[arg(long, requires = "adapter")]
    pub(crate) force: bool,
}

impl AdapterArgs {
    pub(crate) fn load(&self, model: &Model) -> Result<Option<Adapter>> {
        self.adapter
            .as_deref()
            .map(|path| load_adapter(path, model, self.task))
            .transpose()
            .map_err(|e| e.forced(self.force))
    }
}

/// Adapters, of which several can speak together.
#[derive(Args)]
#[command(next_help_heading = "Adapter")]
pub(crate) struct EnsembleArgs {
    /// Adapter to graft onto the model: a GGUF adapter file or a PEFT folder. With --ensemble several of them, `none` is the model itself
    #[arg(short, long, value_name = "FILE|FOLDER")]
    pub(crate) adapter: Vec<PathBuf>,
    /// Which task of a multitask PEFT folder, counted from 0
    #[arg(long, value_name = "N", requires = "adapter", value_parser = whole::<usize>)]
    task: Option<usize>,
    /// Use adapters even if they were made for another model of the same shape
    #[arg(long, requires = "adapter")]
    force: bool,
    /// Several adapters speak as one. The next token comes from the mean of their probabilities (mean-prob) or logits (mean-logit), from their votes for the most likely token (vote),
    /// or from the product of the probabilities (product)
    #[arg(long, value_name = "METHOD", requires = "adapter", value_parser = combine)]
    ensemble: Option<Combine>,
    /// Weights of the adapters, in the order of -a [default: all the same]
    #[arg(
        long,
        value_name = "W,W,...",
        requires = "ensemble",
        value_delimiter = ','
    )]
    weights: Vec<f32>,
}

/// Rows that are computed at a time unless told otherwise: more would be faster, and take more memory.
pub(crate) const PARALLEL: usize = 16;

/// The name that stands for no adapter.
pub(crate) const NONE: &str = "none";

/// The method of that name.
pub(crate) fn combine(name: &str) -> Result<Combine, String> {
    let found = Combine::ALL.into_iter().find(|c| c.name() == name);
    found.ok_or_else(|| {
        let names = Combine::ALL.map(Combine::name);
        format!("must be one of {}", names.join(", "))
    })
}

impl EnsembleArgs {
    /// The files.
    pub(crate) fn paths(&self) -> impl Iterator<Item = &Path> {
        let paths = self.adapter.iter().map(PathBuf::as_path);
        paths.filter(|path| *path != Path::new(NONE))
    }

    /// How several speak together, if they do.
    pub(crate) fn combine(&self) -> Option<Combine> {
        self.ensemble
    }

    /// One of the adapters, or another one.
    pub(crate) fn load_one(&self, path: &Path, model: &Model) -> Result<Adapter> {
        load_adapter(path, model, self.task).map_err(|e| e.forced(self.force))
    }

    /// Whoever speaks.
    pub(crate) fn load(&self, model: &Model) -> Result<Ensemble> {
        let (combine, n) = (self.ensemble, self.adapter.len());
        let combine = match combine {
            None if n > 1 => {
                return Err(Failure::Usage(format!(
                    "{n} adapters: --ensemble says how they speak together (one of {}); `ggraft concat` makes one prefix of several",
                    Combine::ALL.map(Combine::name).join(", ")
                )));
            }
            None => Combine::default(),
            Some(combine) => combine,
        };
        let load = |path: &PathBuf| match path == Path::new(NONE) {
            true => Ok(None),
            false => self.load_one(path, model).map(Some),
        };
        let members: Vec<_> = match n {
            0 => vec![None],
            _ => self.adapter.iter().map(load).collect::<Result<_>>()?,
        };
        let ensemble = Ensemble::new(members, combine)?;
        Ok(match self.weights.is_empty() {
            true => ensemble,
            false => ensemble.weights(&self.weights)?,
        })
    }

    /// A session for one of them, or the model itself.
    pub(crate) fn session(
        &self,
        model: &Model,
        options: SessionOptions,
        member: Option<&Adapter>,
    ) -> Result<Session> {
        new_session(model, options, member, self.force)
    }

    /// An engine for `parallel` rows at a time, each with all of the ensemble, which fits.
    pub(crate) fn scheduler(
        &self,
        model: &Model,
        ensemble: &Ensemble,
        options: SessionOptions,
        parallel: usize,
    ) -> Result<Scheduler> {
        let threads = options.n_threads;
        let scheduler = Scheduler::new(model, &self.engine(options, parallel))?;
        warn_of_threads(threads);
        (scheduler.check_fits(ensemble)).map_err(|e| Failure::from(e).forced(self.force))?;
        Ok(scheduler)
    }

    /// How such an engine computes.
    pub(crate) fn engine(&self, options: SessionOptions, parallel: usize) -> EngineOptions {
        let mut options = EngineOptions::from(&options.accept_other_base(self.force));
        options.max_running = parallel.saturating_mul(self.adapter.len().max(1));
        options
    }
}

/// A GGUF adapter file, or a PEFT folder imported for `model`.
pub(crate) fn load_adapter(path: &Path, model: &Model, task: Option<usize>) -> Result<Adapter> {
    load_adapter_for(path, (model.shape(), model.fingerprint()), task)
}

/// As [`load_adapter`], for a base of which no more is known.
pub(crate) fn load_adapter_for(
    path: &Path,
    base: (&BaseShape, Fingerprint),
    task: Option<usize>,
) -> Result<Adapter> {
    if path.is_dir() {
        let options = ImportOptions {
            task,
            name: Some(stem(path)),
            ..ImportOptions::default()
        };
        return import_folder(path, base, &options);
    }
    if task.is_some() {
        return Err(Failure::Usage(format!(
            "--task chooses from a multitask PEFT folder, and {} is none",
            path.display()
        )));
    }
    load_adapter_file(path)
}

/// A PEFT folder, imported for a base of this shape and fingerprint.
pub(crate) fn import_folder(
    path: &Path,
    (shape, fingerprint): (&BaseShape, Fingerprint),
    options: &ImportOptions,
) -> Result<Adapter> {
    import_peft(path, shape, Some(fingerprint), options).map_err(|e| about(path, e))
}

/// What is in a PEFT folder, whatever the base.
pub(crate) fn read_peft(path: &Path) -> Result<PeftFolder> {
    PeftFolder::read(path).map_err(|e| about(path, e))
}

/// A GGUF adapter file.
pub(crate) fn load_adapter_file(path: &Path) -> Result<Adapter> {
    Adapter::load(path).map_err(|e| about(path, e))
}

/// The library's errors about an adapter's content do not all name the file or folder: several may be in play here.
fn about(path: &Path, e: ggraft::Error) -> Failure {
    match e.to_string().starts_with(&path.display().to_string()) {
        true => e.into(),
        false => Failure::About {
            path: path.to_owned(),
            source: Box::new(e),
        },
    }
}

/// The name of a file or folder without its extension.
pub(crate) fn stem(path: &Path) -> String {
    let name = match path.is_dir() {
        true => path.file_name(),
        false => path.file_stem(),
    };
    name.map_or_else(
        || "adapter".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// A session on `model` with the adapter, if any, in place.
pub(crate) fn new_session(
    model: &Model,
    options: SessionOptions,
    adapter: Option<&Adapter>,
    force: bool,
) -> Result<Session> {
    let threads = options.n_threads;
    let mut session = Session::new(model, &options.accept_other_base(force))?;
    warn_of_threads(threads);
    if let Some(adapter) = adapter {
        session
            .attach(adapter, ggraft::infer::ExistingText::Drop)
            .map_err(|e| Failure::from(e).forced(force))?;
    }
    Ok(session)
}

/// Where a text ends.
#[derive(Args)]
pub(crate) struct StopArgs {
    /// End the text where this appears, which is not printed; can be given several times
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    pub(crate) stop: Vec<String>,
}

/// How the next token is chosen; llama.cpp's names and defaults.
#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SampleArgs {
    /// Temperature; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = SamplerParams::default().temperature)]
    temp: f32,
    /// Keep the K most likely tokens; 0 or -1 keeps all
    #[arg(long, value_name = "K", default_value_t = i64::from(SamplerParams::default().top_k), value_parser = or_minus_1)]
    top_k: i64,
    /// Keep the smallest set of tokens whose probabilities reach P; 1 keeps all
    #[arg(long, value_name = "P", default_value_t = SamplerParams::default().top_p)]
    top_p: f32,
    /// Keep tokens at least P times as likely as the most likely one; 0 keeps all
    #[arg(long, value_name = "P", default_value_t = SamplerParams::default().min_p)]
    min_p: f32,
    /// Divide the logits of recent tokens; 1 does nothing
    #[arg(long, value_name = "X", default_value_t = SamplerParams::default().repeat_penalty)]
    repeat_penalty: f32,
    /// How many recent tokens the penalty looks at; -1: all
    #[arg(long, value_name = "N", default_value_t = i64::from(SamplerParams::default().repeat_last_n), value_parser = or_minus_1)]
    repeat_last_n: i64,
    /// Equal seeds give equal text; -1: a random one [default: -1]
    #[arg(long, value_name = "N", value_parser = seed, hide_default_value = true, default_value = "-1")]
    seed: Seed,
}

impl SampleArgs {
    /// Settings with a seed that is known, so that a run can be repeated.
    ///
    /// Fails if a setting is out of range, before anything is computed.
    pub(crate) fn params(&self, model: &Model) -> Result<SamplerParams> {
        let number = |n: i64, all: u32| u32::try_from(n).unwrap_or(all);
        let params = SamplerParams {
            temperature: self.temp,
            top_k: number(self.top_k, 0),
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            repeat_last_n: number(self.repeat_last_n, SamplerParams::MAX_REPEAT_LAST_N),
            seed: Some(self.seed.0.unwrap_or_else(random_seed)),
            ..SamplerParams::default()
        };
        params.validate(model.shape().n_vocab)?;
        self.warn();
        Ok(params)
    }

    /// Of what was given and has no effect.
    fn warn(&self) {
        let usual = SamplerParams::default();
        let idle: Vec<_> = [
            ("--top-k", self.top_k != i64::from(usual.top_k)),
            ("--top-p", self.top_p != usual.top_p),
            ("--min-p", self.min_p != usual.min_p),
        ]
        .into_iter()
        .filter_map(|(option, given)| given.then_some(option))
        .collect();
        if self.temp == 0.0 && !idle.is_empty() {
            tracing::warn!(
                "--temp 0 always takes the most likely token: without effect are {}",
                idle.join(", ")
            );
        }
        if self.repeat_penalty == 1.0 && self.repeat_last_n != i64::from(usual.repeat_last_n) {
            tracing::warn!("--repeat-last-n has no effect without --repeat-penalty");
        }
    }
}

/// `--seed`; `None`: a random one.
#[derive(Clone, Copy)]
struct Seed(Option<u32>);

fn seed(text: &str) -> Result<Seed, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(Seed(None)),
        Ok(n) => match u32::try_from(n) {
            Ok(n) if n < u32::MAX => Ok(Seed(Some(n))),
            _ => Err(format!("must be from 0 to {}, or -1", u32::MAX - 1)),
        },
        Err(_) => Err("must be a whole number, or -1".to_owned()),
    }
}

/// From the random keys that the standard library takes for its hash maps; never the reserved `u32::MAX`.
fn random_seed() -> u32 {
    (RandomState::new().build_hasher().finish() >> 33) as u32
}

/// A whole number, as large as its type holds.
fn number<T: FromStr + PartialOrd>(text: &str, least: T, why: &str) -> Result<T, String> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    match text.parse() {
        Ok(n) if n >= least => Ok(n),
        Err(_) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
            Err("is more than is supported".to_owned())
        }
        _ => Err(why.to_owned()),
    }
}

/// A whole number above 0.
pub(crate) fn count<T: FromStr + PartialOrd + From<u8>>(text: &str) -> Result<T, String> {
    number(text, T::from(1), "must be a whole number, at least 1")
}

/// A whole number.
pub(crate) fn whole<T: FromStr + PartialOrd + From<u8>>(text: &str) -> Result<T, String> {
    number(text, T::from(0), "must be a whole number, at least 0")
}

/// A whole number that fits into 32 bits, or -1.
fn or_minus_1(text: &str) -> Result<i64, String> {
    match text {
        "-1" => Ok(-1),
        _ => number::<u32>(text, 0, "must be a whole number, at least 0, or -1").map(i64::from),
    }
}

/// Parses `-n`: a count, or -1 for no limit.
pub(crate) fn parse_limit(text: &str) -> Result<Limit, String> {
    match text.parse::<i64>() {
        Ok(-1) => Ok(Limit(None)),
        Ok(n) => match usize::try_from(n) {
            Ok(n) => Ok(Limit(Some(n))),
            Err(_) => Err("must be a count, or -1 for no limit".to_owned()),
        },
        Err(_) => Err("must be a count, or -1 for no limit".to_owned()),
    }
}

/// Tokens to generate at most; `None`: until the text ends.
#[derive(Clone, Copy)]
pub(crate) struct Limit(pub(crate) Option<usize>);
