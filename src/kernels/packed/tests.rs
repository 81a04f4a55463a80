use super::super::{TYPES, values};
use super::*;
use crate::ggml::quantize_rows;

const K: usize = 256;

/// Rows `0..t` of X times a panel of `width` rows of W, twice: set, then added.
fn product(kind: &Tiles, ty: GgmlType, width: usize, t: usize) -> Vec<u32> {
    let mut w = Vec::new();
    quantize_rows(ty, &values(K * width, 1), K, &mut w);
    let stride = packed_words(K, t, Bits::Fourteen);
    let mut x = vec![0.0; stride * t];
    for (row, to) in values(K * t, 2).chunks(K).zip(x.chunks_mut(stride)) {
        pack_row(row, t, Bits::Fourteen, to);
    }
    let mut panel = Panel::new();
    panel.resize(K / BLOCK);
    let mut y = vec![0.0f32; width * t];
    // SAFETY: the matrices have these sizes, and the CPU the instructions (`kinds`).
    unsafe {
        let row_bytes = ty.row_bytes(K as u64).unwrap() as usize;
        assert!(panel.unpack(ty, (w.as_ptr(), row_bytes), width, 0..K / BLOCK));
        for accumulate in [false, true] {
            let rows = Rows {
                words: x.as_ptr(),
                t,
                k: K,
                first: 0,
                stride,
            };
            let output = Output {
                values: y.as_mut_ptr(),
                stride: width,
                width,
                accumulate,
            };
            panel.multiply_by(kind, K / BLOCK, rows, output);
        }
    }
    y.into_iter().map(f32::to_bits).collect()
}

#[test]
fn all_kinds_of_tiles_give_the_same_bits() {
    if !has_avx512() {
        ggraft_testkit::skipped("tiles of AVX-512 beside those of AVX2 (needs AVX-512 VNNI)");
        return;
    }
    let types = TYPES
        .iter()
        .filter(|&&ty| has_format(ty) || ty == GgmlType::F32);
    let mut checked = 0;
    for &ty in types {
        for width in [1, 7, WIDTH] {
            for t in (1..=13).chain([29]) {
                let (a, b) = (
                    product(&avx2::TILES, ty, width, t),
                    product(&avx512::TILES, ty, width, t),
                );
                assert!(a.iter().any(|&y| y != 0));
                assert_eq!(a, b, "{ty:?}, {width} of W, {t} of X");
                checked += 1;
            }
        }
    }
    assert!(checked > 500);
}
