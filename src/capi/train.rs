//! Training: an application's idle time becomes an adapter.

use super::adapter::{self, ggraft_adapter, ggraft_adapter_kind};
use super::exclusive::Exclusive;
use super::model::ggraft_model;
use super::params::{self, Params, no_such};
use super::pointer::{give, handle, path, place, take_back, text};
use super::status::{Failure, call, ggraft_status, ggraft_status::*};
use ggraft::adapter::{AdapterKind, Precision, Template};
use ggraft::model::Model;
use ggraft::train::data::{Dataset, Example};
use ggraft::train::{
    CancelToken, Finish, Init, Objective, OptimizerKind, Reparam, Report, Schedule, TrainOptions,
    Trainer,
};
use std::ffi::c_char;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Trains one adapter on a model that others share. For one thread at a time, except for `ggraft_trainer_poll`,
/// `ggraft_trainer_cancel` and `ggraft_trainer_clear_cancel`, which any thread may call at any time.
pub struct ggraft_trainer {
    trainer: Exclusive<Trainer>,
    /// Outside of the lock, as `last`: they are for other threads.
    cancel: CancelToken,
    /// What `ggraft_trainer_poll` returns; locked for as long as a copy takes.
    last: Mutex<ggraft_train_report>,
}

const _: fn() = || {
    fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<ggraft_trainer>();
};

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

/// Whether a run goes on.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ggraft_train_state {
    /// There are steps left.
    GGRAFT_TRAIN_RUNNING = 0,
    /// All steps were taken.
    GGRAFT_TRAIN_STEPS = 1,
    /// The validation loss has not improved for `patience` evaluations.
    GGRAFT_TRAIN_EARLY_STOP = 2,
    /// A step ended with GGRAFT_ERROR_NON_FINITE: there is nothing to go on with. The adapter is the best one or, without
    /// evaluations, the last one with a finite loss.
    GGRAFT_TRAIN_FAILED = 3,
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
}

// SAFETY: `repr(C)`, numbers and raw pointers; the sum of their sizes is checked below: no padding.
unsafe impl Params for ggraft_train_params {
    const FIRST_SIZE: usize = size_of::<Self>();
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
        }
    }
}

const _: () = assert!(
    size_of::<ggraft_train_params>() == 6 * size_of::<usize>() + 18 * 4 + 12 * 8,
    "padding"
);

/// What a step did, and how the run stands.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ggraft_train_report {
    /// Steps taken so far.
    pub step: u64,
    /// Steps of the run; 0 before the first step if the params left them open.
    pub steps: u64,
    /// Tokens computed in the step, virtual ones included.
    pub tokens: u64,
    /// Tokens predicted in the step.
    pub targets: u64,
    /// Mean cross-entropy of those before the step, in nats. NaN before the first step, as the next three.
    pub loss: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Norm of the step's gradient before clipping.
    pub grad_norm: f64,
    /// Duration of the step without the evaluation.
    pub seconds: f64,
    /// Mean cross-entropy of the validation set after the step; NaN if it was not evaluated.
    pub valid_loss: f64,
    /// Passes over the training set so far.
    pub epoch: f64,
    /// 1 if `valid_loss` is the lowest so far: `ggraft_trainer_adapter` returns the adapter of this step.
    pub best: i32,
    /// A `ggraft_train_state`.
    pub state: i32,
}

impl ggraft_train_report {
    /// Before the first step of a handle.
    fn start(trainer: &Trainer) -> Self {
        Self {
            step: trainer.summary().steps,
            steps: trainer.steps(),
            tokens: 0,
            targets: 0,
            loss: f64::NAN,
            lr: f64::NAN,
            grad_norm: f64::NAN,
            seconds: f64::NAN,
            valid_loss: f64::NAN,
            epoch: 0.0,
            best: 0,
            state: state(trainer.finished()) as i32,
        }
    }

