//! Panels and register tiles in bytes, for CPUs without dot products of bytes. `vpmaddubsw` multiplies 32 pairs and adds neighbours to words of 16 bits, and
//! `vpmaddwd` by ones adds neighbours of these to words of 32. One operand has no sign: these are the weights, as they are stored, and what they are more than they
//! stand for is subtracted from sums; of weights with all eight bits it is their absolute values, and X gets their signs.

use super::super::bytes::{BYTE_WIDTH, ByteBlocks, ByteRows, ByteTile, Kind, LANES, QUADS};
use super::super::{Line, by_height, for_each_block};
use super::eight::Quads;
use super::formats::{Format, GROUP, Units, Visit, groups, visit};
use super::scales::Scales;
use super::{prefetch_for_later, store_lanes};
use crate::file::types::GgmlType;
use std::arch::asm;
use std::arch::x86_64::*;

/// Rows of X in a tile: its eight sums of words of 16 bits, two registers of W and one of X stay in registers.
pub(in super::super) const TILE_HEIGHT: usize = 4;

/// Registers of a line.
const PARTS: [usize; 2] = [0, GROUP];

impl ByteBlocks<'_> {
    /// Unpacks blocks of type `ty`, and says what they have. `None` if there is no format for it.
    ///
    /// # Safety
    /// The rows must have the blocks, and the CPU AVX2, FMA and F16C.
    pub(super) unsafe fn unpack_256(self, ty: GgmlType) -> Option<Kind> {
        // SAFETY: the caller's promise.
        unsafe { visit(ty, ToWords(self)) }
    }
}

/// Blocks that become words in which eight rows stand side by side.
struct ToWords<'a>(ByteBlocks<'a>);

impl Visit for ToWords<'_> {
    type Output = Kind;

    unsafe fn visit<F: Format>(self) -> Kind {
        // SAFETY: the caller's promise.
        unsafe { self.copy::<F>() };
        Kind::of::<F>()
    }
}

impl ToWords<'_> {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn copy<F: Format>(mut self) {
        const { assert!(BYTE_WIDTH.is_multiple_of(GROUP)) };
        let (row_bytes, blocks) = (self.0.row_bytes, self.0.blocks);
        for (row, rows) in groups(self.0.first, row_bytes, self.0.rows) {
            for u in 0..blocks / F::BLOCKS {
                let units = Units::new::<F>(&rows, u);
                for r in 0..GROUP {
                    let next = units.of(r).wrapping_add(BYTE_WIDTH * row_bytes);
                    prefetch_for_later(next, F::BYTES);
                }
                // SAFETY: unit u of these rows.
                unsafe {
                    self.copy_scales::<F>(&F::scales(units), row, u * F::BLOCKS);
                    for_each_block!(F, I, {
                        // Blocks that have bytes in common are unpacked together.
                        if F::BLOCKS == 1 {
                            self.store::<F>(F::eight(units, I), row, u);
                        } else if I % (2 * F::APART) < F::APART {
                            let (first, second) =
                                (F::eight(units, I), F::eight(units, I + F::APART));
                            self.store::<F>(first, row, u * F::BLOCKS + I);
                            self.store::<F>(second, row, u * F::BLOCKS + I + F::APART);
                        }
                    });
                }
            }
        }
    }

    /// Stores the integers of a block of eight rows, of which the first is `row`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn store<F: Format>(&mut self, quads: Quads, row: usize, block: usize) {
        let words = &mut self.0.words[block * QUADS..(block + 1) * QUADS];
        // Those of all eight bits get their sign back.
        let offset = _mm256_set1_epi8(if F::FULL { i8::MIN } else { 0 });
        for (quad, to) in quads.into_iter().zip(words) {
            store_lanes(
                _mm256_xor_si256(quad, offset),
                &mut to[row / LANES],
                row % LANES,
            );
        }
    }

    /// Stores what stands beside the integers of a unit of eight rows, of which the first is `row`.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn copy_scales<F: Format>(&mut self, scales: &Scales, row: usize, block: usize) {
        let (line, lane) = (row / LANES, row % LANES);
        for i in 0..F::BLOCKS {
            for part in 0..F::PARTS {
                let at = (block + i) * F::PARTS + part;
                let steps = _mm256_castps_si256(scales.steps_of::<F>(i, part));
                store_lanes(steps, &mut self.0.steps[at][line], lane);
                if F::MINS {
                    let mins = _mm256_castps_si256(scales.mins[i][part]);
                    store_lanes(mins, &mut self.0.mins[at][line], lane);
                }
            }
        }
    }
}

