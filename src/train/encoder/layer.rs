//! One step from the embedding to the rows, forwards and backwards.

use super::add;
use super::lstm::Lstm;
use super::spec::{Distribution, ParamSpec};
use crate::kernels::{RowMajor, Strided, gemm};
use crate::train::linalg::matmul_transposed;
use crate::train::param::Param;

/// A layer, and what its backward pass needs to know of the last forward pass. Its parameters are kept by the encoder.
#[derive(Clone)]
pub(super) enum EncoderLayer {
    Linear(Linear),
    Tanh { output: Vec<f32> },
    Relu { input: Vec<f32> },
    Lstm(Lstm),
}

/// `y = x weight^T + bias`.
#[derive(Clone)]
pub(super) struct Linear {
    /// PyTorch's name of the module.
    name: &'static str,
    from: usize,
    to: usize,
    input: Vec<f32>,
}

impl EncoderLayer {
    pub(super) fn linear(name: &'static str, from: usize, to: usize) -> Self {
        Self::Linear(Linear {
            name,
            from,
            to,
            input: Vec::new(),
        })
    }

    pub(super) fn tanh() -> Self {
        Self::Tanh { output: Vec::new() }
    }

    pub(super) fn relu() -> Self {
        Self::Relu { input: Vec::new() }
    }

    /// Its parameters, in PyTorch's order.
    pub(super) fn params(&self) -> Vec<ParamSpec> {
        match self {
            Self::Linear(linear) => linear.params(),
            Self::Tanh { .. } | Self::Relu { .. } => Vec::new(),
            Self::Lstm(lstm) => lstm.params(),
        }
    }

    /// How many those are.
    pub(super) fn n_params(&self) -> usize {
        match self {
            Self::Linear(_) => Linear::N_PARAMS,
            Self::Tanh { .. } | Self::Relu { .. } => 0,
            Self::Lstm(_) => Lstm::N_PARAMS,
        }
    }

    /// The output for `rows` inputs `x`, with the layer's own `params`.
    pub(super) fn forward(&mut self, params: &[Param], rows: usize, x: Vec<f32>) -> Vec<f32> {
        match self {
            Self::Linear(linear) => linear.forward(params, rows, x),
            Self::Tanh { output } => {
                *output = x.iter().map(|v| v.tanh()).collect();
                output.clone()
            }
            Self::Relu { input } => {
                let y = x.iter().map(|v| v.max(0.0)).collect();
                *input = x;
                y
            }
            Self::Lstm(lstm) => lstm.forward(params, rows, x),
        }
    }

    /// The gradient with respect to the input, given that with respect to the output; adds to the gradients of `params`.
    pub(super) fn backward(&self, params: &mut [Param], rows: usize, mut d: Vec<f32>) -> Vec<f32> {
        match self {
            Self::Linear(linear) => linear.backward(params, rows, &d),
            Self::Tanh { output } => {
                for (d, y) in d.iter_mut().zip(output) {
                    *d *= 1.0 - y * y;
                }
                d
            }
            Self::Relu { input } => {
                for (d, &x) in d.iter_mut().zip(input) {
                    // 0 at 0, as PyTorch.
                    *d = if x > 0.0 { *d } else { 0.0 };
                }
                d
            }
            Self::Lstm(lstm) => lstm.backward(params, rows, &d),
        }
    }
}

impl Linear {
    const N_PARAMS: usize = 2;

    fn params(&self) -> Vec<ParamSpec> {
        let part = |part, shape| ParamSpec {
            name: format!("{}.{part}", self.name),
            shape,
            init: Distribution::Uniform { fan: self.from },
        };
        vec![
            part("weight", vec![self.to, self.from]),
            part("bias", vec![self.to]),
        ]
    }

    fn forward(&mut self, params: &[Param], rows: usize, x: Vec<f32>) -> Vec<f32> {
        let [weight, bias] = params else {
            unreachable!("weight and bias")
        };
        let mut y = matmul_transposed(rows, self.to, self.from, &x, &weight.value);
        for y in y.chunks_exact_mut(self.to) {
            add(y, &bias.value);
        }
        self.input = x;
        y
    }

    fn backward(&self, params: &mut [Param], rows: usize, dy: &[f32]) -> Vec<f32> {
        let [weight, bias] = params else {
            unreachable!("weight and bias")
        };
        let mut dx = vec![0.0; self.input.len()];
        product_backward(weight, rows, &self.input, dy, &mut dx);
        for dy in dy.chunks_exact(self.to) {
            add(&mut bias.grad, dy);
        }
        dx
    }
}

/// Backwards through `y = x weight^T`: adds to the gradients of the weight and of `x`.
pub(super) fn product_backward(
    weight: &mut Param,
    rows: usize,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
) {
    let (output, input) = (weight.shape[0], weight.shape[1]);
    // d(weight) += dy^T x
    gemm(
        true,
        [output, input, rows],
        Strided::columns(dy, output),
        RowMajor(x, input),
        RowMajor(&mut weight.grad, input),
    );
    // dx += dy weight
    gemm(
        true,
        [rows, input, output],
        Strided::rows(dy, output),
        RowMajor(&weight.value, input),
        RowMajor(dx, input),
    );
}
