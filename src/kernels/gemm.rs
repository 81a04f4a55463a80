//! Single-threaded F32 matrix products.
//!
//! Every element of the result is one chain of fused multiply-adds over the reduction index, in increasing order. Where
//! the element lies in a register tile, and how the caller cuts the matrix into parts, has no influence on its bits.

/// Columns of the widest register tile: panels of B have so many.
pub(crate) const NR: usize = 32;

/// Rows of B that are copied at a time when its stride is unfortunate: with the columns of a register tile half of a first-level cache or a whole one.
const PANEL_ROWS: usize = 256;

/// `a * b + c`, `FUSED` where that is one instruction: without it `mul_add` is a slow library call.
#[inline(always)]
pub(crate) fn mul_add<const FUSED: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// A matrix that is read: element `(i, p)` at `values[i * row + p * col]`.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    values: &'a [f32],
    row: usize,
    col: usize,
}

impl<'a> Strided<'a> {
    /// Rows that begin `ld` values apart.
    pub(crate) fn rows(values: &'a [f32], ld: usize) -> Self {
        let (row, col) = (ld, 1);
        Self { values, row, col }
    }

    /// Columns that begin `ld` values apart: the transpose of [`Strided::rows`].
    pub(crate) fn columns(values: &'a [f32], ld: usize) -> Self {
        let (row, col) = (1, ld);
        Self { values, row, col }
    }
}

/// A matrix whose rows begin so many values apart.
pub(crate) struct RowMajor<V>(pub(crate) V, pub(crate) usize);

/// `C = A B`, or `C += A B` to `accumulate`, with A `m x k`, B `k x n` and C `m x n`.
///
/// # Panics
/// If a matrix does not fit into its slice, or rows of B or C overlap.
pub(crate) fn gemm(
    accumulate: bool,
    size: [usize; 3],
    a: Strided<'_>,
    b: RowMajor<&[f32]>,
    c: RowMajor<&mut [f32]>,
) {
    gemm_by(Tiles::fastest(), accumulate, size, a, b, c);
}

/// [`gemm`] with tiles of a kind that the CPU has.
fn gemm_by(
    tiles: Tiles,
    accumulate: bool,
    [m, n, k]: [usize; 3],
    a: Strided<'_>,
    b: RowMajor<&[f32]>,
    c: RowMajor<&mut [f32]>,
) {
    let (RowMajor(b, ldb), RowMajor(c, ldc)) = (b, c);
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
    assert!(
        extent(m, a.row, k, a.col) <= a.values.len(),
        "A is too small"
    );
    assert!(
        n <= ldb && extent(k, ldb, n, 1) <= b.len(),
        "B is too small"
    );
    let x = Operands {
        a: a.values.as_ptr(),
        a_row: a.row,
        a_col: a.col,
        b: b.as_ptr(),
        ldb,
        c: c.as_mut_ptr(),
        ldc,
    };
    // SAFETY: the matrices lie within their slices (checked above), and C is borrowed exclusively.
    unsafe { tiles.product(accumulate, [m, n, k], x) }
}

/// The matrices of a product: element `(i, p)` of A at `a[i * a_row + p * a_col]`, rows of B and C `ldb` and `ldc` values apart.
#[derive(Clone, Copy)]
pub(super) struct Operands {
    pub(super) a: *const f32,
    pub(super) a_row: usize,
    pub(super) a_col: usize,
    pub(super) b: *const f32,
    pub(super) ldb: usize,
    pub(super) c: *mut f32,
    pub(super) ldc: usize,
}

impl Operands {
    /// The product from row `i` on.
    ///
    /// # Safety
    /// A and C must have that row.
    unsafe fn at_row(self, i: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                a: self.a.add(i * self.a_row),
                c: self.c.add(i * self.ldc),
                ..self
            }
        }
    }

    /// The product from column `j` on.
    ///
    /// # Safety
    /// B and C must have that column.
    unsafe fn at_column(self, j: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            Self {
                b: self.b.add(j),
                c: self.c.add(j),
                ..self
            }
        }
    }
}

/// Elements from the first to the last of a strided `rows x cols` matrix, both inclusive.
fn extent(rows: usize, row: usize, cols: usize, col: usize) -> usize {
    let along = |count: usize, stride: usize| (count - 1).checked_mul(stride);
    let last = along(rows, row).and_then(|r| r.checked_add(along(cols, col)?));
    last.and_then(|last| last.checked_add(1))
        .expect("a matrix in memory")
}

