//! What to train, and how.

use super::{OptimizerKind, Schedule};
use crate::adapter::{Adapter, AdapterKind, Template};

/// Where training starts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Init {
    /// Normally distributed values, as PEFT's; for an encoder PyTorch's initial weights.
    Random,
    /// Zeros.
    Zeros,
    /// Embeddings of tokens picked at random (prompt and P-tuning; Lester 2021).
    Vocab,
    /// A text, cut or repeated to the adapter's length: embeddings of its tokens, or for a prefix the keys and values that the
    /// base itself computes for it (Li & Liang 2021).
    Text(String),
    /// As [`Init::Text`], from the prompts of the first training rows.
    Prompts,
    /// Rows of a prefix that say nothing yet but are heard: keys near the mean key of the first training rows' tokens, which queries
    /// look for, values near zero, and noise that tells the rows apart.
    Mean,
    /// The rows of another adapter: goes on with its training.
    Adapter(Adapter),
}

/// The network that produces the adapter's rows while training; folded away when saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Reparam {
    /// None: the rows themselves are trained.
    None,
    /// A multilayer perceptron (Li & Liang 2021 for prefixes, Liu 2021 for P-tuning).
    Mlp,
    /// A bidirectional LSTM and a perceptron (Liu 2021); P-tuning only.
    Lstm,
}

/// What is to be learned.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Objective {
    /// Cross-entropy on the tokens that follow the prompt.
    Completion,
    /// Cross-entropy on all tokens.
    All,
    /// To predict, at every token that counts, what the base predicts when it reads `context` in front of the row
    /// (Eyuboglu et al. 2025, Cartridges).
    Distill {
        /// The text that the adapter shall stand for.
        context: String,
        /// Most probable tokens that are taken over; their probabilities are scaled to sum to 1.
        top_k: usize,
    },
}

impl Objective {
    /// Most probable tokens to take over where nothing else decides: they hold nearly all of the probability.
    pub const DEFAULT_TOP_K: usize = 20;
}

/// Gradients without a way back (MeZO, Malladi et al. 2023): how the loss differs between two steps in opposite directions, drawn at random, says how far it falls in that
/// one; the mean over some directions stands for the gradient. libllama computes, whatever the base's architecture, in no more memory than inference takes.
///
/// It is for bases without a backward pass only. Of d trained values each direction tells about one: the estimate's cosine with the gradient is about the square root of
/// `directions / d`, and a run takes ten to a hundred times the time of backpropagation, or never gets there.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct Mezo {
    /// Directions of a step, each for two forward passes. More of them make the estimate better, as a larger batch does.
    pub directions: usize,
    /// Length of the two steps, as a part of the root mean square of what is trained, matrix by matrix. Too short ones drown in the rounding of a quantized base.
    pub epsilon: f32,
}

impl Default for Mezo {
    fn default() -> Self {
        Self {
            directions: 8,
            epsilon: 0.1,
        }
    }
}

impl Mezo {
    /// Sets [`Mezo::directions`].
    pub fn directions(mut self, n: usize) -> Self {
        self.directions = n;
        self
    }

    /// Sets [`Mezo::epsilon`].
    pub fn epsilon(mut self, epsilon: f32) -> Self {
        self.epsilon = epsilon;
        self
    }
}

/// Options of a [`super::Trainer`]. `None` stands for the default that the field's documentation names. A checkpoint holds them all
/// but the start.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct TrainOptions {
    /// Prefix, prompt or P-tuning.
    pub method: AdapterKind,
    /// P. Default: what the template places, what the initial adapter has, or 20: enough for most tasks.
    pub length: Option<usize>,
    /// Default: the text of the first prompts, through P-tuning's encoder too. But for a prefix random with the MLP, the context that
    /// is distilled, and in runs of at least 300 steps in which no row is frozen [`Init::Mean`], or [`Init::Random`] from
    /// [`TrainOptions::MANY_EPOCHS`] on: a text learns faster, they end better.
    #[serde(skip)]
    pub init: Option<Init>,
    /// Default: [`Reparam::Mlp`] for P-tuning, none otherwise.
    pub reparam: Option<Reparam>,
    /// Width of the encoder's hidden layers. Default: that of its input, as in PEFT: Hk d for prefixes, D for P-tuning.
    pub hidden: Option<usize>,
    /// Layers of the LSTM, as in PEFT.
    pub lstm_layers: usize,
    /// Where the virtual tokens stand; P-tuning only. Default: where the initial adapter has them, or in front.
    pub template: Option<Template>,
    /// Rows of the prefix that keep their initial values, from the first on (an attention sink). Not with an encoder.
    pub freeze_first: usize,
    /// What is to be learned.
    pub loss: Objective,
    /// Probability that is spread over the vocabulary while training (Szegedy et al. 2016).
    pub label_smoothing: f32,
    /// Optimizer steps. Default: `epochs`, if given, or 300.
    pub steps: Option<u64>,
    /// Passes over the data, if `steps` is not given.
    pub epochs: Option<f64>,
    /// Rows per step and accumulation.
    pub batch: usize,
    /// Batches whose gradients are summed up for one step.
    pub accum: usize,
    /// Longest row in tokens, virtual ones included; longer rows are cut at the end. Default: the model's context.
    pub max_len: Option<usize>,
    /// Learning rate. Default: see [`TrainOptions::default_lr`].
    pub lr: Option<f64>,
    /// How the learning rate changes.
    pub schedule: Schedule,
    /// Steps in which the learning rate rises. Default: one in fifteen, at most 100.
    pub warmup: Option<u64>,
    /// Which optimizer.
    pub optimizer: OptimizerKind,
    /// AdamW's decay of the mean of the gradient and of its square. Default: 0.9 and 0.9. PyTorch's 0.999 remembers squares
    /// for a thousand steps, longer than most runs: the large first gradients would hold back all later steps.
    pub betas: (f64, f64),
    /// Decoupled weight decay (AdamW, Adafactor) or its older form (SGD). Default: see
    /// [`TrainOptions::default_weight_decay`].
    pub weight_decay: Option<f64>,
    /// Largest norm of the gradient; longer ones are scaled down to it. 0 for no limit.
    pub clip: f64,
    /// Probability that a value of the prefix is left out in a step (PEFT's prefix dropout).
    pub dropout: f32,
    /// Steps between two evaluations. Default: 20 evaluations in a run.
    pub eval_every: Option<u64>,
    /// Evaluations without improvement after which training stops. Default: never.
    pub patience: Option<usize>,
    /// Seed of everything random.
    pub seed: u64,
    /// Threads. Default: [`crate::default_threads`].
    pub threads: Option<usize>,
    /// Train on threads of the trainer's own, which have the priority of the thread that takes its first step, beside sessions and engines of the model. Default: with as many
    /// threads they are theirs, too, and they wait for each other's steps.
    #[serde(default)]
    pub background: bool,
    /// Bytes for activations: layers beyond what fits keep only their input and are computed twice. Default: 800 MiB,
    /// which holds all of a model of a billion parameters at 512 tokens.
    pub memory: Option<u64>,
    /// Estimate gradients by forward passes, for bases that have no backward pass. Default: backpropagation.
    #[serde(default)]
    pub mezo: Option<Mezo>,
    /// Context length for which the adapter is meant, which decides LongRoPE's factors. Default: the model's.
    pub n_ctx: Option<usize>,
    /// Name of the adapter, for people.
    pub name: Option<String>,
}

