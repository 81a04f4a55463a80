//! What produces the rows of an adapter while it is trained. Saved adapters hold the rows only: the encoder is folded into
//! its output, as PEFT does.
//!
//! Architectures, names of parameters and initial values are those of PEFT (`PrefixEncoder`, `PromptEncoder`), so that its
//! parameters load here. Matrices of activations have one row per virtual token.

mod layer;
mod lstm;
mod spec;

use super::param::{Param, StateError};
use super::rng::Rng;
use layer::EncoderLayer;
use spec::{Distribution, ParamSpec, Sizes};
use std::collections::HashMap;

/// PEFT's name of trained rows in the files it saves.
const ROWS: &str = "prompt_embeddings";
/// PyTorch's name of the table that encoders start from, and of trained rows in PEFT's modules.
const EMBEDDING: &str = "embedding.weight";

/// Numbers that are drawn within seconds: of more, somebody who waits is told.
const MANY: u64 = 1 << 28;
/// Bytes of a number, its gradient and two moments.
const BYTES: u64 = 16;

/// Architecture of an encoder: [`EncoderKind::specs`] says what it consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EncoderKind {
    /// The rows themselves: prefix tuning without reparameterization, and prompt tuning (Lester et al. 2021).
    #[serde(rename = "rows")]
    Direct,
    /// Embedding, linear, tanh, linear: prefix tuning (Li and Liang 2021), PEFT's `prefix_projection`.
    PrefixMlp,
    /// Embedding, linear, ReLU, linear, ReLU, linear: P-tuning (Liu et al. 2021), PEFT's default.
    PTuningMlp,
    /// Embedding, bidirectional LSTM over the virtual tokens, linear, ReLU, linear: P-tuning. Without dropout between the LSTM's
    /// layers, as PEFT by default.
    PTuningLstm,
}

/// Parameters and how rows are computed from them.
#[derive(Clone)]
pub(crate) struct Encoder {
    kind: EncoderKind,
    rows: usize,
    width: usize,
    /// The embedding first, then those of each layer.
    params: Vec<Param>,
    layers: Vec<EncoderLayer>,
    /// Added to the output, see [`Encoder::starting_at`].
    base: Option<Vec<f32>>,
    /// The layers know what they were given.
    forwarded: bool,
}

impl Encoder {
    /// Direct parameters: `rows` rows of `width` values, of which the first `frozen` keep their values. The parameter is
    /// called `prompt_embeddings`, as PEFT saves it.
    pub(crate) fn rows(init: Vec<f32>, rows: usize, width: usize, frozen: usize) -> Self {
        let params = vec![Param::new(ROWS, &[rows, width], init).with_frozen(frozen)];
        let sizes = Sizes {
            rows,
            input: width,
            output: width,
            hidden: 0,
            layers: 0,
        };
        Self::assemble(EncoderKind::Direct, &sizes, params)
    }

    /// `rows` prefix rows of `width` values (2 * Hk * d of every layer) in PEFT's layout, from an embedding of `token_dim`
    /// (PEFT: `Hk * d`).
    pub(crate) fn prefix_mlp(
        rows: usize,
        token_dim: usize,
        hidden: usize,
        width: usize,
        rng: &mut Rng,
    ) -> Self {
        let sizes = Sizes {
            rows,
            input: token_dim,
            output: width,
            hidden,
            layers: 0,
        };
        Self::random(EncoderKind::PrefixMlp, &sizes, rng)
    }

    /// `rows` embedding rows of `width` = D values.
    pub(crate) fn ptuning_mlp(rows: usize, width: usize, hidden: usize, rng: &mut Rng) -> Self {
        let sizes = Sizes {
            rows,
            input: width,
            output: width,
            hidden,
            layers: 0,
        };
        Self::random(EncoderKind::PTuningMlp, &sizes, rng)
    }

    /// `rows` embedding rows of `width` = D values, from an LSTM of `layers` layers with `hidden` units in each direction.
    pub(crate) fn ptuning_lstm(
        rows: usize,
        width: usize,
        hidden: usize,
        layers: usize,
        rng: &mut Rng,
    ) -> Self {
        let sizes = Sizes {
            rows,
            input: width,
            output: width,
            hidden,
            layers,
        };
        Self::random(EncoderKind::PTuningLstm, &sizes, rng)
    }

    /// From the parameters of a checkpoint or of a PEFT module, in any order; sizes follow from their shapes. Trained rows may
    /// have either of their names.
    pub(crate) fn from_params(kind: EncoderKind, params: Vec<Param>) -> Result<Self, StateError> {
        let mut by_name = HashMap::new();
        for mut param in params {
            if kind == EncoderKind::Direct && param.name == EMBEDDING {
                param.name = ROWS.to_owned();
            }
            by_name.insert(param.name.clone(), param);
        }
        let sizes = Sizes::of(kind, &by_name)?;
        let mut params = Vec::new();
        for ParamSpec { name, shape, .. } in kind.params(&sizes) {
            let param = by_name.remove(&name);
            let param = param.ok_or_else(|| StateError::Missing {
                tensor: name.clone(),
            })?;
            if param.shape != shape {
                return Err(spec::shape_error(&param, shape));
            }
            params.push(param);
        }
        if let Some(tensor) = by_name.into_keys().min() {
            return Err(StateError::Unexpected { tensor });
        }
        Ok(Self::assemble(kind, &sizes, params))
    }

