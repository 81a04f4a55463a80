//! The product with a frozen weight matrix forward, in 16-bit integers.
//!
//! Both operands are rounded in blocks of 32 values along K to multiples of a step of their own, at most ±8191 of them: 64 times
//! finer than the 8 bits that ggml gives activations. The products of a block are summed exactly in 32 bits (8191² · 32 < 2³¹), and
//! the blocks in single precision, in order. So what an element of the result is does not depend on how many rows there are, on
//! the tiles it was computed in, or on who computed it.
//!
//! `vpmaddwd` multiplies and adds twice as many pairs in an instruction as a fused multiply-add of F32 does, and unpacking a tile of weights
//! once for all rows makes the type of the weights almost irrelevant.

use super::dequant::row_to_f32;
use crate::file::types::GgmlType;
use std::ops::Range;

/// Values that share a step.
const BLOCK: usize = 32;
/// Largest multiple of a step.
const MAX: f32 = 8191.0;
/// Blocks whose largest value is below this are zero: the reciprocal of their step would be infinite.
const TINY: f32 = 1e-30;
/// Rows of W in a panel: two registers.
const ROWS: usize = 16;
/// Values of a row of W that are unpacked at a time; a panel of them takes 64 KB.
const DEPTH: usize = 2048;
/// Values of a row of W that ggml unpacks at a time: the largest block of any type.
const CHUNK: usize = 256;

/// Whether this CPU has the kernel, for rows of `k` values of type `ty`.
pub(crate) fn has_mul_mat(ty: GgmlType, k: usize) -> bool {
    arch::available()
        && k.is_multiple_of(BLOCK)
        && (ty.is_quantized() || matches!(ty, GgmlType::F16 | GgmlType::BF16))
}

/// Rows of X from which on it may be worth while to unpack W: with fewer that is most of the work.
pub(crate) const FEWEST_ROWS: usize = 32;

/// Whether the kernel is faster than ggml's for weights of type `ty` and [`FEWEST_ROWS`] or more. Measured on Zen 3: ggml has dot products only
/// for these types, and tiles for the others.
pub(crate) fn packs_faster(ty: GgmlType) -> bool {
    use GgmlType::*;
    // SAFETY: a pure query of how ggml was compiled.
    let wider = unsafe { ggml_sys::ggml_cpu_has_avx512() } != 0;
    !wider && matches!(ty, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | BF16)
}

/// Words that a packed row of `k` values takes: two values each, then the steps.
pub(crate) fn packed_words(k: usize) -> usize {
    k / 2 + k / BLOCK
}

/// Rounds a row of `x.len()` values, a multiple of 32, to [`packed_words`] words. A block with a value that is infinite or not a number gets a step that is
/// not a number.
///
/// # Panics
/// If there is no [`has_mul_mat`] for such rows, or `to` is of another size.
pub(crate) fn pack_row(x: &[f32], to: &mut [f32]) {
    assert!(
        arch::available() && x.len().is_multiple_of(BLOCK) && to.len() == packed_words(x.len())
    );
    let (words, steps) = to.split_at_mut(x.len() / 2);
    let blocks = x.as_chunks::<BLOCK>().0.iter();
    for ((x, words), step) in blocks
        .zip(words.as_chunks_mut::<{ BLOCK / 2 }>().0)
        .zip(steps)
    {
        // SAFETY: the CPU has the instructions (asserted above).
        *step = unsafe { arch::round(x, words) };
    }
}

/// `Y = W X`.
pub(crate) struct MulMat {
    /// The type of W, for which there is [`has_mul_mat`].
    pub(crate) ty: GgmlType,
    /// W, `ne = [k, n]`.
    pub(crate) w: *const u8,
    /// From one row of W to the next.
    pub(crate) row_bytes: usize,
    pub(crate) k: usize,
    pub(crate) n: usize,
    /// X, `ne = [k, t]`, as rows of [`packed_words`] words.
    pub(crate) x: *const f32,
    pub(crate) t: usize,
    /// `W X`, `ne = [n, t]`.
    pub(crate) y: *mut f32,
}

