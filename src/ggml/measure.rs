//! How long the kernels take, beside ggml's on matrices of the same shape. For `cargo bench`.

use super::kv::{KvLayout, KvPart, KvRows, KvSequence, KvStep};
use super::quant::row_to_f32;
use super::{Context, Graph, GraphMemory, Operations, Scoring, Tensor, ThreadPool, quantize_rows};
use crate::file::types::GgmlType;
use crate::kernels::{Bits, Heads, MulMatBack, PAGE, available_bits, has_attention};
use half::f16;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Seconds that products of a matrix W (`ne = [k, n]`) take, the best of some rounds. All have `2 * k * n * t` operations.
#[derive(Clone, Copy, Debug)]
pub struct Seconds {
    /// Ours: `dX = W^T dY` with W in its own type, dY `ne = [n, t]`.
    pub back: f64,
    /// ggml's `mul_mat` of the same shape if W^T were kept as BF16: `ne = [n, k]` times `ne = [n, t]`.
    pub ggml_bf16: f64,
    /// Ours of the forward pass: W in its own type times `ne = [k, t]`, packing to 14 bits included, or in F32 for weights of floating-point numbers; not a number
    /// without the kernel.
    pub forward: f64,
    /// As `forward`, with 8 bits, or BF16 for weights of BF16.
    pub forward_in_bytes: f64,
    /// ggml's `mul_mat` of the forward pass.
    pub ggml_forward: f64,
}

/// Measures products of a random matrix W of type `ty` (`ne = [k, n]`) with `t` rows. They take turns, so that a drift
/// of the machine's speed hits all alike.
///
/// # Panics
/// If `k` or `n` is no multiple of 32, or `k` of the type's block size.
pub fn mul_mat_back_seconds(
    ty: GgmlType,
    k: usize,
    n: usize,
    t: usize,
    n_threads: usize,
    rounds: usize,
) -> Seconds {
    let pool = ThreadPool::new(n_threads);
    let w = weights(ty, k, n);
    let transposed = weights(GgmlType::BF16, n, k);
    let product = |bits| Measured::product(ty, [k, n, t], &w, bits);
    let mut bf16 = Measured::product(GgmlType::BF16, [n, k, t], &transposed, None);
    let [mut own, mut in_bytes] =
        available_bits(ty, k).map(|bits| bits.map(|bits| product(Some(bits))));
    let mut forward = product(None);
    let (dy, mut dx) = (values(n * t), vec![0.0; k * t]);
    let [back, ggml_bf16, forward, forward_in_bytes, ggml_forward] = best_of(rounds, || {
        [
            Some(back(ty, &w, &dy, &mut dx, [k, n, t], n_threads)),
            Some(bf16.compute(&pool)),
            own.as_mut().map(|own| own.compute(&pool)),
            in_bytes.as_mut().map(|own| own.compute(&pool)),
            Some(forward.compute(&pool)),
        ]
    });
    Seconds {
        back,
        ggml_bf16,
        forward,
        forward_in_bytes,
        ggml_forward,
    }
}

/// Seconds of a product `W X` as it is defined, on one thread: weights become F32 row by row, and each element is a sum in order. W is of type `ty` (`ne = [k, n]`), X `ne = [k, t]`.
///
/// # Panics
/// As [`mul_mat_back_seconds`].
pub fn naive_seconds(ty: GgmlType, k: usize, n: usize, t: usize) -> f64 {
    let (w, x) = (weights(ty, k, n), values(k * t));
    let (mut row, mut y) = (vec![0.0f32; k], vec![0.0f32; n * t]);
    let start = Instant::now();
    for (i, bytes) in w.chunks_exact(w.len() / n).enumerate() {
        // SAFETY: a row of the type, and room for its values.
        unsafe { row_to_f32(ty, bytes.as_ptr(), row.as_mut_ptr(), k) };
        for (j, x) in x.chunks_exact(k).enumerate() {
            y[j * n + i] = row.iter().zip(x).map(|(w, x)| w * x).sum();
        }
    }
    std::hint::black_box(&y);
    start.elapsed().as_secs_f64()
}

/// The least seconds of each of `N` things in some rounds; not a number for what is not there.
fn best_of<const N: usize>(
    rounds: usize,
    mut round: impl FnMut() -> [Option<Duration>; N],
) -> [f64; N] {
    // The smaller of a number and what is none is the number.
    let mut best = [f64::NAN; N];
    for _ in 0..rounds {
        for (best, now) in best.iter_mut().zip(round()) {
            *best = now.map_or(*best, |now| best.min(now.as_secs_f64()));
        }
    }
    best
}

