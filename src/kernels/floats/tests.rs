use super::super::{Exact, values};
use super::*;
use crate::ggml::quantize_rows;

/// Tiles of AVX-512 beside those of AVX2: the same operations on each element.
#[test]
fn all_kinds_of_tiles_give_the_same_bits() {
    if !has(CpuLevel::Avx512) {
        ggraft_testkit::skipped("products of F32 with AVX-512 beside AVX2 (needs AVX-512)");
        return;
    }
    let types = [
        (GgmlType::F32, Weights::F32),
        (GgmlType::F16, Weights::F16),
        (GgmlType::BF16, Weights::Bf16),
    ];
    for (ty, weights) in types {
        // One run and more, with tails; rows of X in a cache and too many for it; a last tile of fewer rows.
        for (k, t) in [(1, 1), (37, 2), (640, 3), (1500, 7), (5003, 2), (520, 70)] {
            let n = 75;
            let mut bytes = Vec::new();
            quantize_rows(ty, &values(k * n, 1), k, &mut bytes);
            let (w, x) = (Exact::new(ty, &bytes), values(k * t, 2));
            let [a, b] = [&avx2::TILES, &avx512::TILES].map(|kind| {
                let mut y = vec![f32::NAN; n * t];
                let product = Product {
                    weights,
                    first: w.as_ptr(),
                    row_bytes: w.len() / n,
                    rows: n,
                    k,
                    x: x.as_ptr(),
                    x_stride: k,
                    t,
                    y: y.as_mut_ptr(),
                    y_stride: n,
                };
                // SAFETY: the matrices have these sizes, and the CPU the instructions.
                unsafe { product.compute_by(kind) };
                y.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            });
            assert!(a.iter().any(|&y| y != 0));
            assert_eq!(a, b, "{ty:?}, {k}, {t} rows");
        }
    }
}