impl TrainOptions {
    /// P where nothing else decides.
    pub const DEFAULT_LENGTH: usize = 20;
    /// Optimizer steps where nothing else decides.
    pub const DEFAULT_STEPS: u64 = 300;
    /// Evaluations of a run where nothing else decides.
    pub const DEFAULT_EVALUATIONS: u64 = 20;
    /// Passes over the data from which on a run learns its rows by heart if nothing holds it back: there is a weight decay by
    /// default, and prefixes start at random.
    pub const MANY_EPOCHS: f64 = 8.0;
    /// Bytes for activations where nothing else decides.
    pub const DEFAULT_MEMORY: u64 = 800 << 20;

    /// Defaults for `method`.
    pub fn new(method: AdapterKind) -> Self {
        Self {
            method,
            length: None,
            init: None,
            reparam: None,
            hidden: None,
            lstm_layers: 2,
            template: None,
            freeze_first: 0,
            loss: Objective::Completion,
            label_smoothing: 0.0,
            steps: None,
            epochs: None,
            batch: 8,
            accum: 1,
            max_len: None,
            lr: None,
            schedule: Schedule::Linear,
            warmup: None,
            optimizer: OptimizerKind::AdamW,
            betas: (0.9, 0.9),
            weight_decay: None,
            clip: 1.0,
            dropout: 0.0,
            eval_every: None,
            patience: None,
            seed: 1,
            threads: None,
            background: false,
            memory: None,
            mezo: None,
            n_ctx: None,
            name: None,
        }
    }

    /// The encoder in use.
    pub fn effective_reparam(&self) -> Reparam {
        self.reparam.unwrap_or(match self.method {
            AdapterKind::PTuning => Reparam::Mlp,
            AdapterKind::Prefix | AdapterKind::Prompt => Reparam::None,
        })
    }

    /// The learning rate when none is given.
    pub fn default_lr(&self) -> f64 {
        // What an estimate says of a single value is mostly noise, and AdamW moves by it as if it were not.
        let share = match self.mezo {
            Some(_) => 1.0 / 64.0,
            None => 1.0,
        };
        let of_gradient = match (self.optimizer, self.method, self.effective_reparam()) {
            // Lester 2021.
            (OptimizerKind::Adafactor, ..) => 0.3,
            (OptimizerKind::Sgd, ..) => 1.0,
            (OptimizerKind::AdamW, AdapterKind::Prefix, Reparam::None) => 0.1,
            (OptimizerKind::AdamW, _, Reparam::None) => 0.2,
            (OptimizerKind::AdamW, _, Reparam::Mlp | Reparam::Lstm) => 0.01,
        };
        share * of_gradient
    }

    /// The weight decay when none is given, for a run at the learning rate `lr` that passes `epochs` times over its data.
    ///
    /// AdamW takes `lr` times the decay off every value in each step. It is that product which is fixed here, as Wang and
    /// Aitchison (2024) advise: the values are a mean over the last 30 to 100 steps at the full rate, whatever the rate.
    /// Without it a run that reads few rows often learns them by heart, and the tanh in a prefix's MLP saturates in any run.
    /// The rows of a prefix, which have to be about as large as the base's own keys and values, get no more than 0.1.
    pub fn default_weight_decay(&self, lr: f64, epochs: f64) -> f64 {
        let repeats =
            epochs >= Self::MANY_EPOCHS && !matches!(self.loss, Objective::Distill { .. });
        match (self.optimizer, self.method, self.effective_reparam()) {
            (OptimizerKind::AdamW, AdapterKind::Prefix, Reparam::Mlp | Reparam::Lstm) => 0.02 / lr,
            (OptimizerKind::AdamW, AdapterKind::Prefix, Reparam::None) if repeats => {
                (0.01 / lr).min(0.1)
            }
            (OptimizerKind::AdamW, _, Reparam::None) if repeats => 0.03 / lr,
            _ => 0.0,
        }
    }
}
