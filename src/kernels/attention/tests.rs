use super::super::{Exact, values};
use super::*;
use crate::ggml::{quantize_rows, row_to_f32};
use ggraft_testkit::metrics::nmse;
use half::f16;
use proptest::prelude::*;

/// A text and the memory of its keys and values.
struct Stored {
    /// Rows in front, a prefix.
    prefix: Option<Exact>,
    /// Room of each is no more than what is there.
    pages: Vec<Exact>,
    /// Tokens of the prefix.
    p: usize,
    /// Keys, the prefix's included.
    n: usize,
    /// Tokens that ask, the last ones.
    t: usize,
}

/// An attention and the memory of its operands.
struct Case {
    heads: Heads,
    ty: GgmlType,
    window: Option<usize>,
    softcap: f32,
    sinks: Option<Vec<f32>>,
    q: Vec<f32>,
    texts: Vec<Stored>,
}

const SCALE: f32 = 0.3;
const TYPES: [GgmlType; 3] = [GgmlType::F32, GgmlType::F16, GgmlType::Q8_0];

/// Sizes of a text: rows of a prefix, keys behind them, of which the last ask.
type Sizes = [usize; 3];

impl Case {
    fn new(ty: GgmlType, [d, h, hk]: [usize; 3], texts: &[Sizes], window: Option<usize>) -> Self {
        let heads = Heads { d, h, hk };
        let mut seed = 1;
        let mut rows = |room: usize| {
            let mut bytes = Vec::new();
            seed += 1;
            quantize_rows(ty, &values(2 * d * hk * room, seed), d, &mut bytes);
            Exact::new(ty, &bytes)
        };
        let stored = |&[p, n, t]: &Sizes| Stored {
            prefix: (p > 0).then(|| rows(p)),
            pages: (0..n)
                .step_by(PAGE)
                .map(|i| rows(PAGE.min(n - i)))
                .collect(),
            p,
            n: p + n,
            t,
        };
        let stored: Vec<_> = texts.iter().map(stored).collect();
        let tokens: usize = stored.iter().map(|s| s.t).sum();
        Self {
            heads,
            ty,
            window,
            softcap: 0.0,
            sinks: None,
            q: values(d * h * tokens, 1)
                .into_iter()
                .map(|x| 5.0 * x)
                .collect(),
            texts: stored,
        }
    }

    /// The same with a sink of each head, some among the largest scores and some below.
    fn with_sinks(mut self) -> Self {
        let size = 2.0 * (self.heads.d as f32).sqrt();
        let sinks = values(self.heads.h, 77).into_iter();
        self.sinks = Some(sinks.map(|x| size * (x + 0.5)).collect());
        self
    }

    fn row_bytes(&self) -> usize {
        self.ty.row_bytes(self.heads.d as u64).unwrap() as usize
    }

    fn layer(&self) -> Layer {
        Layer {
            heads: self.heads,
            ty: self.ty,
            behind: [0, self.heads.hk * self.row_bytes()],
            window: self.window,
        }
    }

    /// The part of [`Case::q`] and the output that is a token's.
    fn width(&self) -> usize {
        self.heads.d * self.heads.h
    }

    fn texts(&self) -> Vec<Text> {
        let rows = |bytes: &Exact| Rows {
            first: bytes.as_ptr(),
            room: bytes.len() / (2 * self.heads.hk * self.row_bytes()),
        };
        let mut first = 0;
        let text = |s: &Stored| {
            first += s.t;
            Text {
                prefix: s.prefix.as_ref().map_or(Rows::EMPTY, rows),
                pages: s.pages.iter().map(rows).collect(),
                tokens: first - s.t..first,
                position: s.n - s.t,
            }
        };
        self.texts.iter().map(text).collect()
    }

    /// By so many threads, one after the other.
    fn computed(&self, nth: usize) -> Vec<f32> {
        self.computed_from(&self.texts(), nth)
    }

