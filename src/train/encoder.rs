//! What produces the rows of an adapter while it is trained. Saved adapters hold the rows only: the encoder is folded into
//! its output, as PEFT does.
//!
//! Architectures, names of parameters and initial values are those of PEFT (`PrefixEncoder`, `PromptEncoder`), so that its
//! parameters load here. Matrices of activations have one row per virtual token.

use super::linalg::{matmul_transposed, transpose};
use super::param::{Param, StateError};
use super::rng::Rng;
use crate::ggml::gemm;
use std::collections::HashMap;

/// PEFT's name of trained rows in the files it saves.
const ROWS: &str = "prompt_embeddings";
/// PyTorch's name of the table that encoders start from, and of trained rows in PEFT's modules.
const EMBEDDING: &str = "embedding.weight";
/// PyTorch's names of the parameters of an LSTM layer in one direction.
const LSTM_PARAMS: [&str; 4] = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"];
/// What those of the backward direction end in.
const DIRECTIONS: [&str; 2] = ["", "_reverse"];
/// Gates of an LSTM, in PyTorch's order: input, forget, cell, output.
const GATES: usize = 4;

/// Architecture of an encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum EncoderKind {
    /// The rows themselves: prefix tuning without reparameterization, and prompt tuning (Lester et al. 2021).
    Rows,
    /// Embedding, linear, tanh, linear: prefix tuning (Li and Liang 2021), PEFT's `prefix_projection`.
    PrefixMlp,
    /// Embedding, linear, ReLU, linear, ReLU, linear: P-tuning (Liu et al. 2021), PEFT's default.
    PTuningMlp,
    /// Embedding, bidirectional LSTM over the virtual tokens, linear, ReLU, linear: P-tuning. Without dropout between the LSTM's
    /// layers, as PEFT by default.
    PTuningLstm,
}

/// Sizes of an encoder, as far as its kind has them.
struct Sizes {
    /// P.
    rows: usize,
    /// Width of the embedding.
    input: usize,
    hidden: usize,
    /// Of the LSTM.
    layers: usize,
    /// W, width of the rows.
    width: usize,
}

/// Distribution of initial values.
enum Init {
    /// N(0, 1), as `torch.nn.Embedding`.
    Normal,
    /// Uniform between -1/sqrt(fan) and 1/sqrt(fan), as `torch.nn.Linear` (fan is its input) and `torch.nn.LSTM` (its hidden
    /// size).
    Uniform { fan: usize },
}

/// What a parameter must be.
struct Spec {
    name: String,
    shape: Vec<usize>,
    init: Init,
}

/// One step from the embedding to the rows, with parameters in PyTorch's order.
#[derive(Clone)]
enum Layer {
    /// Weight and bias from index `param`.
    Linear {
        param: usize,
    },
    Tanh,
    Relu,
    /// Those of the forward and of the backward direction from index `param`.
    Lstm {
        param: usize,
        traces: [LstmTrace; 2],
    },
}

/// What the backward pass through an LSTM needs to know of the forward pass.
#[derive(Clone, Default)]
struct LstmTrace {
    /// After the activation, `GATES * hidden` values per virtual token.
    gates: Vec<f32>,
    /// `hidden` values per virtual token.
    cells: Vec<f32>,
}

/// Parameters and how rows are computed from them.
#[derive(Clone)]
pub(crate) struct Encoder {
    kind: EncoderKind,
    rows: usize,
    width: usize,
    /// The embedding first.
    params: Vec<Param>,
    layers: Vec<Layer>,
    /// Added to the output, see [`Encoder::starting_at`].
    base: Option<Vec<f32>>,
    /// What each layer was given in the last forward pass.
    inputs: Vec<Vec<f32>>,
}

impl Encoder {
    /// Direct parameters: `rows` rows of `width` values, of which the first `frozen` keep their values. The parameter is
    /// called `prompt_embeddings`, as PEFT saves it.
    pub(crate) fn rows(init: Vec<f32>, rows: usize, width: usize, frozen: usize) -> Self {
        let params = vec![Param::new(ROWS, &[rows, width], init).with_frozen(frozen)];
        Self::assemble(EncoderKind::Rows, rows, width, params)
    }