/// A cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Rows of W in words of two values that stand next to each other: pair `p` of row `r` at `words[p * ROWS + r]`, and the step of
/// block `b` of row `r` at `steps[b * ROWS + r]`.
struct Panel {
    words: Vec<Line>,
    steps: Vec<Line>,
}

thread_local! {
    static PANEL: std::cell::RefCell<Panel> = const { std::cell::RefCell::new(Panel { words: Vec::new(), steps: Vec::new() }) };
}

impl MulMat {
    /// Computes part `ith` of `nth`: some of W's rows, whole panels of them. Values do not depend on `nth`, nor those of a row on `t`.
    ///
    /// # Safety
    /// The matrices must be valid; all parts together write all of Y, each its own.
    pub(crate) unsafe fn part(&self, ith: usize, nth: usize) {
        let panels = self.n.div_ceil(ROWS);
        PANEL.with_borrow_mut(|panel| {
            panel.words.resize(DEPTH / 2 * ROWS / 16, Line([0.0; 16]));
            panel
                .steps
                .resize(DEPTH / BLOCK * ROWS / 16, Line([0.0; 16]));
            for i in panels * ith / nth..panels * (ith + 1) / nth {
                let rows = i * ROWS..self.n.min((i + 1) * ROWS);
                for k0 in (0..self.k).step_by(DEPTH) {
                    let depth = k0..self.k.min(k0 + DEPTH);
                    // SAFETY: rows and columns of W, all rows of X and ours of Y.
                    unsafe {
                        panel.unpack(self, &rows, &depth);
                        panel.multiply(self, &rows, &depth);
                    }
                }
            }
        });
    }
}

impl Panel {
    /// Fills the panel with columns `depth` of W's rows `rows`; rows that are missing stay as they were.
    ///
    /// # Safety
    /// They must lie in W.
    unsafe fn unpack(&mut self, product: &MulMat, rows: &Range<usize>, depth: &Range<usize>) {
        let ty = product.ty;
        // SAFETY: row and column of W.
        let at = |r: usize, k: usize| unsafe {
            let bytes = k / ty.block_size() as usize * ty.type_size() as usize;
            product.w.add(r * product.row_bytes + bytes)
        };
        let mut blocks = arch::Blocks {
            first: at(rows.start, depth.start),
            row_bytes: product.row_bytes,
            rows: rows.len(),
            words: &mut self.words[..depth.len() / 2],
            steps: &mut self.steps[..depth.len() / BLOCK],
        };
        // SAFETY: whole blocks of these rows, on a CPU that has the instructions (`has_mul_mat`).
        if unsafe { blocks.unpack(ty) } {
            return;
        }
        let mut values = [[0.0f32; CHUNK]; ROWS];
        for k0 in depth.clone().step_by(CHUNK) {
            let k = CHUNK.min(depth.end - k0);
            for (r, values) in rows.clone().zip(&mut values) {
                // SAFETY: whole blocks of row r.
                unsafe { row_to_f32(ty, at(r, k0), values.as_mut_ptr(), k) };
            }
            let from = k0 - depth.start;
            let mut blocks = arch::Blocks {
                first: values.as_ptr().cast(),
                row_bytes: size_of_val(&values[0]),
                rows: rows.len(),
                words: &mut self.words[from / 2..(from + k) / 2],
                steps: &mut self.steps[from / BLOCK..(from + k) / BLOCK],
            };
            // SAFETY: as above.
            let known = unsafe { blocks.unpack(GgmlType::F32) };
            assert!(known, "F32 has a block");
        }
    }

