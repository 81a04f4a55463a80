//! Matrix products of the encoders.

use crate::kernels::{RowMajor, Strided, gemm};

/// The transpose, row-major `cols x rows`, of the row-major `rows x cols` matrix `a`.
pub(crate) fn transpose(rows: usize, cols: usize, a: &[f32]) -> Vec<f32> {
    assert_eq!(a.len(), rows * cols);
    let mut out = vec![0.0; a.len()];
    for (r, row) in a.chunks_exact(cols.max(1)).enumerate() {
        for (c, &value) in row.iter().enumerate() {
            out[c * rows + r] = value;
        }
    }
    out
}

/// `A B^T`, row-major `m x n`, of the row-major matrices A, `m x k`, and B, `n x k`. B is much the larger one here (rows of A
/// are virtual tokens, B is a weight), so it is A and the product that are transposed to suit [`gemm`].
pub(crate) fn matmul_transposed(m: usize, n: usize, k: usize, a: &[f32], b: &[f32]) -> Vec<f32> {
    let mut product = vec![0.0; n * m];
    let a = transpose(m, k, a);
    let c = RowMajor(&mut product[..], m);
    gemm(false, [n, m, k], Strided::rows(b, k), RowMajor(&a, m), c);
    transpose(n, m, &product)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposed_products() {
        let a = [1.0, 2.0, 3.0, 4.0];
        let b = [1.0, 0.0, 2.0, 1.0, -1.0, 1.0];
        assert_eq!(transpose(3, 2, &b), [1.0, 2.0, -1.0, 0.0, 1.0, 1.0]);
        let product = matmul_transposed(2, 3, 2, &a, &b);
        assert_eq!(product, [1.0, 4.0, 1.0, 3.0, 10.0, 1.0]);
    }
}