/// A tile of `t` rows of X.
struct OfHeight<'a> {
    tile: &'a ByteTile,
    t: usize,
}

impl ByteTile {
    /// For `t` rows of X, at most [`TILE_HEIGHT`].
    ///
    /// # Safety
    /// All pointers must be valid for that, and the CPU have AVX2, FMA and F16C.
    pub(super) unsafe fn compute_256(&self, t: usize) {
        // SAFETY: the caller's promise.
        let known = unsafe { visit(self.ty, OfHeight { tile: self, t }) };
        assert!(known.is_some(), "{:?} has a format", self.ty);
    }
}

impl Visit for OfHeight<'_> {
    type Output = ();

    unsafe fn visit<F: Format>(self) {
        // SAFETY: the caller's promise.
        unsafe { by_height!(self.fixed::<F>, self.t, 1 2 3 4) }
    }
}

impl OfHeight<'_> {
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn fixed<F: Format, const N: usize>(&self) {
        for line in 0..self.tile.y.width.div_ceil(LANES) {
            // SAFETY: the caller's promise.
            unsafe { self.line::<F, N>(line) };
        }
    }

    /// Computes what is of rows of a line.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn line<F: Format, const N: usize>(&self, line: usize) {
        let ByteTile { y, x, .. } = *self.tile;
        let (y, first) = (y.values.wrapping_add(line * LANES), line * LANES);
        let width = (self.tile.y.width - first).min(LANES);
        let stride = self.tile.y.stride;
        // SAFETY: the caller's promise; with fewer elements than a line has rows, Y is reached through a copy.
        unsafe {
            let mut sums = [[_mm256_setzero_ps(); 2]; N];
            if self.tile.y.accumulate {
                for (t, sums) in sums.iter_mut().enumerate() {
                    let mut copy = [0.0f32; LANES];
                    let mut from = y.wrapping_add(t * stride).cast_const();
                    if width < LANES {
                        std::ptr::copy_nonoverlapping(from, copy.as_mut_ptr(), width);
                        from = copy.as_ptr();
                    }
                    *sums = PARTS.map(|v| _mm256_loadu_ps(from.add(v)));
                }
            }
            let of_rows = |from: *const f32, i: usize| {
                PARTS.map(|v| _mm256_load_ps(from.add(i * BYTE_WIDTH + first + v)))
            };
            for b in 0..self.tile.blocks {
                for part in 0..F::PARTS {
                    let quad = (b * F::PARTS + part) * (QUADS / F::PARTS);
                    let w = self.tile.words.add(quad * BYTE_WIDTH + first);
                    let acc = products::<F, N>(w, x.quads.add(quad), x.stride);
                    let steps = of_rows(self.tile.steps, b * F::PARTS + part);
                    for (t, (sums, acc)) in sums.iter_mut().zip(acc).enumerate() {
                        let at = t * x.stride + b;
                        let x_step = _mm256_broadcast_ss(&*x.steps.add(at));
                        for ((sum, acc), step) in sums.iter_mut().zip(acc).zip(steps) {
                            let mut product = _mm256_cvtepi32_ps(acc);
                            if !F::FULL && F::OFFSET > 0 {
                                // Integers below 2²⁴: exact.
                                let offset = _mm256_set1_ps(f32::from(F::OFFSET));
                                let x_sum = x_sums::<F>(x, at)[part];
                                product = _mm256_fnmadd_ps(offset, x_sum, product);
                            }
                            let step = _mm256_mul_ps(step, x_step);
                            *sum = _mm256_fmadd_ps(product, step, *sum);
                        }
                    }
                }
                if F::MINS {
                    let mins: [_; 2] = std::array::from_fn(|part| {
                        of_rows(self.tile.mins, b * F::PARTS + part.min(F::PARTS - 1))
                    });
                    for (t, sums) in sums.iter_mut().enumerate() {
                        let x_sums = scaled_sums::<F>(x, t * x.stride + b);
                        for (mins, x_sum) in mins.into_iter().zip(x_sums).take(F::PARTS) {
                            for (sum, min) in sums.iter_mut().zip(mins) {
                                *sum = _mm256_fmadd_ps(min, x_sum, *sum);
                            }
                        }
                    }
                }
            }
            for (t, sums) in sums.into_iter().enumerate() {
                let to = y.wrapping_add(t * stride);
                if width == LANES {
                    store_sums(sums, to);
                } else {
                    let mut copy = [0.0f32; LANES];
                    store_sums(sums, copy.as_mut_ptr());
                    std::ptr::copy_nonoverlapping(copy.as_ptr(), to, width);
                }
            }
        }
    }
}

