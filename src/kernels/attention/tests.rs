use super::super::{Exact, values};
use super::*;
use crate::ggml::{quantize_rows, row_to_f32};
use ggraft_testkit::metrics::nmse;
use proptest::prelude::*;

/// An attention and the memory of its operands.
struct Case {
    shape: Shape,
    q: Vec<f32>,
    ty: GgmlType,
    /// `ne = [d, Hk, N, S]`, a row of each head behind the one of the head before.
    k: Exact,
    v: Exact,
    mask: Vec<f16>,
    softcap: f32,
}

const SCALE: f32 = 0.3;
const TYPES: [GgmlType; 3] = [GgmlType::F32, GgmlType::F16, GgmlType::Q8_0];

impl Case {
    /// The tokens that ask are the last of the cache, and see a window, if there is one.
    fn new(ty: GgmlType, shape: Shape, window: Option<usize>) -> Self {
        let Shape { d, h, hk, t, n, s } = shape;
        let cache = |seed| {
            let mut bytes = Vec::new();
            quantize_rows(ty, &values(d * hk * n * s, seed), d, &mut bytes);
            Exact::new(ty, &bytes)
        };
        let at = |i: usize| (i % n, i / n % t + n - t);
        let seen =
            |(key, token): (usize, usize)| key <= token && window.is_none_or(|w| key + w > token);
        let mask = |i| match seen(at(i)) {
            true => f16::ZERO,
            false => f16::NEG_INFINITY,
        };
        Self {
            shape,
            q: values(d * h * t * s, 1)
                .into_iter()
                .map(|x| 5.0 * x)
                .collect(),
            ty,
            k: cache(2),
            v: cache(3),
            mask: (0..n * t * s).map(mask).collect(),
            softcap: 0.0,
        }
    }

    fn row_bytes(&self) -> usize {
        self.ty.row_bytes(self.shape.d as u64).unwrap() as usize
    }