    /// Sets elements of Y to the part of the sum that lies in columns `depth` of W, or adds it to what the parts before gave.
    ///
    /// # Safety
    /// The panel must hold these rows and columns of W; Y's must not be written by anybody else.
    unsafe fn multiply(&self, product: &MulMat, rows: &Range<usize>, depth: &Range<usize>) {
        let stride = packed_words(product.k);
        let tiles = product.t.div_ceil(arch::COLUMNS);
        for tile in 0..tiles {
            let (from, to) = (tile * product.t / tiles, (tile + 1) * product.t / tiles);
            // SAFETY: rows from..to of X and Y.
            unsafe {
                let x = product.x.add(from * stride);
                let tile = arch::Tile {
                    blocks: depth.len() / BLOCK,
                    words: self.words.as_ptr().cast(),
                    steps: self.steps.as_ptr().cast(),
                    x: x.add(depth.start / 2),
                    x_steps: x.add(product.k / 2 + depth.start / BLOCK),
                    x_stride: stride,
                    y: product.y.add(from * product.n + rows.start),
                    y_stride: product.n,
                    rows: rows.len(),
                    accumulate: depth.start > 0,
                };
                tile.compute(to - from);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod arch {
    use super::{BLOCK, Line, MAX, ROWS, TINY};
    use crate::file::types::GgmlType;
    use std::arch::x86_64::*;

    /// Rows of X in a register tile: with two registers of W half of the 16 registers hold sums.
    pub(super) const COLUMNS: usize = 4;

    pub(super) fn available() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }

    /// Rounds a block to words of two multiples of a step each, and returns the step.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) unsafe fn round(x: &[f32; BLOCK], to: &mut [f32; BLOCK / 2]) -> f32 {
        // SAFETY: loads and stores within the arrays.
        unsafe {
            let (words, step) = rounded(std::array::from_fn(|i| {
                _mm256_loadu_ps(x.as_ptr().add(8 * i))
            }));
            _mm256_storeu_si256(to.as_mut_ptr().cast(), words[0]);
            _mm256_storeu_si256(to.as_mut_ptr().add(8).cast(), words[1]);
            step
        }
    }

    /// The words of a block, and its step.
    type Rounded = ([__m256i; 2], f32);

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn rounded(x: [__m256; 4]) -> Rounded {
        let abs = |x| _mm256_andnot_ps(_mm256_set1_ps(-0.0), x);
        let most = _mm256_max_ps(
            _mm256_max_ps(abs(x[0]), abs(x[1])),
            _mm256_max_ps(abs(x[2]), abs(x[3])),
        );
        // Zero, or not a number if any value is infinite or not a number, which a maximum may lose.
        let zero = _mm256_setzero_ps();
        let odd = x.iter().fold(zero, |sum, &x| _mm256_fmadd_ps(x, zero, sum));
        let most = across(most, |a, b| _mm_max_ps(a, b));
        let odd = across(odd, |a, b| _mm_add_ps(a, b));
        let (step, inverse) = if most > TINY {
            (most / MAX, MAX / most)
        } else {
            (0.0, 0.0)
        };
        let inverse = _mm256_set1_ps(inverse);
        let [a, b, c, d] = x.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
        // Packing interleaves the halves of its operands.
        let words = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(a, b));
        ([words(a, b), words(c, d)], step + odd)
    }

    /// Blocks of [`ROWS`] rows of W, or fewer, that become part of a panel.
    pub(super) struct Blocks<'a> {
        /// The first row's first block.
        pub(super) first: *const u8,
        pub(super) row_bytes: usize,
        pub(super) rows: usize,
        pub(super) words: &'a mut [Line],
        pub(super) steps: &'a mut [Line],
    }

    impl Blocks<'_> {
        /// Unpacks blocks of type `ty`; false if there is no way but through F32.
        ///
        /// # Safety
        /// The rows must have as many blocks as there are steps, and the CPU AVX2, FMA and F16C.
        pub(super) unsafe fn unpack(&mut self, ty: GgmlType) -> bool {
            // SAFETY: the caller's promise.
            unsafe {
                match ty {
                    GgmlType::F32 => self.each::<F32>(),
                    GgmlType::F16 => self.each::<F16>(),
                    GgmlType::BF16 => self.each::<BF16>(),
                    GgmlType::Q8_0 => self.each::<Q8_0>(),
                    GgmlType::Q4_0 => self.each::<Q4_0>(),
                    GgmlType::Q4_1 => self.each::<Q4_1>(),
                    GgmlType::Q5_0 => self.each::<Q5_0>(),
                    GgmlType::Q5_1 => self.each::<Q5_1>(),
                    _ => return false,
                }
            }
            true
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn each<B: Block>(&mut self) {
            let mut words = [[0.0f32; BLOCK / 2]; ROWS];
            let to = self.words.as_chunks_mut::<{ BLOCK / 2 }>().0;
            for (b, (to, steps)) in to.iter_mut().zip(&mut *self.steps).enumerate() {
                for (r, (words, step)) in words
                    .iter_mut()
                    .zip(&mut steps.0)
                    .take(self.rows)
                    .enumerate()
                {
                    // SAFETY: block b of row r.
                    unsafe {
                        let ([low, high], s) =
                            B::words(self.first.add(r * self.row_bytes + b * B::BYTES));
                        _mm256_storeu_si256(words.as_mut_ptr().cast(), low);
                        _mm256_storeu_si256(words.as_mut_ptr().add(8).cast(), high);
                        *step = s;
                    }
                }
                interleave(&words, to);
            }
        }
    }