/// A kind of register tile.
#[derive(Clone, Copy)]
struct Tiles {
    /// Rows.
    height: usize,
    /// Columns, at most [`NR`].
    width: usize,
    /// Computes a product of at most so many rows and columns, `(accumulate, [m, n, k], matrices)`. These must be valid, C not overlap with A or B, `m`, `n`
    /// and `k` above 0, and the CPU have the instructions.
    compute: unsafe fn(bool, [usize; 3], Operands),
}

impl Tiles {
    /// The fastest ones of this CPU.
    fn fastest() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            use super::level::{CpuLevel, has};
            if has(CpuLevel::Avx512) {
                return avx512::TILES;
            }
            if has(CpuLevel::Avx2) {
                return loops::AVX2;
            }
        }
        loops::BASELINE
    }

    /// At most [`Tiles::width`] columns of a product.
    ///
    /// # Safety
    /// As `compute`.
    unsafe fn columns(self, accumulate: bool, [m, n, k]: [usize; 3], x: Operands) {
        // Tiles of almost equal height: a small last one would leave the multipliers waiting for its few chains.
        let tiles = m.div_ceil(self.height);
        for tile in 0..tiles {
            let (from, to) = (tile * m / tiles, (tile + 1) * m / tiles);
            // SAFETY: rows from..to of A and C.
            unsafe { (self.compute)(accumulate, [to - from, n, k], x.at_row(from)) }
        }
    }

    /// Any columns of a product.
    ///
    /// # Safety
    /// As `compute`, for any number of rows and columns.
    unsafe fn any_columns(self, accumulate: bool, [m, n, k]: [usize; 3], x: Operands) {
        for j in (0..n).step_by(self.width) {
            let size = [m, self.width.min(n - j), k];
            // SAFETY: some columns of B and C.
            unsafe { self.columns(accumulate, size, x.at_column(j)) }
        }
    }

    /// [`gemm`] without checks.
    ///
    /// # Safety
    /// As `compute`, for any number of rows and columns.
    unsafe fn product(self, accumulate: bool, [m, n, k]: [usize; 3], x: Operands) {
        // Rows a multiple of 1 KB apart share a few sets of the caches and evict each other before the next rows of A come.
        let copy = m > self.height && k > 16 && x.ldb.is_multiple_of(256);
        if !copy {
            // SAFETY: the caller's promise.
            return unsafe { self.any_columns(accumulate, [m, n, k], x) };
        }
        let mut copied = [0.0f32; NR * PANEL_ROWS];
        for j in (0..n).step_by(self.width) {
            let nr = self.width.min(n - j);
            // SAFETY: columns j..j + nr of B and C.
            let x = unsafe { x.at_column(j) };
            for p in (0..k).step_by(PANEL_ROWS) {
                let rows = PANEL_ROWS.min(k - p);
                for (q, row) in copied.chunks_exact_mut(self.width).take(rows).enumerate() {
                    // SAFETY: `nr` columns of row p + q of B.
                    unsafe {
                        let from = x.b.add((p + q) * x.ldb);
                        std::ptr::copy_nonoverlapping(from, row.as_mut_ptr(), nr);
                    }
                }
                let x = Operands {
                    // SAFETY: column p of A.
                    a: unsafe { x.a.add(p * x.a_col) },
                    b: copied.as_ptr(),
                    ldb: self.width,
                    ..x
                };
                // SAFETY: rows p..p + rows of B and columns of A.
                unsafe { self.columns(accumulate || p > 0, [m, nr, rows], x) }
            }
        }
    }
}

/// `C = A B`, or `C += A B` to `accumulate`: A `m x k`, B `k x n`, C `m x n`. B is read as it lies: it should be a panel of few columns.
///
/// # Safety
/// The matrices must be valid, C not overlap with A or B; `m`, `n`, `k` above 0.
pub(super) unsafe fn panel(accumulate: bool, size: [usize; 3], x: Operands) {
    // SAFETY: the caller's promise.
    unsafe { Tiles::fastest().any_columns(accumulate, size, x) }
}