    fn attention(&self) -> Attention<'_> {
        let Shape { d, h, hk, t, n, .. } = self.shape;
        let row = self.row_bytes();
        let cached = |bytes: &Exact| Cached {
            first: bytes.as_ptr(),
            ty: self.ty,
            nb: [row, row * hk, row * hk * n],
        };
        Attention {
            shape: self.shape,
            q: &self.q,
            q_stride: [d, d * h, d * h * t],
            k: cached(&self.k),
            v: cached(&self.v),
            mask: &self.mask,
            scale: SCALE,
            softcap: self.softcap,
        }
    }

    /// By so many threads, one after the other.
    fn whole(&self, nth: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.q.len()];
        for ith in 0..nth {
            // SAFETY: the operands have these sizes.
            unsafe { self.attention().part(ith, nth, out.as_mut_ptr()) };
        }
        out
    }

    /// The records first, in `parts` runs, then what they are together.
    fn divided(&self, parts: usize) -> Vec<f32> {
        assert_eq!(self.shape.tiles(), 1);
        let [len, n] = self.shape.records();
        let mut records = vec![f32::NAN; len * n];
        for part in 0..parts {
            let range = n * part / parts..n * (part + 1) / parts;
            let to = &mut records[range.start * len..range.end * len];
            // SAFETY: the operands have these sizes.
            unsafe { self.attention().records(range.start, to) };
        }
        let mut out = vec![f32::NAN; self.q.len()];
        let (first, second) = out.split_at_mut(self.q.len() / self.shape.d / 2 * self.shape.d);
        merge_records(&self.shape, &records, 0, first);
        merge_records(&self.shape, &records, first.len() / self.shape.d, second);
        out
    }

    /// Token `token` of each stream alone.
    fn alone(&self, token: usize) -> Self {
        let Shape { d, h, t, n, s, .. } = self.shape;
        let of_streams = |width: usize| {
            (0..s).flat_map(move |stream| {
                let at = (stream * t + token) * width;
                at..at + width
            })
        };
        Self {
            shape: Shape { t: 1, ..self.shape },
            q: of_streams(d * h).map(|i| self.q[i]).collect(),
            mask: of_streams(n).map(|i| self.mask[i]).collect(),
            k: Exact::new(self.ty, &self.k),
            v: Exact::new(self.ty, &self.v),
            ..*self
        }
    }

    /// In F64, on the values that keys and values stand for.
    fn exact(&self) -> Vec<f32> {
        let naive = self.naive();
        naive.into_iter().map(|(value, _)| value as f32).collect()
    }

    /// The same, and by how much the kernel may differ from it at most.
    fn naive(&self) -> Vec<(f64, f64)> {
        let Shape { d, h, hk, t, n, s } = self.shape;
        let unpack = |bytes: &[u8]| {
            let mut rows = vec![0.0f32; d * hk * n * s];
            for (row, to) in bytes.chunks(self.row_bytes()).zip(rows.chunks_mut(d)) {
                // SAFETY: a row of `d` values.
                unsafe { row_to_f32(self.ty, row.as_ptr(), to.as_mut_ptr(), d) };
            }
            rows
        };
        let (k, v) = (unpack(&self.k), unpack(&self.v));
        let mut out = Vec::new();
        for query in 0..h * t * s {
            let (head, token, stream) = (query % h, query / h % t, query / h / t);
            let q = &self.q[query * d..][..d];
            let row = |key: usize| ((stream * n + key) * hk + head / (h / hk)) * d;
            let scores = (0..n).map(|key| {
                let dot = q.iter().zip(&k[row(key)..][..d]);
                let dot = dot.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
                let (score, cap) = (dot * f64::from(SCALE), f64::from(self.softcap));
                let score = if cap > 0.0 {
                    cap * (score / cap).tanh()
                } else {
                    score
                };
                score + self.mask[(stream * t + token) * n + key].to_f64()
            });
            let scores: Vec<_> = scores.collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
            let weights = scores.iter().map(|s| (s - max).exp());
            let sum: f64 = weights.clone().sum();
            // Scores are off by what F32 does to sums of d products and to the cap, weights by so many parts of them, and then by what it does to e^x.
            let product = |(a, b): (&f32, &f32)| f64::from((a * b).abs());
            let seen = (0..n).filter(|key| weights.clone().nth(*key) != Some(0.0));
            let most = seen.clone().map(|key| {
                let dot = q.iter().zip(&k[row(key)..][..d]);
                dot.map(product).sum::<f64>() * f64::from(SCALE)
            });
            let most = most.fold(f64::from(self.softcap), f64::max);
            let of_scores = (d + 8) as f64 * f64::from(f32::EPSILON) * most;
            let values = seen.flat_map(|key| &v[row(key)..][..d]);
            let largest = values.fold(0.0, |m: f64, v| m.max(f64::from(v.abs())));
            let of_sums = (n + 32) as f64 * f64::from(f32::EPSILON);
            let bound = (2.0 * of_scores + of_sums) * largest;
            out.extend((0..d).map(|i| {
                let sums = weights.clone().enumerate();
                let sums = sums.map(|(key, w)| w * f64::from(v[row(key) + i]));
                (sums.sum::<f64>() / sum, bound)
            }));
        }
        out
    }
}

fn shape([d, h, hk, t, n, s]: [usize; 6]) -> Shape {
    Shape { d, h, hk, t, n, s }
}

/// Whether this CPU has the kernel; says so if not.
fn available() -> bool {
    let available = arch::available();
    if !available {
        ggraft_testkit::skipped("attention by our own kernel (needs AVX2 or NEON)");
    }
    available
}

/// Tokens and keys that fill no tile, register or chunk, one of each, many; groups of heads; streams.
const SHAPES: [[usize; 6]; 8] = [
    [32, 1, 1, 1, 1, 1],
    [32, 2, 1, 3, 17, 2],
    [64, 9, 3, 1, 300, 1],
    [64, 9, 3, 30, 300, 2],
    [64, 4, 4, 70, 70, 1],
    [96, 6, 1, 7, 513, 1],
    [128, 8, 2, 33, 256, 1],
    [256, 4, 1, 20, 600, 1],
];

