//! Products in bytes of a few rows of X with weights that are turned in registers: the same operations on each element as in a tile of
//! [bytes](super::bytes), so the same bits.
//!
//! Lanes are rows of W from the beginning ([`wide`](super::wide)): a word of X meets sixteen of them, and nothing is added across. Blocks meet
//! all rows of X as soon as they are turned: nothing of W is written, as it is to a panel. As in [dot products](super::dot) the weights are the operand without
//! a sign; what they are more than they stand for is subtracted from the sum.

use super::super::avx2::formats::{Format, Visit};
use super::super::bytes::{ByteRows, QUADS};
use super::super::{BLOCK, Dots, Rows, by_height};
use super::bytes::OFFSET;
use super::two::{self, ROWS, Two, for_each_two, sixteens};
use super::wide::Quads;
use crate::kernels::room;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Rows of X that are multiplied at a time. Each has two sums of integers, one for each of two blocks or halves: with more of them there is no room for W.
pub(in super::super) const MOST_TURNED: usize = 8;

/// [`Dots`] of rows of X that were rounded to 8 bits, [`MOST_TURNED`] at most.
pub(in super::super) struct TurnedDots(pub(in super::super) Dots);

thread_local! {
    /// [`XBlock`]s: what a thread keeps between calls.
    static BLOCKS: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

impl Visit for TurnedDots {
    type Output = ();

    unsafe fn visit<F: Format>(self) {
        BLOCKS.with_borrow_mut(|blocks| {
            let with_x = WithRoom(self.0, blocks);
            // SAFETY: the caller's promise.
            unsafe { by_height!(with_x.fixed::<F>, with_x.0.t, 1 2 3 4 5 6 7 8) }
        });
    }
}

/// With memory for blocks of X.
struct WithRoom<'a>(Dots, &'a mut Vec<f32>);

impl WithRoom<'_> {
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn fixed<F: Format, const N: usize>(self) {
        let Self(dots, room_of_x) = self;
        let Dots {
            first,
            row_bytes,
            rows,
            k,
            y,
            y_stride,
            ..
        } = dots;
        let x = ByteRows::new(Rows::of_bytes(dots.x, N, k));
        let words = k / BLOCK * size_of::<XBlock<N>>() / size_of::<f32>();
        let blocks: *mut XBlock<N> = room(room_of_x, words).as_mut_ptr().cast();
        for b in 0..k / BLOCK {
            // SAFETY: a block of X, and room for it.
            unsafe { XBlock::write::<F>(blocks.add(b), x, b) };
        }
        for (i, sixteen) in sixteens(first, row_bytes, rows).enumerate() {
            let row = i * ROWS;
            let there = ((1u32 << (rows - row).min(ROWS)) - 1) as __mmask16;
            let mut products = Products {
                x: blocks,
                sums: [_mm512_setzero_ps(); N],
            };
            // SAFETY: rows of W, and elements of Y; those that it does not have are masked.
            unsafe {
                for_each_two::<F, _>(sixteen, row_bytes, k / BLOCK, &mut products);
                for (t, sum) in products.sums.into_iter().enumerate() {
                    _mm512_mask_storeu_ps(y.wrapping_add(t * y_stride + row), there, sum);
                }
            }
        }
    }
}

/// A block of `N` rows of X: what is read together stands together.
#[repr(C)]
struct XBlock<const N: usize> {
    /// The integers, with their sign.
    quads: [[i32; QUADS]; N],
    /// What sums begin with, of a block or of its halves: minus what the integers of W are more than they stand for. Not written where they are not.
    starts: [[i32; N]; 2],
    steps: [f32; N],
    /// What the minimum of a block is multiplied with, or those of its halves.
    sums: [[f32; N]; 2],
}