    fn new(report: &Report, finished: Option<Finish>) -> Self {
        Self {
            step: report.step,
            steps: report.steps,
            tokens: report.tokens,
            targets: report.targets,
            loss: report.loss,
            lr: report.lr,
            grad_norm: report.grad_norm,
            seconds: report.seconds,
            valid_loss: report.valid_loss.unwrap_or(f64::NAN),
            epoch: report.epoch,
            best: report.best.into(),
            state: state(finished) as i32,
        }
    }
}

fn state(finished: Option<Finish>) -> ggraft_train_state {
    match finished {
        None => ggraft_train_state::GGRAFT_TRAIN_RUNNING,
        Some(Finish::Steps) => ggraft_train_state::GGRAFT_TRAIN_STEPS,
        Some(Finish::EarlyStop) => ggraft_train_state::GGRAFT_TRAIN_EARLY_STOP,
        Some(Finish::Failed) => ggraft_train_state::GGRAFT_TRAIN_FAILED,
    }
}

impl ggraft_trainer {
    fn new(trainer: Trainer) -> Self {
        Self {
            cancel: trainer.cancel_token(),
            last: Mutex::new(ggraft_train_report::start(&trainer)),
            trainer: Exclusive::new(trainer),
        }
    }

    /// The last report: numbers that are replaced in one piece, so that a panic cannot leave half of them.
    fn last(&self) -> MutexGuard<'_, ggraft_train_report> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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
unsafe fn options(params: *const ggraft_train_params) -> Result<TrainOptions, Failure> {
    // SAFETY: the caller's promise.
    let p = unsafe { params::read(params, "params")? };
    let mut o = TrainOptions::new(adapter::kind(p.method)?);
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
    Ok(o)
}

/// # Safety
/// The pointers of `p` that its `init` needs are valid.
unsafe fn init(p: &ggraft_train_params) -> Result<Option<Init>, Failure> {
    use ggraft_init::*;
    Ok(match p.init {
        v if v == GGRAFT_INIT_DEFAULT as i32 => None,
        v if v == GGRAFT_INIT_RANDOM as i32 => Some(Init::Random),
        v if v == GGRAFT_INIT_ZEROS as i32 => Some(Init::Zeros),
        v if v == GGRAFT_INIT_VOCAB as i32 => Some(Init::Vocab),
        v if v == GGRAFT_INIT_TEXT as i32 => {
            // SAFETY: the caller's promise.
            Some(Init::Text(
                unsafe { text(p.init_text, "init_text")? }.to_owned(),
            ))
        }
        v if v == GGRAFT_INIT_PROMPTS as i32 => Some(Init::Prompts),
        v if v == GGRAFT_INIT_MEAN as i32 => Some(Init::Mean),
        v if v == GGRAFT_INIT_ADAPTER as i32 => {
            // SAFETY: the caller's promise.
            let handle = unsafe { handle(p.init_adapter, "init_adapter")? };
            Some(Init::Adapter(handle.adapter.clone()))
        }
        v => return Err(no_such(v, "ggraft_init")),
    })
}

fn reparam(value: i32) -> Result<Option<Reparam>, Failure> {
    use ggraft_reparam::*;
    match value {
        v if v == GGRAFT_REPARAM_DEFAULT as i32 => Ok(None),
        v if v == GGRAFT_REPARAM_NONE as i32 => Ok(Some(Reparam::None)),
        v if v == GGRAFT_REPARAM_MLP as i32 => Ok(Some(Reparam::Mlp)),
        v if v == GGRAFT_REPARAM_LSTM as i32 => Ok(Some(Reparam::Lstm)),
        v => Err(no_such(v, "ggraft_reparam")),
    }
}

/// # Safety
/// The pointer of `p` that its `objective` needs is valid.
unsafe fn objective(p: &ggraft_train_params) -> Result<Objective, Failure> {
    use ggraft_objective::*;
    match p.objective {
        v if v == GGRAFT_OBJECTIVE_COMPLETION as i32 => Ok(Objective::Completion),
        v if v == GGRAFT_OBJECTIVE_ALL as i32 => Ok(Objective::All),
        v if v == GGRAFT_OBJECTIVE_DISTILL as i32 => Ok(Objective::Distill {
            // SAFETY: the caller's promise.
            context: unsafe { text(p.context, "context")? }.to_owned(),
            top_k: p.top_k as usize,
        }),
        v => Err(no_such(v, "ggraft_objective")),
    }
}

fn schedule(value: i32) -> Result<Schedule, Failure> {
    use ggraft_schedule::*;
    match value {
        v if v == GGRAFT_SCHEDULE_LINEAR as i32 => Ok(Schedule::Linear),
        v if v == GGRAFT_SCHEDULE_COSINE as i32 => Ok(Schedule::Cosine),
        v if v == GGRAFT_SCHEDULE_CONSTANT as i32 => Ok(Schedule::Constant),
        v => Err(no_such(v, "ggraft_schedule")),
    }
}

fn optimizer(value: i32) -> Result<OptimizerKind, Failure> {
    use ggraft_optimizer::*;
    match value {
        v if v == GGRAFT_OPTIMIZER_ADAMW as i32 => Ok(OptimizerKind::AdamW),
        v if v == GGRAFT_OPTIMIZER_ADAFACTOR as i32 => Ok(OptimizerKind::Adafactor),
        v if v == GGRAFT_OPTIMIZER_SGD as i32 => Ok(OptimizerKind::Sgd),
        v => Err(no_such(v, "ggraft_optimizer")),
    }
}

/// Where rows come from: the function that reads a file or a text.
type Read = unsafe fn(*const c_char, &str) -> Result<Dataset, Failure>;

/// # Safety
/// `ptr` is null or points to a NUL-terminated string.
unsafe fn read_file(ptr: *const c_char, name: &str) -> Result<Dataset, Failure> {
    // SAFETY: the caller's promise.
    Ok(Dataset::read_jsonl(unsafe { path(ptr, name)? })?)
}

/// # Safety
/// As [`read_file`].
unsafe fn read_text(ptr: *const c_char, name: &str) -> Result<Dataset, Failure> {
    // SAFETY: the caller's promise.
    Ok(Dataset::from_reader(
        unsafe { text(ptr, name)? }.as_bytes(),
        name,
    )?)
}

/// Examples of both sets; a null `valid` stands for an empty one.
///
/// # Safety
/// Both are null or what `read` promises.
unsafe fn examples(
    model: &Model,
    read: Read,
    train: *const c_char,
    valid: *const c_char,
) -> Result<[Vec<Example>; 2], Failure> {
    // SAFETY: the caller's promise.
    let train = unsafe { read(train, "train")? }.examples(model)?;
    let valid = match valid.is_null() {
        true => Vec::new(),
        // SAFETY: the caller's promise.
        false => unsafe { read(valid, "valid")? }.examples(model)?,
    };
    Ok([train, valid])
}

/// # Safety
/// As `ggraft_trainer_new`.
unsafe fn start(
    model: *const ggraft_model,
    params: *const ggraft_train_params,
    read: Read,
    [train, valid]: [*const c_char; 2],
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (model, options, [train, valid]) = unsafe {
            let model = &handle(model, "model")?.model;
            // What can be refused at once comes before the rows are tokenized.
            (
                model,
                options(params)?,
                examples(model, read, train, valid)?,
            )
        };
        let trainer = Trainer::new(model, options, train, valid)?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_trainer::new(trainer)) };
        Ok(())
    })
}