    /// `rows` prefix rows of `width = 2 * L * Hk * d` values in PEFT's layout, from an embedding of `token_dim` (PEFT: `Hk * d`).
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
            hidden,
            layers: 0,
            width,
        };
        Self::random(EncoderKind::PrefixMlp, &sizes, rng)
    }

    /// `rows` embedding rows of `width` = D values.
    pub(crate) fn ptuning_mlp(rows: usize, width: usize, hidden: usize, rng: &mut Rng) -> Self {
        let sizes = Sizes {
            rows,
            input: width,
            hidden,
            layers: 0,
            width,
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
            hidden,
            layers,
            width,
        };
        Self::random(EncoderKind::PTuningLstm, &sizes, rng)
    }

    /// From the parameters of a checkpoint or of a PEFT module, in any order; sizes follow from their shapes. Trained rows may
    /// have either of their names.
    pub(crate) fn from_params(kind: EncoderKind, params: Vec<Param>) -> Result<Self, StateError> {
        let mut by_name = HashMap::new();
        for mut param in params {
            if kind == EncoderKind::Rows && param.name == EMBEDDING {
                param.name = ROWS.to_owned();
            }
            by_name.insert(param.name.clone(), param);
        }
        let sizes = sizes_of(kind, &by_name)?;
        let mut params = Vec::new();
        for Spec { name, shape, .. } in specs(kind, &sizes) {
            let param = by_name.remove(&name);
            let param = param.ok_or_else(|| StateError::Missing {
                tensor: name.clone(),
            })?;
            if param.shape != shape {
                return Err(shape_error(&param, shape));
            }
            params.push(param);
        }
        if let Some(tensor) = by_name.into_keys().min() {
            return Err(StateError::Unexpected { tensor });
        }
        Ok(Self::assemble(kind, sizes.rows, sizes.width, params))
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
        self.inputs.clear();
        let mut x = self.params[0].value.clone();
        for layer in &mut self.layers {
            let y = match layer {
                Layer::Linear { param } => linear(&self.params[*param..][..2], self.rows, &x),
                Layer::Tanh => x.iter().map(|v| v.tanh()).collect(),
                Layer::Relu => x.iter().map(|v| v.max(0.0)).collect(),
                Layer::Lstm { param, traces } => {
                    let params = &self.params[*param..][..2 * LSTM_PARAMS.len()];
                    lstm(params, self.rows, &x, traces)
                }
            };
            self.inputs.push(std::mem::replace(&mut x, y));
        }
        if let Some(base) = &self.base {
            for (x, base) in x.iter_mut().zip(base) {
                *x += base;
            }
        }
        x
    }

    /// Adds to the gradients of the parameters, given that of the loss with respect to the rows (`ne = [W, P]`). Follows
    /// [`Encoder::forward`], once or several times, with the parameters unchanged in between.
    pub(crate) fn backward(&mut self, d_rows: &[f32]) {
        assert_eq!(d_rows.len(), self.rows * self.width);
        assert_eq!(self.inputs.len(), self.layers.len(), "forward comes first");
        let mut d = d_rows.to_vec();
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let x = &self.inputs[i];
            // The last layer is linear: where the output is needed, another layer was given it.
            match layer {
                Layer::Linear { param } => {
                    d = linear_backward(&mut self.params[*param..][..2], self.rows, x, &d);
                }
                Layer::Tanh => {
                    for (d, y) in d.iter_mut().zip(&self.inputs[i + 1]) {
                        *d *= 1.0 - y * y;
                    }
                }
                Layer::Relu => {
                    for (d, &x) in d.iter_mut().zip(x) {
                        // 0 at 0, as PyTorch.
                        *d = if x > 0.0 { *d } else { 0.0 };
                    }
                }
                Layer::Lstm { param, traces } => {
                    let params = &mut self.params[*param..][..2 * LSTM_PARAMS.len()];
                    d = lstm_backward(params, self.rows, x, &self.inputs[i + 1], traces, &d);
                }
            }
        }
        add(&mut self.params[0].grad, &d);
    }

    fn random(kind: EncoderKind, sizes: &Sizes, rng: &mut Rng) -> Self {
        let param = |spec: Spec| {
            let bound = match spec.init {
                Init::Normal => None,
                Init::Uniform { fan } => Some(1.0 / (fan as f32).sqrt()),
            };
            let value = (0..spec.shape.iter().product())
                .map(|_| match bound {
                    None => rng.normal(),
                    Some(bound) => rng.uniform(-bound, bound),
                })
                .collect();
            Param::new(spec.name, &spec.shape, value)
        };
        let params = specs(kind, sizes).into_iter().map(param).collect();
        Self::assemble(kind, sizes.rows, sizes.width, params)
    }

    /// `params` are as [`specs`] says.
    fn assemble(kind: EncoderKind, rows: usize, width: usize, params: Vec<Param>) -> Self {
        let linear = |param| Layer::Linear { param };
        let layers = match kind {
            EncoderKind::Rows => vec![],
            EncoderKind::PrefixMlp => vec![linear(1), Layer::Tanh, linear(3)],
            EncoderKind::PTuningMlp => {
                vec![linear(1), Layer::Relu, linear(3), Layer::Relu, linear(5)]
            }
            EncoderKind::PTuningLstm => {
                let head = params.len() - 4;
                let lstm = |param| Layer::Lstm {
                    param,
                    traces: Default::default(),
                };
                let mut layers = Vec::from_iter((1..head).step_by(2 * LSTM_PARAMS.len()).map(lstm));
                layers.extend([linear(head), Layer::Relu, linear(head + 2)]);
                layers
            }
        };
        Self {
            kind,
            rows,
            width,
            params,
            layers,
            base: None,
            inputs: Vec::new(),
        }
    }
}