/// Calls a function that is compiled for each height of a tile.
macro_rules! by_height {
    ($m:expr, $($n:literal)*, |$height:ident| $call:expr) => {
        match $m {
            $($n => {
                const $height: usize = $n;
                // SAFETY: the caller's promise.
                unsafe { $call }
            })*
            m => unreachable!("a tile of {m} rows"),
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use super::{NR, Operands, Tiles};
    use std::arch::x86_64::*;

    /// 24 of the 32 registers hold sums.
    pub(super) const TILES: Tiles = Tiles {
        height: 12,
        width: NR,
        compute,
    };

    unsafe fn compute(accumulate: bool, [m, n, k]: [usize; 3], x: Operands) {
        by_height!(m, 1 2 3 4 5 6 7 8 9 10 11 12, |M| match n > 16 {
            false => fixed::<M, 1>(accumulate, n, k, x),
            true => fixed::<M, 2>(accumulate, n, k, x),
        });
    }

    /// `M` rows and more than `16 * (V - 1)`, at most `16 * V` columns.
    ///
    /// # Safety
    /// As `Tiles::compute`.
    #[target_feature(enable = "avx512f")]
    unsafe fn fixed<const M: usize, const V: usize>(
        accumulate: bool,
        nr: usize,
        k: usize,
        x: Operands,
    ) {
        let Operands { ldb, c, ldc, .. } = x;
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
            let (mut a, mut b) = (x.a, x.b);
            for _ in 0..k {
                let mut row_of_b = [_mm512_setzero_ps(); V];
                for (v, part) in row_of_b.iter_mut().enumerate() {
                    *part = _mm512_maskz_loadu_ps(mask(v), b.wrapping_add(16 * v));
                }
                for (i, row) in acc.iter_mut().enumerate() {
                    let y = _mm512_set1_ps(*a.add(i * x.a_row));
                    for (sum, part) in row.iter_mut().zip(row_of_b) {
                        *sum = _mm512_fmadd_ps(y, part, *sum);
                    }
                }
                a = a.wrapping_add(x.a_col);
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

/// Fixed-size arrays that the compiler keeps in vector registers, whatever they are.
mod loops {
    use super::{Operands, Tiles, mul_add};
    use crate::kernels::level::FUSED;

    /// Columns of a tile.
    const WIDTH: usize = 16;

    /// 16 of 32 registers of NEON hold sums.
    pub(super) const BASELINE: Tiles = Tiles {
        height: 4,
        width: WIDTH,
        compute: baseline,
    };

    unsafe fn baseline(accumulate: bool, [m, n, k]: [usize; 3], x: Operands) {
        by_height!(m, 1 2 3 4, |M| any_width::<M, FUSED>(accumulate, n, k, x));
    }

    /// 12 of the 16 registers hold sums.
    #[cfg(target_arch = "x86_64")]
    pub(super) const AVX2: Tiles = Tiles {
        height: 6,
        width: WIDTH,
        compute: avx2,
    };

    #[cfg(target_arch = "x86_64")]
    unsafe fn avx2(accumulate: bool, [m, n, k]: [usize; 3], x: Operands) {
        #[target_feature(enable = "avx2,fma")]
        unsafe fn compute<const M: usize>(accumulate: bool, n: usize, k: usize, x: Operands) {
            // SAFETY: the caller's promise.
            unsafe { any_width::<M, true>(accumulate, n, k, x) }
        }
        by_height!(m, 1 2 3 4 5 6, |M| compute::<M>(accumulate, n, k, x));
    }

    /// `M` rows and at most [`WIDTH`] columns.
    ///
    /// # Safety
    /// As `Tiles::compute`.
    #[inline(always)]
    unsafe fn any_width<const M: usize, const FUSED: bool>(
        accumulate: bool,
        n: usize,
        k: usize,
        x: Operands,
    ) {
        // SAFETY: the caller's promise; column j of B and C.
        unsafe {
            if n == WIDTH {
                return fixed::<M, WIDTH, FUSED>(accumulate, k, x);
            }
            for j in 0..n {
                fixed::<M, 1, FUSED>(accumulate, k, x.at_column(j));
            }
        }
    }

    /// `M x N` elements.
    ///
    /// # Safety
    /// As `Tiles::compute`.
    #[inline(always)]
    unsafe fn fixed<const M: usize, const N: usize, const FUSED: bool>(
        accumulate: bool,
        k: usize,
        x: Operands,
    ) {
        let Operands { ldb, c, ldc, .. } = x;
        let mut acc = [[0.0f32; N]; M];
        if accumulate {
            for (i, row) in acc.iter_mut().enumerate() {
                // SAFETY: row i of the tile.
                *row = unsafe { c.add(i * ldc).cast::<[f32; N]>().read() };
            }
        }
        for p in 0..k {
            // SAFETY: row p of B.
            let row_of_b = unsafe { x.b.add(p * ldb).cast::<[f32; N]>().read() };
            for (i, row) in acc.iter_mut().enumerate() {
                // SAFETY: element (i, p) of A.
                let y = unsafe { *x.a.add(i * x.a_row + p * x.a_col) };
                for (sum, part) in row.iter_mut().zip(row_of_b) {
                    *sum = mul_add::<FUSED>(y, part, *sum);
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
    #[cfg(target_arch = "x86_64")]
    use crate::kernels::level::{CpuLevel, has};

    /// Kinds of tiles that this CPU has, and whether their multiply-adds are fused.
    fn kinds() -> Vec<(Tiles, bool)> {
        #[cfg(target_arch = "x86_64")]
        let higher = [
            (CpuLevel::Avx2, loops::AVX2),
            (CpuLevel::Avx512, avx512::TILES),
        ]
        .into_iter()
        .filter_map(|(level, tiles)| has(level).then_some((tiles, true)));
        #[cfg(not(target_arch = "x86_64"))]
        let higher = std::iter::empty();
        let lowest = (loops::BASELINE, crate::kernels::level::FUSED);
        std::iter::once(lowest).chain(higher).collect()
    }

    fn check(accumulate: bool, m: usize, n: usize, k: usize, transposed: bool, pad: usize) {
        for (tiles, _) in kinds() {
            check_by(tiles, accumulate, [m, n, k], transposed, pad);
        }
    }

    fn check_by(
        tiles: Tiles,
        accumulate: bool,
        [m, n, k]: [usize; 3],
        transposed: bool,
        pad: usize,
    ) {
        let (ldb, ldc) = (n + pad, n + 2 * pad);
        let a = values(m * k + (m + k) * pad, 1);
        let view = if transposed {
            Strided::columns(&a, m + pad)
        } else {
            Strided::rows(&a, k + pad)
        };
        let b = values(k * ldb, 2);
        let before = values(m * ldc, 3);
        let mut c = before.clone();
        let product = RowMajor(&mut c[..], ldc);
        gemm_by(
            tiles,
            accumulate,
            [m, n, k],
            view,
            RowMajor(&b, ldb),
            product,
        );
        for i in 0..m {
            for j in 0..ldc {
                let (got, old) = (c[i * ldc + j], before[i * ldc + j]);
                if j >= n {
                    assert_eq!(got, old, "gaps between rows are left alone");
                    continue;
                }
                let dot: f64 = (0..k)
                    .map(|p| f64::from(a[i * view.row + p * view.col]) * f64::from(b[p * ldb + j]))
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
        let view = Strided::rows(&a, k);
        let product = RowMajor(&mut whole[..], n);
        gemm(false, [m, n, k], view, RowMajor(&b, n), product);
        for (rows, cols, depth) in [(1, 256, 270), (13, 100, 270), (29, 256, 7), (5, 33, 64)] {
            let mut parts = vec![0.0; m * n];
            for i in (0..m).step_by(rows) {
                for j in (0..n).step_by(cols) {
                    for p in (0..k).step_by(depth) {
                        let size = [rows.min(m - i), cols.min(n - j), depth.min(k - p)];
                        let a = Strided::rows(&a[i * k + p..], k);
                        let b = RowMajor(&b[p * n + j..], n);
                        gemm(p > 0, size, a, b, RowMajor(&mut parts[i * n + j..], n));
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
    fn tiles_of_all_kinds_give_the_same_bits() {
        let fused: Vec<_> = kinds().into_iter().filter(|kind| kind.1).collect();
        if fused.len() < 2 {
            ggraft_testkit::skipped("products of F32 at several levels (needs AVX2)");
        }
        let (m, k, ldb) = (13, 37, 40);
        let (a, b) = (values(m * k, 6), values(k * ldb, 7));
        for n in [40, 32, 16, 5] {
            let products = fused.iter().map(|&(tiles, _)| {
                let mut c = vec![0.0; m * n];
                let (view, product) = (Strided::rows(&a, k), RowMajor(&mut c[..], n));
                gemm_by(tiles, false, [m, n, k], view, RowMajor(&b, ldb), product);
                c
            });
            let products: Vec<_> = products.collect();
            assert!(products.iter().all(|c| *c == products[0]), "{n} columns");
        }
    }

    #[test]
    #[should_panic(expected = "A is too small")]
    fn a_must_fit() {
        let (a, b, mut c) = ([0.0; 3], [0.0; 2], [0.0; 2]);
        let view = Strided::rows(&a, 2);
        gemm(false, [2, 1, 2], view, RowMajor(&b, 1), RowMajor(&mut c, 1));
    }
}
