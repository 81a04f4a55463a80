//! Pairs of rows as BF16, value by value beside each other, which is what the dot product of pairs takes.
//!
//! The types of common files have functions of their own. Where a block knows 16 or 32 values only, they are computed
//! first, those of both rows in one vector, and quants become indices into it.

use super::{GgmlType, MAX_COLUMNS, NR, Tile};
use std::arch::x86_64::*;

/// Writes a tile as panels of [`NR`] columns, `panel` words apart: a row of [`NR`] words for each pair of rows of the
/// tile, the first one's value in the lower half. An odd last row is its own partner.
///
/// # Safety
/// The tile must lie in a matrix, `to` have room for its panels, the last one complete; the CPU must have
/// [`CpuLevel::Avx512Bf16`](crate::ggml::CpuLevel).
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
pub(in super::super) unsafe fn to_bf16_pairs(tile: &Tile, to: *mut u32, panel: usize) {
    // SAFETY: the caller's promise; each function reads one block of its type.
    unsafe {
        match tile.ty {
            GgmlType::BF16 if tile.k.is_multiple_of(NR) => {
                blocks(tile, to, panel, |w, to| bf16(w, to));
            }
            GgmlType::Q4_0 => blocks(tile, to, panel, |w, to| q4_0(w, to)),
            GgmlType::Q4_1 => blocks(tile, to, panel, |w, to| q4_1(w, to)),
            GgmlType::Q5_0 => blocks(tile, to, panel, |w, to| q5_0(w, to)),
            GgmlType::Q5_1 => blocks(tile, to, panel, |w, to| q5_1(w, to)),
            GgmlType::Q8_0 => blocks(tile, to, panel, |w, to| q8_0(w, to)),
            GgmlType::Q2_K => blocks(tile, to, panel, |w, to| q2_k(w, to, panel)),
            GgmlType::Q3_K => blocks(tile, to, panel, |w, to| q3_k(w, to, panel)),
            GgmlType::Q4_K => blocks(tile, to, panel, |w, to| q4_k(w, to, panel)),
            GgmlType::Q5_K => blocks(tile, to, panel, |w, to| q5_k(w, to, panel)),
            GgmlType::Q6_K => blocks(tile, to, panel, |w, to| q6_k(w, to, panel)),
            GgmlType::IQ4_NL => blocks(tile, to, panel, |w, to| iq4_nl(w, to)),
            GgmlType::IQ4_XS => blocks(tile, to, panel, |w, to| iq4_xs(w, to, panel)),
            _ => any(tile, to, panel),
        }
    }
}

/// Calls `f` with each pair of blocks, or of [`NR`] values if blocks are smaller, and where its words go.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn blocks(tile: &Tile, to: *mut u32, panel: usize, f: impl Fn([*const u8; 2], *mut u32)) {
    let columns = NR.max(tile.ty.block_size() as usize);
    let bytes = columns / tile.ty.block_size() as usize * tile.ty.type_size() as usize;
    for n in (0..tile.n).step_by(2) {
        let second = (n + 1).min(tile.n - 1);
        // SAFETY: rows of the tile, their blocks, and the panels of a block.
        unsafe {
            tile.prefetch_after(n);
            tile.prefetch_after(second);
            let w = [tile.row(n), tile.row(second)];
            for block in 0..tile.k / columns {
                let to = to.add(block * (columns / NR) * panel + n / 2 * NR);
                f(w.map(|w| w.add(block * bytes)), to);
            }
        }
    }
}

/// Any type, by way of F32.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn any(tile: &Tile, to: *mut u32, panel: usize) {
    let mut rows = [[0.0f32; MAX_COLUMNS]; 2];
    for n in (0..tile.n).step_by(2) {
        for (i, row) in rows.iter_mut().enumerate() {
            // SAFETY: a row of the tile.
            unsafe {
                let n = (n + i).min(tile.n - 1);
                tile.prefetch_after(n);
                let from = tile.row(n);
                (tile.to_f32)(tile.ty, from, row.as_mut_ptr(), tile.k);
            }
        }
        for j in (0..tile.k).step_by(16) {
            // SAFETY: 16 columns of both rows, and their words in a panel.
            unsafe {
                let [a, b] = [0, 1].map(|i| _mm512_loadu_ps(rows[i].as_ptr().add(j)));
                store_rounded(a, b, to.add(j / NR * panel + n / 2 * NR + j % NR));
            }
        }
    }
}

