//! How to train: a struct that grows, and its choices.

use crate::adapter::{ggraft_adapter, ggraft_adapter_kind};
use crate::params::{self, Params, choose};
use crate::pointer::{handle, text};
use crate::status::{Failure, call, ggraft_status, ggraft_status::*};
use ggraft::adapter::{AdapterKind, Template};
use ggraft::train::{Init, Mezo, Objective, OptimizerKind, Reparam, Schedule, TrainOptions};
use std::ffi::c_char;

/// Where training starts.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_init {
    /// GGRAFT_INIT_PROMPTS. But of a prefix GGRAFT_INIT_RANDOM with the MLP, the context with GGRAFT_OBJECTIVE_DISTILL, and
    /// in runs of at least 300 steps in which no row is frozen GGRAFT_INIT_MEAN, or GGRAFT_INIT_RANDOM from 8 passes over the
    /// training set on.
    GGRAFT_INIT_DEFAULT = 0,
    /// Normally distributed values; for an encoder PyTorch's initial weights.
    GGRAFT_INIT_RANDOM = 1,
    /// Zeros. Not with an encoder.
    GGRAFT_INIT_ZEROS = 2,
    /// Embeddings of tokens picked at random. Not for prefixes.
    GGRAFT_INIT_VOCAB = 3,
    /// `init_text`, cut or repeated to the adapter's length: the embeddings of its tokens, or for a prefix the keys and values
    /// that the model computes for it.
    GGRAFT_INIT_TEXT = 4,
    /// As GGRAFT_INIT_TEXT, from the first training rows.
    GGRAFT_INIT_PROMPTS = 5,
    /// The rows of `init_adapter`: its training goes on.
    GGRAFT_INIT_ADAPTER = 6,
    /// Keys near the mean key of the first training rows, values near zero, and noise. Prefixes only.
    GGRAFT_INIT_MEAN = 7,
}

/// The network that produces the adapter's rows while training; it is folded away when the adapter is made.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_reparam {
    /// GGRAFT_REPARAM_MLP for P-tuning, GGRAFT_REPARAM_NONE for the others.
    GGRAFT_REPARAM_DEFAULT = 0,
    /// None: the rows themselves are trained.
    GGRAFT_REPARAM_NONE = 1,
    /// A multilayer perceptron, for prefixes and P-tuning.
    GGRAFT_REPARAM_MLP = 2,
    /// A bidirectional LSTM and a perceptron, for P-tuning.
    GGRAFT_REPARAM_LSTM = 3,
}

/// What is to be learned.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_objective {
    /// The tokens that follow the prompt.
    GGRAFT_OBJECTIVE_COMPLETION = 0,
    /// All tokens.
    GGRAFT_OBJECTIVE_ALL = 1,
    /// What the model itself predicts for the tokens that follow the prompt when it reads `context` in front of each row: the
    /// adapter will stand for that text.
    GGRAFT_OBJECTIVE_DISTILL = 2,
}

/// How the learning rate changes after the warm-up.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_schedule {
    /// It falls evenly.
    GGRAFT_SCHEDULE_LINEAR = 0,
    /// It falls as half a wave of a cosine.
    GGRAFT_SCHEDULE_COSINE = 1,
    /// It stays.
    GGRAFT_SCHEDULE_CONSTANT = 2,
}

/// How values move against their gradient.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_optimizer {
    /// AdamW, which needs the least tuning.
    GGRAFT_OPTIMIZER_ADAMW = 0,
    /// Adafactor without parameter scaling, which remembers less.
    GGRAFT_OPTIMIZER_ADAFACTOR = 1,
    /// Gradient descent with momentum.
    GGRAFT_OPTIMIZER_SGD = 2,
}

