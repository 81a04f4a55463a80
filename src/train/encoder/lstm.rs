//! One layer of a bidirectional LSTM over the virtual tokens (Hochreiter and Schmidhuber 1997), as PyTorch has it.

use super::add;
use super::layer::product_backward;
use super::spec::{Distribution, ParamSpec};
use crate::kernels::{RowMajor, Strided, gemm};
use crate::train::linalg::{matmul_transposed, transpose};
use crate::train::param::Param;

/// PyTorch's names of the parameters of a layer in one direction.
pub(super) const PARAMS: [&str; 4] = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"];
/// What those of the forward and of the backward direction end in.
const DIRECTIONS: [&str; 2] = ["", "_reverse"];
/// In PyTorch's order: input, forget, cell, output.
const GATES: usize = 4;

/// A layer in both directions: `2 * hidden` outputs each (forward, backward), from zero states.
#[derive(Clone)]
pub(super) struct Lstm {
    /// PyTorch's name of the module.
    name: &'static str,
    /// Which of the module's layers.
    layer: usize,
    from: usize,
    hidden: usize,
    input: Vec<f32>,
    output: Vec<f32>,
    traces: [Trace; 2],
}

/// What the backward pass needs to know of one direction.
#[derive(Clone, Default)]
struct Trace {
    /// After the activation, `GATES * hidden` values per virtual token.
    gates: Vec<f32>,
    /// `hidden` values per virtual token.
    cells: Vec<f32>,
}

impl Lstm {
    pub(super) const N_PARAMS: usize = PARAMS.len() * DIRECTIONS.len();

    pub(super) fn new(name: &'static str, layer: usize, from: usize, hidden: usize) -> Self {
        Self {
            name,
            layer,
            from,
            hidden,
            input: Vec::new(),
            output: Vec::new(),
            traces: Default::default(),
        }
    }

    /// Name of a parameter that layer `layer` of the module `name` has: how layers are counted.
    pub(super) fn recurrent(name: &str, layer: usize) -> String {
        format!("{name}.weight_hh_l{layer}")
    }

    pub(super) fn params(&self) -> Vec<ParamSpec> {
        let n_gates = GATES * self.hidden;
        let shapes = [
            vec![n_gates, self.from],
            vec![n_gates, self.hidden],
            vec![n_gates],
            vec![n_gates],
        ];
        let of_direction = |direction| {
            PARAMS
                .into_iter()
                .zip(shapes.clone())
                .map(move |(param, shape)| ParamSpec {
                    name: format!("{}.{param}_l{}{direction}", self.name, self.layer),
                    shape,
                    init: Distribution::Uniform { fan: self.hidden },
                })
        };
        DIRECTIONS.into_iter().flat_map(of_direction).collect()
    }

    /// Both directions over `rows` steps `x`.
    pub(super) fn forward(&mut self, params: &[Param], rows: usize, x: Vec<f32>) -> Vec<f32> {
        let (hidden, n_gates) = (self.hidden, GATES * self.hidden);
        let mut y = vec![0.0; rows * 2 * hidden];
        let directions = params.chunks_exact(PARAMS.len());
        for ((direction, params), trace) in directions.enumerate().zip(&mut self.traces) {
            let [weight_ih, weight_hh, bias_ih, bias_hh] = params else {
                unreachable!("chunks of four")
            };
            let mut gates = matmul_transposed(rows, n_gates, self.from, &x, &weight_ih.value);
            let mut cells = vec![0.0; rows * hidden];
            let (mut cell, mut output) = (vec![0.0; hidden], vec![0.0; hidden]);
            let recurrent = transpose(n_gates, hidden, &weight_hh.value);
            for t in time(direction, rows) {
                let gates = &mut gates[t * n_gates..][..n_gates];
                add(gates, &bias_ih.value);
                add(gates, &bias_hh.value);
                gemm(
                    true,
                    [1, n_gates, hidden],
                    Strided::rows(&output, hidden),
                    RowMajor(&recurrent, n_gates),
                    RowMajor(gates, n_gates),
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
            *trace = Trace { gates, cells };
        }
        self.input = x;
        self.output.clone_from(&y);
        y
    }

    /// The gradient with respect to the input.
    pub(super) fn backward(&self, params: &mut [Param], rows: usize, dy: &[f32]) -> Vec<f32> {
        let (hidden, n_gates) = (self.hidden, GATES * self.hidden);
        let (x, y) = (&self.input, &self.output);
        let mut dx = vec![0.0; x.len()];
        let directions = params.chunks_exact_mut(PARAMS.len());
        for ((direction, params), trace) in directions.enumerate().zip(&self.traces) {
            let [weight_ih, weight_hh, bias_ih, bias_hh] = params else {
                unreachable!("chunks of four")
            };
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
                gemm(
                    false,
                    [1, hidden, n_gates],
                    Strided::rows(d_gates, n_gates),
                    RowMajor(&weight_hh.value, hidden),
                    RowMajor(&mut d_output, hidden),
                );
            }
            product_backward(weight_ih, rows, x, &d_gates, &mut dx);
            gemm(
                true,
                [n_gates, hidden, rows],
                Strided::columns(&d_gates, n_gates),
                RowMajor(&previous, hidden),
                RowMajor(&mut weight_hh.grad, hidden),
            );
            for d_gates in d_gates.chunks_exact(n_gates) {
                add(&mut bias_ih.grad, d_gates);
                add(&mut bias_hh.grad, d_gates);
            }
        }
        dx
    }
}

/// The order in which a direction visits the virtual tokens.
fn time(direction: usize, rows: usize) -> impl Iterator<Item = usize> {
    (0..rows).map(move |t| if direction == 0 { t } else { rows - 1 - t })
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}
