//! Single-threaded F32 matrix products.
//!
//! Every element of the result is one chain of fused multiply-adds over the reduction index, in increasing order. Where
//! the element lies in a register tile, and how the caller cuts the matrix into parts, has no influence on its bits.

#[cfg(target_feature = "avx512f")]
use avx512 as arch;
#[cfg(not(target_feature = "avx512f"))]
use portable as arch;

pub(crate) use arch::NR;

/// Rows of B that are copied at a time when its stride is unfortunate: with [`NR`] columns half of a first-level cache.
const PANEL_ROWS: usize = 256;

/// `a * b + c`, fused where that is one instruction: without hardware `mul_add` is a slow library call.
#[inline(always)]
pub(crate) fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
        a.mul_add(b, c)
    } else {
        a * b + c
    }
}

/// A view of a matrix that is read: element `(i, p)` at `data[i * row + p * col]`.
#[derive(Clone, Copy)]
pub(super) struct Strided {
    pub(super) data: *const f32,
    pub(super) row: usize,
    pub(super) col: usize,
}

/// C (`m x n`, row-major, leading dimension `ldc`) = or += A (`m x k`, element `(i, p)` at `a[i * rsa + p * csa]`) * B
/// (`k x n`, row-major, leading dimension `ldb`).
///
/// # Panics
/// If a matrix does not fit into its slice, or rows of B or C overlap.
#[allow(clippy::too_many_arguments)]
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
    if m == 0 || n == 0 {
        return;
    }
    assert!(
        n <= ldc && extent(m, ldc, n, 1) <= c.len(),
        "C is too small"
    );
    if k == 0 {
        if !accumulate {
            for row in c.chunks_mut(ldc).take(m) {
                row[..n].fill(0.0);
            }
        }
        return;
    }
    assert!(extent(m, rsa, k, csa) <= a.len(), "A is too small");
    assert!(
        n <= ldb && extent(k, ldb, n, 1) <= b.len(),
        "B is too small"
    );
    let a = Strided {
        data: a.as_ptr(),
        row: rsa,
        col: csa,
    };
    // SAFETY: the matrices lie within their slices (checked above), and C is borrowed exclusively.
    unsafe { gemm_raw(accumulate, m, n, k, a, b.as_ptr(), ldb, c.as_mut_ptr(), ldc) }
}

/// Elements from the first to the last of a strided `rows x cols` matrix, both inclusive.
fn extent(rows: usize, row: usize, cols: usize, col: usize) -> usize {
    let along = |count: usize, stride: usize| (count - 1).checked_mul(stride);
    let last = along(rows, row).and_then(|r| r.checked_add(along(cols, col)?));
    last.and_then(|last| last.checked_add(1))
        .expect("a matrix in memory")
}

/// [`gemm`] without checks.
///
/// # Safety
/// The matrices must be valid, C not overlap with A or B; `m`, `n`, `k` above 0.
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn gemm_raw(
    accumulate: bool,
    m: usize,
    n: usize,
    k: usize,
    a: Strided,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
) {
    // Rows a multiple of 1 KB apart share a few sets of the caches and evict each other before the next rows of A come.
    let copy = m > arch::MR && k > 16 && ldb.is_multiple_of(256);
    if !copy {
        for j in (0..n).step_by(NR) {
            let nr = NR.min(n - j);
            // SAFETY: columns j..j + nr of B and C.
            unsafe { panel(accumulate, m, nr, k, a, b.add(j), ldb, c.add(j), ldc) }
        }
        return;
    }
    let mut copied = [[0.0f32; NR]; PANEL_ROWS];
    for j in (0..n).step_by(NR) {
        let nr = NR.min(n - j);
        for p in (0..k).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(k - p);
            // SAFETY: columns j..j + nr of B and C, rows p..p + rows of B and columns of A.
            unsafe {
                for (q, row) in copied[..rows].iter_mut().enumerate() {
                    let from = b.add((p + q) * ldb + j);
                    if nr == NR {
                        *row = from.cast::<[f32; NR]>().read_unaligned();
                    } else {
                        std::ptr::copy_nonoverlapping(from, row.as_mut_ptr(), nr);
                    }
                }
                let a = Strided {
                    data: a.data.add(p * a.col),
                    ..a
                };
                let b = copied.as_ptr().cast();
                panel(accumulate || p > 0, m, nr, rows, a, b, NR, c.add(j), ldc);
            }
        }
    }
}

/// `nr <= NR` columns of a product.
///
/// # Safety
/// As [`gemm_raw`].
#[allow(clippy::too_many_arguments)]
pub(super) unsafe fn panel(
    accumulate: bool,
    m: usize,
    nr: usize,
    k: usize,
    a: Strided,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
) {
    // Tiles of almost equal height: a small last one would leave the multipliers waiting for its few chains.
    let tiles = m.div_ceil(arch::MR);
    for tile in 0..tiles {
        let (from, to) = (tile * m / tiles, (tile + 1) * m / tiles);
        // SAFETY: rows from..to of A and C.
        unsafe {
            let a = Strided {
                data: a.data.add(from * a.row),
                ..a
            };
            let c = c.add(from * ldc);
            arch::tile(accumulate, to - from, nr, k, a, b, ldb, c, ldc);
        }
    }
}