/// Sizes of an attention over a cache.
#[derive(Clone, Copy, Debug)]
pub struct AttentionShape {
    /// Values of a head, a multiple of 32.
    pub d: usize,
    /// Heads of queries.
    pub h: usize,
    /// Heads of keys and values, a divisor of `h`.
    pub hk: usize,
    /// Tokens that ask, the last ones.
    pub t: usize,
    /// Tokens in the cache.
    pub n: usize,
}

/// Seconds that attention over a cache of type `ty` (F16, F32 or Q8_0) takes by our own kernel, not a number without it, and by ggml's
/// fused one, the best of some rounds, in turns.
pub fn attention_seconds(
    ty: GgmlType,
    shape: AttentionShape,
    n_threads: usize,
    rounds: usize,
) -> [f64; 2] {
    let pool = ThreadPool::new(n_threads);
    let mut own = has_attention(ty, shape.d).then(|| Measured::own_attention(ty, shape));
    let mut ggml = Measured::ggml_attention(ty, shape);
    best_of(rounds, || {
        [
            own.as_mut().map(|own| own.compute(&pool)),
            Some(ggml.compute(&pool)),
        ]
    })
}

/// Values in -1..1 without a period that a matrix could have.
fn values(n: usize) -> Vec<f32> {
    let value = |i: usize| (i.wrapping_mul(2_654_435_761) >> 8 & 0xffff) as f32 / 32_768.0 - 1.0;
    (0..n).map(value).collect()
}

/// `rows` rows of `width` values: some are quantized, which is slow, and repeated.
fn weights(ty: GgmlType, width: usize, rows: usize) -> Vec<u8> {
    const DIFFERENT: usize = 32;
    let mut some = Vec::new();
    quantize_rows(ty, &values(DIFFERENT * width), width, &mut some);
    some.repeat(rows.div_ceil(DIFFERENT))
}

/// What is measured takes at least so long, by repetition.
const LEAST: Duration = Duration::from_millis(5);

/// Of heads of `d` values.
fn scoring(d: usize) -> Scoring {
    Scoring {
        scale: (d as f32).powf(-0.5),
        softcap: 0.0,
    }
}

/// One operation in a graph.
struct Measured {
    graph: Graph,
}

impl Measured {
    /// `y`, given the bytes of its operands.
    fn new(ctx: Context, y: Tensor, operands: &[(&Tensor, &[u8])]) -> Self {
        let y = ctx.output(y);
        let mut graph = Graph::new(ctx, &[y], GraphMemory::new()).expect("memory");
        for (operand, bytes) in operands {
            let to = graph.bytes_mut(operand);
            to.copy_from_slice(&bytes[..to.len()]);
        }
        Self { graph }
    }

    /// The last tokens of a text read all of it, in pages.
    fn own_attention(ty: GgmlType, shape: AttentionShape) -> Self {
        let AttentionShape { d, h, hk, t, n } = shape;
        let layout = KvLayout::new(ty, [(Heads { d, h, hk }, None)]);
        let rows = weights(ty, d, PAGE);
        let page = |_| {
            let mut page = KvRows::new(layout.token_bytes(0), PAGE).expect("memory");
            for (part, head) in KvPart::BOTH
                .iter()
                .flat_map(|part| (0..hk).map(move |h| (part, h)))
            {
                let to = page.head_mut(layout.layer(0).1, *part, head, 0..PAGE);
                to.copy_from_slice(&rows[..to.len()]);
            }
            Some(Arc::new(page))
        };
        let mut pages = [(0..n.div_ceil(PAGE)).map(page).collect()];
        let step = Arc::new(KvStep::default());
        step.begin(
            &layout,
            &mut [KvSequence {
                prefix: None,
                pages: &mut pages,
                position: n - t,
                n: t,
            }],
        );
        let ctx = Context::new(Operations::Ggml);
        let q = ctx.input(GgmlType::F32, &[d, h, t], "q");
        let y = ctx.cached_attention(&step, &layout, 0, (&q, None), scoring(d));
        let queries = values(d * h * t);
        Self::new(ctx, y, &[(&q, bytemuck::cast_slice(&queries))])
    }

    /// The same, rows of all heads of a token side by side.
    fn ggml_attention(ty: GgmlType, shape: AttentionShape) -> Self {
        let AttentionShape { d, h, hk, t, n } = shape;
        let ctx = Context::new(Operations::Ggml);
        let q = ctx.input(GgmlType::F32, &[d, h, t], "q");
        let [k, v] = ["k", "v"].map(|name| ctx.input(ty, &[d, hk, n], name));
        let mask = ctx.input(GgmlType::F16, &[n, t], "mask");
        let heads = [&q, &k, &v].map(|x| ctx.permute(x, [0, 2, 1, 3]));
        let y = ctx.flash_attn(&heads[0], [&heads[1], &heads[2]], &mask, None, scoring(d));
        let seen = |i: usize| i % n <= n - t + i / n;
        let visible = (0..n * t).map(|i| match seen(i) {
            true => f16::ZERO,
            false => f16::NEG_INFINITY,
        });
        let visible: Vec<_> = visible.collect();
        let rows = weights(ty, d * hk, n);
        let queries = values(d * h * t);
        let operands: [(&Tensor, &[u8]); 4] = [
            (&q, bytemuck::cast_slice(&queries)),
            (&k, &rows),
            (&v, &rows),
            (&mask, bytemuck::cast_slice(&visible)),
        ];
        Self::new(ctx, y, &operands)
    }