impl<const N: usize> XBlock<N> {
    /// Block `b` of X, for weights of this format.
    ///
    /// # Safety
    /// There must be room, and the rows have the block.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn write<F: Format>(to: *mut Self, x: ByteRows, b: usize) {
        // SAFETY: the caller's promise; all bits are numbers.
        let to = unsafe { &mut *to };
        for t in 0..N {
            let at = t * x.stride + b;
            // SAFETY: the caller's promise.
            unsafe {
                let unsigned = _mm256_loadu_si256(x.quads.add(t * x.stride + b * QUADS).cast());
                let signed = _mm256_xor_si256(unsigned, _mm256_set1_epi8(OFFSET));
                _mm256_storeu_si256(to.quads[t].as_mut_ptr().cast(), signed);
                if F::OFFSET > 0 {
                    let starts = starts::<F>(signed);
                    (to.starts[0][t], to.starts[1][t]) = (starts[0], starts[1]);
                }
                to.steps[t] = *x.steps.add(at);
                if F::MINS {
                    let sum = *x.sums.add(at);
                    let first = *x.firsts.add(at);
                    (to.sums[0][t], to.sums[1][t]) = match F::FACTORS {
                        true => (first, sum - first),
                        false => (sum, 0.0),
                    };
                }
            }
        }
    }
}

/// What sums of products with these integers of X begin with.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn starts<F: Format>(x: __m256i) -> [i32; 2] {
    let offset = _mm256_set1_epi8(F::OFFSET.cast_signed());
    let more = _mm256_dpbusd_epi32(_mm256_setzero_si256(), offset, x);
    let pairs = _mm256_hadd_epi32(more, more);
    let halves = _mm256_hadd_epi32(pairs, pairs);
    let (first, second) = (
        _mm256_extract_epi32::<0>(halves),
        _mm256_extract_epi32::<4>(halves),
    );
    match F::FACTORS {
        true => [-first, -second],
        false => [-(first + second), 0],
    }
}

/// Sums of products of sixteen rows of W with `N` of X. Lanes are rows of W.
struct Products<const N: usize> {
    x: *const XBlock<N>,
    sums: [__m512; N],
}

impl<const N: usize> two::Visit for Products<N> {
    const AHEAD: usize = ROWS;
    const SOON: bool = true;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn visit<F: Format, const I: usize>(&mut self, two: Two<I>) {
        // SAFETY: the caller's promise; X has the blocks.
        unsafe {
            let quads = two.quads::<F>();
            let x = [0, two.there - 1].map(|b| &*self.x.add(two.first + b));
            if F::FACTORS {
                self.add_halves::<F, I>(&two, 0, quads[0], x[0]);
                if two.there == 2 {
                    self.add_halves::<F, I>(&two, 1, quads[1], x[1]);
                }
            } else {
                let mut acc = [[_mm512_setzero_si512(); N]; 2];
                start::<F, N>(&mut acc, [&x[0].starts[0], &x[1].starts[0]]);
                let words = x.map(|x| x.quads.as_ptr().cast::<i32>());
                for (i, (first, second)) in quads[0].into_iter().zip(quads[1]).enumerate() {
                    add_quads(&mut acc, [first, second], words.map(|x| x.add(i)));
                }
                self.add(two.steps::<F>(0, 0), acc[0], x[0]);
                self.add_mins::<F, I>(&two, 0, x[0]);
                if two.there == 2 {
                    self.add(two.steps::<F>(1, 0), acc[1], x[1]);
                    self.add_mins::<F, I>(&two, 1, x[1]);
                }
            }
        }
    }
}

