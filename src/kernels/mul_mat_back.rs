//! The backward pass of a product with a frozen weight matrix.

use super::Line;
use super::dequant::{self, RowToF32, Tile};
use super::gemm::{self, NR};
use super::level::{self, CpuLevel, has};
use crate::file::types::GgmlType;
use std::cell::RefCell;
use std::ops::Range;

/// What weights and gradients are rounded to before they are multiplied. Sums are F32 in both cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// Nothing is rounded.
    F32,
    /// 8 bits of significand. Products of two are exact in F32.
    Bf16,
}

impl Rounding {
    /// BF16 where the CPU multiplies it several times faster than F32 and the weights carry no more precision anyway.
    pub(crate) fn of(ty: GgmlType) -> Self {
        // Dot products of BF16 are twice as fast as F32 on Zen 4, and take half as long again on Emerald Rapids, where only tiles are fast.
        let fast = has(CpuLevel::Amx) || has(CpuLevel::Avx512Bf16) && !level::is_intel();
        match fast && Self::may_be_bf16(ty) {
            true => Self::Bf16,
            false => Self::F32,
        }
    }

    /// BF16 itself, and quantized types, whose own error is at least as large. F32 and F16 weights are exact.
    fn may_be_bf16(ty: GgmlType) -> bool {
        ty.is_quantized() || ty == GgmlType::BF16
    }
}

/// Rows of dY that are converted at a time. Weights are dequantized again for the next ones.
const T_CHUNK: usize = 512;
/// Columns of W that are dequantized at a time: a superblock.
const K_TILE: usize = dequant::MAX_COLUMNS;
/// Rows of W that are dequantized at a time, 4-byte words of them in a panel of [`NR`] columns: BF16 values go in pairs.
const N_WORDS: usize = 256;
/// Words between rows of converted dY. Not a power of two: equal columns of different rows must not share a set of the
/// cache.
const A_STRIDE: usize = N_WORDS + 16;
/// Words between panels of dequantized W.
const PANEL: usize = N_WORDS * NR + 16;

/// What a thread keeps between calls.
struct Scratch {
    /// Converted dY: `T_CHUNK` rows of `A_STRIDE` words.
    dy: Vec<Line<u32>>,
    /// Dequantized W: `K_TILE / NR` panels.
    w: Vec<Line<u32>>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { dy: Vec::new(), w: Vec::new() }) };
}

impl Scratch {
    /// Room for `t` converted rows, and for a tile of weights.
    fn words(&mut self, t: usize) -> (*mut u32, *mut u32) {
        let room = |lines: &mut Vec<Line<u32>>, words: usize| {
            if lines.len() < words / 16 {
                lines.resize(words / 16, Line([0; 16]));
            }
            lines.as_mut_ptr().cast()
        };
        let (t, panels) = (T_CHUNK.min(t), K_TILE.div_ceil(NR));
        (
            room(&mut self.dy, t * A_STRIDE),
            room(&mut self.w, panels * PANEL),
        )
    }
}

/// The gradient of a product's input, `dX = W^T dY`: `dX[k, t] = sum_n W[n][k] * dY[n, t]`.
pub(crate) struct MulMatBack {
    /// The type of W.
    pub(crate) ty: GgmlType,
    /// For types that are not unpacked here.
    pub(crate) to_f32: RowToF32,
    /// W, `ne = [k, n]`.
    pub(crate) w: *const u8,
    /// From one row of W to the next.
    pub(crate) row_bytes: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    /// dY, `ne = [n, t]`.
    pub(crate) dy: *const f32,
    /// Values from one row of dY to the next.
    pub(crate) dy_stride: usize,
    /// dX, `ne = [k, t]`.
    pub(crate) dx: *mut f32,
    /// Values from one row of dX to the next.
    pub(crate) dx_stride: usize,
    pub(crate) t: usize,
}

impl MulMatBack {
    /// Parts of a product with a matrix of `k` columns that do not repeat much of each other's work: each reads all of dY, and whole blocks of W.
    pub(crate) fn pieces(k: usize) -> usize {
        k / (2 * K_TILE)
    }

    /// Computes part `ith` of `nth`. Parts are ranges of columns, so no part waits for another. Values do not depend on `nth`,
    /// nor those of a row on `t`.
    ///
    /// # Safety
    /// The matrices must be valid and dX not overlap with the others; all `nth` parts together write all of dX, disjointly.
    pub(crate) unsafe fn part(&self, ith: usize, nth: usize) {
        // SAFETY: the caller's promise.
        unsafe { self.part_rounded(Rounding::of(self.ty), ith, nth) }
    }

