//! A trained tensor with its gradient, and why saved ones are refused.

use std::ops::Range;

/// Tensors of a checkpoint that do not fit what they are loaded into, one variant per cause.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A tensor is absent.
    #[error("tensor {tensor} is missing")]
    Missing {
        /// Its name.
        tensor: String,
    },
    /// A tensor that has no place there.
    #[error("unexpected tensor {tensor}")]
    Unexpected {
        /// Its name.
        tensor: String,
    },
    /// A tensor of the wrong shape.
    #[error("tensor {tensor}: shape is {got:?}, expected {expected:?} (slowest dimension first)")]
    Shape {
        /// Its name.
        tensor: String,
        /// Slowest dimension first; 0 stands for any size.
        expected: Vec<usize>,
        /// Slowest dimension first.
        got: Vec<usize>,
    },
}

/// A trained tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Param {
    /// PyTorch's name in PEFT's encoders.
    pub(crate) name: String,
    /// PyTorch's order, slowest dimension first.
    pub(crate) shape: Vec<usize>,
    pub(crate) value: Vec<f32>,
    /// Of the loss, summed since [`Param::zero_grad`]; kept for frozen rows too.
    pub(crate) grad: Vec<f32>,
    /// The first so many rows (of the slowest dimension) keep their values: they take part in the computation, and neither
    /// the optimizer nor the norm of the gradient sees them. Cartridges (Eyuboglu et al. 2025, PEFT's CARTRIDGE) hold an
    /// attention sink still this way.
    pub(crate) frozen: usize,
}

impl Param {
    /// `value` has the shape `shape`, slowest dimension first; every row is trained.
    pub(crate) fn new(name: impl Into<String>, shape: &[usize], value: Vec<f32>) -> Self {
        assert_eq!(shape.iter().product::<usize>(), value.len(), "{shape:?}");
        Self {
            name: name.into(),
            shape: shape.to_vec(),
            grad: vec![0.0; value.len()],
            value,
            frozen: 0,
        }
    }

    /// The same with the first `rows` rows frozen.
    pub(crate) fn with_frozen(mut self, rows: usize) -> Self {
        assert!(rows <= self.shape[0], "{rows} of {}", self.shape[0]);
        self.frozen = rows;
        self
    }

    pub(crate) fn zero_grad(&mut self) {
        self.grad.fill(0.0);
    }

    /// Shape of the rows that move: what optimizers keep state for.
    pub(crate) fn trainable_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        shape[0] -= self.frozen;
        shape
    }

    /// Gradient of the rows that move.
    pub(crate) fn trainable_grad(&self) -> &[f32] {
        &self.grad[self.trainable_range()]
    }

    pub(crate) fn trainable_grad_mut(&mut self) -> &mut [f32] {
        let range = self.trainable_range();
        &mut self.grad[range]
    }

    /// Values and gradient of the rows that move.
    pub(crate) fn trainable_mut(&mut self) -> (&mut [f32], &[f32]) {
        let range = self.trainable_range();
        (&mut self.value[range.clone()], &self.grad[range])
    }

    fn trainable_range(&self) -> Range<usize> {
        let row: usize = self.shape[1..].iter().product();
        self.frozen * row..self.value.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frozen_rows_are_not_trainable() {
        let mut p = Param::new("w", &[3, 2], vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).with_frozen(1);
        p.grad.copy_from_slice(&[9.0, 9.0, 1.0, 2.0, 3.0, 4.0]);
        assert_eq!(p.value.len(), 6);
        assert_eq!(p.trainable_shape(), [2, 2]);
        assert_eq!(p.trainable_grad(), [1.0, 2.0, 3.0, 4.0]);
        let (value, grad) = p.trainable_mut();
        assert_eq!(value, [3.0, 4.0, 5.0, 6.0]);
        assert_eq!(grad, [1.0, 2.0, 3.0, 4.0]);
        p.zero_grad();
        assert_eq!(p.grad, [0.0; 6]);
    }

    #[test]
    fn all_rows_may_be_frozen() {
        let p = Param::new("b", &[2], vec![1.0, 2.0]).with_frozen(2);
        assert_eq!(p.trainable_shape(), [0]);
        assert!(p.trainable_grad().is_empty());
    }
}