/// # Safety
/// As `ggraft_trainer_resume`.
unsafe fn resume(
    model: *const ggraft_model,
    checkpoint: *const c_char,
    read: Read,
    [train, valid]: [*const c_char; 2],
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let (model, checkpoint, [train, valid]) = unsafe {
            let model = &handle(model, "model")?.model;
            (
                model,
                path(checkpoint, "checkpoint")?,
                examples(model, read, train, valid)?,
            )
        };
        let trainer = Trainer::resume(model, checkpoint, train, valid)?;
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_trainer::new(trainer)) };
        Ok(())
    })
}

/// Runs `work` on the trainer behind a handle.
///
/// # Safety
/// `trainer` is null or a live handle.
unsafe fn with<T>(
    trainer: *mut ggraft_trainer,
    work: impl FnOnce(&ggraft_trainer, &mut Trainer) -> Result<T, Failure>,
) -> Result<T, Failure> {
    // SAFETY: the caller's promise; the handle itself never changes, the trainer in it is locked.
    let handle = unsafe { handle(trainer, "trainer")? };
    work(handle, &mut *handle.trainer.lock("trainer")?)
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

/// Prepares a run on `model`, which stays as it is: no step is taken yet. `params` may be NULL. `train` is the path of a JSONL
/// file, whose rows are learned: each line an object with `prompt` and `completion`, with `messages` of `role` and `content`, or
/// with `text`, and perhaps a `weight`. `valid` is such a file, too, whose rows decide which step's adapter is kept; NULL: that
/// of the last step. Both are read before the function returns. To compute the initial rows can take as long as a step.
///
/// # Safety
/// `model` is a live handle, `params` NULL or an initialised struct whose pointers are valid, `train` a NUL-terminated string,
/// `valid` NULL or one, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_new(
    model: *const ggraft_model,
    params: *const ggraft_train_params,
    train: *const c_char,
    valid: *const c_char,
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { start(model, params, read_file, [train, valid], out) }
}