#[cfg(target_feature = "avx512f")]
mod avx512 {
    use super::Strided;
    use std::arch::x86_64::*;

    /// Height of a register tile: 24 of the 32 registers hold sums.
    pub(super) const MR: usize = 12;
    /// Width of a register tile.
    pub(crate) const NR: usize = 32;

    /// `mr <= MR` rows and `nr <= NR` columns of a product.
    ///
    /// # Safety
    /// As `gemm_raw`.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn tile(
        accumulate: bool,
        mr: usize,
        nr: usize,
        k: usize,
        a: Strided,
        b: *const f32,
        ldb: usize,
        c: *mut f32,
        ldc: usize,
    ) {
        macro_rules! tall {
            ($($m:literal)*) => {
                match (mr, nr > 16) {
                    $(
                        // SAFETY: the caller's promise.
                        ($m, false) => unsafe { fixed::<$m, 1>(accumulate, nr, k, a, b, ldb, c, ldc) },
                        // SAFETY: the caller's promise.
                        ($m, true) => unsafe { fixed::<$m, 2>(accumulate, nr, k, a, b, ldb, c, ldc) },
                    )*
                    _ => unreachable!("a tile of {mr} rows"),
                }
            };
        }
        tall!(1 2 3 4 5 6 7 8 9 10 11 12)
    }

    /// `M` rows and more than `16 * (V - 1)`, at most `16 * V` columns.
    #[allow(clippy::too_many_arguments)]
    unsafe fn fixed<const M: usize, const V: usize>(
        accumulate: bool,
        nr: usize,
        k: usize,
        a: Strided,
        b: *const f32,
        ldb: usize,
        c: *mut f32,
        ldc: usize,
    ) {
        let last: __mmask16 = u16::MAX >> (16 * V - nr);
        let mask = |v: usize| if v + 1 == V { last } else { u16::MAX };
        // SAFETY: masked loads and stores touch the tile's own elements only; pointers beyond the last row are computed
        // (wrapping) and not read.
        unsafe {
            let mut acc = [[_mm512_setzero_ps(); V]; M];
            if accumulate {
                for (i, row) in acc.iter_mut().enumerate() {
                    for (v, sum) in row.iter_mut().enumerate() {
                        *sum = _mm512_maskz_loadu_ps(mask(v), c.add(i * ldc + 16 * v));
                    }
                }
            }
            let (mut at, mut b) = (a.data, b);
            for _ in 0..k {
                let mut x = [_mm512_setzero_ps(); V];
                for (v, x) in x.iter_mut().enumerate() {
                    *x = _mm512_maskz_loadu_ps(mask(v), b.wrapping_add(16 * v));
                }
                for (i, row) in acc.iter_mut().enumerate() {
                    let y = _mm512_set1_ps(*at.add(i * a.row));
                    for (sum, x) in row.iter_mut().zip(x) {
                        *sum = _mm512_fmadd_ps(y, x, *sum);
                    }
                }
                at = at.wrapping_add(a.col);
                b = b.wrapping_add(ldb);
            }
            for (i, row) in acc.iter().enumerate() {
                for (v, sum) in row.iter().enumerate() {
                    _mm512_mask_storeu_ps(c.add(i * ldc + 16 * v), mask(v), *sum);
                }
            }
        }
    }
}

/// Fixed-size arrays that the compiler keeps in whatever vector registers the target has.
#[cfg(any(test, not(target_feature = "avx512f")))]
#[cfg_attr(target_feature = "avx512f", allow(dead_code))]
mod portable {
    use super::{Strided, mul_add};

    /// Height of a register tile: with [`NR`] columns 8 registers of AVX2, 16 of NEON.
    pub(super) const MR: usize = 4;
    /// Width of a register tile.
    pub(crate) const NR: usize = 16;

    /// `mr <= MR` rows and `nr <= NR` columns of a product.
    ///
    /// # Safety
    /// As `gemm_raw`.
    #[allow(clippy::too_many_arguments)]
    pub(super) unsafe fn tile(
        accumulate: bool,
        mr: usize,
        nr: usize,
        k: usize,
        a: Strided,
        b: *const f32,
        ldb: usize,
        c: *mut f32,
        ldc: usize,
    ) {
        macro_rules! tall {
            ($($m:literal)*) => {
                match (mr, nr == NR) {
                    $(
                        // SAFETY: the caller's promise.
                        ($m, true) => unsafe { fixed::<$m, NR>(accumulate, k, a, b, ldb, c, ldc) },
                        ($m, false) => for j in 0..nr {
                            // SAFETY: column j of B and C.
                            unsafe { fixed::<$m, 1>(accumulate, k, a, b.add(j), ldb, c.add(j), ldc) }
                        },
                    )*
                    _ => unreachable!("a tile of {mr} rows"),
                }
            };
        }
        tall!(1 2 3 4)
    }