/// `rows` rows of `width` values from N(0, 1), as `torch.nn.Embedding`: how PEFT starts prefix and prompt tuning unless told
/// otherwise.
pub(crate) fn normal_rows(rows: usize, width: usize, rng: &mut Rng) -> Vec<f32> {
    (0..rows * width).map(|_| rng.normal()).collect()
}

/// The parameters of an encoder, in PyTorch's order.
fn specs(kind: EncoderKind, sizes: &Sizes) -> Vec<Spec> {
    let &Sizes {
        rows,
        input,
        hidden,
        layers,
        width,
    } = sizes;
    let embedding = |name: &str, cols| Spec {
        name: name.to_owned(),
        shape: vec![rows, cols],
        init: Init::Normal,
    };
    let linear = |name: &str, from, to| {
        let part = |part, shape| Spec {
            name: format!("{name}.{part}"),
            shape,
            init: Init::Uniform { fan: from },
        };
        [part("weight", vec![to, from]), part("bias", vec![to])]
    };
    let mut specs = Vec::new();
    match kind {
        EncoderKind::Rows => specs.push(embedding(ROWS, width)),
        EncoderKind::PrefixMlp => {
            specs.push(embedding(EMBEDDING, input));
            specs.extend(linear("transform.0", input, hidden));
            specs.extend(linear("transform.2", hidden, width));
        }
        EncoderKind::PTuningMlp => {
            specs.push(embedding(EMBEDDING, input));
            specs.extend(linear("mlp_head.0", input, hidden));
            specs.extend(linear("mlp_head.2", hidden, hidden));
            specs.extend(linear("mlp_head.4", hidden, width));
        }
        EncoderKind::PTuningLstm => {
            specs.push(embedding(EMBEDDING, input));
            for layer in 0..layers {
                let from = if layer == 0 { input } else { 2 * hidden };
                let gates = GATES * hidden;
                for direction in DIRECTIONS {
                    let shapes = [
                        vec![gates, from],
                        vec![gates, hidden],
                        vec![gates],
                        vec![gates],
                    ];
                    specs.extend(
                        LSTM_PARAMS
                            .into_iter()
                            .zip(shapes)
                            .map(|(name, shape)| Spec {
                                name: format!("lstm_head.{name}_l{layer}{direction}"),
                                shape,
                                init: Init::Uniform { fan: hidden },
                            }),
                    );
                }
            }
            specs.extend(linear("mlp_head.0", 2 * hidden, 2 * hidden));
            specs.extend(linear("mlp_head.2", 2 * hidden, width));
        }
    }
    specs
}

/// Sizes that follow from the shapes of some parameters; the other shapes have to agree with them.
fn sizes_of(kind: EncoderKind, params: &HashMap<String, Param>) -> Result<Sizes, StateError> {
    let matrix = |name: &str| {
        let param = params.get(name).ok_or_else(|| StateError::Missing {
            tensor: name.to_owned(),
        })?;
        match param.shape[..] {
            [rows, cols] if rows > 0 && cols > 0 => Ok((rows, cols)),
            _ => Err(shape_error(param, vec![0, 0])),
        }
    };
    let (mut hidden, mut layers) = (0, 0);
    let (rows, input) = match kind {
        EncoderKind::Rows => matrix(ROWS)?,
        _ => matrix(EMBEDDING)?,
    };
    let mut width = input;
    match kind {
        EncoderKind::Rows => {}
        EncoderKind::PrefixMlp => (width, hidden) = matrix("transform.2.weight")?,
        EncoderKind::PTuningMlp => (_, hidden) = matrix("mlp_head.4.weight")?,
        EncoderKind::PTuningLstm => {
            (_, hidden) = matrix("lstm_head.weight_hh_l0")?;
            let present = |l: &usize| params.contains_key(&format!("lstm_head.weight_hh_l{l}"));
            layers = (0..).take_while(present).count();
        }
    }
    Ok(Sizes {
        rows,
        input,
        hidden,
        layers,
        width,
    })
}

