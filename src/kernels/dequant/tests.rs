use super::super::level::{CpuLevel, has};
use super::super::{TYPES, factors};
use super::*;
use crate::ggml::row_to_f32;
use half::{bf16, f16};

/// Every bit of a block is random but for its F16 factors.
#[test]
fn own_functions_equal_rounded_values_of_ggml() {
    if !has(CpuLevel::Avx512Bf16) {
        ggraft_testkit::skipped(
            "weights as BF16 pairs against ggml's values (needs AVX-512 with BF16 and VBMI)",
        );
        return;
    }
    let types = TYPES.into_iter().filter(|ty| ty.is_quantized());
    let (n, k, panel) = (5, 512, 3 * NR);
    for ty in types {
        let row_bytes = ty.row_bytes(k as u64).expect("whole blocks") as usize;
        let mut w: Vec<u8> = super::super::values(row_bytes * n, 9)
            .into_iter()
            .map(|x| (x * 128.0) as i8 as u8)
            .collect();
        for (i, block) in w.chunks_exact_mut(ty.type_size() as usize).enumerate() {
            for &at in factors(ty) {
                let factor = f16::from_f32(0.013 * (i + at + 1) as f32);
                block[at..at + 2].copy_from_slice(&factor.to_le_bytes());
            }
        }
        for k0 in [0, 256] {
            let tile = Tile {
                ty,
                to_f32: row_to_f32,
                rows: w.as_ptr(),
                row_bytes,
                n,
                k0,
                k: 256,
            };
            let mut pairs = vec![0u32; 256 / NR * panel];
            let mut row = [0.0f32; 256];
            // SAFETY: a tile of the rows above, and room for n / 2 rounded up rows in each panel.
            unsafe { to_bf16_pairs(&tile, pairs.as_mut_ptr(), panel) };
            for i in 0..n {
                // SAFETY: 256 columns of row i.
                unsafe { row_to_f32(ty, tile.row(i), row.as_mut_ptr(), 256) };
                for (j, &x) in row.iter().enumerate() {
                    let word = pairs[j / NR * panel + i / 2 * NR + j % NR];
                    let got = if i % 2 == 0 {
                        word as u16
                    } else {
                        (word >> 16) as u16
                    };
                    assert_eq!(
                        got,
                        bf16::from_f32(x).to_bits(),
                        "{ty}, row {i}, column {j}"
                    );
                }
            }
        }
    }
}