/// As `ggraft_trainer_new`, with the rows themselves in `train` and `valid` instead of paths: private data need not touch a disk.
///
/// # Safety
/// As `ggraft_trainer_new`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_new_from_jsonl_text(
    model: *const ggraft_model,
    params: *const ggraft_train_params,
    train: *const c_char,
    valid: *const c_char,
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { start(model, params, read_text, [train, valid], out) }
}

/// Goes on with the run that `ggraft_trainer_save_checkpoint` wrote to `checkpoint`, with the same model and the same data
/// (GGRAFT_ERROR_CHECKPOINT otherwise): the adapter will be that of a run that was never interrupted, bit for bit.
///
/// # Safety
/// `model` is a live handle, `checkpoint` and `train` are NUL-terminated strings, `valid` is NULL or one, `out` is valid for a
/// write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_resume(
    model: *const ggraft_model,
    checkpoint: *const c_char,
    train: *const c_char,
    valid: *const c_char,
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { resume(model, checkpoint, read_file, [train, valid], out) }
}

/// As `ggraft_trainer_resume`, with the rows themselves in `train` and `valid`. `checkpoint` is a path all the same: a checkpoint
/// holds no rows, but the `context` of GGRAFT_OBJECTIVE_DISTILL.
///
/// # Safety
/// As `ggraft_trainer_resume`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_resume_from_jsonl_text(
    model: *const ggraft_model,
    checkpoint: *const c_char,
    train: *const c_char,
    valid: *const c_char,
    out: *mut *mut ggraft_trainer,
) -> ggraft_status {
    // SAFETY: the caller's promise.
    unsafe { resume(model, checkpoint, read_text, [train, valid], out) }
}

/// Takes one step, and stores what it did: `ggraft_trainer_step(trainer, &report, sizeof report)`. `report.state` tells whether
/// there are more; when the run is over, nothing is computed and the last report stored again. Before its first step a run with
/// GGRAFT_OBJECTIVE_DISTILL computes what `context` makes the model predict in all rows.
///
/// GGRAFT_ERROR_CANCELLED: the step was not taken, or only its evaluation is missing; the next call takes up what was left.
/// GGRAFT_ERROR_NON_FINITE: the run is over (GGRAFT_TRAIN_FAILED), a lower learning rate may help.
///
/// # Safety
/// `trainer` is a live handle, `report` valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_step(
    trainer: *mut ggraft_trainer,
    report: *mut ggraft_train_report,
    size: usize,
) -> ggraft_status {
    call(|| {
        let report = place(report, "report")?;
        let step = |handle: &ggraft_trainer, trainer: &mut Trainer| {
            let taken = trainer.step();
            let mut last = handle.last();
            match (&taken, trainer.finished()) {
                (Ok(Some(report)), finished) => *last = ggraft_train_report::new(report, finished),
                (_, finished) => last.state = state(finished) as i32,
            }
            taken?;
            Ok(*last)
        };
        // SAFETY: the caller's promise.
        unsafe { params::write(report, size, with(trainer, step)?) }
    })
}