/// Integers of a block or of a half of it in two registers of W, as they are stored, times those of `N` rows of X.
///
/// # Safety
/// The words must be there. The CPU must have AVX2, FMA and F16C.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn products<F: Format, const N: usize>(
    w: *const f32,
    x: *const f32,
    x_stride: usize,
) -> [[__m256i; 2]; N] {
    let mut acc = [[_mm256_setzero_si256(); 2]; N];
    for q in (0..QUADS / F::PARTS).step_by(F::WORDS) {
        // SAFETY: the caller's promise.
        unsafe {
            let (w, x) = (w.add(q * BYTE_WIDTH), x.add(q));
            match F::WORDS {
                1 => add_signed(&mut acc, w, x, x_stride),
                2 => add_two(&mut acc, w, x, x_stride),
                4 => add(&mut acc, words::<N, 4>(w, x, x_stride)),
                8 => add(&mut acc, words::<N, 8>(w, x, x_stride)),
                _ => unreachable!("{} words at a time", F::WORDS),
            }
        }
    }
    acc
}

/// Adds neighbours of words of 16 bits.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn add<const N: usize>(acc: &mut [[__m256i; 2]; N], words: [[__m256i; 2]; N]) {
    let ones = _mm256_set1_epi16(1);
    for (acc, words) in acc.iter_mut().zip(words) {
        for (acc, words) in acc.iter_mut().zip(words) {
            *acc = _mm256_add_epi32(*acc, _mm256_madd_epi16(words, ones));
        }
    }
}

// All of these are in assembly, because compilers take one row of X after the other, and keep W in memory meanwhile.

/// A tile of `$n` rows of X in assembly: `$words` is a macro of instructions that is given the numbers of a row's two sums, and where it begins.
macro_rules! tile {
    ($n:expr, $w:ident, $x:ident, $stride:ident, $acc:ident, [$($rest:tt)*], $words:ident $($q:literal)*) => {
        match $n {
            1 => tile!($w, $x, $stride, $acc, [$($rest)*], $words [$($q)*] [0 1 "{x0}"] 0),
            2 => tile!($w, $x, $stride, $acc, [$($rest)*], $words [$($q)*] [0 1 "{x0}" 2 3 "{x0} + {s}"] 0 1),
            3 => tile!(
                $w, $x, $stride, $acc, [$($rest)*], $words [$($q)*]
                [0 1 "{x0}" 2 3 "{x0} + {s}" 4 5 "{x0} + 2 * {s}"] 0 1 2
            ),
            4 => tile!(
                $w, $x, $stride, $acc, [$($rest)*], $words [$($q)*]
                [0 1 "{x0}" 2 3 "{x0} + {s}" 4 5 "{x0} + 2 * {s}" 6 7 "{x3}"] 0 1 2 3
            ),
            n => unreachable!("a tile of {n} rows"),
        }
    };
    ($w:ident, $x:ident, $stride:ident, $acc:ident, [$($rest:tt)*], $words:ident [$($q:literal)*] $rows:tt $($t:literal)*) => {
        asm!(
            $($words!($q, $rows),)*
            // Few rows do not need all of these.
            "/* {s} {x3} */",
            $(inout(ymm_reg) $acc[$t][0], inout(ymm_reg) $acc[$t][1],)*
            $($rest)*
            w = in(reg) $w,
            x0 = in(reg) $x,
            x3 = in(reg) $x.wrapping_add(3 * $stride),
            s = in(reg) 4 * $stride,
            options(pure, readonly, nostack, preserves_flags)
        )
    };
}