    fn computed_from(&self, texts: &[Text], nth: usize) -> Vec<f32> {
        let attention = Attention {
            layer: self.layer(),
            q: &self.q,
            q_stride: [self.heads.d, self.width()],
            texts,
            scale: SCALE,
            softcap: self.softcap,
            sinks: self.sinks.as_deref(),
        };
        let mut records = vec![f32::NAN; self.layer().n_records(texts)];
        let mut out = vec![f32::NAN; self.q.len()];
        // SAFETY: the operands have these sizes.
        unsafe {
            for ith in 0..nth {
                attention.part(ith, nth, out.as_mut_ptr(), records.as_mut_ptr());
            }
            for ith in 0..nth {
                attention.merge_part(&records, ith, nth, out.as_mut_ptr());
            }
        }
        out
    }

    /// Token `token` of text `text` alone, by so many threads.
    fn alone(&self, text: usize, token: usize, nth: usize) -> Vec<f32> {
        let mut texts = self.texts();
        let all = texts.swap_remove(text);
        let at = (all.tokens.start + token) * self.width();
        let one = Text {
            tokens: 0..1,
            position: all.position + token,
            ..all
        };
        let case = Self {
            q: self.q[at..at + self.width()].to_vec(),
            texts: Vec::new(),
            sinks: self.sinks.clone(),
            ..*self
        };
        case.computed_from(&[one], nth)
    }

    /// In F64, on the values that keys and values stand for.
    fn exact(&self) -> Vec<f32> {
        let naive = self.naive();
        naive.into_iter().map(|(value, _)| value as f32).collect()
    }

    /// Row `key` of a head.
    fn unpacked(&self, s: &Stored, part: usize, head: usize, key: usize) -> Vec<f32> {
        let (bytes, at) = match (&s.prefix, key.checked_sub(s.p)) {
            (Some(prefix), None) => (prefix, key),
            (_, Some(key)) => (&s.pages[key / PAGE], key % PAGE),
            (None, None) => unreachable!(),
        };
        let row = self.row_bytes();
        let room = bytes.len() / (2 * self.heads.hk * row);
        let first = ((part * self.heads.hk + head) * room + at) * row;
        let mut to = vec![0.0; self.heads.d];
        // SAFETY: a row of `d` values.
        unsafe { row_to_f32(self.ty, bytes[first..].as_ptr(), to.as_mut_ptr(), to.len()) };
        to
    }

    /// The same, and by how much the kernel may differ from it at most.
    fn naive(&self) -> Vec<(f64, f64)> {
        let Heads { d, h, hk } = self.heads;
        let mut out = Vec::new();
        let mut queries = self.q.chunks_exact(d);
        for s in &self.texts {
            let unpacked = |part, head| {
                let row = |key| self.unpacked(s, part, head, key);
                (0..s.n).map(row).collect::<Vec<_>>()
            };
            let unpacked: Vec<_> = (0..hk)
                .map(|head| [unpacked(0, head), unpacked(1, head)])
                .collect();
            for (position, head) in (s.n - s.t..s.n).flat_map(|p| (0..h).map(move |h| (p, h))) {
                let (q, [k, v]) = (queries.next().unwrap(), &unpacked[head / (h / hk)]);
                let seen = visible(position, self.window);
                let (k, v) = (&k[seen.clone()], &v[seen.clone()]);
                let score = |k: &Vec<f32>| {
                    let dot = q.iter().zip(k).map(|(a, b)| f64::from(*a) * f64::from(*b));
                    let (score, cap) =
                        (dot.sum::<f64>() * f64::from(SCALE), f64::from(self.softcap));
                    match cap > 0.0 {
                        true => cap * (score / cap).tanh(),
                        false => score,
                    }
                };
                let scores: Vec<_> = k.iter().map(score).collect();
                let sink = self.sinks.as_ref().map(|sinks| f64::from(sinks[head]));
                let max = (scores.iter().chain(&sink)).fold(f64::NEG_INFINITY, |m, s| m.max(*s));
                let weights: Vec<_> = scores.iter().map(|s| (s - max).exp()).collect();
                let of_sink = sink.map_or(0.0, |sink| (sink - max).exp());
                let sum = weights.iter().sum::<f64>() + of_sink;
                // Scores are off by what F32 does to sums of d products and to the cap, weights by so many parts of them, and then by what it does to e^x.
                let most = k.iter().map(|k| {
                    let dot = q.iter().zip(k).map(|(a, b)| f64::from((a * b).abs()));
                    dot.sum::<f64>() * f64::from(SCALE)
                });
                let most = most.fold(f64::from(self.softcap), f64::max);
                let of_scores = (d + 8) as f64 * f64::from(f32::EPSILON) * most;
                let values = v.iter().flatten();
                let largest = values.fold(0.0, |m: f64, v| m.max(f64::from(v.abs())));
                let of_sums = (seen.len() + 32) as f64 * f64::from(f32::EPSILON);
                let bound = (2.0 * of_scores + of_sums) * largest;
                out.extend((0..d).map(|i| {
                    let sums = weights.iter().zip(v).map(|(w, v)| w * f64::from(v[i]));
                    (sums.sum::<f64>() / sum, bound)
                }));
            }
        }
        out
    }
}