/// Makes the run one of `steps` steps in all, also one that is over: what was learned and the optimizer's memory stay, and the
/// learning rate follows the schedule of a run of that length.
///
/// # Safety
/// `trainer` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_set_steps(
    trainer: *mut ggraft_trainer,
    steps: u64,
) -> ggraft_status {
    call(|| {
        let set = |handle: &ggraft_trainer, trainer: &mut Trainer| {
            trainer.set_steps(steps).map_err(ggraft::Error::from)?;
            let mut last = handle.last();
            last.steps = steps;
            last.state = state(trainer.finished()) as i32;
            Ok(())
        };
        // SAFETY: the caller's promise.
        unsafe { with(trainer, set) }
    })
}

/// Stores the validation loss of the model without an adapter, which one must stay below to be of use; NaN without validation
/// rows. Computed once in a run.
///
/// # Safety
/// `trainer` is a live handle, `loss` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_base_valid_loss(
    trainer: *mut ggraft_trainer,
    loss: *mut f64,
) -> ggraft_status {
    call(|| {
        let loss = place(loss, "loss")?;
        // SAFETY: the caller's promise.
        let base = unsafe { with(trainer, |_, t| Ok(t.base_valid_loss()?))? };
        // SAFETY: the caller's promise.
        unsafe { loss.write(base.unwrap_or(f64::NAN)) };
        Ok(())
    })
}

/// Stores the last report, and computes nothing: `ggraft_trainer_poll(trainer, &report, sizeof report)`. Any thread may call it
/// at any time, also while another one is inside a function of the trainer.
///
/// # Safety
/// `trainer` is a live handle, `report` valid for writes of `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_poll(
    trainer: *mut ggraft_trainer,
    report: *mut ggraft_train_report,
    size: usize,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise; only the report is touched, which is made for other threads.
        let last = *unsafe { handle(trainer, "trainer")? }.last();
        // SAFETY: the caller's promise.
        unsafe { params::write(report, size, last) }
    })
}

/// Stops the step that runs, and refuses those that follow, with GGRAFT_ERROR_CANCELLED, until `ggraft_trainer_clear_cancel`. Any
/// thread may call it at any time, also while another one is inside a function of the trainer.
///
/// # Safety
/// `trainer` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_cancel(trainer: *mut ggraft_trainer) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise; only the token is touched, which is made for other threads.
        unsafe { handle(trainer, "trainer")? }.cancel.cancel();
        Ok(())
    })
}

/// Allows steps again after `ggraft_trainer_cancel`. Any thread may call it.
///
/// # Safety
/// `trainer` is a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_clear_cancel(
    trainer: *mut ggraft_trainer,
) -> ggraft_status {
    call(|| {
        // SAFETY: as in `ggraft_trainer_cancel`.
        unsafe { handle(trainer, "trainer")? }.cancel.reset();
        Ok(())
    })
}

/// Makes an adapter of what was learned so far: that of the lowest validation loss, or without a validation set the latest. The
/// run can go on, the adapter stays as it is.
///
/// # Safety
/// `trainer` is a live handle, `out` valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_adapter(
    trainer: *mut ggraft_trainer,
    out: *mut *mut ggraft_adapter,
) -> ggraft_status {
    call(|| {
        let out = place(out, "out")?;
        // SAFETY: the caller's promise.
        let adapter = unsafe { with(trainer, |_, t| Ok(t.adapter()?))? };
        // SAFETY: `out` is valid by the caller's promise.
        unsafe { give(out, ggraft_adapter::new(adapter)) };
        Ok(())
    })
}

/// Writes the adapter of `ggraft_trainer_adapter` as a GGUF adapter file in half precision, which is what the KV cache makes of
/// it anyway; it appears at `path` complete or not at all.
///
/// # Safety
/// `trainer` is a live handle, `path` a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_save(
    trainer: *mut ggraft_trainer,
    path: *const c_char,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { self::path(path, "path")? };
        // SAFETY: the caller's promise.
        let adapter = unsafe { with(trainer, |_, t| Ok(t.adapter()?))? };
        adapter.save(path, Precision::F16)?;
        Ok(())
    })
}