/// A word of both registers of W times one of each row of X, added in 16 bits.
macro_rules! word {
    ($q:literal, [$($first:literal $second:literal $row:literal)*]) => {
        concat!(
            "vmovdqa {w0}, [{w} + 128 * ", $q, "]\n",
            "vmovdqa {w1}, [{w} + 128 * ", $q, " + 32]\n",
            $(
                "vpbroadcastd {x}, dword ptr [", $row, " + 4 * ", $q, "]\n",
                "vpmaddubsw {p0}, {w0}, {x}\n",
                "vpmaddubsw {p1}, {w1}, {x}\n",
                "vpaddw {", $first, "}, {", $first, "}, {p0}\n",
                "vpaddw {", $second, "}, {", $second, "}, {p1}\n",
            )*
        )
    };
}

/// `W` words, four or eight, times those of `N` rows of X in 16 bits.
///
/// # Safety
/// As for [`products`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn words<const N: usize, const W: usize>(
    w: *const f32,
    x: *const f32,
    x_stride: usize,
) -> [[__m256i; 2]; N] {
    const { assert!(BYTE_WIDTH == 32 && N <= TILE_HEIGHT) };
    let mut acc = [[_mm256_setzero_si256(); 2]; N];
    // `out(ymm_reg) _` has no type that says how wide the register is.
    let mut s = [_mm256_setzero_si256(); 5];
    macro_rules! add_words {
        ($($q:literal)*) => {
            tile!(N, w, x, x_stride, acc, [
                w0 = out(ymm_reg) s[0], w1 = out(ymm_reg) s[1], x = out(ymm_reg) s[2], p0 = out(ymm_reg) s[3], p1 = out(ymm_reg) s[4],
            ], word $($q)*)
        };
    }
    // SAFETY: reads the words only.
    unsafe {
        match W {
            4 => add_words!(0 1 2 3),
            8 => add_words!(0 1 2 3 4 5 6 7),
            _ => unreachable!("{W} words at a time"),
        }
    }
    let _ = s;
    acc
}

/// Two words of both registers of W, from `$q` on, times those of each row of X: added in 16 bits, then in 32.
macro_rules! two_words {
    ($q:literal, [$($first:literal $second:literal $row:literal)*]) => {
        concat!(
            "vmovdqa {w0}, [{w} + 128 * ", $q, "]\n",
            "vmovdqa {w1}, [{w} + 128 * ", $q, " + 32]\n",
            "vmovdqa {w2}, [{w} + 128 * ", $q, " + 128]\n",
            "vmovdqa {w3}, [{w} + 128 * ", $q, " + 160]\n",
            $(
                "vpbroadcastd {p1}, dword ptr [", $row, " + 4 * ", $q, "]\n",
                "vpbroadcastd {p3}, dword ptr [", $row, " + 4 * ", $q, " + 4]\n",
                "vpmaddubsw {p0}, {w0}, {p1}\n",
                "vpmaddubsw {p1}, {w1}, {p1}\n",
                "vpmaddubsw {p2}, {w2}, {p3}\n",
                "vpmaddubsw {p3}, {w3}, {p3}\n",
                "vpaddw {p0}, {p0}, {p2}\n",
                "vpaddw {p1}, {p1}, {p3}\n",
                "vpmaddwd {p0}, {p0}, [{ones}]\n",
                "vpmaddwd {p1}, {p1}, [{ones}]\n",
                "vpaddd {", $first, "}, {", $first, "}, {p0}\n",
                "vpaddd {", $second, "}, {", $second, "}, {p1}\n",
            )*
        )
    };
}