#[test]
fn it_is_what_the_definition_says() {
    if !available() {
        return;
    }
    for (ty, sizes) in TYPES.into_iter().flat_map(|ty| SHAPES.map(|s| (ty, s))) {
        for (window, softcap) in [(None, 0.0), (Some(40), 0.0), (None, 3.0)] {
            let mut case = Case::new(ty, shape(sizes), window);
            case.softcap = softcap;
            let error = nmse(&case.whole(2), &case.exact());
            assert!(
                error < 1e-11,
                "{ty:?} {sizes:?} {window:?} {softcap}: {error:e}"
            );
        }
    }
}

#[test]
fn heads_of_any_multiple_of_eight_are_computed() {
    if !available() {
        return;
    }
    for d in [8, 24, 40, 72, 80, 120] {
        for ty in [GgmlType::F32, GgmlType::F16] {
            let case = Case::new(ty, shape([d, 2, 1, 5, 37, 1]), None);
            let error = nmse(&case.whole(1), &case.exact());
            assert!(error < 1e-11, "{d} {ty:?}: {error:e}");
        }
    }
}

#[test]
fn bits_depend_on_neither_batch_nor_threads_nor_division() {
    if !available() {
        return;
    }
    for (ty, sizes) in TYPES.into_iter().flat_map(|ty| SHAPES.map(|s| (ty, s))) {
        for window in [None, Some(40)] {
            let case = Case::new(ty, shape(sizes), window);
            let Shape { d, h, t, s, .. } = case.shape;
            let want = case.whole(1);
            for nth in [2, 3, 64] {
                assert!(case.whole(nth) == want, "{ty:?} {sizes:?}: {nth} threads");
            }
            if case.shape.tiles() == 1 {
                for parts in [1, 2, 5] {
                    assert!(
                        case.divided(parts) == want,
                        "{ty:?} {sizes:?}: {parts} parts"
                    );
                }
            }
            for token in [0, t / 2, t - 1] {
                let alone = case.alone(token);
                let of_token = (0..s).flat_map(|s| &want[(s * t + token) * d * h..][..d * h]);
                let of_token: Vec<_> = of_token.copied().collect();
                assert!(
                    alone.whole(1) == of_token,
                    "{ty:?} {sizes:?}: token {token}"
                );
                assert!(
                    alone.divided(2) == of_token,
                    "{ty:?} {sizes:?}: token {token}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attentions_are_what_the_definition_says(
        ty in prop::sample::select(&TYPES[..]),
        [eights, hk, group, s] in [1..17usize, 1..4usize, 1..6usize, 1..3usize],
        (t, before) in (prop_oneof![1..3usize, 1..80usize], prop_oneof![0..20usize, 0..600usize]),
        (window, softcap) in (prop::option::of(1..100usize), prop_oneof![Just(0.0f32), 1.0..50.0f32]),
        (nth, token) in (1..100usize, any::<prop::sample::Index>()),
    ) {
        if !arch::available() {
            return Ok(());
        }
        let d = match ty {
            GgmlType::Q8_0 => 32 * eights.div_ceil(4),
            _ => 8 * eights,
        };
        let mut case = Case::new(ty, shape([d, group * hk, hk, t, before + t, s]), window);
        case.softcap = softcap;
        let got = case.whole(nth);
        for (i, (got, (want, bound))) in got.iter().zip(case.naive()).enumerate() {
            let error = (f64::from(*got) - want).abs();
            prop_assert!(error <= bound, "at {}: {} for {}, {:e} more than {:e}", i, got, want, error, bound);
        }
        let alone = case.alone(token.index(t));
        let width = d * group * hk;
        let of_token = (0..s).flat_map(|s| &got[(s * t + token.index(t)) * width..][..width]);
        let of_token: Vec<_> = of_token.copied().collect();
        prop_assert_eq!(&alone.whole(nth), &of_token);
        prop_assert_eq!(&alone.divided(nth), &of_token);
    }
}

/// Room in the cache that no token sees yet changes nothing, whatever stands there.
#[test]
fn keys_out_of_sight_may_be_anything() {
    if !available() {
        return;
    }
    for (n, more) in [(5, 3), (37, 300), (256, 1), (300, 20)] {
        let short = Case::new(GgmlType::F16, shape([64, 2, 1, 4, n, 1]), None);
        let mut long = Case::new(GgmlType::F16, shape([64, 2, 1, 4, n + more, 1]), None);
        for (long, short) in [(&mut long.k, &short.k), (&mut long.v, &short.v)] {
            long.fill(0xff);
            long[..short.len()].copy_from_slice(short);
        }
        long.mask.fill(f16::NEG_INFINITY);
        for (long, short) in long.mask.chunks_mut(n + more).zip(short.mask.chunks(n)) {
            long[..n].copy_from_slice(short);
        }
        assert!(long.whole(1) == short.whole(1), "{n} + {more}");
        assert!(long.divided(1) == short.whole(1), "{n} + {more}");
    }
}

#[test]
fn whoever_sees_no_key_gets_zeros() {
    if !available() {
        return;
    }
    let mut case = Case::new(GgmlType::F16, shape([32, 2, 1, 3, 300, 1]), None);
    let before = case.whole(1);
    case.mask[300..600].fill(f16::NEG_INFINITY);
    let got = case.whole(1);
    assert_eq!(case.divided(2), got);
    assert!(got[64..128].iter().all(|x| *x == 0.0));
    assert_eq!((&got[..64], &got[128..]), (&before[..64], &before[128..]));
}

/// In queries, keys or values: where it is seen, the output is not a number.
#[test]
fn what_is_not_a_number_comes_out() {
    if !available() {
        return;
    }
    for bad in [f16::NAN, f16::INFINITY] {
        for part in ["q", "k", "v"] {
            let mut case = Case::new(GgmlType::F16, shape([32, 2, 1, 3, 300, 1]), None);
            // Key 299 is seen by the last token only.
            let at = 299 * 64;
            match part {
                "q" => case.q[4 * 32] = bad.to_f32(),
                "k" => case.k[at..at + 2].copy_from_slice(&bad.to_le_bytes()),
                _ => case.v[at..at + 2].copy_from_slice(&bad.to_le_bytes()),
            }
            for got in [case.whole(1), case.divided(3)] {
                let finite = |range: Range<usize>| got[range].iter().all(|x| x.is_finite());
                assert!(!finite(128..192), "{part} {bad}");
                assert!(part == "v" || finite(0..128), "{part} {bad}");
            }
        }
    }
}

/// Tiles of AVX-512 beside those of AVX2: the same operations on each element.
#[cfg(target_arch = "x86_64")]
#[test]
fn all_kinds_of_tiles_give_the_same_bits() {
    use crate::kernels::level::{CpuLevel, has};
    if !has(CpuLevel::Avx512) {
        ggraft_testkit::skipped("attention with AVX-512 beside AVX2 (needs AVX-512)");
        return;
    }
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let (d, n, keys) = (40, 29, 23);
    let (q, unpacked) = (values(d * n, 1), values(d * WIDTH, 2));
    let (weights, rows) = (values(CHUNK * n, 3), values(WIDTH * keys, 4));
    let outputs = [avx2::TILES, avx512::TILES].map(|kind| {
        let (mut s, mut v) = (vec![0.0f32; CHUNK * n], vec![0.5f32; WIDTH * n]);
        each_tile(kind.scores, n, |first, tile| {
            let s = s[first * CHUNK..].as_mut_ptr();
            // SAFETY: sizes as above, on a CPU with the instructions.
            unsafe { tile(q[first * d..].as_ptr(), unpacked.as_ptr(), d, s) };
        });
        for add in [true, false, true] {
            each_tile(kind.values, n, |first, tile| {
                let (p, to) = (&weights[first * CHUNK..], v[first * WIDTH..].as_mut_ptr());
                // SAFETY: as above.
                unsafe { tile(p.as_ptr(), rows.as_ptr(), keys, add, to, WIDTH) };
            });
        }
        assert!(s.iter().chain(&v).any(|&x| x != 0.0));
        (bits(&s), bits(&v))
    });
    assert_eq!(outputs[0], outputs[1]);
}