/// `[table of row 0 (16), table of row 1 (16)]` of 16 columns.
const INTERLEAVE: [u16; 32] = {
    let mut lanes = [0; 32];
    let mut i = 0;
    while i < 32 {
        lanes[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    lanes
};

/// Byte `column` of row 0 in even 16-bit lanes, of row 1 (`row` bytes further) in odd ones, for 16 columns.
const fn spread(column: u8, row: u8) -> [u8; 64] {
    let mut bytes = [0; 64];
    let mut i = 0;
    while i < 64 {
        bytes[i] = column + (i / 4) as u8 + if i % 4 < 2 { 0 } else { row };
        i += 1;
    }
    bytes
}

/// 0, 1, ... 15.
const COUNT: [f32; 16] = {
    let mut lanes = [0.0; 16];
    let mut i = 0;
    while i < 16 {
        lanes[i] = i as f32;
        i += 1;
    }
    lanes
};

/// A constant as a vector.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
fn vector<T, const N: usize>(lanes: &[T; N]) -> __m512i {
    const { assert!(size_of::<[T; N]>() == 64) };
    // SAFETY: 64 bytes.
    unsafe { _mm512_loadu_si512(lanes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
fn count() -> __m512 {
    _mm512_castsi512_ps(vector(&COUNT))
}

/// Both rounded to BF16, `a` in the lower half.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
fn round(a: __m512, b: __m512) -> __m512i {
    // SAFETY: plain vectors of one size.
    unsafe { std::mem::transmute(_mm512_cvtne2ps_pbh(b, a)) }
}

/// 16 columns of two rows.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn store_rounded(row0: __m512, row1: __m512, to: *mut u32) {
    // SAFETY: the caller has room for 16 words.
    unsafe {
        let words = _mm512_permutexvar_epi16(vector(&INTERLEAVE), round(row0, row1));
        _mm512_storeu_si512(to.cast(), words);
    }
}

/// 16 columns of two rows: signed quants times a factor for each row.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn store_scaled(quants: [__m128i; 2], factors: [f32; 2], to: *mut u32) {
    // SAFETY: the caller has room for 16 words.
    unsafe {
        let scaled = |i: usize| {
            let q = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(quants[i]));
            _mm512_mul_ps(q, _mm512_set1_ps(factors[i]))
        };
        store_rounded(scaled(0), scaled(1), to);
    }
}

/// 32 columns of two rows: `f` of quants, row and half, for 16 columns each. 32 signed bytes of each row.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn store_bytes(quants: __m512i, to: *mut u32, f: impl Fn(__m512, usize, usize) -> __m512) {
    // SAFETY: the caller has room for 32 words.
    unsafe {
        let values = |q| _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(q));
        let row0 = values(_mm512_castsi512_si128(quants));
        let row1 = values(_mm512_extracti32x4_epi32::<2>(quants));
        store_rounded(f(row0, 0, 0), f(row1, 1, 0), to);
        let row0 = values(_mm512_extracti32x4_epi32::<1>(quants));
        let row1 = values(_mm512_extracti32x4_epi32::<3>(quants));
        store_rounded(f(row0, 0, 1), f(row1, 1, 1), to.add(16));
    }
}

/// 16 columns of two rows: the lower 4 bits of each 16-bit lane are an index into the row's half of the table.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn store_looked_up(table: __m512i, nibbles: __m512i, to: *mut u32) {
    // SAFETY: the caller has room for 16 words. 0xea is (a and b) or c.
    unsafe {
        let (low, second) = (_mm512_set1_epi16(15), _mm512_set1_epi32(16 << 16));
        let index = _mm512_ternarylogic_epi32::<0xea>(nibbles, low, second);
        _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(index, table));
    }
}