    /// # Safety
    /// As [`MulMatBack::part`].
    unsafe fn part_rounded(&self, rounding: Rounding, ith: usize, nth: usize) {
        // Parts end at panels, not at blocks: a block on the border is dequantized by both neighbours, none waits idle.
        let panels = self.k.div_ceil(NR);
        let (begin, end) = (panels * ith / nth * NR, panels * (ith + 1) / nth * NR);
        let columns = begin..end.min(self.k);
        if columns.is_empty() {
            return;
        }
        let n_block = match rounding {
            Rounding::F32 => N_WORDS,
            Rounding::Bf16 => 2 * N_WORDS,
        };
        SCRATCH.with_borrow_mut(|scratch| {
            let (a, b) = scratch.words(self.t);
            for t0 in (0..self.t).step_by(T_CHUNK) {
                let rows = t0..self.t.min(t0 + T_CHUNK);
                if self.n == 0 {
                    for t in rows.clone() {
                        // SAFETY: our columns of row t of dX.
                        unsafe {
                            let row = self.dx.add(t * self.dx_stride + begin);
                            row.write_bytes(0, columns.len());
                        }
                    }
                }
                for n0 in (0..self.n).step_by(n_block) {
                    let depth = n0..self.n.min(n0 + n_block);
                    // SAFETY: at most as many rows and columns as the scratch holds, of matrices that are valid.
                    unsafe {
                        self.convert(rounding, &rows, &depth, a);
                        self.multiply(rounding, &rows, &depth, &columns, a, b);
                    }
                }
            }
        });
    }

    /// Writes rows `rows` and columns `depth` of dY to `a`, as F32 or as pairs of BF16.
    ///
    /// # Safety
    /// `a` must hold the rows, [`A_STRIDE`] words apart.
    unsafe fn convert(
        &self,
        rounding: Rounding,
        rows: &Range<usize>,
        depth: &Range<usize>,
        a: *mut u32,
    ) {
        for (i, t) in rows.clone().enumerate() {
            // SAFETY: row t of dY, row i of the scratch.
            unsafe {
                let from = self.dy.add(t * self.dy_stride + depth.start);
                let to = a.add(i * A_STRIDE);
                match rounding {
                    Rounding::F32 => std::ptr::copy_nonoverlapping(from, to.cast(), depth.len()),
                    Rounding::Bf16 => bf16::convert_row(from, depth.len(), to),
                }
            }
        }
    }

    /// Sets columns `columns` of rows `rows` of dX to the part of the sum that lies in rows `depth` of W, or adds it to what
    /// the parts before gave.
    ///
    /// # Safety
    /// `a` must hold converted dY, `b` have room for a tile of W.
    unsafe fn multiply(
        &self,
        rounding: Rounding,
        rows: &Range<usize>,
        depth: &Range<usize>,
        columns: &Range<usize>,
        a: *const u32,
        b: *mut u32,
    ) {
        let accumulate = depth.start > 0;
        let (m, n) = (rows.len(), depth.len());
        // Whole blocks around the columns.
        let align = NR.max(self.ty.block_size() as usize);
        let first = columns.start / align * align;
        let last = self.k.min(columns.end.next_multiple_of(align));
        for k0 in (first..last).step_by(K_TILE) {
            let k = K_TILE.min(last - k0);
            let tile = Tile {
                ty: self.ty,
                to_f32: self.to_f32,
                // SAFETY: a row of W.
                rows: unsafe { self.w.add(depth.start * self.row_bytes) },
                row_bytes: self.row_bytes,
                n,
                k0,
                k,
            };
            // SAFETY: the tile lies in W; the scratch holds its panels.
            unsafe {
                match rounding {
                    Rounding::F32 => dequant::to_f32(&tile, b.cast(), PANEL),
                    Rounding::Bf16 => dequant::to_bf16_pairs(&tile, b, PANEL),
                }
            }
            for j in (k0.max(columns.start)..columns.end.min(k0 + k)).step_by(NR) {
                let nr = NR.min(columns.end - j);
                // SAFETY: columns j..j + nr of dX, the same of the tile.
                unsafe {
                    let b = b.add((j - k0) / NR * PANEL);
                    let (c, ldc) = (self.dx.add(rows.start * self.dx_stride + j), self.dx_stride);
                    match rounding {
                        Rounding::F32 => {
                            let x = gemm::Operands {
                                a: a.cast(),
                                a_row: A_STRIDE,
                                a_col: 1,
                                b: b.cast(),
                                ldb: NR,
                                c,
                                ldc,
                            };
                            gemm::panel(accumulate, [m, nr, n], x);
                        }
                        Rounding::Bf16 => {
                            bf16::panel(accumulate, [m, nr, n.div_ceil(2)], a, b, (c, ldc));
                        }
                    }
                }
            }
        }
    }
}

