//! Matrix products of the encoders.

/// Rows of B per pass over C: they stay in the cache while every row of C is updated from them.
const BLOCK: usize = 64;

/// `C = A B`, or `C += A B` if `accumulate`. C is `m x n`, row `i` at `c[i * ldc]`; element `(i, p)` of A, which is `m x k`, is
/// `a[i * rsa + p * csa]`; B is `k x n`, row `p` at `b[p * ldb]`.
#[expect(clippy::too_many_arguments, reason = "the signature of GEMM")]
pub(crate) fn gemm(
    accumulate: bool,
    m: usize,
    n: usize,
    k: usize,
    a: &[f32],
    rsa: usize,
    csa: usize,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
) {
    if !accumulate {
        for i in 0..m {
            c[i * ldc..][..n].fill(0.0);
        }
    }
    for block in (0..k).step_by(BLOCK) {
        for i in 0..m {
            let c = &mut c[i * ldc..][..n];
            for p in block..k.min(block + BLOCK) {
                let factor = a[i * rsa + p * csa];
                for (c, b) in c.iter_mut().zip(&b[p * ldb..][..n]) {
                    *c += factor * b;
                }
            }
        }
    }
}

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
    gemm(false, n, m, k, b, k, 1, &a, m, &mut product, m);
    transpose(n, m, &product)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products() {
        // Whole numbers: sums are exact in any order. k spans blocks, C and B are parts of wider matrices.
        let (m, n, k, ldb, ldc) = (3, 5, 2 * BLOCK + 7, 6, 8);
        let number = |i: usize| (i * 7 % 13) as f32 - 6.0;
        let a: Vec<f32> = (0..m * k).map(number).collect();
        let b: Vec<f32> = (0..k * ldb).map(|i| number(i + 3)).collect();
        let at = transpose(m, k, &a);
        for accumulate in [false, true] {
            let start = vec![100.0; m * ldc];
            let (mut c, mut from_transposed) = (start.clone(), start.clone());
            gemm(accumulate, m, n, k, &a, k, 1, &b, ldb, &mut c, ldc);
            let out = &mut from_transposed;
            gemm(accumulate, m, n, k, &at, 1, m, &b, ldb, out, ldc);
            let mut expected = start;
            for i in 0..m {
                for j in 0..n {
                    let sum: f32 = (0..k).map(|p| a[i * k + p] * b[p * ldb + j]).sum();
                    expected[i * ldc + j] = sum + if accumulate { 100.0 } else { 0.0 };
                }
            }
            assert_eq!(c, expected);
            assert_eq!(from_transposed, expected);
        }
    }

    #[test]
    fn transposed_products() {
        let a = [1.0, 2.0, 3.0, 4.0];
        let b = [1.0, 0.0, 2.0, 1.0, -1.0, 1.0];
        assert_eq!(transpose(3, 2, &b), [1.0, 2.0, -1.0, 0.0, 1.0, 1.0]);
        let product = matmul_transposed(2, 3, 2, &a, &b);
        assert_eq!(product, [1.0, 4.0, 1.0, 3.0, 10.0, 1.0]);
    }

    #[test]
    fn an_empty_sum_is_zero() {
        let mut c = [1.0, 2.0];
        gemm(false, 1, 2, 0, &[], 0, 1, &[], 2, &mut c, 2);
        assert_eq!(c, [0.0, 0.0]);
    }
}
