//! What training costs.
//!
//!     cargo bench --bench training
//!
//! A table of the product that carries the gradient back through a frozen matrix, beside ggml's own products of that
//! shape: a `mul_mat` with the transposed matrix kept as BF16, and the forward pass. All three take turns, and the best of
//! the rounds is what counts.
//!
//! Environment: `GGRAFT_BENCH_TYPES` (q4_k,q8_0,q6_k,f16), `GGRAFT_BENCH_ROWS` (8,64,512), `GGRAFT_BENCH_THREADS` (all
//! cores), `GGRAFT_BENCH_ROUNDS` (10).

use ggraft::file::types::GgmlType;
use ggraft::measure::{Seconds, mul_mat_back_seconds};

/// Frozen matrices, `ne = [K, N]`: both sides of a feed-forward network.
const MATRICES: [[usize; 2]; 2] = [[2048, 8192], [8192, 2048]];

struct Setup {
    types: Vec<GgmlType>,
    rows: Vec<usize>,
    n_threads: usize,
    rounds: usize,
}

fn var(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

fn number(text: &str) -> usize {
    text.parse()
        .unwrap_or_else(|_| panic!("'{text}' is no number"))
}

fn type_called(name: &str) -> GgmlType {
    let found = GgmlType::ALL
        .iter()
        .copied()
        .find(|t| t.name().eq_ignore_ascii_case(name));
    found.unwrap_or_else(|| panic!("no type '{name}'"))
}

fn setup() -> Setup {
    let cores = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .to_string();
    Setup {
        types: var("GGRAFT_BENCH_TYPES", "q4_k,q8_0,q6_k,f16")
            .split(',')
            .map(type_called)
            .collect(),
        rows: var("GGRAFT_BENCH_ROWS", "8,64,512")
            .split(',')
            .map(number)
            .collect(),
        n_threads: number(&var("GGRAFT_BENCH_THREADS", &cores)),
        rounds: number(&var("GGRAFT_BENCH_ROUNDS", "10")),
    }
}

fn products(s: &Setup) {
    println!(
        "\ndX = W^T dY on {} threads, GFLOP/s, best of {} rounds\n",
        s.n_threads, s.rounds
    );
    println!(
        "| type | W | T | ms | back | ggml BF16 | ratio | ggml forward | ratio |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    for &ty in &s.types {
        for [k, n] in MATRICES {
            for &t in &s.rows {
                let Seconds {
                    back,
                    ggml_bf16,
                    ggml_forward,
                } = mul_mat_back_seconds(ty, k, n, t, s.n_threads, s.rounds);
                let speed = |seconds: f64| 2e-9 * (k * n * t) as f64 / seconds;
                println!(
                    "| {} | {k} x {n} | {t} | {:.2} | {:.0} | {:.0} | {:.2} | {:.0} | {:.2} |",
                    ty.name(),
                    back * 1e3,
                    speed(back),
                    speed(ggml_bf16),
                    ggml_bf16 / back,
                    speed(ggml_forward),
                    ggml_forward / back
                );
            }
        }
    }
}

fn main() {
    products(&setup());
}