/// Rounds values to pairs of BF16. An odd last one gets a zero as its partner.
///
/// # Panics
/// If the sizes do not fit, or the CPU has no dot products of BF16.
pub(super) fn round_to_bf16(from: &[f32], to: &mut [f32]) {
    assert!(has(CpuLevel::Avx512Bf16) && to.len() == from.len().div_ceil(2));
    // SAFETY: sizes and instructions as asserted.
    unsafe { bf16::convert_row(from.as_ptr(), from.len(), to.as_mut_ptr().cast()) };
}

#[cfg(target_arch = "x86_64")]
mod bf16 {
    use super::{A_STRIDE, CpuLevel, NR, has};
    use crate::kernels::amx;
    use std::arch::x86_64::*;

    /// Height of a register tile: 28 of the 32 registers hold sums.
    const MR: usize = 14;

    /// Rounds `n` values to BF16. An odd last one gets a zero as its partner.
    ///
    /// # Safety
    /// `n` values to read, as many rounded up to even to write; [`CpuLevel::Avx512Bf16`](super::CpuLevel).
    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn convert_row(from: *const f32, n: usize, to: *mut u32) {
        for j in (0..n).step_by(32) {
            let left = (n - j).min(32);
            let values = u32::MAX >> (32 - left);
            let words = u16::MAX >> (16 - left.div_ceil(2));
            // SAFETY: masked loads and stores touch what is left only.
            unsafe {
                let low = _mm512_maskz_loadu_ps(values as u16, from.wrapping_add(j));
                let high = _mm512_maskz_loadu_ps((values >> 16) as u16, from.wrapping_add(j + 16));
                let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low));
                _mm512_mask_storeu_epi32(to.wrapping_add(j / 2).cast(), words, both);
            }
        }
    }

    /// `nr <= NR` columns of a product: A is `m` rows of [`A_STRIDE`] words, B `pairs` rows of [`NR`] words.
    ///
    /// # Safety
    /// The matrices must be valid, and the CPU have the level [`CpuLevel::Avx512Bf16`](super::CpuLevel).
    pub(super) unsafe fn panel(
        accumulate: bool,
        [m, nr, pairs]: [usize; 3],
        a: *const u32,
        b: *const u32,
        (c, ldc): (*mut f32, usize),
    ) {
        if has(CpuLevel::Amx) {
            for i in (0..m).step_by(amx::BLOCK) {
                // SAFETY: some rows of A and C.
                unsafe {
                    let x = amx::Operands {
                        a: a.add(i * A_STRIDE),
                        a_bytes: 4 * A_STRIDE,
                        b,
                        c: c.add(i * ldc),
                        c_bytes: 4 * ldc,
                    };
                    let size = [amx::BLOCK.min(m - i), nr, pairs];
                    amx::block(accumulate, size, x);
                }
            }
            return;
        }
        macro_rules! tall {
            ($rows:expr, $a:expr, $c:expr; $($m:literal)*) => {
                match $rows {
                    $(
                        // SAFETY: the caller's promise.
                        $m => unsafe { tile::<$m>(accumulate, [nr, pairs], $a, b, ($c, ldc)) },
                    )*
                    rows => unreachable!("a tile of {rows} rows"),
                }
            };
        }
        let tiles = m.div_ceil(MR);
        for i in 0..tiles {
            let (from, to) = (i * m / tiles, (i + 1) * m / tiles);
            // SAFETY: row `from` of A and C.
            let (a, c) = unsafe { (a.add(from * A_STRIDE), c.add(from * ldc)) };
            tall!(to - from, a, c; 1 2 3 4 5 6 7 8 9 10 11 12 13 14)
        }
    }

    /// `M` rows. Sums of one block of the reduction are added to C at the end.
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn tile<const M: usize>(
        accumulate: bool,
        [nr, pairs]: [usize; 2],
        a: *const u32,
        b: *const u32,
        (c, ldc): (*mut f32, usize),
    ) {
        let columns = u32::MAX >> (NR - nr);
        let masks = [columns as u16, (columns >> 16) as u16];
        // SAFETY: A and B hold `pairs` words per row and column; masked accesses touch the tile's own elements only.
        unsafe {
            for i in 0..M {
                let row = c.wrapping_add(i * ldc).cast();
                _mm_prefetch::<_MM_HINT_T0>(row);
                _mm_prefetch::<_MM_HINT_T0>(row.wrapping_add(64));
            }
            let mut acc = [[_mm512_setzero_ps(); 2]; M];
            for q in 0..pairs {
                let x = [0, 16].map(|v| _mm512_loadu_si512(b.add(q * NR + v).cast()));
                for (i, row) in acc.iter_mut().enumerate() {
                    let y = _mm512_set1_epi32(*a.add(i * A_STRIDE + q) as i32);
                    for (sum, x) in row.iter_mut().zip(x) {
                        *sum = _mm512_dpbf16_ps(*sum, bh(y), bh(x));
                    }
                }
            }
            for (i, row) in acc.iter().enumerate() {
                for (v, (sum, mask)) in row.iter().zip(masks).enumerate() {
                    let at = c.wrapping_add(i * ldc + 16 * v);
                    let sum = if accumulate {
                        _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), *sum)
                    } else {
                        *sum
                    };
                    _mm512_mask_storeu_ps(at, mask, sum);
                }
            }
        }
    }

    /// The same bits as pairs of BF16.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bh(x: __m512i) -> __m512bh {
        // SAFETY: plain vectors of one size.
        unsafe { std::mem::transmute(x) }
    }
}