/// 32 columns of two rows: 16 bytes of quants, first the lower halves.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn store_nibbles(table: __m512i, w: [*const u8; 2], offset: usize, to: *mut u32) {
    // SAFETY: the caller's bytes and words.
    unsafe {
        let quants = load_16(w, offset);
        let nibbles = _mm512_permutexvar_epi8(vector(&const { spread(0, 16) }), quants);
        store_looked_up(table, nibbles, to);
        store_looked_up(table, _mm512_srli_epi16::<4>(nibbles), to.add(16));
    }
}

/// 32 columns of two rows: 32 fifth bits, then 16 bytes of lower bits as in `store_nibbles`. A table for each row.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn store_five_bits(tables: [__m512i; 2], w: [*const u8; 2], offset: usize, to: *mut u32) {
    // SAFETY: the caller's bytes and words. 0xea is (a and b) or c.
    unsafe {
        let [a, b] = w.map(|w| w.add(offset).cast::<u32>().read_unaligned());
        let quants = load_16(w, offset + 4);
        let nibbles = _mm512_permutexvar_epi8(vector(&const { spread(0, 16) }), quants);
        let (low, second) = (_mm512_set1_epi16(15), _mm512_set1_epi32(32 << 16));
        for (i, nibbles) in [nibbles, _mm512_srli_epi16::<4>(nibbles)]
            .into_iter()
            .enumerate()
        {
            let (a, b) = (a >> (16 * i), b >> (16 * i));
            let fifth = _pdep_u32(a, 0x5555_5555) | _pdep_u32(b, 0xaaaa_aaaa);
            let index = _mm512_ternarylogic_epi32::<0xea>(nibbles, low, second);
            let index = _mm512_or_si512(index, _mm512_maskz_set1_epi16(fifth, 16));
            let words = _mm512_permutex2var_epi16(tables[0], index, tables[1]);
            _mm512_storeu_si512(to.add(16 * i).cast(), words);
        }
    }
}

/// An F16 value of two rows. Put together as integers: a load of two bytes into a vector waits for the register's last
/// value, and with it for the blocks before.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn f16(w: [*const u8; 2], offset: usize) -> [f32; 2] {
    // SAFETY: the caller's bytes.
    unsafe {
        let [a, b] = w.map(|w| u32::from(w.add(offset).cast::<u16>().read_unaligned()));
        let both = _mm_cvtph_ps(_mm_cvtsi32_si128((a | b << 16) as i32));
        [_mm_cvtss_f32(both), _mm_cvtss_f32(_mm_movehdup_ps(both))]
    }
}

/// 16 bytes of two rows, the second above the first.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn load_16(w: [*const u8; 2], offset: usize) -> __m512i {
    // SAFETY: the caller's bytes.
    unsafe {
        let [a, b] = w.map(|w| _mm_loadu_si128(w.add(offset).cast()));
        _mm512_castsi256_si512(_mm256_set_m128i(b, a))
    }
}

/// 32 bytes of two rows, the second above the first.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn load_32(w: [*const u8; 2], offset: usize) -> __m512i {
    // SAFETY: the caller's bytes.
    unsafe {
        let [a, b] = w.map(|w| _mm256_loadu_si256(w.add(offset).cast()));
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(a), b)
    }
}

/// 32 values.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn bf16(w: [*const u8; 2], to: *mut u32) {
    // SAFETY: the caller's 64 bytes, and 32 words.
    unsafe {
        for i in [0, 16] {
            let words = _mm512_permutexvar_epi16(vector(&INTERLEAVE), load_32(w, 2 * i));
            _mm512_storeu_si512(to.add(i).cast(), words);
        }
    }
}