/// What to train, and how. Fill it with `ggraft_train_params_init`. Texts are copied.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_train_params {
    /// Size of the struct, set by the init function.
    pub struct_size: usize,
    /// Name of the adapter, for people. Default NULL: none.
    pub name: *const c_char,
    /// A `ggraft_adapter_kind`. Default GGRAFT_ADAPTER_PREFIX.
    pub method: i32,
    /// Virtual tokens. Default 0: what the template places, what `init_adapter` has, or 20, which is enough for most tasks.
    pub length: u32,
    /// A `ggraft_init`. Default GGRAFT_INIT_DEFAULT.
    pub init: i32,
    /// A `ggraft_reparam`. Default GGRAFT_REPARAM_DEFAULT.
    pub reparam: i32,
    /// The text of GGRAFT_INIT_TEXT, which others ignore. Default NULL.
    pub init_text: *const c_char,
    /// The adapter of GGRAFT_INIT_ADAPTER, which others ignore; its handle may be freed. Default NULL.
    pub init_adapter: *const ggraft_adapter,
    /// Width of the encoder's hidden layers. Default 0: that of its input, as in PEFT.
    pub hidden: u32,
    /// Layers of the LSTM. Default 2.
    pub lstm_layers: u32,
    /// P-tuning: where the virtual tokens stand, for example "{v:10} {prompt} {v:10}". Default NULL: in front of everything.
    pub template_text: *const c_char,
    /// The text of GGRAFT_OBJECTIVE_DISTILL, which others ignore. Default NULL.
    pub context: *const c_char,
    /// A `ggraft_objective`. Default GGRAFT_OBJECTIVE_COMPLETION.
    pub objective: i32,
    /// GGRAFT_OBJECTIVE_DISTILL: most probable tokens that are taken over at each place. Default 20, which hold nearly all of
    /// the probability.
    pub top_k: u32,
    /// Rows of a prefix that stay as they begin, from the first on: 1 keeps an attention sink. Not with an encoder. Default 0.
    pub freeze_first: u32,
    /// Probability that is spread over the vocabulary. Default 0.
    pub label_smoothing: f32,
    /// Steps of the run. Default 0: as `epochs` says, or 300.
    pub steps: u64,
    /// Passes over the training set; ignored if there are `steps`. Default 0: as `steps` says.
    pub epochs: f64,
    /// Rows that are computed together. Default 8.
    pub batch: u32,
    /// Batches that are added up to one step. Default 1.
    pub accum: u32,
    /// Longest row in tokens, virtual ones included; longer rows are cut at the end. Default 0: the model's context.
    pub max_len: u32,
    /// A `ggraft_schedule`. Default GGRAFT_SCHEDULE_LINEAR.
    pub schedule: i32,
    /// Learning rate at its highest. Default 0: what suits method, reparam and optimizer, 0.01 to 1.
    pub lr: f64,
    /// Steps in which the learning rate rises. Default -1: one in fifteen, at most 100.
    pub warmup: i64,
    /// AdamW's decay of the mean of the gradient, from 0 to below 1. Default 0.9.
    pub beta1: f64,
    /// AdamW's decay of the mean of the gradient's square, from 0 to below 1. Default 0.9.
    pub beta2: f64,
    /// Pulls values towards 0. Default -1: what suits method, reparam, learning rate and passes over the data; 0 in most runs.
    pub weight_decay: f64,
    /// Largest norm of the gradient, longer ones are scaled down to it; 0 for no limit. Default 1.
    pub clip: f64,
    /// A `ggraft_optimizer`. Default GGRAFT_OPTIMIZER_ADAMW.
    pub optimizer: i32,
    /// Probability that a value is left out in a step. Default 0.
    pub dropout: f32,
    /// Steps between two evaluations of the validation set. Default 0: 20 evaluations in a run.
    pub eval_every: u64,
    /// Evaluations without improvement after which training stops. Default 0: it does not.
    pub patience: u64,
    /// Equal seeds, data and thread counts give equal adapters, bit for bit. Default 1.
    pub seed: u64,
    /// Bytes for what the backward pass needs of the forward pass; what does not fit is computed twice. Default 0: 800 MiB.
    pub memory: u64,
    /// Threads that compute. Default 0: one for each physical core that this process may use. Trainers and sessions of one model
    /// with equal counts share one pool and take turns.
    pub n_threads: u32,
    /// Context length for which the adapter is meant; only models with long-context factors care. Default 0: the model's.
    pub n_ctx: u32,
    /// Directions of a step by forward passes alone (MeZO), each for two of them: for bases without a backward pass, which only libllama's decoder computes. Default 0:
    /// backpropagation.
    pub mezo_directions: u32,
    /// Length of these two steps, as a part of the root mean square of what is trained. Default 0.1.
    pub mezo_epsilon: f32,
}