impl<const N: usize> Products<N> {
    /// Adds the products of block `b` of two, whose halves have steps.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn add_halves<F: Format, const I: usize>(
        &mut self,
        two: &Two<I>,
        b: usize,
        quads: Quads,
        x: &XBlock<N>,
    ) {
        let mut acc = [[_mm512_setzero_si512(); N]; 2];
        start::<F, N>(&mut acc, [&x.starts[0], &x.starts[1]]);
        let words: *const i32 = x.quads.as_ptr().cast();
        for i in 0..QUADS / 2 {
            let j = QUADS / 2 + i;
            // SAFETY: words of the block.
            unsafe { add_quads(&mut acc, [quads[i], quads[j]], [words.add(i), words.add(j)]) };
        }
        self.add(two.steps::<F>(b, 0), acc[0], x);
        self.add(two.steps::<F>(b, 1), acc[1], x);
        self.add_mins::<F, I>(two, b, x);
    }

    /// Adds sums of products of integers of a block, or of half of it.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn add(&mut self, step: __m512, products: [__m512i; N], x: &XBlock<N>) {
        for (t, (sum, products)) in self.sums.iter_mut().zip(products).enumerate() {
            let step = _mm512_mul_ps(step, _mm512_set1_ps(x.steps[t]));
            *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), step, *sum);
        }
    }

    /// Adds what the minimums of a block give, if it has any.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    fn add_mins<F: Format, const I: usize>(&mut self, two: &Two<I>, b: usize, x: &XBlock<N>) {
        if F::MINS {
            for part in 0..F::PARTS {
                let min = two.mins::<F>(b, part);
                for (sum, x_sum) in self.sums.iter_mut().zip(x.sums[part]) {
                    *sum = _mm512_fmadd_ps(min, _mm512_set1_ps(x_sum), *sum);
                }
            }
        }
    }
}

/// Sets sums of zero to what they begin with.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
fn start<F: Format, const N: usize>(acc: &mut [[__m512i; N]; 2], starts: [&[i32; N]; 2]) {
    if F::OFFSET > 0 {
        for (acc, starts) in acc.iter_mut().zip(starts) {
            for (acc, start) in acc.iter_mut().zip(starts) {
                *acc = _mm512_set1_epi32(*start);
            }
        }
    }
}

/// Adds products of a word of each of two blocks or halves of W with those of `N` rows of X, of which the first ones are at `x`. Two, because an instruction waits for
/// the one before that adds to the same sum, and sums of one are too few to keep both multipliers busy meanwhile.
///
/// In assembly, so that words of X are operands in memory, whatever CPU the compiler has in mind.
///
/// # Safety
/// X must have the words.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn add_quads<const N: usize>(
    acc: &mut [[__m512i; N]; 2],
    w: [__m512i; 2],
    x: [*const i32; 2],
) {
    const { assert!(QUADS == 8 && N <= MOST_TURNED) };
    // A row of X, and the numbers of its two sums.
    macro_rules! rows {
        ($($t:literal $first:literal $second:literal),*) => {
            asm!(
                concat!($(
                    "vpdpbusd {", $first, "}, {w0}, dword ptr [{x0} + 32 * ", $t, "]{{1to16}}\n",
                    "vpdpbusd {", $second, "}, {w1}, dword ptr [{x1} + 32 * ", $t, "]{{1to16}}\n",
                )*),
                $(inout(zmm_reg) acc[0][$t], inout(zmm_reg) acc[1][$t],)*
                w0 = in(zmm_reg) w[0],
                w1 = in(zmm_reg) w[1],
                x0 = in(reg) x[0],
                x1 = in(reg) x[1],
                options(pure, readonly, nostack, preserves_flags)
            )
        };
    }
    // SAFETY: reads the words only.
    unsafe {
        match N {
            1 => rows!(0 0 1),
            2 => rows!(0 0 1, 1 2 3),
            3 => rows!(0 0 1, 1 2 3, 2 4 5),
            4 => rows!(0 0 1, 1 2 3, 2 4 5, 3 6 7),
            5 => rows!(0 0 1, 1 2 3, 2 4 5, 3 6 7, 4 8 9),
            6 => rows!(0 0 1, 1 2 3, 2 4 5, 3 6 7, 4 8 9, 5 10 11),
            7 => rows!(0 0 1, 1 2 3, 2 4 5, 3 6 7, 4 8 9, 5 10 11, 6 12 13),
            8 => rows!(0 0 1, 1 2 3, 2 4 5, 3 6 7, 4 8 9, 5 10 11, 6 12 13, 7 14 15),
            _ => unreachable!("{N} rows of X at a time"),
        }
    }
}
