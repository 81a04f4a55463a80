//! Attention over a cache: our own kernel beside ggml's fused one, on the same operands, in turns; the best of the rounds counts.
//!
//!     cargo bench --bench attention
//!
//! T tokens, the last ones, read all N that are in the cache. `cargo bench -- --test` runs it once on few tokens, whose figures say nothing.
//!
//! Environment: `GGRAFT_BENCH_THREADS` (physical cores), `GGRAFT_BENCH_ROUNDS` (3, full: 10).

use ggraft::file::types::GgmlType;
use ggraft::measure::{AttentionShape, attention_seconds};
use ggraft_testkit::bench::{Progress, is_full, is_quick, number, threads};

/// d, H and Hk of SmolLM2-135M, Gemma 3 270M and Llama 3.2 1B.
const HEADS: [[usize; 3]; 3] = [[64, 9, 3], [256, 4, 1], [64, 32, 8]];
/// T and N.
const TOKENS: [[usize; 2]; 5] = [[512, 512], [512, 4096], [8, 1024], [1, 1024], [1, 4096]];
const QUICK_TOKENS: [[usize; 2]; 2] = [[8, 64], [1, 300]];
/// Of a cache.
const TYPES: [GgmlType; 2] = [GgmlType::F16, GgmlType::Q8_0];

fn main() {
    let rounds = match is_quick() {
        true => 1,
        false => number("GGRAFT_BENCH_ROUNDS", if is_full() { 10 } else { 3 }),
    };
    let tokens = match is_quick() {
        true => &QUICK_TOKENS[..],
        false => &TOKENS[..],
    };
    let progress = Progress::new(TYPES.len() * HEADS.len() * tokens.len(), "attention");
    println!(
        "\nAttention over a cache on {} threads, best of {rounds} rounds\n\n\
         | cache | d | H | Hk | T | N | ours, ms | ggml, ms | ratio |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        threads()
    );
    for ty in TYPES {
        for [d, h, hk] in HEADS {
            for &[t, n] in tokens {
                progress.row(&format!(
                    "{} cache, {h} heads of {d}, {t} of {n}",
                    ty.name()
                ));
                let shape = AttentionShape { d, h, hk, t, n };
                let [own, ggml] = attention_seconds(ty, shape, threads(), rounds);
                println!(
                    "| {} | {d} | {h} | {hk} | {t} | {n} | {:.2} | {:.2} | {:.2} |",
                    ty.name(),
                    1e3 * own,
                    1e3 * ggml,
                    ggml / own
                );
            }
        }
    }
}