/// Without dot products of BF16 nothing is rounded to it.
#[cfg(not(target_arch = "x86_64"))]
mod bf16 {
    pub(super) unsafe fn convert_row(_: *const f32, _: usize, _: *mut u32) {
        unreachable!("Rounding::of never says BF16")
    }

    pub(super) unsafe fn panel(
        _: bool,
        _: [usize; 3],
        _: *const u32,
        _: *const u32,
        _: (*mut f32, usize),
    ) {
        unreachable!("Rounding::of never says BF16")
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Exact, TYPES, values};
    use super::*;
    use crate::ggml::{quantize_rows, row_to_f32};
    use half::bf16;
    use proptest::prelude::*;

    /// Weights and gradients: `ne = [k, n]` and `ne = [n, t]`.
    struct Case {
        ty: GgmlType,
        rounding: Rounding,
        k: usize,
        n: usize,
        t: usize,
        w: Exact,
        dy: Vec<f32>,
    }

    impl Case {
        fn new(ty: GgmlType, k: usize, n: usize, t: usize) -> Self {
            let mut w = Vec::new();
            quantize_rows(ty, &values(k * n, 1), k, &mut w);
            Self {
                ty,
                rounding: match has(CpuLevel::Avx512Bf16) && Rounding::may_be_bf16(ty) {
                    true => Rounding::Bf16,
                    false => Rounding::F32,
                },
                k,
                n,
                t,
                w: Exact::new(ty, &w),
                dy: values(n * t, 2),
            }
        }

        /// As on a CPU without dot products of BF16.
        fn exact(self) -> Self {
            let rounding = Rounding::F32;
            Self { rounding, ..self }
        }

        /// Rows `from..to` of dX, computed in `nth` parts.
        fn rows(&self, from: usize, to: usize, nth: usize) -> Vec<f32> {
            let mut dx = vec![f32::NAN; (to - from) * self.k];
            let product = MulMatBack {
                ty: self.ty,
                to_f32: row_to_f32,
                w: self.w.as_ptr(),
                row_bytes: self.w.len() / self.n,
                k: self.k,
                n: self.n,
                dy: self.dy[from * self.n..].as_ptr(),
                dy_stride: self.n,
                dx: dx.as_mut_ptr(),
                dx_stride: self.k,
                t: to - from,
            };
            for ith in 0..nth {
                // SAFETY: the matrices have these sizes.
                unsafe { product.part_rounded(self.rounding, ith, nth) };
            }
            dx
        }

        /// dX by definition and the sum of absolute values in it, of values rounded as `rounding` says.
        fn naive(&self) -> Vec<(f64, f64)> {
            let rounded = |x: f32| match self.rounding {
                Rounding::F32 => f64::from(x),
                Rounding::Bf16 => bf16::from_f32(x).to_f64(),
            };
            let mut sums = vec![(0.0, 0.0); self.t * self.k];
            let mut row = vec![0.0; self.k];
            for (n, bytes) in self.w.chunks_exact(self.w.len() / self.n).enumerate() {
                // SAFETY: a row of k values.
                unsafe { row_to_f32(self.ty, bytes.as_ptr(), row.as_mut_ptr(), self.k) };
                let row: Vec<f64> = row.iter().map(|&w| rounded(w)).collect();
                for (t, sums) in sums.chunks_exact_mut(self.k).enumerate() {
                    let dy = rounded(self.dy[t * self.n + n]);
                    for (sum, w) in sums.iter_mut().zip(&row) {
                        *sum = (sum.0 + w * dy, sum.1 + (w * dy).abs());
                    }
                }
            }
            sums
        }