fn shape_error(param: &Param, expected: Vec<usize>) -> StateError {
    StateError::Shape {
        tensor: param.name.clone(),
        expected,
        got: param.shape.clone(),
    }
}

fn add(to: &mut [f32], values: &[f32]) {
    for (to, value) in to.iter_mut().zip(values) {
        *to += value;
    }
}

/// Weight and bias, `rows` inputs in rows.
fn linear(params: &[Param], rows: usize, x: &[f32]) -> Vec<f32> {
    let [weight, bias] = params else {
        unreachable!("weight and bias")
    };
    let (output, input) = (weight.shape[0], weight.shape[1]);
    let mut y = matmul_transposed(rows, output, input, x, &weight.value);
    for y in y.chunks_exact_mut(output) {
        add(y, &bias.value);
    }
    y
}

/// Returns the gradient with respect to the input `x`.
fn linear_backward(params: &mut [Param], rows: usize, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let [weight, bias] = params else {
        unreachable!("weight and bias")
    };
    let mut dx = vec![0.0; x.len()];
    product_backward(weight, rows, x, dy, &mut dx);
    for dy in dy.chunks_exact(bias.numel()) {
        add(&mut bias.grad, dy);
    }
    dx
}

/// Backwards through `y = x weight^T`: adds to the gradients of the weight and of `x`.
fn product_backward(weight: &mut Param, rows: usize, x: &[f32], dy: &[f32], dx: &mut [f32]) {
    let (output, input) = (weight.shape[0], weight.shape[1]);
    let d_weight = &mut weight.grad;
    gemm(
        true, output, input, rows, dy, 1, output, x, input, d_weight, input,
    );
    gemm(
        true,
        rows,
        input,
        output,
        dy,
        output,
        1,
        &weight.value,
        input,
        dx,
        input,
    );
}

/// Both directions of one layer: `rows` steps from zero states, `2 * hidden` outputs each (forward, backward).
fn lstm(params: &[Param], rows: usize, x: &[f32], traces: &mut [LstmTrace; 2]) -> Vec<f32> {
    let hidden = params[1].shape[1];
    let mut y = vec![0.0; rows * 2 * hidden];
    let directions = params.chunks_exact(LSTM_PARAMS.len());
    for ((direction, params), trace) in directions.enumerate().zip(traces) {
        let [weight_ih, weight_hh, bias_ih, bias_hh] = params else {
            unreachable!("chunks of four")
        };
        let (n_gates, input) = (weight_ih.shape[0], weight_ih.shape[1]);
        let mut gates = matmul_transposed(rows, n_gates, input, x, &weight_ih.value);
        let mut cells = vec![0.0; rows * hidden];
        let (mut cell, mut output) = (vec![0.0; hidden], vec![0.0; hidden]);
        let recurrent = transpose(n_gates, hidden, &weight_hh.value);
        for t in time(direction, rows) {
            let gates = &mut gates[t * n_gates..][..n_gates];
            add(gates, &bias_ih.value);
            add(gates, &bias_hh.value);
            gemm(
                true, 1, n_gates, hidden, &output, hidden, 1, &recurrent, n_gates, gates, n_gates,
            );
            for j in 0..hidden {
                let at = |gate: usize| gate * hidden + j;
                gates[at(0)] = sigmoid(gates[at(0)]);
                gates[at(1)] = sigmoid(gates[at(1)]);
                gates[at(2)] = gates[at(2)].tanh();
                gates[at(3)] = sigmoid(gates[at(3)]);
                cell[j] = gates[at(1)] * cell[j] + gates[at(0)] * gates[at(2)];
                output[j] = gates[at(3)] * cell[j].tanh();
            }
            cells[t * hidden..][..hidden].copy_from_slice(&cell);
            y[(2 * t + direction) * hidden..][..hidden].copy_from_slice(&output);
        }
        *trace = LstmTrace { gates, cells };
    }
    y
}

