//! Rotation by Walsh-Hadamard matrices, which spreads outliers over a whole run of values before it is quantized.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output};
use crate::ggml::tensor::Tensor;

/// Rotates each run of `n` values by the orthonormal Walsh-Hadamard matrix of size n, a power of two, in place. The matrix
/// is symmetric and its own inverse, so scalar products of two rotated runs are those of the runs themselves.
///
/// # Panics
/// If `n` is no power of two or `values` holds no whole number of runs.
pub(crate) fn rotate(values: &mut [f32], n: usize) {
    assert!(n.is_power_of_two() && values.len().is_multiple_of(n));
    let scale = 1.0 / (n as f32).sqrt();
    values.iter_mut().for_each(|v| *v *= scale);
    // H(2m) = [H(m) H(m); H(m) -H(m)]: log2(n) passes of sums and differences (the fast Walsh-Hadamard transform).
    let mut half = 1;
    while half < n {
        for pair in values.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// Each row with its runs of `n` values rotated. Operand: rows, possibly with gaps between them.
struct Rotate {
    n: usize,
}

impl Kernel for Rotate {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let x = op.operand(0);
        let [width, rows, planes, _] = x.ne;
        let (first, dst) = out.share(rows * planes);
        for (i, row) in (first..).zip(dst.chunks_exact_mut(width)) {
            row.copy_from_slice(x.nth_row(i));
            rotate(row, self.n);
        }
    }
}

impl Context {
    /// x `ne = [W, A, B]` with each run of `n` values rotated ([`rotate`]) -> the same shape, contiguous. W is a multiple
    /// of `n`, a power of two.
    pub(crate) fn rotate_runs(&self, x: &Tensor, n: usize) -> Tensor {
        self.custom(Rotate { n }, &[x], x.ne())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition: the sign is the parity of the bits that row and column have in common.
    fn naive(x: &[f32]) -> Vec<f32> {
        let n = x.len();
        let sign = |i: usize, j: usize| match (i & j).count_ones() % 2 {
            0 => 1.0,
            _ => -1.0,
        };
        (0..n)
            .map(|i| (0..n).map(|j| sign(i, j) * x[j]).sum::<f32>() / (n as f32).sqrt())
            .collect()
    }

    #[test]
    fn the_fast_transform_equals_the_matrix_and_is_its_own_inverse() {
        for n in [1, 2, 64, 256] {
            let x: Vec<f32> = (0..3 * n).map(|i| (i * i % 23) as f32 - 11.0).collect();
            let mut y = x.clone();
            rotate(&mut y, n);
            for (run, got) in x.chunks(n).zip(y.chunks(n)) {
                for (want, got) in naive(run).iter().zip(got) {
                    assert!((want - got).abs() < 1e-4, "{n}: {want} {got}");
                }
            }
            rotate(&mut y, n);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-4), "{n}");
        }
    }
}