/// Whether this CPU has the kernel; says so if not.
fn available() -> bool {
    let available = arch::available();
    if !available {
        ggraft_testkit::skipped("attention by our own kernel (needs AVX2 or NEON)");
    }
    available
}

/// Heads; texts whose tokens and keys fill no tile, register, page or chunk, one of each, many; with and without a prefix, one longer than a chunk; alone and
/// with others, of one token and of many.
const CASES: [([usize; 3], &[Sizes]); 9] = [
    ([32, 1, 1], &[[0, 1, 1]]),
    ([32, 2, 1], &[[0, 17, 3], [5, 17, 3]]),
    ([64, 9, 3], &[[0, 300, 1]]),
    ([64, 9, 3], &[[20, 300, 30], [0, 1, 1], [20, 700, 1]]),
    ([64, 4, 4], &[[0, 70, 70]]),
    ([96, 6, 1], &[[13, 513, 7]]),
    ([128, 8, 2], &[[300, 256, 33], [0, 64, 64]]),
    ([256, 4, 1], &[[0, 600, 20], [1, 64, 1], [2, 65, 2]]),
    ([64, 32, 8], &[[20, 1, 1], [20, 200, 1], [7, 600, 1]]),
];

#[test]
fn it_is_what_the_definition_says() {
    if !available() {
        return;
    }
    for (ty, (heads, texts)) in TYPES.into_iter().flat_map(|ty| CASES.map(|c| (ty, c))) {
        for (window, softcap) in [(None, 0.0), (Some(40), 0.0), (None, 3.0)] {
            let mut case = Case::new(ty, heads, texts, window);
            case.softcap = softcap;
            let error = nmse(&case.computed(2), &case.exact());
            assert!(
                error < 1e-11,
                "{ty:?} {heads:?} {texts:?} {window:?} {softcap}: {error:e}"
            );
            let without = case.exact();
            let case = case.with_sinks();
            let error = nmse(&case.computed(2), &case.exact());
            assert!(
                error < 1e-11,
                "{ty:?} {heads:?} {texts:?}, sinks: {error:e}"
            );
            assert!(nmse(&without, &case.exact()) > 1e-9, "sinks count");
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
            let case = Case::new(ty, [d, 2, 1], &[[3, 37, 5]], None);
            let error = nmse(&case.computed(1), &case.exact());
            assert!(error < 1e-11, "{d} {ty:?}: {error:e}");
        }
    }
}