    /// 32 values as they lie in memory.
    trait Block {
        const BYTES: usize;

        /// As [`rounded`] gives them, or exactly.
        ///
        /// # Safety
        /// There must be a block at `at`. Callers have AVX2, FMA and F16C, and this becomes part of them.
        unsafe fn words(at: *const u8) -> Rounded;
    }

    /// A half-precision number.
    ///
    /// # Safety
    /// There must be one at `at`, and the CPU have F16C.
    #[inline(always)]
    unsafe fn half(at: *const u8) -> f32 {
        // SAFETY: the caller's promise.
        unsafe {
            _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(
                at.cast::<u16>().read_unaligned(),
            ))))
        }
    }

    /// 16 bytes of two 4-bit numbers as 32 bytes: the low ones, then the high ones.
    ///
    /// # Safety
    /// They must be at `at`, and the CPU have AVX2.
    #[inline(always)]
    unsafe fn nibbles(at: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe {
            let both = _mm_loadu_si128(at.cast());
            let both = _mm256_set_m128i(_mm_srli_epi16::<4>(both), both);
            _mm256_and_si256(both, _mm256_set1_epi8(15))
        }
    }

    /// 32 bits as the fifth bits of 32 bytes.
    ///
    /// # Safety
    /// They must be at `at`, and the CPU have AVX2.
    #[inline(always)]
    unsafe fn fifth_bits(at: *const u8) -> __m256i {
        // SAFETY: the caller's promise.
        unsafe {
            let bits = _mm256_set1_epi32(at.cast::<i32>().read_unaligned());
            let spread = _mm256_shuffle_epi8(
                bits,
                _mm256_set_epi64x(
                    0x0303_0303_0303_0303,
                    0x0202_0202_0202_0202,
                    0x0101_0101_0101_0101,
                    0,
                ),
            );
            let bit = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64.cast_signed());
            let set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit);
            _mm256_and_si256(set, _mm256_set1_epi8(16))
        }
    }

    /// Signed bytes times a scale: nothing is rounded.
    ///
    /// # Safety
    /// The CPU must have AVX2.
    #[inline(always)]
    unsafe fn integers(x: __m256i, scale: f32) -> Rounded {
        // SAFETY: the caller's promise.
        unsafe {
            let low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(x));
            let high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(x));
            ([low, high], scale)
        }
    }

    /// Bytes times a scale and a minimum.
    ///
    /// # Safety
    /// The CPU must have AVX2, FMA and F16C.
    #[inline(always)]
    unsafe fn affine(x: __m256i, scale: f32, min: f32) -> Rounded {
        // SAFETY: the caller's promise.
        unsafe {
            let (scale, min) = (_mm256_set1_ps(scale), _mm256_set1_ps(min));
            let value =
                |x| _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(x)), scale, min);
            let (low, high) = (_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            rounded([
                value(low),
                value(_mm_srli_si128::<8>(low)),
                value(high),
                value(_mm_srli_si128::<8>(high)),
            ])
        }
    }

    macro_rules! blocks {
        ($($ty:ident: $bytes:literal, |$at:ident| $words:expr;)*) => {
            $(
                struct $ty;

                impl Block for $ty {
                    const BYTES: usize = $bytes;

                    #[inline(always)]
                    unsafe fn words($at: *const u8) -> Rounded {
                        // SAFETY: the parts of a block, whose layout is ggml-common.h's.
                        unsafe { $words }
                    }
                }
            )*
        };
    }

    blocks! {
        F32: 128, |at| rounded(std::array::from_fn(|i| _mm256_loadu_ps(at.cast::<f32>().add(8 * i))));
        F16: 64, |at| rounded(std::array::from_fn(|i| _mm256_cvtph_ps(_mm_loadu_si128(at.cast::<__m128i>().add(i)))));
        BF16: 64, |at| rounded(std::array::from_fn(|i| {
            let upper = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.cast::<__m128i>().add(i)));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(upper))
        }));
        Q8_0: 34, |at| integers(_mm256_loadu_si256(at.add(2).cast()), half(at));
        Q4_0: 18, |at| integers(_mm256_sub_epi8(nibbles(at.add(2)), _mm256_set1_epi8(8)), half(at));
        Q4_1: 20, |at| affine(nibbles(at.add(4)), half(at), half(at.add(2)));
        Q5_0: 22, |at| integers(
            _mm256_sub_epi8(_mm256_or_si256(nibbles(at.add(6)), fifth_bits(at.add(2))), _mm256_set1_epi8(16)),
            half(at)
        );
        Q5_1: 24, |at| affine(_mm256_or_si256(nibbles(at.add(8)), fifth_bits(at.add(4))), half(at), half(at.add(2)));
    }

    /// All elements reduced to one.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn across(x: __m256, f: impl Fn(__m128, __m128) -> __m128) -> f32 {
        let x = f(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = f(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(f(x, _mm_shuffle_ps::<1>(x, x)))
    }

    /// Words of [`ROWS`] rows, one after the other, to rows of words.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn interleave(from: &[[f32; BLOCK / 2]; ROWS], to: &mut [Line; BLOCK / 2]) {
        for (half, rows) in from.as_chunks::<8>().0.iter().enumerate() {
            for (part, to) in to.as_chunks_mut::<8>().0.iter_mut().enumerate() {
                // SAFETY: eight words of eight rows each.
                unsafe {
                    let r: [__m256; 8] =
                        std::array::from_fn(|i| _mm256_loadu_ps(rows[i].as_ptr().add(8 * part)));
                    let pair = |i: usize| {
                        (
                            _mm256_unpacklo_ps(r[i], r[i + 1]),
                            _mm256_unpackhi_ps(r[i], r[i + 1]),
                        )
                    };
                    let (a, b, c, d) = (pair(0), pair(2), pair(4), pair(6));
                    let low = |a, b| _mm256_shuffle_ps::<0b01_00_01_00>(a, b);
                    let high = |a, b| _mm256_shuffle_ps::<0b11_10_11_10>(a, b);
                    let four = [
                        (low(a.0, b.0), low(c.0, d.0)),
                        (high(a.0, b.0), high(c.0, d.0)),
                        (low(a.1, b.1), low(c.1, d.1)),
                        (high(a.1, b.1), high(c.1, d.1)),
                    ];
                    for (i, (x, y)) in four.into_iter().enumerate() {
                        let first = _mm256_permute2f128_ps::<0x20>(x, y);
                        let second = _mm256_permute2f128_ps::<0x31>(x, y);
                        _mm256_storeu_ps(to[i].0.as_mut_ptr().add(8 * half), first);
                        _mm256_storeu_ps(to[i + 4].0.as_mut_ptr().add(8 * half), second);
                    }
                }
            }
        }
    }

    /// [`ROWS`] rows of W times some rows of X.
    pub(super) struct Tile {
        /// Blocks along K.
        pub(super) blocks: usize,
        /// The panel.
        pub(super) words: *const f32,
        pub(super) steps: *const f32,
        /// Packed rows of X: words, steps, and from one row to the next.
        pub(super) x: *const f32,
        pub(super) x_steps: *const f32,
        pub(super) x_stride: usize,
        /// Element (i, t) at `y[t * y_stride + i]`.
        pub(super) y: *mut f32,
        pub(super) y_stride: usize,
        /// Rows of W that there are.
        pub(super) rows: usize,
        /// Adds to what Y has.
        pub(super) accumulate: bool,
    }

    impl Tile {
        /// For `columns` rows of X, at most [`COLUMNS`].
        ///
        /// # Safety
        /// All pointers must be valid for that, and the CPU have AVX2 and FMA.
        pub(super) unsafe fn compute(&self, columns: usize) {
            // SAFETY: the caller's promise.
            unsafe {
                match columns {
                    1 => self.fixed::<1>(),
                    2 => self.fixed::<2>(),
                    3 => self.fixed::<3>(),
                    4 => self.fixed::<4>(),
                    _ => unreachable!("a tile of {columns} columns"),
                }
            }
        }

        #[target_feature(enable = "avx2,fma,f16c")]
        unsafe fn fixed<const N: usize>(&self) {
            // SAFETY: the caller's promise; with fewer rows than a panel has, Y is reached through a copy.
            unsafe {
                let mut sums = [[_mm256_setzero_ps(); 2]; N];
                let mut copy = [[0.0f32; ROWS]; N];
                let whole = self.rows == ROWS;
                if self.accumulate {
                    for (t, (sums, copy)) in sums.iter_mut().zip(&mut copy).enumerate() {
                        let y = self.y.add(t * self.y_stride).cast_const();
                        let y = if whole { y } else { copied(y, copy, self.rows) };
                        *sums = [_mm256_loadu_ps(y), _mm256_loadu_ps(y.add(8))];
                    }
                }
                for b in 0..self.blocks {
                    let mut acc = [[_mm256_setzero_si256(); 2]; N];
                    let words = self.words.add(b * BLOCK / 2 * ROWS);
                    let x = self.x.add(b * BLOCK / 2);
                    for p in 0..BLOCK / 2 {
                        let w = [0, 8].map(|v| _mm256_load_si256(words.add(p * ROWS + v).cast()));
                        for (t, acc) in acc.iter_mut().enumerate() {
                            let x = _mm256_castps_si256(_mm256_broadcast_ss(
                                &*x.add(t * self.x_stride + p),
                            ));
                            for (acc, w) in acc.iter_mut().zip(w) {
                                *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(w, x));
                            }
                        }
                    }
                    let steps = [0, 8].map(|v| _mm256_load_ps(self.steps.add(b * ROWS + v)));
                    for (t, (sums, acc)) in sums.iter_mut().zip(acc).enumerate() {
                        let x_step = _mm256_broadcast_ss(&*self.x_steps.add(t * self.x_stride + b));
                        for ((sum, acc), step) in sums.iter_mut().zip(acc).zip(steps) {
                            *sum = _mm256_fmadd_ps(
                                _mm256_cvtepi32_ps(acc),
                                _mm256_mul_ps(step, x_step),
                                *sum,
                            );
                        }
                    }
                }
                for (t, (sums, copy)) in sums.iter().zip(&mut copy).enumerate() {
                    let y = self.y.add(t * self.y_stride);
                    let to = if whole { y } else { copy.as_mut_ptr() };
                    _mm256_storeu_ps(to, sums[0]);
                    _mm256_storeu_ps(to.add(8), sums[1]);
                    if !whole {
                        std::ptr::copy_nonoverlapping(to, y, self.rows);
                    }
                }
            }
        }
    }

    /// `n` values in an array that has room for more.
    ///
    /// # Safety
    /// There must be so many at `from`.
    unsafe fn copied(from: *const f32, to: &mut [f32; ROWS], n: usize) -> *const f32 {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(from, to.as_mut_ptr(), n) };
        to.as_ptr()
    }
}