/// Writes everything that the next step depends on, for `ggraft_trainer_resume`; the file appears at `path` complete or not at
/// all.
///
/// # Safety
/// `trainer` is a live handle, `path` a NUL-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_save_checkpoint(
    trainer: *mut ggraft_trainer,
    path: *const c_char,
) -> ggraft_status {
    call(|| {
        // SAFETY: the caller's promise.
        let path = unsafe { self::path(path, "path")? };
        // SAFETY: the caller's promise.
        unsafe { with(trainer, |_, t| Ok(t.save_checkpoint(path)?)) }
    })
}

/// Frees the trainer; NULL is allowed. Adapters that it made stay.
///
/// # Safety
/// `trainer` is NULL or a live handle that no thread uses now or later, not even to poll or to cancel.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ggraft_trainer_free(trainer: *mut ggraft_trainer) {
    call(|| {
        // SAFETY: the caller's promise.
        unsafe { take_back(trainer) };
        Ok(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use ggraft::model::ModelOptions;
    use std::ptr::null_mut;

    fn trainer() -> ggraft_trainer {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tinylm-q8_0.gguf");
        let model = Model::open(file, &ModelOptions::default()).unwrap();
        let rows = Dataset::from_reader(&br#"{"text": "A cat."}"#[..], "rows").unwrap();
        let mut options = TrainOptions::new(AdapterKind::Prompt);
        (options.steps, options.threads) = (Some(2), Some(1));
        let examples = rows.examples(&model).unwrap();
        ggraft_trainer::new(Trainer::new(&model, options, examples, Vec::new()).unwrap())
    }

    /// Statuses of all functions that need the trainer for themselves.
    fn exclusive(handle: &ggraft_trainer) -> [ggraft_status; 4] {
        let trainer = std::ptr::from_ref(handle).cast_mut();
        let mut report = *handle.last();
        let mut adapter = null_mut();
        let nowhere = c"/no-such-folder/file".as_ptr();
        // SAFETY: a live handle that nobody changes but through its locks, places for results, strings.
        unsafe {
            [
                ggraft_trainer_step(trainer, &mut report, size_of_val(&report)),
                ggraft_trainer_adapter(trainer, &mut adapter),
                ggraft_trainer_save(trainer, nowhere),
                ggraft_trainer_save_checkpoint(trainer, nowhere),
            ]
        }
    }

    /// Statuses of the functions for other threads.
    fn shared(handle: &ggraft_trainer) -> [ggraft_status; 3] {
        let trainer = std::ptr::from_ref(handle).cast_mut();
        let mut report = *handle.last();
        // SAFETY: as in `exclusive`.
        unsafe {
            [
                ggraft_trainer_poll(trainer, &mut report, size_of_val(&report)),
                ggraft_trainer_cancel(trainer),
                ggraft_trainer_clear_cancel(trainer),
            ]
        }
    }

    #[test]
    fn a_trainer_in_use_is_busy_and_can_be_polled_and_cancelled() {
        let handle = trainer();
        let _in_use = handle.trainer.lock("trainer").unwrap();
        assert_eq!(exclusive(&handle), [GGRAFT_ERROR_BUSY; 4]);
        assert_eq!(shared(&handle), [GGRAFT_OK; 3]);
    }

    #[test]
    fn a_trainer_that_panicked_refuses_further_work() {
        let handle = trainer();
        let raw = std::ptr::from_ref(&handle).cast_mut();
        // SAFETY: a live handle.
        let status = call(|| unsafe { with(raw, |_, _| panic!("while training")) });
        assert_eq!(status, GGRAFT_ERROR_INTERNAL);
        assert_eq!(exclusive(&handle), [GGRAFT_ERROR_INTERNAL; 4]);
        assert_eq!(shared(&handle), [GGRAFT_OK; 3]);
    }
}