#[test]
fn bits_depend_on_neither_batch_nor_threads_nor_division() {
    if !available() {
        return;
    }
    let mut divided = 0;
    for (ty, (heads, texts)) in TYPES.into_iter().flat_map(|ty| CASES.map(|c| (ty, c))) {
        for (window, sinks) in [(None, false), (Some(40), false), (None, true)] {
            let mut case = Case::new(ty, heads, texts, window);
            if sinks {
                case = case.with_sinks();
            }
            let want = case.computed(1);
            for nth in [2, 3, 64] {
                assert!(
                    case.computed(nth) == want,
                    "{ty:?} {texts:?}: {nth} threads"
                );
            }
            let mut first = 0;
            for (i, &[.., t]) in texts.iter().enumerate() {
                divided += usize::from(case.layer().n_records(&case.texts()[i..=i]) > 0);
                for token in [0, t / 2, t - 1] {
                    let of_token = &want[(first + token) * case.width()..][..case.width()];
                    for nth in [1, 2] {
                        let alone = case.alone(i, token, nth);
                        assert!(alone == of_token, "{ty:?} {texts:?}: {i}, token {token}");
                    }
                }
                first += t;
            }
        }
    }
    assert!(divided > 10, "{divided} were merged from records");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn attentions_are_what_the_definition_says(
        ty in prop::sample::select(&TYPES[..]),
        [eights, hk, group] in [1..17usize, 1..4usize, 1..6usize],
        texts in prop::collection::vec(
            (prop_oneof![Just(0usize), 1..300usize], prop_oneof![0..20usize, 0..600usize], prop_oneof![1..3usize, 1..80usize]),
            1..4,
        ),
        (window, softcap, sinks) in (prop::option::of(1..100usize), prop_oneof![Just(0.0f32), 1.0..50.0f32], any::<bool>()),
        (nth, text, token) in (1..100usize, any::<prop::sample::Index>(), any::<prop::sample::Index>()),
    ) {
        if !arch::available() {
            return Ok(());
        }
        let d = match ty {
            GgmlType::Q8_0 => 32 * eights.div_ceil(4),
            _ => 8 * eights,
        };
        let texts: Vec<_> = texts.into_iter().map(|(p, before, t)| [p, before + t, t]).collect();
        let mut case = Case::new(ty, [d, group * hk, hk], &texts, window);
        case.softcap = softcap;
        if sinks {
            case = case.with_sinks();
        }
        let got = case.computed(nth);
        for (i, (got, (want, bound))) in got.iter().zip(case.naive()).enumerate() {
            let error = (f64::from(*got) - want).abs();
            prop_assert!(error <= bound, "at {}: {} for {}, {:e} more than {:e}", i, got, want, error, bound);
        }
        let text = text.index(texts.len());
        let token = token.index(texts[text][2]);
        let before: usize = texts[..text].iter().map(|t| t[2]).sum();
        let of_token = &got[(before + token) * case.width()..][..case.width()];
        prop_assert_eq!(&case.alone(text, token, nth), of_token);
    }
}

/// Room in pages that is not written yet changes nothing, whatever stands there; nor do keys in front of the window, whose pages need not be there.
#[test]
fn keys_out_of_sight_may_be_anything() {
    if !available() {
        return;
    }
    for (n, window) in [
        (5, None),
        (37, None),
        (256, None),
        (300, Some(70)),
        (650, Some(100)),
    ] {
        let mut case = Case::new(GgmlType::F16, [64, 2, 1], &[[20, n, 4]], window);
        let want = case.computed(1);
        let (row, seen) = (case.row_bytes(), visible(20 + n - 4, window).start);
        for (i, page) in case.texts[0].pages.iter_mut().enumerate() {
            // Nobody sees anything before `seen`.
            let filled = page.len() / (2 * row);
            let hidden = seen.saturating_sub(20 + i * PAGE).min(filled);
            let mut whole = vec![0xff; 2 * row * PAGE];
            for part in 0..2 {
                let from = &page[(part * filled + hidden) * row..(part + 1) * filled * row];
                whole[(part * PAGE + hidden) * row..][..from.len()].copy_from_slice(from);
            }
            *page = Exact::new(GgmlType::F16, &whole);
        }
        assert!(case.computed(1) == want, "{n} {window:?}");
        let mut texts = case.texts();
        let gone = seen.saturating_sub(20) / PAGE;
        assert_eq!(gone > 0, window.is_some());
        texts[0].pages[..gone].fill(Rows::EMPTY);
        assert!(case.computed_from(&texts, 2) == want, "{n} {window:?}");
    }
}

/// In queries, keys or values: where it is seen, the output is not a number.
#[test]
fn what_is_not_a_number_comes_out() {
    if !available() {
        return;
    }
    for bad in [f16::NAN, f16::INFINITY] {
        for part in ["q", "k", "v"] {
            let mut case = Case::new(GgmlType::F16, [32, 2, 1], &[[0, 300, 3]], None);
            // Key 299 is seen by the last token only.
            let page = case.texts[0].pages.last_mut().unwrap();
            let middle = page.len() / 2;
            match part {
                "q" => case.q[4 * 32] = bad.to_f32(),
                "k" => page[middle - 64..][..2].copy_from_slice(&bad.to_le_bytes()),
                _ => page[2 * middle - 64..][..2].copy_from_slice(&bad.to_le_bytes()),
            }
            for nth in [1, 3] {
                let got = case.computed(nth);
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