/// Other CPUs multiply with ggml.
#[cfg(not(target_arch = "x86_64"))]
mod arch {
    use super::{BLOCK, Line};
    use crate::file::types::GgmlType;

    pub(super) const COLUMNS: usize = 1;

    pub(super) fn available() -> bool {
        false
    }

    pub(super) unsafe fn round(_: &[f32; BLOCK], _: &mut [f32; BLOCK / 2]) -> f32 {
        unreachable!("not available")
    }

    #[allow(dead_code)]
    pub(super) struct Blocks<'a> {
        pub(super) first: *const u8,
        pub(super) row_bytes: usize,
        pub(super) rows: usize,
        pub(super) words: &'a mut [Line],
        pub(super) steps: &'a mut [Line],
    }

    impl Blocks<'_> {
        pub(super) unsafe fn unpack(&mut self, _: GgmlType) -> bool {
            unreachable!("not available")
        }
    }

    #[allow(dead_code)]
    pub(super) struct Tile {
        pub(super) blocks: usize,
        pub(super) words: *const f32,
        pub(super) steps: *const f32,
        pub(super) x: *const f32,
        pub(super) x_steps: *const f32,
        pub(super) x_stride: usize,
        pub(super) y: *mut f32,
        pub(super) y_stride: usize,
        pub(super) rows: usize,
        pub(super) accumulate: bool,
    }

    impl Tile {
        pub(super) unsafe fn compute(&self, _: usize) {
            unreachable!("not available")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::values;
    use super::*;
    use crate::ggml::{Context, Graph, GraphMemory, ThreadPool, quantize_rows};

    const TYPES: [GgmlType; 14] = [
        GgmlType::F16,
        GgmlType::BF16,
        GgmlType::Q8_0,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::IQ4_NL,
        GgmlType::IQ4_XS,
    ];

    struct Case {
        ty: GgmlType,
        k: usize,
        n: usize,
        w: Vec<u8>,
        x: Vec<f32>,
    }

    impl Case {
        /// Values of X differ in size by rows and by columns, as activations do.
        fn new(ty: GgmlType, k: usize, n: usize, t: usize) -> Self {
            let mut w = Vec::new();
            quantize_rows(ty, &values(k * n, 1), k, &mut w);
            let mut x = values(k * t, 2);
            for (i, x) in x.iter_mut().enumerate() {
                *x *=
                    (1 + i % 7) as f32 * (1 + i / k) as f32 * if i % 61 == 0 { 20.0 } else { 1.0 };
            }
            Self { ty, k, n, w, x }
        }

        fn t(&self) -> usize {
            self.x.len() / self.k
        }

        fn packed(&self) -> Vec<f32> {
            let width = packed_words(self.k);
            let mut packed = vec![0.0; self.t() * width];
            for (x, to) in self.x.chunks(self.k).zip(packed.chunks_mut(width)) {
                pack_row(x, to);
            }
            packed
        }

        /// Rows `rows` of X, by so many threads, one after the other.
        fn product(&self, rows: Range<usize>, nth: usize) -> Vec<f32> {
            let packed = self.packed();
            let t = rows.len();
            let mut y = vec![f32::NAN; self.n * t];
            let product = MulMat {
                ty: self.ty,
                w: self.w.as_ptr(),
                row_bytes: self.ty.row_bytes(self.k as u64).unwrap() as usize,
                k: self.k,
                n: self.n,
                x: packed[rows.start * packed_words(self.k)..].as_ptr(),
                t,
                y: y.as_mut_ptr(),
            };
            for ith in 0..nth {
                // SAFETY: the matrices have these sizes.
                unsafe { product.part(ith, nth) };
            }
            y
        }

        /// In F64, on the values that the weights stand for.
        fn exact(&self) -> Vec<f64> {
            let mut w = vec![0.0f32; self.k * self.n];
            let row_bytes = self.ty.row_bytes(self.k as u64).unwrap() as usize;
            for (row, w) in self.w.chunks(row_bytes).zip(w.chunks_mut(self.k)) {
                // SAFETY: a row of W.
                unsafe { row_to_f32(self.ty, row.as_ptr(), w.as_mut_ptr(), self.k) };
            }
            let dot = |x: &[f32], w: &[f32]| {
                x.iter()
                    .zip(w)
                    .map(|(&x, &w)| f64::from(x) * f64::from(w))
                    .sum()
            };
            self.x
                .chunks(self.k)
                .flat_map(|x| w.chunks(self.k).map(move |w| dot(x, w)))
                .collect()
        }

        fn ggml(&self) -> Vec<f32> {
            let ctx = Context::new();
            let w = ctx.input(self.ty, &[self.k, self.n], "w");
            let x = ctx.input(GgmlType::F32, &[self.k, self.t()], "x");
            let y = ctx.output(ctx.mul_mat(&w, &x));
            let mut graph = Graph::new(ctx, std::slice::from_ref(&y), GraphMemory::new()).unwrap();
            graph.bytes_mut(&w).copy_from_slice(&self.w);
            graph.slice_mut::<f32>(&x).copy_from_slice(&self.x);
            graph.compute(&ThreadPool::new(1), None).unwrap();
            graph.read_f32(&y).to_vec()
        }
    }

    /// Whether the kernel can run; a test that cannot says so.
    fn available() -> bool {
        if !arch::available() {
            ggraft_testkit::skipped("products forward in 16-bit integers (needs AVX2 and FMA)");
        }
        arch::available()
    }

    /// Sum of squared differences over sum of squares.
    fn nmse(got: &[f32], want: &[f64]) -> f64 {
        assert_eq!(got.len(), want.len());
        let error: f64 = got
            .iter()
            .zip(want)
            .map(|(&g, w)| (f64::from(g) - w).powi(2))
            .sum();
        error / want.iter().map(|w| w * w).sum::<f64>()
    }

    #[test]
    fn it_is_nearer_to_the_definition_than_ggml() {
        if !available() {
            return;
        }
        let mut complaints = String::new();
        for ty in TYPES {
            // More than one panel and chunk, and ends of both.
            let mut shapes = vec![(256, 16, 4), (512, 37, 9), (DEPTH + 256, 5, 3)];
            if ty.block_size() == 32 {
                shapes.extend([(32, 17, 7), (288, 33, 6)]);
            }
            for (k, n, t) in shapes {
                let case = Case::new(ty, k, n, t);
                let want = case.exact();
                let (ours, theirs) = (
                    nmse(&case.product(0..t, 1), &want),
                    nmse(&case.ggml(), &want),
                );
                // Both operands are rounded to 1/16,382 of a block's largest value, which is many times the others' size here.
                if ours > 1e-7 || ours > theirs {
                    complaints +=
                        &format!("{ty:?} {k} x {n} x {t}: {ours:.1e}, ggml {theirs:.1e}\n");
                }
            }
        }
        assert!(complaints.is_empty(), "\n{complaints}");
    }

    #[test]
    fn bits_depend_on_neither_batch_nor_threads() {
        if !available() {
            return;
        }
        let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
        for ty in TYPES {
            let case = Case::new(ty, 512, 83, 11);
            let all = bits(&case.product(0..11, 1));
            for nth in [2, 3, 64] {
                assert_eq!(
                    bits(&case.product(0..11, nth)),
                    all,
                    "{ty:?}, {nth} threads"
                );
            }
            for rows in [0..1, 3..5, 8..11, 2..10] {
                let want = &all[rows.start * case.n..rows.end * case.n];
                assert_eq!(
                    bits(&case.product(rows.clone(), 1)),
                    want,
                    "{ty:?}, rows {rows:?}"
                );
            }
            assert!(case.product(4..4, 2).is_empty());
        }
    }

    #[test]
    fn values_that_are_no_numbers_surface() {
        if !available() {
            return;
        }
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 31, 77, 255] {
                let mut case = Case::new(GgmlType::Q8_0, 256, 20, 3);
                case.x[256 + at] = odd;
                let y = case.product(0..3, 1);
                assert!(y[20..40].iter().all(|y| y.is_nan()), "{odd} at {at}");
                assert!(y[..20].iter().chain(&y[40..]).all(|y| y.is_finite()));
            }
        }
        // A scale of W.
        let mut case = Case::new(GgmlType::Q8_0, 256, 20, 3);
        case.w[..2].copy_from_slice(&half::f16::NAN.to_le_bytes());
        let y = case.product(0..3, 1);
        assert!((0..60).all(|i| y[i].is_nan() == i.is_multiple_of(20)));
        // Blocks of nothing, and of next to nothing.
        let mut case = Case::new(GgmlType::Q4_0, 64, 3, 2);
        case.x[..64].fill(0.0);
        case.x[64..].fill(1e-38);
        assert!(case.product(0..2, 1).iter().all(|&y| y == 0.0));
    }
}
