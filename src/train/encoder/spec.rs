//! What the encoders consist of: one list each, from which parameters, sizes and layers follow.

use super::layer::EncoderLayer;
use super::lstm::Lstm;
use super::{EMBEDDING, EncoderKind, ROWS};
use crate::train::param::{Param, StateError};
use std::collections::HashMap;

/// Values per virtual token between two layers.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Width {
    /// Of the embedding.
    Input,
    Hidden,
    /// Of both directions of an LSTM.
    TwiceHidden,
    /// Of the rows, where it is not that of the embedding.
    Output,
}

/// One step from the embedding to the rows, with PyTorch's name of the module.
pub(super) enum LayerSpec {
    Linear {
        name: &'static str,
        from: Width,
        to: Width,
    },
    Tanh,
    Relu,
    /// As many layers as [`Sizes::layers`] says, each in both directions; the first reads the embedding.
    Lstm {
        name: &'static str,
    },
}

const fn linear(name: &'static str, from: Width, to: Width) -> LayerSpec {
    LayerSpec::Linear { name, from, to }
}

const PREFIX_MLP: &[LayerSpec] = &[
    linear("transform.0", Width::Input, Width::Hidden),
    LayerSpec::Tanh,
    linear("transform.2", Width::Hidden, Width::Output),
];

const PTUNING_MLP: &[LayerSpec] = &[
    linear("mlp_head.0", Width::Input, Width::Hidden),
    LayerSpec::Relu,
    linear("mlp_head.2", Width::Hidden, Width::Hidden),
    LayerSpec::Relu,
    linear("mlp_head.4", Width::Hidden, Width::Input),
];

const PTUNING_LSTM: &[LayerSpec] = &[
    LayerSpec::Lstm { name: "lstm_head" },
    linear("mlp_head.0", Width::TwiceHidden, Width::TwiceHidden),
    LayerSpec::Relu,
    linear("mlp_head.2", Width::TwiceHidden, Width::Input),
];

/// Sizes of an encoder, as far as its kind has them.
pub(super) struct Sizes {
    /// P.
    pub(super) rows: usize,
    /// Width of the embedding.
    pub(super) input: usize,
    /// W, width of the rows.
    pub(super) output: usize,
    pub(super) hidden: usize,
    /// Of the LSTM.
    pub(super) layers: usize,
}

/// Distribution of initial values.
pub(super) enum Distribution {
    /// N(0, 1), as `torch.nn.Embedding`.
    Normal,
    /// Uniform between -1/sqrt(fan) and 1/sqrt(fan), as `torch.nn.Linear` (fan is its input) and `torch.nn.LSTM` (its hidden
    /// size).
    Uniform { fan: usize },
}

/// What a parameter must be.
pub(super) struct ParamSpec {
    pub(super) name: String,
    pub(super) shape: Vec<usize>,
    pub(super) init: Distribution,
}

impl EncoderKind {
    /// The steps behind the embedding.
    pub(super) fn specs(self) -> &'static [LayerSpec] {
        match self {
            Self::Direct => &[],
            Self::PrefixMlp => PREFIX_MLP,
            Self::PTuningMlp => PTUNING_MLP,
            Self::PTuningLstm => PTUNING_LSTM,
        }
    }

    /// PyTorch's name of the table in front of them.
    fn table(self) -> &'static str {
        match self {
            Self::Direct => ROWS,
            Self::PrefixMlp | Self::PTuningMlp | Self::PTuningLstm => EMBEDDING,
        }
    }

    /// The layers of an encoder of these sizes.
    pub(super) fn layers(self, sizes: &Sizes) -> Vec<EncoderLayer> {
        let mut layers = Vec::new();
        for spec in self.specs() {
            match *spec {
                LayerSpec::Linear { name, from, to } => {
                    layers.push(EncoderLayer::linear(name, sizes.get(from), sizes.get(to)));
                }
                LayerSpec::Tanh => layers.push(EncoderLayer::tanh()),
                LayerSpec::Relu => layers.push(EncoderLayer::relu()),
                LayerSpec::Lstm { name } => {
                    let mut from = sizes.get(Width::Input);
                    for layer in 0..sizes.layers {
                        layers.push(EncoderLayer::Lstm(Lstm::new(
                            name,
                            layer,
                            from,
                            sizes.hidden,
                        )));
                        from = sizes.get(Width::TwiceHidden);
                    }
                }
            }
        }
        layers
    }

    /// The parameters of an encoder of these sizes, in PyTorch's order.
    pub(super) fn params(self, sizes: &Sizes) -> Vec<ParamSpec> {
        let table = ParamSpec {
            name: self.table().to_owned(),
            shape: vec![sizes.rows, sizes.input],
            init: Distribution::Normal,
        };
        let layers = self.layers(sizes);
        let of_layers = layers.iter().flat_map(EncoderLayer::params);
        std::iter::once(table).chain(of_layers).collect()
    }
}

impl Sizes {
    fn get(&self, width: Width) -> usize {
        match width {
            Width::Input => self.input,
            Width::Hidden => self.hidden,
            Width::TwiceHidden => 2 * self.hidden,
            Width::Output => self.output,
        }
    }

    /// Sizes that follow from the shapes of the matrices that are the first to have them; the other shapes have to agree with
    /// them.
    pub(super) fn of(
        kind: EncoderKind,
        params: &HashMap<String, Param>,
    ) -> Result<Self, StateError> {
        let (rows, input) = matrix(params, kind.table())?;
        let (mut hidden, mut output, mut layers) = (None, None, 0);
        for spec in kind.specs() {
            match *spec {
                LayerSpec::Linear { name, from, to } => {
                    let (n_to, n_from) = matrix(params, &format!("{name}.weight"))?;
                    for (width, n) in [(from, n_from), (to, n_to)] {
                        match width {
                            Width::Input => {}
                            Width::Hidden => _ = hidden.get_or_insert(n),
                            Width::TwiceHidden => _ = hidden.get_or_insert(n / 2),
                            Width::Output => _ = output.get_or_insert(n),
                        }
                    }
                }
                LayerSpec::Tanh | LayerSpec::Relu => {}
                LayerSpec::Lstm { name } => {
                    let present = |l: &usize| params.contains_key(&Lstm::recurrent(name, *l));
                    layers = (0..).take_while(present).count().max(1);
                }
            }
        }
        Ok(Self {
            rows,
            input,
            output: output.unwrap_or(input),
            hidden: hidden.unwrap_or(0),
            layers,
        })
    }
}

/// Rows and columns of a matrix of any size.
fn matrix(params: &HashMap<String, Param>, name: &str) -> Result<(usize, usize), StateError> {
    let param = params.get(name).ok_or_else(|| StateError::Missing {
        tensor: name.to_owned(),
    })?;
    match param.shape[..] {
        [rows, cols] if rows > 0 && cols > 0 => Ok((rows, cols)),
        _ => Err(shape_error(param, vec![0, 0])),
    }
}

pub(super) fn shape_error(param: &Param, expected: Vec<usize>) -> StateError {
    StateError::Shape {
        tensor: param.name.clone(),
        expected,
        got: param.shape.clone(),
    }
}