    /// `M x N` elements.
    #[allow(clippy::too_many_arguments)]
    unsafe fn fixed<const M: usize, const N: usize>(
        accumulate: bool,
        k: usize,
        a: Strided,
        b: *const f32,
        ldb: usize,
        c: *mut f32,
        ldc: usize,
    ) {
        let mut acc = [[0.0f32; N]; M];
        if accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                // SAFETY: row i of the tile.
                *row = unsafe { c.add(i * ldc).cast::<[f32; N]>().read() };
            }
        }
        for p in 0..k {
            // SAFETY: row p of B.
            let x = unsafe { b.add(p * ldb).cast::<[f32; N]>().read() };
            for (i, row) in acc.iter_mut().enumerate() {
                // SAFETY: element (i, p) of A.
                let y = unsafe { *a.data.add(i * a.row + p * a.col) };
                for (sum, x) in row.iter_mut().zip(x) {
                    *sum = mul_add(y, x, *sum);
                }
            }
        }
        for (i, row) in acc.iter().enumerate() {
            // SAFETY: row i of the tile.
            unsafe { c.add(i * ldc).cast::<[f32; N]>().write(*row) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::values;
    use super::*;

    fn check(accumulate: bool, m: usize, n: usize, k: usize, transposed: bool, pad: usize) {
        let (rsa, csa) = if transposed {
            (1, m + pad)
        } else {
            (k + pad, 1)
        };
        let (ldb, ldc) = (n + pad, n + 2 * pad);
        let a = values(m * k + (m + k) * pad, 1);
        let b = values(k * ldb, 2);
        let before = values(m * ldc, 3);
        let mut c = before.clone();
        gemm(accumulate, m, n, k, &a, rsa, csa, &b, ldb, &mut c, ldc);
        for i in 0..m {
            for j in 0..ldc {
                let (got, old) = (c[i * ldc + j], before[i * ldc + j]);
                if j >= n {
                    assert_eq!(got, old, "gaps between rows are left alone");
                    continue;
                }
                let dot: f64 = (0..k)
                    .map(|p| f64::from(a[i * rsa + p * csa]) * f64::from(b[p * ldb + j]))
                    .sum();
                let want = dot + if accumulate { f64::from(old) } else { 0.0 };
                let err = (f64::from(got) - want).abs();
                let bound = 1e-6 * (k as f64 + 1.0).sqrt() + 1e-6;
                assert!(
                    err <= bound,
                    "{m} x {n} x {k} at {i}, {j}: {got} for {want}"
                );
            }
        }
    }

    #[test]
    fn gemm_equals_the_definition() {
        for m in [1, 2, 5, 11, 12, 13, 25, 32] {
            for n in [1, 7, 15, 16, 17, 31, 32, 33, 65] {
                for k in [0, 1, 3, 32] {
                    let odd = (m + n + k) % 2 == 1;
                    check(odd, m, n, k, false, 0);
                    check(!odd, m, n, k, true, 3);
                }
            }
        }
        // Copied panels, more than one of them.
        check(false, 14, 256, 300, false, 0);
        check(true, 14, 256, 300, true, 0);
    }

    #[test]
    fn bits_do_not_depend_on_blocking() {
        let (m, n, k) = (29, 256, 270);
        let (a, b) = (values(m * k, 4), values(k * n, 5));
        let mut whole = vec![0.0; m * n];
        gemm(false, m, n, k, &a, k, 1, &b, n, &mut whole, n);
        for (rows, cols, depth) in [(1, 256, 270), (13, 100, 270), (29, 256, 7), (5, 33, 64)] {
            let mut parts = vec![0.0; m * n];
            for i in (0..m).step_by(rows) {
                for j in (0..n).step_by(cols) {
                    for p in (0..k).step_by(depth) {
                        let size = (rows.min(m - i), cols.min(n - j), depth.min(k - p));
                        let (a, b) = (&a[i * k + p..], &b[p * n + j..]);
                        let c = &mut parts[i * n + j..];
                        gemm(p > 0, size.0, size.1, size.2, a, k, 1, b, n, c, n);
                    }
                }
            }
            assert!(
                whole
                    .iter()
                    .zip(&parts)
                    .all(|(x, y)| x.to_bits() == y.to_bits())
            );
        }
    }

    #[test]
    fn portable_tiles_give_the_same_bits() {
        let (k, a, b) = (37, values(4 * 37, 6), values(37 * 16, 7));
        let view = Strided {
            data: a.as_ptr(),
            row: k,
            col: 1,
        };
        for nr in [16, 5] {
            let mut want = vec![0.0; 4 * nr];
            gemm(false, 4, nr, k, &a, k, 1, &b, 16, &mut want, nr);
            let mut got = vec![0.0; 4 * nr];
            let c = got.as_mut_ptr();
            // SAFETY: the matrices have these sizes.
            unsafe { portable::tile(false, 4, nr, k, view, b.as_ptr(), 16, c, nr) };
            assert_eq!(got, want);
        }
    }

    #[test]
    #[should_panic(expected = "A is too small")]
    fn a_must_fit() {
        gemm(
            false,
            2,
            1,
            2,
            &[0.0; 3],
            2,
            1,
            &[0.0; 2],
            1,
            &mut [0.0; 2],
            1,
        );
    }
}