    /// Lets a reparameterized adapter start at given rows (`ne = [W, P]`), such as the embeddings of a text: the difference to
    /// what the encoder yields now becomes a constant that every output has added to it. The next output equals `rows` up to
    /// rounding, and gradients are as without. PEFT has no such thing: results that are compared with it are without a base.
    pub(crate) fn starting_at(mut self, rows: &[f32]) -> Self {
        self.base = None;
        let now = self.forward();
        assert_eq!(rows.len(), now.len());
        self.base = Some(rows.iter().zip(now).map(|(to, from)| to - from).collect());
        self
    }

    /// With the [`Encoder::base`] of a checkpoint, `ne = [W, P]`.
    pub(crate) fn with_base(mut self, base: Vec<f32>) -> Result<Self, StateError> {
        if base.len() != self.rows * self.width {
            return Err(StateError::Shape {
                tensor: "base".to_owned(),
                expected: vec![self.rows * self.width],
                got: vec![base.len()],
            });
        }
        self.base = Some(base);
        Ok(self)
    }

    /// What is added to the output, `ne = [W, P]`.
    pub(crate) fn base(&self) -> Option<&[f32]> {
        self.base.as_deref()
    }

    pub(crate) fn kind(&self) -> EncoderKind {
        self.kind
    }

    pub(crate) fn params(&self) -> &[Param] {
        &self.params
    }

    pub(crate) fn params_mut(&mut self) -> &mut [Param] {
        &mut self.params
    }

    /// The rows, `ne = [W, P]`. Keeps what [`Encoder::backward`] needs.
    pub(crate) fn forward(&mut self) -> Vec<f32> {
        let (embedding, mut rest) = self.params.split_first().expect("the embedding");
        let mut x = embedding.value.clone();
        for layer in &mut self.layers {
            let (own, behind) = rest.split_at(layer.n_params());
            rest = behind;
            x = layer.forward(own, self.rows, x);
        }
        self.forwarded = true;
        if let Some(base) = &self.base {
            add(&mut x, base);
        }
        x
    }

    /// Adds to the gradients of the parameters, given that of the loss with respect to the rows (`ne = [W, P]`). Follows
    /// [`Encoder::forward`], once or several times, with the parameters unchanged in between.
    pub(crate) fn backward(&mut self, d_rows: &[f32]) {
        assert_eq!(d_rows.len(), self.rows * self.width);
        assert!(self.forwarded, "forward comes first");
        let (embedding, mut rest) = self.params.split_first_mut().expect("the embedding");
        let mut d = d_rows.to_vec();
        for layer in self.layers.iter().rev() {
            let (before, own) = rest.split_at_mut(rest.len() - layer.n_params());
            rest = before;
            d = layer.backward(own, self.rows, d);
        }
        add(&mut embedding.grad, &d);
    }

    fn random(kind: EncoderKind, sizes: &Sizes, rng: &mut Rng) -> Self {
        let param = |spec: ParamSpec| {
            let mut draw = || match spec.init {
                Distribution::Normal => rng.normal(),
                Distribution::Uniform { fan } => {
                    let bound = 1.0 / (fan as f32).sqrt();
                    rng.uniform(-bound, bound)
                }
            };
            let value = (0..spec.shape.iter().product()).map(|_| draw()).collect();
            Param::new(spec.name, &spec.shape, value)
        };
        let specs = kind.params(sizes);
        let numbers = |spec: &ParamSpec| spec.shape.iter().map(|&n| n as u64).product::<u64>();
        let all: u64 = specs.iter().map(numbers).sum();
        if all > MANY {
            let gib = (all * BYTES) >> 30;
            tracing::warn!(
                "the network has {all} numbers, which are drawn now and take {gib} GiB with what AdamW keeps of them: a smaller inner \
                 width (--hidden) takes less"
            );
        }
        let params = specs.into_iter().map(param).collect();
        Self::assemble(kind, sizes, params)
    }

    /// `params` are as [`EncoderKind::params`] says.
    fn assemble(kind: EncoderKind, sizes: &Sizes, params: Vec<Param>) -> Self {
        Self {
            kind,
            rows: sizes.rows,
            width: sizes.output,
            params,
            layers: kind.layers(sizes),
            base: None,
            forwarded: false,
        }
    }
}

/// `rows` rows of `width` values from N(0, 1), as `torch.nn.Embedding`: how PEFT starts prefix and prompt tuning unless told
/// otherwise.
pub(crate) fn normal_rows(rows: usize, width: usize, rng: &mut Rng) -> Vec<f32> {
    (0..rows * width).map(|_| rng.normal()).collect()
}

fn add(to: &mut [f32], values: &[f32]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += value;
    }
}

#[cfg(test)]
mod tests;