/// F16 d; 32 quants of 4 bits, first the lower halves of the bytes: `d * (q - 8)`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q4_0(w: [*const u8; 2], to: *mut u32) {
    // SAFETY: the caller's blocks of 18 bytes, and 32 words.
    unsafe {
        let centred = _mm512_sub_ps(count(), _mm512_set1_ps(8.0));
        let [a, b] = f16(w, 0).map(|d| _mm512_mul_ps(centred, _mm512_set1_ps(d)));
        store_nibbles(round(a, b), w, 2, to);
    }
}

/// F16 d and m; quants as in Q4_0: `d * q + m`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q4_1(w: [*const u8; 2], to: *mut u32) {
    // SAFETY: the caller's blocks of 20 bytes, and 32 words.
    unsafe {
        let (d, m) = (f16(w, 0), f16(w, 2));
        let row = |i: usize| _mm512_fmadd_ps(count(), _mm512_set1_ps(d[i]), _mm512_set1_ps(m[i]));
        store_nibbles(round(row(0), row(1)), w, 4, to);
    }
}

/// F16 d; 32 fifth bits; quants as in Q4_0: `d * (q - 16)`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q5_0(w: [*const u8; 2], to: *mut u32) {
    // SAFETY: the caller's blocks of 22 bytes, and 32 words.
    unsafe {
        let below = _mm512_sub_ps(count(), _mm512_set1_ps(16.0));
        let tables = f16(w, 0).map(|d| {
            let d = _mm512_set1_ps(d);
            round(_mm512_mul_ps(below, d), _mm512_mul_ps(count(), d))
        });
        store_five_bits(tables, w, 2, to);
    }
}

/// F16 d and m; 32 fifth bits; quants as in Q4_0: `d * q + m`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q5_1(w: [*const u8; 2], to: *mut u32) {
    // SAFETY: the caller's blocks of 24 bytes, and 32 words.
    unsafe {
        let above = _mm512_add_ps(count(), _mm512_set1_ps(16.0));
        let (d, m) = (f16(w, 0), f16(w, 2));
        let row = |i: usize| {
            let (d, m) = (_mm512_set1_ps(d[i]), _mm512_set1_ps(m[i]));
            round(_mm512_fmadd_ps(count(), d, m), _mm512_fmadd_ps(above, d, m))
        };
        store_five_bits([row(0), row(1)], w, 4, to);
    }
}

/// The 16 values of the non-linear types.
const NON_LINEAR: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// F16 d; quants as in Q4_0: `d * value(q)`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn iq4_nl(w: [*const u8; 2], to: *mut u32) {
    // SAFETY: the caller's blocks of 18 bytes, and 32 words.
    unsafe {
        let values = _mm512_castsi512_ps(vector(&NON_LINEAR));
        let [a, b] = f16(w, 0).map(|d| _mm512_mul_ps(values, _mm512_set1_ps(d)));
        store_nibbles(round(a, b), w, 2, to);
    }
}

/// F16 d; upper 2 bits of 8 scales, lower 4 bits of them, 8 x 16 bytes of quants: `d * (scale - 32) * value(q)`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn iq4_xs(w: [*const u8; 2], to: *mut u32, panel: usize) {
    // SAFETY: the caller's blocks of 136 bytes, and 8 x 32 words.
    unsafe {
        let values = _mm512_castsi512_ps(vector(&NON_LINEAR));
        let d = f16(w, 0);
        let scales = |i: usize| {
            let upper = _mm256_set1_epi32(i32::from(w[i].add(2).cast::<u16>().read_unaligned()));
            let lower = _mm256_set1_epi32(w[i].add(4).cast::<i32>().read_unaligned());
            let upper = _mm256_srlv_epi32(upper, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
            let lower = _mm256_srlv_epi32(lower, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
            let upper = _mm256_slli_epi32::<4>(_mm256_and_si256(upper, _mm256_set1_epi32(3)));
            let both = _mm256_or_si256(upper, _mm256_and_si256(lower, _mm256_set1_epi32(15)));
            let both = _mm256_cvtepi32_ps(_mm256_sub_epi32(both, _mm256_set1_epi32(32)));
            let mut out = [0.0f32; 8];
            _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(both, _mm256_set1_ps(d[i])));
            out
        };
        let scales = [scales(0), scales(1)];
        let table = |block: usize| {
            let row = |i: usize| _mm512_mul_ps(values, _mm512_set1_ps(scales[i][block]));
            round(row(0), row(1))
        };
        for block in 0..8 {
            store_nibbles(table(block), w, 8 + 16 * block, to.add(block * panel));
        }
    }
}