/// Backwards through [`lstm`] with input `x` and output `y`: returns the gradient with respect to `x`.
fn lstm_backward(
    params: &mut [Param],
    rows: usize,
    x: &[f32],
    y: &[f32],
    traces: &[LstmTrace; 2],
    dy: &[f32],
) -> Vec<f32> {
    let hidden = params[1].shape[1];
    let mut dx = vec![0.0; x.len()];
    let directions = params.chunks_exact_mut(LSTM_PARAMS.len());
    for ((direction, params), trace) in directions.enumerate().zip(traces) {
        let [weight_ih, weight_hh, bias_ih, bias_hh] = params else {
            unreachable!("chunks of four")
        };
        let n_gates = GATES * hidden;
        // Before the activation of the gates.
        let mut d_gates = vec![0.0; rows * n_gates];
        // What each step was given by the one before it, zeros in the first.
        let mut previous = vec![0.0; rows * hidden];
        // From the step after, with respect to this step's output and cell.
        let (mut d_output, mut d_cell) = (vec![0.0; hidden], vec![0.0; hidden]);
        let steps = Vec::from_iter(time(direction, rows));
        for (n, &t) in steps.iter().enumerate().rev() {
            let before = n.checked_sub(1).map(|n| steps[n]);
            if let Some(before) = before {
                let output = &y[(2 * before + direction) * hidden..][..hidden];
                previous[t * hidden..][..hidden].copy_from_slice(output);
            }
            add(&mut d_output, &dy[(2 * t + direction) * hidden..][..hidden]);
            let gates = &trace.gates[t * n_gates..][..n_gates];
            let d_gates = &mut d_gates[t * n_gates..][..n_gates];
            for j in 0..hidden {
                let [i, f, g, o] = [0, 1, 2, 3].map(|gate| gates[gate * hidden + j]);
                let cell = trace.cells[t * hidden + j].tanh();
                let cell_before = before.map_or(0.0, |t| trace.cells[t * hidden + j]);
                let d = d_cell[j] + d_output[j] * o * (1.0 - cell * cell);
                d_gates[j] = d * g * i * (1.0 - i);
                d_gates[hidden + j] = d * cell_before * f * (1.0 - f);
                d_gates[2 * hidden + j] = d * i * (1.0 - g * g);
                d_gates[3 * hidden + j] = d_output[j] * cell * o * (1.0 - o);
                d_cell[j] = d * f;
            }
            let weight = &weight_hh.value;
            gemm(
                false,
                1,
                hidden,
                n_gates,
                d_gates,
                n_gates,
                1,
                weight,
                hidden,
                &mut d_output,
                hidden,
            );
        }
        product_backward(weight_ih, rows, x, &d_gates, &mut dx);
        let d_recurrent = &mut weight_hh.grad;
        gemm(
            true,
            n_gates,
            hidden,
            rows,
            &d_gates,
            1,
            n_gates,
            &previous,
            hidden,
            d_recurrent,
            hidden,
        );
        for d_gates in d_gates.chunks_exact(n_gates) {
            add(&mut bias_ih.grad, d_gates);
            add(&mut bias_hh.grad, d_gates);
        }
    }
    dx
}