    /// W of type `ty` (`ne = [k, n]`) times `ne = [k, t]`, by our own kernel with so many bits or by ggml's.
    fn product(ty: GgmlType, [k, n, t]: [usize; 3], weights: &[u8], own: Option<Bits>) -> Self {
        let ctx = Context::new(Operations::Ggml);
        let w = ctx.input(ty, &[k, n], "w");
        let x = ctx.input(GgmlType::F32, &[k, t], "x");
        let y = match own {
            Some(bits) => ctx.mul_mat_packed(&w, &ctx.pack(&x, bits), bits),
            None => ctx.mul_mat(&w, &x),
        };
        let x_values = values(k * t);
        let operands = [(&w, weights), (&x, bytemuck::cast_slice(&x_values))];
        Self::new(ctx, y, &operands)
    }

    fn compute(&mut self, pool: &ThreadPool) -> Duration {
        // Products of a few rows are over before a CPU that slept is at its speed again.
        let (start, mut times) = (Instant::now(), 0);
        let time = loop {
            self.graph.compute(pool, None).expect("memory");
            times += 1;
            let time = start.elapsed();
            if time > LEAST {
                break time / times;
            }
        };
        // Workers poll for a while and would slow down what comes next.
        std::thread::sleep(Duration::from_millis(10));
        time
    }
}

/// The second of two products: the first one gives each thread its memory.
fn back(
    ty: GgmlType,
    w: &[u8],
    dy: &[f32],
    dx: &mut [f32],
    [k, n, t]: [usize; 3],
    n_threads: usize,
) -> Duration {
    /// Shared by threads that write parts of dX.
    struct Shared(MulMatBack);
    // SAFETY: the parts are disjoint; W and dY are only read.
    unsafe impl Sync for Shared {}
    impl Shared {
        /// # Safety
        /// As for [`MulMatBack::part`].
        unsafe fn part(&self, ith: usize, nth: usize) {
            // SAFETY: the caller's promise.
            unsafe { self.0.part(ith, nth) }
        }
    }
    let row_bytes = ty.row_bytes(k as u64).expect("whole blocks") as usize;
    assert!(w.len() >= n * row_bytes && dy.len() >= n * t && dx.len() >= k * t);
    let product = &Shared(MulMatBack {
        ty,
        to_f32: row_to_f32,
        w: w.as_ptr(),
        row_bytes,
        k,
        n,
        dy: dy.as_ptr(),
        dy_stride: n,
        dx: dx.as_mut_ptr(),
        dx_stride: k,
        t,
    });
    let arrived = &AtomicUsize::new(0);
    let part = move |ith: usize| {
        let run = || {
            // SAFETY: the matrices have these sizes (asserted above); every thread runs a part of its own.
            unsafe { product.part(ith, n_threads) };
        };
        let wait = |turn: usize| {
            arrived.fetch_add(1, Ordering::AcqRel);
            while arrived.load(Ordering::Acquire) < turn * n_threads {
                std::hint::spin_loop();
            }
        };
        run();
        wait(1);
        let start = Instant::now();
        run();
        wait(2);
        start.elapsed()
    };
    std::thread::scope(|scope| {
        for ith in 1..n_threads {
            scope.spawn(move || part(ith));
        }
        part(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::CpuLevel;

    #[test]
    fn all_are_measured() {
        let s = mul_mat_back_seconds(GgmlType::Q8_0, 64, 96, 3, 2, 1);
        assert!(
            [s.back, s.ggml_bf16, s.ggml_forward]
                .iter()
                .all(|t| t.is_finite() && *t > 0.0)
        );
        let level = CpuLevel::current().unwrap();
        let there = match cfg!(target_arch = "aarch64") {
            true => [false, true],
            false => [level >= CpuLevel::Avx2; 2],
        };
        assert_eq!([s.forward, s.forward_in_bytes].map(|t| t > 0.0), there);
        assert!(naive_seconds(GgmlType::Q8_0, 64, 96, 3) > 0.0);
        let shape = AttentionShape {
            d: 32,
            h: 2,
            hk: 1,
            t: 3,
            n: 40,
        };
        let [own, ggml] = attention_seconds(GgmlType::Q8_0, shape, 2, 1);
        assert!(ggml.is_finite() && ggml > 0.0);
        assert_eq!(own > 0.0, has_attention(GgmlType::Q8_0, 32));
    }
}