/// F16 d; 32 quants of 8 bits: `d * q`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q8_0(w: [*const u8; 2], to: *mut u32) {
    // SAFETY: the caller's blocks of 34 bytes, and 32 words.
    unsafe {
        let d = f16(w, 0);
        for i in [0, 16] {
            let quants = w.map(|w| _mm_loadu_si128(w.add(2 + i).cast()));
            store_scaled(quants, d, to.add(i));
        }
    }
}

/// Scales and minima of the 8 sub-blocks of a Q4_K or Q5_K superblock: F16 d and dmin; then 6 bits each, of the first
/// four in a byte, of the others 4 bits in 4 bytes and 2 bits on top of the first eight.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn scales_k(w: *const u8) -> [f32; 16] {
    // SAFETY: the caller's 16 bytes.
    unsafe {
        let [a, b, c] = w.add(4).cast::<[u32; 3]>().read_unaligned();
        let low = |first: u32| u64::from(first & 0x3f3f_3f3f);
        let high = |first: u32, second: u32| {
            u64::from(second & 0x0f0f_0f0f | first >> 2 & 0x3030_3030) << 32
        };
        let scales = low(a) | high(a, c);
        let minima = low(b) | high(b, c >> 4);
        let both = _mm_set_epi64x(minima as i64, scales as i64);
        let both = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(both));
        let factors = _mm_cvtph_ps(_mm_cvtsi32_si128(w.cast::<i32>().read_unaligned()));
        let halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        let factors = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(factors));
        let mut out = [0.0; 16];
        _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(both, factors));
        out
    }
}

/// F16 d and dmin, scales and minima, 4 x 32 bytes: the lower halves are quants of one sub-block, the upper ones of the
/// next: `d * scale * q - dmin * minimum`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q4_k(w: [*const u8; 2], to: *mut u32, panel: usize) {
    // SAFETY: the caller's blocks of 144 bytes, and 8 x 32 words.
    unsafe {
        let scales = w.map(|w| scales_k(w));
        let table = |block: usize| {
            let [a, b] = [0, 1].map(|i| {
                let (scale, minimum) = (scales[i][block], scales[i][8 + block]);
                _mm512_fmsub_ps(count(), _mm512_set1_ps(scale), _mm512_set1_ps(minimum))
            });
            round(a, b)
        };
        for pair in 0..4 {
            let quants = load_32(w, 16 + 32 * pair);
            let tables = [table(2 * pair), table(2 * pair + 1)];
            let to = [0, 1].map(|i| to.add((2 * pair + i) * panel));
            let spread = [const { spread(0, 32) }, const { spread(16, 32) }];
            for (i, spread) in spread.iter().enumerate() {
                let nibbles = _mm512_permutexvar_epi8(vector(spread), quants);
                store_looked_up(tables[0], nibbles, to[0].add(16 * i));
                let nibbles = _mm512_srli_epi16::<4>(nibbles);
                store_looked_up(tables[1], nibbles, to[1].add(16 * i));
            }
        }
    }
}