/// The order in which a direction visits the virtual tokens.
fn time(direction: usize, rows: usize) -> impl Iterator<Item = usize> {
    (0..rows).map(move |t| if direction == 0 { t } else { rows - 1 - t })
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::rng::Stream;
    use ggraft_testkit::tensors::Tensors;
    use std::fs;
    use std::path::Path;

    fn rng() -> Rng {
        Rng::new(5, Stream::Init)
    }

    /// One of each kind, with sizes that are all different.
    fn all() -> Vec<Encoder> {
        let mut rng = rng();
        let init = normal_rows(3, 7, &mut rng);
        vec![
            Encoder::rows(init, 3, 7, 1),
            Encoder::prefix_mlp(3, 4, 5, 24, &mut rng),
            Encoder::ptuning_mlp(3, 6, 5, &mut rng),
            Encoder::ptuning_lstm(4, 6, 5, 1, &mut rng),
            Encoder::ptuning_lstm(4, 3, 2, 3, &mut rng),
            Encoder::ptuning_lstm(1, 3, 2, 2, &mut rng),
        ]
    }

    /// Straight from the definitions, in double precision.
    mod reference {
        use super::super::*;

        pub(super) type Values = HashMap<String, Vec<f64>>;
        type Matrix = Vec<Vec<f64>>;

        pub(super) fn values(params: &[Param]) -> Values {
            let value = |p: &Param| p.value.iter().map(|&v| v.into()).collect();
            params.iter().map(|p| (p.name.clone(), value(p))).collect()
        }

        fn times(weight: &[f64], x: &[f64]) -> Vec<f64> {
            let row = |w: &[f64]| w.iter().zip(x).map(|(w, x)| w * x).sum();
            weight.chunks_exact(x.len()).map(row).collect()
        }

        fn linear(v: &Values, name: &str, x: &Matrix) -> Matrix {
            let weight = &v[&format!("{name}.weight")];
            let bias = &v[&format!("{name}.bias")];
            let row = |x: &Vec<f64>| {
                times(weight, x)
                    .iter()
                    .zip(bias)
                    .map(|(y, b)| y + b)
                    .collect()
            };
            x.iter().map(row).collect()
        }

        fn map(f: impl Fn(f64) -> f64, x: Matrix) -> Matrix {
            let row = |x: Vec<f64>| x.into_iter().map(&f).collect();
            x.into_iter().map(row).collect()
        }

        /// Outputs of the steps, in the order of `x`.
        fn lstm<'a>(v: &Values, suffix: &str, x: impl Iterator<Item = &'a Vec<f64>>) -> Matrix {
            let [w_ih, w_hh, b_ih, b_hh] =
                LSTM_PARAMS.map(|name| &v[&format!("lstm_head.{name}_{suffix}")]);
            let hidden = b_ih.len() / 4;
            let (mut h, mut c) = (vec![0.0; hidden], vec![0.0; hidden]);
            x.map(|x| {
                let (from_x, from_h) = (times(w_ih, x), times(w_hh, &h));
                let gate = |k: usize| from_x[k] + b_ih[k] + from_h[k] + b_hh[k];
                let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
                for j in 0..hidden {
                    let (i, f) = (sigmoid(gate(j)), sigmoid(gate(hidden + j)));
                    let (g, o) = (gate(2 * hidden + j).tanh(), sigmoid(gate(3 * hidden + j)));
                    c[j] = f * c[j] + i * g;
                    h[j] = o * c[j].tanh();
                }
                h.clone()
            })
            .collect()
        }

        pub(super) fn forward(kind: EncoderKind, rows: usize, v: &Values) -> Vec<f64> {
            let table = v.get(EMBEDDING).unwrap_or_else(|| &v[ROWS]);
            let mut x: Matrix = table
                .chunks_exact(table.len() / rows)
                .map(<[f64]>::to_vec)
                .collect();
            let relu = |x| f64::max(x, 0.0);
            x = match kind {
                EncoderKind::Rows => x,
                EncoderKind::PrefixMlp => linear(
                    v,
                    "transform.2",
                    &map(f64::tanh, linear(v, "transform.0", &x)),
                ),
                EncoderKind::PTuningMlp => {
                    x = map(relu, linear(v, "mlp_head.0", &x));
                    x = map(relu, linear(v, "mlp_head.2", &x));
                    linear(v, "mlp_head.4", &x)
                }
                EncoderKind::PTuningLstm => {
                    for layer in 0.. {
                        if !v.contains_key(&format!("lstm_head.weight_ih_l{layer}")) {
                            break;
                        }
                        let forward = lstm(v, &format!("l{layer}"), x.iter());
                        let mut backward = lstm(v, &format!("l{layer}_reverse"), x.iter().rev());
                        backward.reverse();
                        let both = forward.into_iter().zip(backward);
                        x = both.map(|(f, b)| [f, b].concat()).collect();
                    }
                    x = map(relu, linear(v, "mlp_head.0", &x));
                    linear(v, "mlp_head.2", &x)
                }
            };
            x.concat()
        }
    }

    #[track_caller]
    fn assert_close(what: &str, got: &[f32], expected: &[f64], tolerance: f64) {
        assert_eq!(got.len(), expected.len(), "{what}");
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
        let pairs = got.iter().zip(expected);
        let distance = norm(&mut pairs.map(|(&g, e)| f64::from(g) - e));
        let of_expected = norm(&mut expected.iter().copied());
        assert!(
            distance <= tolerance * of_expected,
            "{what}: {distance} of {of_expected}"
        );
    }

    /// Forward against the definitions, every gradient against central differences of them.
    #[test]
    fn gradients() {
        for mut encoder in all() {
            let (kind, rows) = (encoder.kind(), encoder.rows);
            let mut v = reference::values(encoder.params());
            let out = encoder.forward();
            assert_close("rows", &out, &reference::forward(kind, rows, &v), 1e-6);

            let weights = normal_rows(rows, encoder.width, &mut rng());
            encoder.backward(&weights);
            for param in encoder.params() {
                let mut loss = |i: usize, step: f64| {
                    let before = v[&param.name][i];
                    v.get_mut(&param.name).unwrap()[i] = before + step;
                    let out = reference::forward(kind, rows, &v);
                    v.get_mut(&param.name).unwrap()[i] = before;
                    let terms = out.iter().zip(&weights).map(|(y, &w)| y * f64::from(w));
                    terms.sum::<f64>()
                };
                let step = 1e-6;
                let difference = |i| (loss(i, step) - loss(i, -step)) / (2.0 * step);
                let expected: Vec<f64> = (0..param.numel()).map(difference).collect();
                let what = format!("{kind:?} {}", param.name);
                // A single step of an LSTM has nothing to recur on.
                let has_effect = expected.iter().any(|&g| g != 0.0);
                assert!(has_effect || rows == 1, "{what} has no effect");
                assert_close(&what, &param.grad, &expected, 2e-6);
            }
        }
    }

    #[test]
    fn gradients_add_up() {
        for mut encoder in all() {
            let d = normal_rows(encoder.rows, encoder.width, &mut rng());
            encoder.forward();
            encoder.backward(&d);
            let once: Vec<_> = encoder.params().iter().map(|p| p.grad.clone()).collect();
            encoder.backward(&d);
            for (param, once) in encoder.params_mut().iter_mut().zip(once) {
                let twice: Vec<_> = once.iter().map(|&g| 2.0 * f64::from(g)).collect();
                assert_close(&param.name, &param.grad, &twice, 1e-6);
                param.zero_grad();
                assert!(param.grad.iter().all(|&g| g == 0.0));
            }
        }
    }

    #[test]
    fn starts_at_given_rows() {
        for encoder in all() {
            let n = encoder.rows;
            let rows = normal_rows(n, encoder.width, &mut Rng::new(6, Stream::Init));
            let wanted: Vec<f64> = rows.iter().map(|&v| v.into()).collect();
            let mut encoder = encoder.starting_at(&rows);
            assert_close("first", &encoder.forward(), &wanted, 1e-6);

            // Moves as without, and continues from a checkpoint.
            encoder.params_mut()[0].value[0] += 0.5;
            let moved = encoder.forward();
            assert_ne!(moved, rows);
            let base = encoder.base().unwrap().to_vec();
            let params = encoder.params().to_vec();
            let mut plain = Encoder::from_params(encoder.kind(), params).unwrap();
            let mut sum = plain.forward();
            add(&mut sum, &base);
            assert_eq!(sum, moved);
            assert!(plain.base().is_none());
            let mut again = plain.with_base(base).unwrap();
            assert_eq!(again.forward(), moved);
            assert!(matches!(
                again.with_base(vec![0.0; n]),
                Err(StateError::Shape { .. })
            ));
        }
    }

    #[test]
    fn frozen_rows_survive_a_checkpoint() {
        let encoder = Encoder::rows(vec![0.5; 6], 3, 2, 2);
        let params = encoder.params().to_vec();
        let again = Encoder::from_params(EncoderKind::Rows, params).unwrap();
        assert_eq!(again.params(), encoder.params());
        assert_eq!(again.params()[0].frozen, 2);
    }

    #[test]
    fn initial_values() {
        let of = |encoder: &Encoder, name: &str| {
            let param = encoder.params().iter().find(|p| p.name == name).unwrap();
            let n = param.numel() as f32;
            let square = param.value.iter().map(|v| v * v).sum::<f32>() / n;
            let largest = param.value.iter().fold(0.0, |m: f32, v| m.max(v.abs()));
            (square.sqrt(), largest)
        };
        let mlp = Encoder::prefix_mlp(20, 100, 64, 400, &mut rng());
        let (rms, _) = of(&mlp, EMBEDDING);
        assert!((rms - 1.0).abs() < 0.05, "{rms}");
        let lstm = Encoder::ptuning_lstm(2, 100, 25, 2, &mut rng());
        for (encoder, name, bound) in [
            (&mlp, "transform.0.weight", 0.1),
            (&mlp, "transform.0.bias", 0.1),
            (&mlp, "transform.2.weight", 0.125),
            (&mlp, "transform.2.bias", 0.125),
            (&lstm, "lstm_head.weight_ih_l0", 0.2),
            (&lstm, "lstm_head.bias_hh_l1_reverse", 0.2),
            (&lstm, "mlp_head.0.weight", 0.02f32.sqrt()),
        ] {
            let (rms, largest) = of(encoder, name);
            assert!(largest <= bound && largest > 0.9 * bound, "{name}");
            assert!((rms * 3f32.sqrt() / bound - 1.0).abs() < 0.15, "{name}");
        }
        assert_eq!(
            Encoder::ptuning_mlp(2, 4, 3, &mut rng()).params(),
            Encoder::ptuning_mlp(2, 4, 3, &mut rng()).params()
        );
    }

    #[test]
    fn params_that_do_not_fit() {
        let param = |name: &str, shape: &[usize]| {
            Param::new(name, shape, vec![0.5; shape.iter().product()])
        };
        let lstm = || {
            Encoder::ptuning_lstm(2, 3, 2, 2, &mut rng())
                .params()
                .to_vec()
        };
        let without = |name: &str| {
            let mut params = lstm();
            params.retain(|p| p.name != name);
            params
        };
        let with = |name: &str, shape: &[usize]| {
            let mut params = without(name);
            params.push(param(name, shape));
            params
        };
        let error = |kind, params| Encoder::from_params(kind, params).err().unwrap();
        for name in [
            "embedding.weight",
            "lstm_head.weight_hh_l0",
            "lstm_head.bias_ih_l1_reverse",
            "mlp_head.2.bias",
        ] {
            let missing = StateError::Missing {
                tensor: name.to_owned(),
            };
            assert_eq!(error(EncoderKind::PTuningLstm, without(name)), missing);
        }
        // A layer that ends the count is found out by what else there is of it.
        assert_eq!(
            error(EncoderKind::PTuningLstm, without("lstm_head.weight_hh_l1")),
            StateError::Unexpected {
                tensor: "lstm_head.bias_hh_l1".to_owned()
            }
        );
        for (name, shape, expected) in [
            ("embedding.weight", &[6][..], &[0, 0][..]),
            ("embedding.weight", &[0, 3], &[0, 0]),
            ("lstm_head.weight_ih_l1", &[8, 3], &[8, 4]),
            ("mlp_head.2.weight", &[4, 4], &[3, 4]),
        ] {
            let wrong = StateError::Shape {
                tensor: name.to_owned(),
                expected: expected.to_vec(),
                got: shape.to_vec(),
            };
            assert_eq!(error(EncoderKind::PTuningLstm, with(name, shape)), wrong);
        }
        assert_eq!(
            error(EncoderKind::Rows, lstm()).to_string(),
            "unexpected tensor lstm_head.bias_hh_l0"
        );
    }

    fn doubles(values: &[f32]) -> Vec<f64> {
        values.iter().map(|&v| v.into()).collect()
    }

    /// From PEFT's parameters to the rows it saves, and from the gradient of the rows to those of the parameters.
    #[test]
    fn as_in_peft() {
        let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance");
        let mut checked = 0;
        for case in fs::read_dir(cases).unwrap() {
            for (adapter, kind) in [
                ("prefix", EncoderKind::Rows),
                ("prompt", EncoderKind::Rows),
                ("prefix_mlp", EncoderKind::PrefixMlp),
                ("ptuning_mlp", EncoderKind::PTuningMlp),
                ("ptuning_lstm", EncoderKind::PTuningLstm),
            ] {
                let dir = case.as_ref().unwrap().path().join("adapters").join(adapter);
                if !dir.exists() {
                    continue;
                }
                let what = |name: &str| format!("{}: {name}", dir.display());
                let load = |name: &str| Tensors::load(&dir.join(name));
                let saved = load("adapter_model.safetensors");
                let expected = load("expected.safetensors");
                let init = load("encoder_init.safetensors");
                let params = init
                    .names()
                    .map(|n| Param::new(n, init.shape(n), init.f32(n).to_vec()))
                    .collect();
                let mut encoder = Encoder::from_params(kind, params).unwrap();

                assert_eq!(*saved.shape(ROWS), [encoder.rows, encoder.width]);
                let out = encoder.forward();
                assert_close(&what(ROWS), &out, &doubles(saved.f32(ROWS)), 1e-5);

                encoder.backward(expected.f32("grad.prompt_embeddings"));
                for param in encoder.params() {
                    let name = format!("grad.{}", param.name);
                    let grad = doubles(expected.f32(&name));
                    assert_eq!(*expected.shape(&name), param.shape);
                    assert_close(&what(&param.name), &param.grad, &grad, 1e-4);
                }
                checked += 1;
            }
        }
        assert!(checked >= 40, "{checked}");
    }
}