/// Adds products of two words.
///
/// # Safety
/// As for [`products`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_two<const N: usize>(
    acc: &mut [[__m256i; 2]; N],
    w: *const f32,
    x: *const f32,
    x_stride: usize,
) {
    const { assert!(BYTE_WIDTH == 32 && N <= TILE_HEIGHT) };
    let mut s = [_mm256_setzero_si256(); 8];
    // SAFETY: reads the words only.
    unsafe {
        tile!(N, w, x, x_stride, acc, [
            w0 = out(ymm_reg) s[0], w1 = out(ymm_reg) s[1], w2 = out(ymm_reg) s[2], w3 = out(ymm_reg) s[3],
            p0 = out(ymm_reg) s[4], p1 = out(ymm_reg) s[5], p2 = out(ymm_reg) s[6], p3 = out(ymm_reg) s[7],
            ones = in(reg) &raw const ONES,
        ], two_words 0);
    }
    let _ = s;
}

/// Words of 16 bits.
static ONES: Line<i16> = Line([1; 16]);

/// A word of both registers of W with its signs times one of each row of X.
macro_rules! signed_word {
    ($q:literal, [$($first:literal $second:literal $row:literal)*]) => {
        concat!(
            "vmovdqa {w0}, [{w} + 128 * ", $q, "]\n",
            "vmovdqa {w1}, [{w} + 128 * ", $q, " + 32]\n",
            "vpabsb {a0}, {w0}\n",
            "vpabsb {a1}, {w1}\n",
            $(
                "vpbroadcastd {p1}, dword ptr [", $row, " + 4 * ", $q, "]\n",
                "vpsignb {p0}, {p1}, {w0}\n",
                "vpsignb {p1}, {p1}, {w1}\n",
                "vpmaddubsw {p0}, {a0}, {p0}\n",
                "vpmaddubsw {p1}, {a1}, {p1}\n",
                "vpmaddwd {p0}, {p0}, {ones}\n",
                "vpmaddwd {p1}, {p1}, {ones}\n",
                "vpaddd {", $first, "}, {", $first, "}, {p0}\n",
                "vpaddd {", $second, "}, {", $second, "}, {p1}\n",
            )*
        )
    };
}

/// Adds products of a word whose integers have a sign.
///
/// # Safety
/// As for [`products`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn add_signed<const N: usize>(
    acc: &mut [[__m256i; 2]; N],
    w: *const f32,
    x: *const f32,
    x_stride: usize,
) {
    const { assert!(BYTE_WIDTH == 32 && N <= TILE_HEIGHT) };
    let mut s = [_mm256_setzero_si256(); 6];
    // SAFETY: reads the words only.
    unsafe {
        tile!(N, w, x, x_stride, acc, [
            w0 = out(ymm_reg) s[0], w1 = out(ymm_reg) s[1], a0 = out(ymm_reg) s[2], a1 = out(ymm_reg) s[3],
            p0 = out(ymm_reg) s[4], p1 = out(ymm_reg) s[5],
            ones = in(ymm_reg) _mm256_set1_epi16(1),
        ], signed_word 0);
    }
    let _ = s;
}

/// Sums of integers of X, of a block or of its halves.
///
/// # Safety
/// They must be there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn x_sums<F: Format>(x: ByteRows, at: usize) -> [__m256; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let sum = _mm256_broadcast_ss(&*x.sums.add(at));
        if F::FACTORS {
            let first = _mm256_broadcast_ss(&*x.firsts.add(at));
            return [first, _mm256_sub_ps(sum, first)];
        }
        [sum; 2]
    }
}

/// The same times their step.
///
/// # Safety
/// As for [`x_sums`].
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn scaled_sums<F: Format>(x: ByteRows, at: usize) -> [__m256; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let step = _mm256_broadcast_ss(&*x.steps.add(at));
        let sum = _mm256_mul_ps(_mm256_broadcast_ss(&*x.sums.add(at)), step);
        if F::FACTORS {
            let first = _mm256_mul_ps(_mm256_broadcast_ss(&*x.firsts.add(at)), step);
            return [first, _mm256_sub_ps(sum, first)];
        }
        [sum; 2]
    }
}

/// Writes a line.
///
/// # Safety
/// There must be room.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn store_sums(sums: [__m256; 2], to: *mut f32) {
    for (sum, v) in sums.into_iter().zip(PARTS) {
        // SAFETY: the caller's promise.
        unsafe { _mm256_storeu_ps(to.add(v), sum) };
    }
}