/// As Q4_K, with 32 bytes of fifth bits in between: bit `i` of each byte belongs to sub-block `i`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q5_k(w: [*const u8; 2], to: *mut u32, panel: usize) {
    // SAFETY: the caller's blocks of 176 bytes, and 8 x 32 words. 0xea is (a and b) or c.
    unsafe {
        let scales = w.map(|w| scales_k(w));
        let above = _mm512_add_ps(count(), _mm512_set1_ps(16.0));
        let fifth = load_32(w, 16);
        let spread = [const { spread(0, 32) }, const { spread(16, 32) }];
        for pair in 0..4 {
            let quants = load_32(w, 48 + 32 * pair);
            for (i, nibbles) in [quants, _mm512_srli_epi16::<4>(quants)]
                .into_iter()
                .enumerate()
            {
                let block = 2 * pair + i;
                let [a, b] = [0, 1].map(|i| {
                    let scale = _mm512_set1_ps(scales[i][block]);
                    let minimum = _mm512_set1_ps(scales[i][8 + block]);
                    round(
                        _mm512_fmsub_ps(count(), scale, minimum),
                        _mm512_fmsub_ps(above, scale, minimum),
                    )
                });
                let bit = _mm512_set1_epi8(1 << block);
                let bit = _mm512_maskz_set1_epi8(_mm512_test_epi8_mask(fifth, bit), 16);
                let low = _mm512_set1_epi8(15);
                let index = _mm512_ternarylogic_epi32::<0xea>(nibbles, low, bit);
                // The second row's table comes after the first one's.
                let index = _mm512_or_si512(index, _mm512_set_epi64(S, S, S, S, 0, 0, 0, 0));
                for (i, spread) in spread.iter().enumerate() {
                    let index = _mm512_permutexvar_epi8(vector(spread), index);
                    let words = _mm512_permutex2var_epi16(a, index, b);
                    _mm512_storeu_si512(to.add(block * panel + 16 * i).cast(), words);
                }
            }
        }
    }
    /// 32 in every byte.
    const S: i64 = 0x2020_2020_2020_2020;
}

/// 128 bytes of lower 4 bits, 64 bytes of upper 2 bits, 16 scales of 8 bits, F16 d: `d * scale * (q - 32)`, a scale for
/// 16 columns. Each half of the superblock has 4 x 32 columns: lower halves of 64 bytes, then their upper halves;
/// the byte of upper bits is shared by the four.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q6_k(w: [*const u8; 2], to: *mut u32, panel: usize) {
    // SAFETY: the caller's blocks of 210 bytes, and 8 x 32 words. 0xea is (a and b) or c.
    unsafe {
        let d = f16(w, 208);
        let factors = [0, 1].map(|i| {
            let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(w[i].add(192).cast()));
            let scales = _mm512_mul_ps(_mm512_set1_ps(d[i]), _mm512_cvtepi32_ps(scales));
            let mut out = [0.0f32; 16];
            _mm512_storeu_ps(out.as_mut_ptr(), scales);
            out
        });
        for half in 0..2 {
            let lower = [0, 32].map(|i| load_32(w, 64 * half + i));
            let upper = load_32(w, 128 + 32 * half);
            let nibbles = [
                lower[0],
                lower[1],
                _mm512_srli_epi16::<4>(lower[0]),
                _mm512_srli_epi16::<4>(lower[1]),
            ];
            let upper = [
                _mm512_slli_epi16::<4>(upper),
                _mm512_slli_epi16::<2>(upper),
                upper,
                _mm512_srli_epi16::<2>(upper),
            ];
            for i in 0..4 {
                let top = _mm512_and_si512(upper[i], _mm512_set1_epi8(0x30));
                let low = _mm512_set1_epi8(15);
                let quants = _mm512_ternarylogic_epi32::<0xea>(nibbles[i], low, top);
                let quants = _mm512_sub_epi8(quants, _mm512_set1_epi8(32));
                let block = 4 * half + i;
                store_bytes(quants, to.add(block * panel), |q, row, side| {
                    _mm512_mul_ps(q, _mm512_set1_ps(factors[row][2 * block + side]))
                });
            }
        }
    }
}