// SAFETY: `repr(C)`, numbers and raw pointers; the sum of their sizes is checked below: no padding.
unsafe impl Params for ggraft_train_params {
    const FIRST_SIZE: usize = std::mem::offset_of!(Self, mezo_directions);
    fn defaults() -> Self {
        let d = TrainOptions::new(AdapterKind::Prefix);
        Self {
            struct_size: size_of::<Self>(),
            name: std::ptr::null(),
            method: ggraft_adapter_kind::GGRAFT_ADAPTER_PREFIX as i32,
            length: 0,
            init: ggraft_init::GGRAFT_INIT_DEFAULT as i32,
            reparam: ggraft_reparam::GGRAFT_REPARAM_DEFAULT as i32,
            init_text: std::ptr::null(),
            init_adapter: std::ptr::null(),
            hidden: 0,
            // These defaults are far below the limits of their fields.
            lstm_layers: d.lstm_layers as u32,
            template_text: std::ptr::null(),
            context: std::ptr::null(),
            objective: ggraft_objective::GGRAFT_OBJECTIVE_COMPLETION as i32,
            top_k: Objective::DEFAULT_TOP_K as u32,
            freeze_first: d.freeze_first as u32,
            label_smoothing: d.label_smoothing,
            steps: 0,
            epochs: 0.0,
            batch: d.batch as u32,
            accum: d.accum as u32,
            max_len: 0,
            schedule: ggraft_schedule::GGRAFT_SCHEDULE_LINEAR as i32,
            lr: 0.0,
            warmup: -1,
            beta1: d.betas.0,
            beta2: d.betas.1,
            weight_decay: -1.0,
            clip: d.clip,
            optimizer: ggraft_optimizer::GGRAFT_OPTIMIZER_ADAMW as i32,
            dropout: d.dropout,
            eval_every: 0,
            patience: 0,
            seed: d.seed,
            memory: 0,
            n_threads: 0,
            n_ctx: 0,
            mezo_directions: 0,
            mezo_epsilon: Mezo::default().epsilon,
        }
    }
}

const _: () = assert!(
    size_of::<ggraft_train_params>() == 6 * size_of::<usize>() + 20 * 4 + 12 * 8,
    "padding"
);

/// A number where 0 stands for the library's default.
fn given(n: u32) -> Option<usize> {
    (n != 0).then_some(n as usize)
}

/// A text that may be missing.
///
/// # Safety
/// `ptr` is null or points to a NUL-terminated string.
unsafe fn optional(ptr: *const c_char, name: &str) -> Result<Option<String>, Failure> {
    if ptr.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    unsafe { text(ptr, name) }.map(|text| Some(text.to_owned()))
}

/// The caller's struct as the Rust API has it.
///
/// # Safety
/// `params` is null or an initialised struct whose pointers are valid.
pub(super) unsafe fn options(params: *const ggraft_train_params) -> Result<TrainOptions, Failure> {
    // SAFETY: the caller's promise.
    let p = unsafe { params::read(params, "params")? };
    let mut o = TrainOptions::new(kind(p.method)?);
    // SAFETY: the caller's promise.
    unsafe {
        o.name = optional(p.name, "name")?;
        o.init = init(&p)?;
        o.loss = objective(&p)?;
        o.template = optional(p.template_text, "template_text")?
            .map(|text| Template::parse(&text))
            .transpose()
            .map_err(|e| Failure::new(GGRAFT_ERROR_ARGUMENT, format!("template_text: {e}")))?;
    }
    o.length = given(p.length);
    o.reparam = reparam(p.reparam)?;
    o.hidden = given(p.hidden);
    o.lstm_layers = p.lstm_layers as usize;
    o.freeze_first = p.freeze_first as usize;
    o.label_smoothing = p.label_smoothing;
    o.steps = (p.steps != 0).then_some(p.steps);
    o.epochs = (p.epochs != 0.0).then_some(p.epochs);
    o.batch = p.batch as usize;
    o.accum = p.accum as usize;
    o.max_len = given(p.max_len);
    o.lr = (p.lr != 0.0).then_some(p.lr);
    o.schedule = schedule(p.schedule)?;
    o.warmup = match p.warmup {
        -1 => None,
        steps => Some(u64::try_from(steps).map_err(|_| {
            Failure::new(
                GGRAFT_ERROR_ARGUMENT,
                format!("warmup is {steps}, it must be -1 (default) or from 0"),
            )
        })?),
    };
    o.optimizer = optimizer(p.optimizer)?;
    o.betas = (p.beta1, p.beta2);
    o.weight_decay = (p.weight_decay != -1.0).then_some(p.weight_decay);
    o.clip = p.clip;
    o.dropout = p.dropout;
    o.eval_every = (p.eval_every != 0).then_some(p.eval_every);
    // More evaluations than fit into memory's addresses are never reached.
    o.patience = (p.patience != 0).then(|| usize::try_from(p.patience).unwrap_or(usize::MAX));
    o.seed = p.seed;
    o.threads = given(p.n_threads);
    o.memory = (p.memory != 0).then_some(p.memory);
    o.n_ctx = given(p.n_ctx);
    o.mezo = given(p.mezo_directions).map(|directions| {
        let mezo = Mezo::default().directions(directions);
        mezo.epsilon(p.mezo_epsilon)
    });
    Ok(o)
}