        fn check(&self) {
            let dx = self.rows(0, self.t, 1);
            for (i, (got, (want, size))) in dx.iter().zip(self.naive()).enumerate() {
                let err = (f64::from(*got) - want).abs();
                let Self { ty, k, n, t, .. } = self;
                assert!(
                    err <= 2e-6 * size + 1e-9,
                    "{ty} {k} x {n} x {t} at {i}: {got} for {want}"
                );
            }
        }
    }

    fn same_bits(a: &[f32], b: &[f32]) -> bool {
        a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
    }

    #[test]
    fn every_type_equals_the_definition() {
        for ty in TYPES {
            let widths: &[usize] = match ty.block_size() {
                1 => &[77, 40, 288],
                32 => &[32, 96, 288],
                _ => &[256, 768],
            };
            for &k in widths {
                Case::new(ty, k, 33, 5).check();
                Case::new(ty, k, 9, 3).exact().check();
            }
            Case::new(ty, widths[0], 67, 13).check();
            Case::new(ty, widths[0], 2, 37).check();
            Case::new(ty, widths[0], 1, 1).check();
        }
    }

    #[test]
    fn long_reductions_and_many_rows() {
        for ty in [GgmlType::F32, GgmlType::BF16, GgmlType::Q8_0] {
            Case::new(ty, 64, 4 * N_WORDS + 7, 3).check();
            Case::new(ty, 32, 3, T_CHUNK + 29).check();
        }
    }

    #[test]
    fn bits_do_not_depend_on_parts_or_rows() {
        for ty in [
            GgmlType::F32,
            GgmlType::F16,
            GgmlType::Q8_0,
            GgmlType::Q4_K,
            GgmlType::Q3_K,
        ] {
            let case = Case::new(ty, 768, 2 * N_WORDS + 51, 37);
            let whole = case.rows(0, case.t, 1);
            for nth in [2, 3, 7] {
                assert!(
                    same_bits(&case.rows(0, case.t, nth), &whole),
                    "{ty} in {nth} parts"
                );
            }
            for (from, to) in [(0, 1), (5, 18), (36, 37), (2, 36)] {
                let expected = &whole[from * case.k..to * case.k];
                assert!(
                    same_bits(&case.rows(from, to, 2), expected),
                    "{ty}, rows {from}..{to}"
                );
            }
        }
    }

    #[test]
    fn more_parts_than_columns_and_no_rows() {
        let case = Case::new(GgmlType::Q8_0, 32, 3, 2);
        assert!(same_bits(&case.rows(0, 2, 5), &case.rows(0, 2, 1)));
        let mut dx = [f32::NAN; 64];
        let product = MulMatBack {
            ty: GgmlType::Q8_0,
            to_f32: row_to_f32,
            w: std::ptr::dangling(),
            row_bytes: 34,
            k: 32,
            n: 0,
            dy: std::ptr::dangling(),
            dy_stride: 0,
            dx: dx.as_mut_ptr(),
            dx_stride: 32,
            t: 2,
        };
        // SAFETY: no row of W and no column of dY is read.
        unsafe { product.part(0, 1) };
        assert_eq!(dx, [0.0; 64]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn gradients_are_what_the_definition_says(
            pick in any::<prop::sample::Index>(),
            [blocks, n, t] in [1..300usize, 1..80usize, 0..40usize],
            nth in 1..40usize,
            exact in any::<bool>(),
            odd in proptest::option::of(any::<prop::sample::Index>()),
        ) {
            let ty = TYPES[pick.index(TYPES.len())];
            let k = match ty.block_size() as usize {
                1 => blocks,
                32 => 32 * blocks.div_ceil(32),
                block => block * blocks.div_ceil(100),
            };
            let mut case = Case::new(ty, k, n, t);
            if exact {
                case = case.exact();
            }
            case.check();
            let whole = case.rows(0, t, 1);
            prop_assert!(same_bits(&case.rows(0, t, nth), &whole));
            if let (Some(odd), 1..) = (odd, t) {
                let at = odd.index(n * t);
                case.dy[at] = f32::NAN;
                let rows = case.rows(0, t, nth);
                for (i, (row, before)) in rows.chunks(k).zip(whole.chunks(k)).enumerate() {
                    match i == at / n {
                        true => prop_assert!(row.iter().all(|x| x.is_nan())),
                        false => prop_assert!(same_bits(row, before)),
                    }
                }
            }
        }
    }
}