/// 16 bytes, each 4 bits of scale and of minimum; 64 bytes of quants of 2 bits, F16 d and dmin:
/// `d * scale * q - dmin * minimum`. 4 x 32 columns share 32 bytes.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q2_k(w: [*const u8; 2], to: *mut u32, panel: usize) {
    // SAFETY: the caller's blocks of 84 bytes, and 8 x 32 words.
    unsafe {
        let (d, dmin) = (f16(w, 80), f16(w, 82));
        let factors = |i: usize| {
            let both = _mm512_cvtepu8_epi32(_mm_loadu_si128(w[i].cast()));
            let scales = _mm512_cvtepi32_ps(_mm512_and_si512(both, _mm512_set1_epi32(15)));
            let minima = _mm512_cvtepi32_ps(_mm512_srli_epi32::<4>(both));
            let mut out = [[0.0f32; 16]; 2];
            _mm512_storeu_ps(
                out[0].as_mut_ptr(),
                _mm512_mul_ps(scales, _mm512_set1_ps(d[i])),
            );
            _mm512_storeu_ps(
                out[1].as_mut_ptr(),
                _mm512_mul_ps(minima, _mm512_set1_ps(dmin[i])),
            );
            out
        };
        let factors = [factors(0), factors(1)];
        for half in 0..2 {
            let mut bits = load_32(w, 16 + 32 * half);
            for block in 4 * half..4 * half + 4 {
                let quants = _mm512_and_si512(bits, _mm512_set1_epi8(3));
                store_bytes(quants, to.add(block * panel), |q, row, side| {
                    let [scales, minima] = &factors[row];
                    let at = 2 * block + side;
                    _mm512_fmsub_ps(q, _mm512_set1_ps(scales[at]), _mm512_set1_ps(minima[at]))
                });
                bits = _mm512_srli_epi16::<2>(bits);
            }
        }
    }
}

/// 32 bytes of third bits: bit `i` of each byte belongs to columns `32 * i..`; 64 bytes of lower 2 bits as in Q2_K; 16
/// scales of 6 bits in 12 bytes, F16 d: `d * (scale - 32) * (q - 4)`.
#[inline]
#[target_feature(enable = "f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vbmi")]
unsafe fn q3_k(w: [*const u8; 2], to: *mut u32, panel: usize) {
    // SAFETY: the caller's blocks of 110 bytes, and 8 x 32 words. 0xea is (a and b) or c.
    unsafe {
        let d = f16(w, 108);
        let factors = |i: usize| {
            let [a, b, c] = w[i].add(96).cast::<[u32; 3]>().read_unaligned();
            let scale =
                |low: u32, high: u32| (low & 0x0f0f_0f0f | (high & 0x0303_0303) << 4) as i32;
            let scales = _mm_setr_epi32(
                scale(a, c),
                scale(b, c >> 2),
                scale(a >> 4, c >> 4),
                scale(b >> 4, c >> 6),
            );
            let scales = _mm512_cvtepi8_epi32(_mm_sub_epi8(scales, _mm_set1_epi8(32)));
            let scales = _mm512_mul_ps(_mm512_cvtepi32_ps(scales), _mm512_set1_ps(d[i]));
            let mut out = [0.0f32; 16];
            _mm512_storeu_ps(out.as_mut_ptr(), scales);
            out
        };
        let factors = [factors(0), factors(1)];
        let third = load_32(w, 0);
        for half in 0..2 {
            let mut bits = load_32(w, 32 + 32 * half);
            for block in 4 * half..4 * half + 4 {
                let bit = _mm512_test_epi8_mask(third, _mm512_set1_epi8(1 << block));
                let top = _mm512_maskz_set1_epi8(bit, 4);
                let quants = _mm512_ternarylogic_epi32::<0xea>(bits, _mm512_set1_epi8(3), top);
                let quants = _mm512_sub_epi8(quants, _mm512_set1_epi8(4));
                store_bytes(quants, to.add(block * panel), |q, row, side| {
                    _mm512_mul_ps(q, _mm512_set1_ps(factors[row][2 * block + side]))
                });
                bits = _mm512_srli_epi16::<2>(bits);
            }
        }
    }
}