/// # Safety
/// The pointers of `p` that its `init` needs are valid.
unsafe fn init(p: &ggraft_train_params) -> Result<Option<Init>, Failure> {
    choose!(p.init, ggraft_init {
        GGRAFT_INIT_DEFAULT => None,
        GGRAFT_INIT_RANDOM => Some(Init::Random),
        GGRAFT_INIT_ZEROS => Some(Init::Zeros),
        GGRAFT_INIT_VOCAB => Some(Init::Vocab),
        GGRAFT_INIT_TEXT => {
            // SAFETY: the caller's promise.
            Some(Init::Text(
                unsafe { text(p.init_text, "init_text")? }.to_owned(),
            ))
        },
        GGRAFT_INIT_PROMPTS => Some(Init::Prompts),
        GGRAFT_INIT_MEAN => Some(Init::Mean),
        GGRAFT_INIT_ADAPTER => {
            // SAFETY: the caller's promise.
            let handle = unsafe { handle(p.init_adapter, "init_adapter")? };
            Some(Init::Adapter(handle.adapter.clone()))
        },
    })
}

fn reparam(value: i32) -> Result<Option<Reparam>, Failure> {
    choose!(value, ggraft_reparam {
        GGRAFT_REPARAM_DEFAULT => None,
        GGRAFT_REPARAM_NONE => Some(Reparam::None),
        GGRAFT_REPARAM_MLP => Some(Reparam::Mlp),
        GGRAFT_REPARAM_LSTM => Some(Reparam::Lstm),
    })
}

/// # Safety
/// The pointer of `p` that its `objective` needs is valid.
unsafe fn objective(p: &ggraft_train_params) -> Result<Objective, Failure> {
    choose!(p.objective, ggraft_objective {
        GGRAFT_OBJECTIVE_COMPLETION => Objective::Completion,
        GGRAFT_OBJECTIVE_ALL => Objective::All,
        GGRAFT_OBJECTIVE_DISTILL => Objective::Distill {
            // SAFETY: the caller's promise.
            context: unsafe { text(p.context, "context")? }.to_owned(),
            top_k: p.top_k as usize,
        },
    })
}

fn schedule(value: i32) -> Result<Schedule, Failure> {
    choose!(value, ggraft_schedule {
        GGRAFT_SCHEDULE_LINEAR => Schedule::Linear,
        GGRAFT_SCHEDULE_COSINE => Schedule::Cosine,
        GGRAFT_SCHEDULE_CONSTANT => Schedule::Constant,
    })
}

fn optimizer(value: i32) -> Result<OptimizerKind, Failure> {
    choose!(value, ggraft_optimizer {
        GGRAFT_OPTIMIZER_ADAMW => OptimizerKind::AdamW,
        GGRAFT_OPTIMIZER_ADAFACTOR => OptimizerKind::Adafactor,
        GGRAFT_OPTIMIZER_SGD => OptimizerKind::Sgd,
    })
}

/// Fills `params` with the defaults: `ggraft_train_params_init(&params, sizeof params)`.
///
/// # Safety
/// `params` is NULL (an error) or valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_train_params_init(
    params: *mut ggraft_train_params,
    size: usize,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    call(|| unsafe { params::init(params, size) })
}

/// The caller's `ggraft_adapter_kind` as the Rust API has it.
fn kind(value: i32) -> Result<AdapterKind, Failure> {
    choose!(value, ggraft_adapter_kind {
        GGRAFT_ADAPTER_PREFIX => AdapterKind::Prefix,
        GGRAFT_ADAPTER_PROMPT => AdapterKind::Prompt,
        GGRAFT_ADAPTER_P_TUNING => AdapterKind::PTuning,
    })
}
