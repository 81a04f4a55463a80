//! The derivative of each verb against central differences of what it computes.

use super::*;
use crate::file::types::GgmlType;
use crate::ggml::{Graph, GraphMemory, ThreadPool};
use crate::model::{Experts, SharedExpert, Weighting};
use crate::operation::RopeKind;

/// Differences are taken with this step and twice of it.
const STEP: f64 = 1e-2;
/// So many elements of a variable are compared, if it has more.
const ELEMENTS: usize = 60;

/// An input of a graph.
#[derive(Clone)]
enum Leaf {
    /// F32 that the gradient is taken with respect to.
    Variable(Vec<usize>, Vec<f32>),
    /// F32 of frozen weights.
    Constant(Vec<usize>, Vec<f32>),
    /// I32 `ne = [n]`.
    Ids(Vec<i32>),
}

/// From -1 to 1, in no order that repeats.
fn random(seed: u64, n: usize) -> Vec<f32> {
    // Knuth's linear congruential generator (MMIX), of which the upper bits are good.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn variable(seed: u64, ne: &[usize]) -> Leaf {
    Leaf::Variable(ne.to_vec(), random(seed, ne.iter().product()))
}

fn constant(seed: u64, ne: &[usize]) -> Leaf {
    Leaf::Constant(ne.to_vec(), random(seed, ne.iter().product()))
}

fn input(b: &Builder, ne: &[usize]) -> Tensor {
    b.ctx().input(GgmlType::F32, ne, "x")
}

const BOTH: [Operations; 2] = [Operations::Own, Operations::Ggml];

/// Result, and given its gradient those of the variables.
fn compute(
    operations: Operations,
    leaves: &[Leaf],
    verb: &impl Fn(&Builder, &[Tensor]) -> Tensor,
    gradient: Option<&[f32]>,
) -> (Vec<f32>, Vec<Vec<f32>>) {
    let mut b = Builder::new(operations);
    let tensors: Vec<Tensor> = leaves
        .iter()
        .map(|leaf| match leaf {
            Leaf::Variable(ne, _) | Leaf::Constant(ne, _) => input(&b, ne),
            Leaf::Ids(ids) => b.ctx().input(GgmlType::I32, &[ids.len()], "ids"),
        })
        .collect();
    let variables = || {
        let variables = leaves.iter().zip(&tensors);
        variables.filter_map(|(l, t)| matches!(l, Leaf::Variable(..)).then_some(t))
    };
    b.record(variables());
    let y = verb(&b, &tensors);
    let tape = b.recorded();
    let mut outputs = vec![b.output(b.ctx().cont(&y))];
    let seed = input(&b, &y.ne());
    if gradient.is_some() {
        let found = tape.backward(b.ctx(), &y, &seed);
        let found = variables().map(|v| found.of(v).expect("the result depends on it"));
        outputs.extend(found.map(|g| b.output(b.ctx().cont(g))));
    }
    let mut graph = Graph::allocate(b.finish(), GraphMemory::new()).unwrap();
    for (leaf, tensor) in leaves.iter().zip(&tensors) {
        // What the verb does not read has none.
        if graph.has_memory(tensor) {
            match leaf {
                Leaf::Variable(_, v) | Leaf::Constant(_, v) => {
                    graph.slice_mut(tensor).copy_from_slice(v);
                }
                Leaf::Ids(ids) => graph.slice_mut(tensor).copy_from_slice(ids),
            }
        }
    }
    if let Some(gradient) = gradient {
        graph.slice_mut(&seed).copy_from_slice(gradient);
    }
    graph.compute(&ThreadPool::new(1), None).unwrap();
    let mut found = outputs.iter().map(|t| graph.read_f32(t).to_vec());
    (found.next().unwrap(), found.collect())
}

/// Relative distance, absolute for values that are all but zero.
fn distance(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
    let differences = &mut got.iter().zip(want).map(|(a, b)| a - b);
    norm(differences) / norm(&mut want.iter().copied()).max(1e-2)
}

/// A variable's values.
fn values(leaf: &Leaf) -> &[f32] {
    match leaf {
        Leaf::Variable(_, values) | Leaf::Constant(_, values) => values,
        Leaf::Ids(_) => unreachable!("ids have no values"),
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&x| f64::from(x)).collect()
}

/// Compares results with those of `forward`, and gradients with its differences, whoever computes what stands between products.
fn check_against(
    name: &str,
    leaves: &[Leaf],
    verb: impl Fn(&Builder, &[Tensor]) -> Tensor,
    forward: impl Fn(&[Leaf]) -> Vec<f64>,
) {
    for operations in BOTH {
        check_operations(operations, name, leaves, &verb, &forward);
    }
}

fn check_operations(
    operations: Operations,
    name: &str,
    leaves: &[Leaf],
    verb: impl Fn(&Builder, &[Tensor]) -> Tensor,
    forward: impl Fn(&[Leaf]) -> Vec<f64>,
) {
    let (y, _) = compute(operations, leaves, &verb, None);
    let error = distance(&wide(&y), &forward(leaves));
    assert!(error <= 1e-3, "{name}: off by {error:.1e}");
    let c = random(99, y.len());
    let (_, gradients) = compute(operations, leaves, &verb, Some(&c));
    let variables = (0..leaves.len()).filter(|&i| matches!(leaves[i], Leaf::Variable(..)));
    assert!(!gradients.is_empty(), "{name}: nothing to differentiate");
    for (i, gradient) in variables.zip(gradients) {
        let start = values(&leaves[i]);
        assert_eq!(gradient.len(), start.len(), "{name}: operand {i}");
        let (mut got, mut want) = (Vec::new(), Vec::new());
        for at in (0..start.len()).step_by(start.len().div_ceil(ELEMENTS)) {
            // Value of the element, and the weighted sum of the results.
            let moved = |step: f64| {
                let mut leaves = leaves.to_vec();
                if let Leaf::Variable(_, values) = &mut leaves[i] {
                    values[at] += step as f32;
                }
                let y = forward(&leaves);
                let products = y.iter().zip(&c).map(|(y, &c)| y * f64::from(c));
                (f64::from(values(&leaves[i])[at]), products.sum::<f64>())
            };
            let slope = |step: f64| {
                let ((right, up), (left, down)) = (moved(step), moved(-step));
                (up - down) / (right - left)
            };
            // The error of the difference is of fourth order (Richardson).
            want.push((4.0 * slope(STEP) - slope(2.0 * STEP)) / 3.0);
            got.push(f64::from(gradient[at]));
        }
        let error = distance(&got, &want);
        assert!(
            error <= 2e-4,
            "{name}: gradient of operand {i} off by {error:.1e}"
        );
    }
}

/// Compares gradients with differences of the verb's own result.
fn check(name: &str, leaves: &[Leaf], verb: impl Fn(&Builder, &[Tensor]) -> Tensor) {
    for operations in BOTH {
        let own = |leaves: &[Leaf]| wide(&compute(operations, leaves, &verb, None).0);
        check_operations(operations, name, leaves, &verb, own);
    }
}

#[test]
fn linear() {
    let leaves = [
        variable(1, &[8, 3]),
        constant(2, &[8, 6]),
        constant(3, &[6]),
    ];
    check("without bias", &leaves, |b, t| {
        b.linear(&Linear::new(t[1].clone(), None), &t[0])
    });
    check("with bias", &leaves, |b, t| {
        b.linear(&Linear::new(t[1].clone(), Some(t[2].clone())), &t[0])
    });
}

#[test]
fn norms() {
    for kind in [NormKind::Rms, NormKind::Layer] {
        for eps in [1e-6, 0.3] {
            for (name, x, w) in [
                ("rows", &[12, 4][..], &[12][..]),
                ("heads, one weight", &[6, 3, 4], &[6]),
                ("heads, own weights", &[6, 3, 4], &[6, 3]),
            ] {
                let leaves = [variable(1, x), constant(2, w), constant(3, w)];
                let name = format!("{kind:?} {eps} {name}");
                check(&name, &leaves, |b, t| {
                    b.scaled_norm(kind, eps, &t[1], &t[0])
                });
                for bias in [false, true] {
                    check(&format!("{name} {bias}"), &leaves, |b, t| {
                        let norm = Norm {
                            w: t[1].clone(),
                            b: bias.then(|| t[2].clone()),
                        };
                        b.norm(kind, eps, &norm, &t[0])
                    });
                }
            }
            // Heads that are views of a fused projection.
            let leaves = [variable(1, &[30, 4]), constant(2, &[6, 2])];
            check(&format!("{kind:?} {eps} views"), &leaves, |b, t| {
                let heads = b.heads(&b.view_columns(&t[0], 12, 10), 6);
                b.scaled_norm(kind, eps, &t[1], &heads)
            });
        }
    }
}

#[test]
fn sums() {
    let leaves = [variable(1, &[5, 3]), variable(2, &[5, 3])];
    check("two", &leaves, |b, t| b.add(&t[0], &t[1]));
    check("one, twice", &leaves[..1], |b, t| b.add(&t[0], &t[0]));
    check("one, in three ways", &leaves, |b, t| {
        let sum = b.add(&b.scale(&t[0], 3.0), &t[1]);
        b.add(&b.scale_capped(&sum, 1.0, 2.0), &t[0])
    });
}

#[test]
fn scales() {
    let leaves = [variable(1, &[5, 3])];
    for s in [1.0, -0.3, 4.0] {
        check("scale", &leaves, |b, t| b.scale(&t[0], s));
        for cap in [0.0, 0.5, 30.0] {
            check("scale and cap", &leaves, |b, t| {
                b.scale_capped(&t[0], s, cap)
            });
        }
    }
}

#[test]
fn rows() {
    let ids = Leaf::Ids(vec![3, 0, 3, 3, 4]);
    let leaves = [variable(1, &[6, 5]), ids];
    check("picked", &leaves, |b, t| b.get_rows(&t[0], &t[1]));
    let slots = Leaf::Ids(vec![-1, 2, 0, -1, 1, 2]);
    let leaves = [constant(1, &[6, 6]), variable(2, &[6, 3]), slots];
    check("placed", &leaves, |b, t| b.place_rows(&t[0], &t[1], &t[2]));
}

#[test]
fn views() {
    let leaves = [variable(1, &[12, 3])];
    check("heads", &leaves, |b, t| b.heads(&t[0], 4));
    for (width, offset) in [(12, 0), (5, 0), (5, 4), (2, 10)] {
        check("columns", &leaves, |b, t| {
            b.view_columns(&t[0], width, offset)
        });
    }
    check("columns that overlap", &leaves, |b, t| {
        let (left, right) = (b.view_columns(&t[0], 8, 0), b.view_columns(&t[0], 8, 4));
        b.add(&left, &b.add(&left, &right))
    });
}

#[test]
fn rotary_positions() {
    for kind in [RopeKind::Interleaved, RopeKind::Neox] {
        let plain = Rope {
            kind,
            n_rot: 8,
            n_ctx_orig: 64,
            freq_base: 100.0,
            freq_scale: 1.0,
            ext_factor: 0.0,
            attn_factor: 1.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
        };
        let yarn = Rope {
            freq_scale: 0.25,
            ext_factor: 1.0,
            attn_factor: 1.2,
            ..plain
        };
        for (name, rope) in [
            ("plain", plain),
            ("partial", Rope { n_rot: 4, ..plain }),
            (
                "linear",
                Rope {
                    freq_scale: 0.25,
                    ..plain
                },
            ),
            ("YaRN", yarn),
            ("partial YaRN", Rope { n_rot: 4, ..yarn }),
        ] {
            let factors: Vec<f32> = (0..rope.n_rot / 2).map(|i| 1.0 + 0.7 * i as f32).collect();
            let leaves = [
                variable(1, &[8, 2, 4]),
                Leaf::Ids(vec![0, 3, 7, 50]),
                Leaf::Constant(vec![factors.len()], factors),
                variable(2, &[30, 4]),
            ];
            let name = format!("{kind:?} {name}");
            check(&name, &leaves[..2], |b, t| {
                b.rope(&t[0], &t[1], None, &rope)
            });
            check(&format!("{name}, factors"), &leaves[..3], |b, t| {
                b.rope(&t[0], &t[1], Some(&t[2]), &rope)
            });
            check(&format!("{name}, views"), &leaves[1..], |b, t| {
                let heads = b.heads(&b.view_columns(&t[2], 16, 10), 8);
                b.rope(&heads, &t[0], None, &rope)
            });
        }
    }
}

/// `W x + b`: x `ne = [K, T]` -> `ne = [N, T]`.
fn product(w: &[f32], bias: &[f32], x: &[f64]) -> Vec<f64> {
    let k = w.len() / bias.len();
    let row = |x: &[f64], n: usize| {
        let products = w[n * k..][..k]
            .iter()
            .zip(x)
            .map(|(&w, x)| f64::from(w) * x);
        products.sum::<f64>() + f64::from(bias[n])
    };
    x.chunks_exact(k)
        .flat_map(|x| (0..bias.len()).map(move |n| row(x, n)))
        .collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

fn gelu(x: f64) -> f64 {
    let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + u.tanh())
}

fn oai(x: f64) -> f64 {
    let x = x.min(7.0);
    x / (1.0 + (-1.702 * x).exp())
}

#[test]
fn feed_forward_networks() {
    const D: usize = 6;
    const F: usize = 10;
    // ggml may look GELU up in a table of F16, whose steps no difference survives: the reference is computed here.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Kind {
        Plain,
        Gated,
        Fused,
    }
    use Kind::*;
    let kinds = [Plain, Gated, Fused].into_iter();
    let activations = [Activation::Silu, Activation::Gelu, Activation::SwigluOai];
    for (f, kind) in kinds.flat_map(|k| activations.map(|f| (f, k))) {
        let up = if kind == Fused { 2 * F } else { F };
        let leaves = [
            Leaf::Variable(
                vec![D, 4],
                random(1, 4 * D).iter().map(|x| 5.0 * x).collect(),
            ),
            constant(2, &[D, up]),
            constant(3, &[up]),
            constant(4, &[D, F]),
            constant(5, &[F]),
            constant(6, &[F, D]),
            constant(7, &[D]),
        ];
        let forward = |leaves: &[Leaf]| {
            let x = wide(values(&leaves[0]));
            let part = |i: usize, x: &[f64]| product(values(&leaves[i]), values(&leaves[i + 1]), x);
            let value = match f {
                Activation::Silu => silu,
                Activation::Gelu => gelu,
                Activation::SwigluOai => oai,
            };
            let gated = |up: f64| match f {
                Activation::SwigluOai => up.clamp(-7.0, 7.0) + 1.0,
                _ => up,
            };
            let multiply = |gates: &[f64], up: &[f64]| {
                let both = gates.iter().zip(up).map(|(&g, &u)| value(g) * gated(u));
                both.collect::<Vec<f64>>()
            };
            let up = part(1, &x);
            let h: Vec<f64> = match kind {
                Plain => up.iter().map(|&x| value(x)).collect(),
                Gated => multiply(&part(3, &x), &up),
                Fused => up
                    .chunks_exact(2 * F)
                    .flat_map(|row| multiply(&row[..F], &row[F..]))
                    .collect(),
            };
            part(5, &h)
        };
        let verb = |b: &Builder, t: &[Tensor]| {
            let linear = |i: usize| Linear::new(t[i].clone(), Some(t[i + 1].clone()));
            let hidden = match kind {
                Plain => Hidden::Plain(linear(1)),
                Gated => Hidden::Gated {
                    gate: linear(3),
                    up: linear(1),
                },
                Fused => Hidden::Fused(linear(1)),
            };
            let down = linear(5);
            let ffn = FeedForward::Dense(Mlp { hidden, down });
            b.feed_forward(f, &ffn, None, &t[0])
        };
        check_against(&format!("{f:?} {kind:?}"), &leaves, verb, forward);
    }
}

/// Sizes of an attention: d, H, Hk.
type Heads = (usize, usize, usize);

/// Attention one query and one key at a time. Leaves: q, k, v, with a prefix its k and v, and with sinks these.
fn attention(leaves: &[Leaf], spans: &Spans, (d, h, hk): Heads) -> Vec<f64> {
    let sinks = leaves.get(if spans.prefix > 0 { 5 } else { 3 });
    let row = |leaf: usize, head: usize, at: usize, heads: usize| {
        wide(&values(&leaves[leaf])[(at * heads + head) * d..][..d])
    };
    let n_tokens = spans.rows.last().map_or(spans.shared, |r| r.end);
    let mut out = Vec::new();
    for t in 0..n_tokens {
        // All that stands in front, in order: leaf of the keys and row in it.
        let own = spans.rows.iter().find(|r| r.contains(&t));
        let seen = (0..spans.prefix).map(|p| (3, p));
        let seen = seen.chain((0..spans.shared.min(t + 1)).map(|s| (1, s)));
        let seen: Vec<_> = seen
            .chain(own.map_or(0..0, |r| r.start..t + 1).map(|s| (1, s)))
            .collect();
        let skipped = spans.window.map_or(0, |w| seen.len().saturating_sub(w));
        for head in 0..h {
            let q = row(0, head, t, h);
            let group = head / (h / hk);
            let scores: Vec<f64> = seen[skipped..]
                .iter()
                .map(|&(leaf, at)| {
                    let k = row(leaf, group, at, hk);
                    let dot = q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
                    let Scoring { scale, softcap } = spans.scoring;
                    let (s, cap) = (f64::from(scale) * dot, f64::from(softcap));
                    if cap > 0.0 { cap * (s / cap).tanh() } else { s }
                })
                .collect();
            let of_sink = sinks.map_or(0.0, |sinks| f64::from(values(sinks)[head]).exp());
            let sum = scores.iter().map(|s| s.exp()).sum::<f64>() + of_sink;
            let mut mean = vec![0.0; d];
            for (&(leaf, at), score) in seen[skipped..].iter().zip(scores) {
                let v = row(leaf + 1, group, at, hk);
                mean.iter_mut()
                    .zip(v)
                    .for_each(|(m, v)| *m += score.exp() / sum * v);
            }
            out.extend(mean);
        }
    }
    out
}

fn check_attention(spans: &Spans, heads: Heads) {
    for sinks in [false, true] {
        check_attention_with(spans, heads, sinks);
    }
}

fn check_attention_with(spans: &Spans, (d, h, hk): Heads, sinks: bool) {
    let t = spans.rows.last().unwrap().end;
    let mut leaves = vec![
        variable(1, &[d, h, t]),
        variable(2, &[d, hk, t]),
        variable(3, &[d, hk, t]),
    ];
    if spans.prefix > 0 {
        leaves.push(variable(4, &[d, hk, spans.prefix]));
        leaves.push(variable(5, &[d, hk, spans.prefix]));
    }
    let others = leaves.len();
    if sinks {
        leaves.push(constant(6, &[h]));
    }
    let shared = Arc::new(spans.clone());
    check_against(
        &format!("{spans:?}, {h} heads of {hk}, sinks: {sinks}"),
        &leaves,
        |b, t| {
            let of = PackedAttention {
                q: &t[0],
                k: &t[1],
                v: &t[2],
                prefix: (others > 3).then(|| [&t[3], &t[4]]),
                sinks: t.get(others),
            };
            b.packed_attention(&shared, of)
        },
        |leaves| attention(leaves, spans, (d, h, hk)),
    );
}

#[test]
fn attention_of_packed_rows() {
    for prefix in [0, 3] {
        for (shared, rows) in [
            (0, std::iter::once(0..5).collect()),
            (0, vec![0..4, 4..5, 5..8]),
            (4, vec![4..5, 5..9]),
        ] {
            for window in [None, Some(1), Some(3), Some(6), Some(100)] {
                for softcap in [0.0, 0.8] {
                    let spans = Spans {
                        prefix,
                        shared,
                        rows: rows.clone(),
                        window,
                        scoring: Scoring {
                            scale: 1.5,
                            softcap,
                        },
                    };
                    check_attention(&spans, (4, 4, 2));
                }
            }
        }
    }
}

#[test]
fn attention_of_all_kinds_of_heads() {
    for heads in [(4, 1, 1), (3, 3, 3), (8, 6, 2), (5, 4, 1)] {
        let spans = Spans {
            prefix: 2,
            shared: 3,
            rows: vec![3..5, 5..9],
            window: Some(5),
            scoring: Scoring {
                scale: 1.0,
                softcap: 2.0,
            },
        };
        check_attention(&spans, heads);
    }
}

#[test]
fn attention_of_long_rows() {
    // More queries than are computed at a time, in the shared part and in a row of its own.
    for (window, softcap) in [(None, 0.0), (Some(20), 1.5)] {
        let spans = Spans {
            prefix: 7,
            shared: 50,
            rows: vec![50..53, 53..103],
            window,
            scoring: Scoring {
                scale: 2.0,
                softcap,
            },
        };
        check_attention(&spans, (4, 2, 1));
    }
}

#[test]
fn attention_of_views() {
    const HEADS: Heads = (4, 4, 2);
    let spans = Arc::new(Spans {
        prefix: 0,
        shared: 2,
        rows: vec![2..4, 4..7],
        window: None,
        scoring: Scoring {
            scale: 1.0,
            softcap: 0.0,
        },
    });
    // One fused projection: q, k and v lie side by side.
    check("fused", &[variable(1, &[32, 7])], |b, t| {
        let part = |width, offset| b.heads(&b.view_columns(&t[0], width, offset), HEADS.0);
        let (q, k, v) = (part(16, 0), part(8, 16), part(8, 24));
        let of = PackedAttention {
            q: &q,
            k: &k,
            v: &v,
            prefix: None,
            sinks: None,
        };
        b.packed_attention(&spans, of)
    });
}

#[test]
fn nothing_is_recorded_below_the_variables() {
    let mut b = Builder::new(Operations::Own);
    let [frozen, x, unused, dy] = std::array::from_fn(|_| input(&b, &[4, 2]));
    b.record([&x, &unused]);
    let below = b.scale(&frozen, 2.0);
    let y = b.add(&below, &x);
    let tape = b.recorded();
    let found = tape.backward(b.ctx(), &y, &dy);
    assert!(found.of(&x).is_some());
    assert!(found.of(&frozen).is_none());
    assert!(found.of(&below).is_none());
    assert!(found.of(&unused).is_none());
}

/// Two of five experts for each of four tokens, as they come from a router.
const CHOSEN: [i32; 8] = [3, 0, 0, 1, 3, 1, 4, 3];

#[test]
fn probabilities_and_weights_of_experts() {
    let logits = [variable(1, &[5, 4])];
    check("softmax", &logits, |b, t| b.softmax_rows(&t[0]));
    let p: Vec<f32> = random(2, 20).iter().map(|p| 0.3 + 0.2 * p).collect();
    // Sums so small that they are not what is divided by.
    let tiny: Vec<f32> = p.iter().map(|p| 1e-6 * p).collect();
    let ids = Leaf::Ids(CHOSEN.to_vec());
    for normalized in [false, true] {
        let leaves = [Leaf::Variable(vec![5, 4], p.clone()), ids.clone()];
        check(&format!("weights, {normalized}"), &leaves, |b, t| {
            let ids = b.ctx().reshape(&t[1], &[2, 4]);
            b.expert_weights(&t[0], &ids, normalized)
        });
    }
    let ids = |ctx: &Context| ctx.input(GgmlType::I32, &[2, 4], "ids");
    for operations in BOTH {
        let b = Builder::new(operations);
        let (p, chosen, dw) = (input(&b, &[5, 4]), ids(b.ctx()), input(&b, &[2, 4]));
        let w = b.ctx().expert_weights(&p, &chosen, true);
        let dp = b.ctx().expert_weights_back(&p, &chosen, true, &dw);
        let mut b = b;
        let (w, dp) = (b.output(w), b.output(dp));
        let mut graph = Graph::allocate(b.finish(), GraphMemory::new()).unwrap();
        graph.slice_mut(&p).copy_from_slice(&tiny);
        graph.slice_mut(&chosen).copy_from_slice(&CHOSEN);
        graph.slice_mut(&dw).fill(1.0f32);
        graph.compute(&ThreadPool::new(1), None).unwrap();
        let smallest = 1.0 / 16384.0;
        assert_eq!(graph.read_f32(&w)[0], tiny[3] / smallest);
        let dp = graph.read_f32(&dp);
        assert_eq!([dp[0], dp[1], dp[3]], [16384.0, 0.0, 16384.0]);
    }
}

#[test]
fn rows_of_experts() {
    const N_EXPERT: usize = 5;
    let ids = Leaf::Ids(CHOSEN.to_vec());
    let leaves = [variable(1, &[6, 8]), variable(2, &[2, 4]), ids.clone()];
    check("mixed", &leaves, |b, t| {
        let groups = b.ctx().group_rows(&t[2], N_EXPERT);
        b.mix_rows(&t[0], &t[1], &groups)
    });
    let leaves = [
        variable(1, &[6, 8]),
        constant(2, &[6, 3, N_EXPERT]),
        ids,
        constant(3, &[3, N_EXPERT]),
    ];
    for biased in [false, true] {
        check(&format!("multiplied, {biased}"), &leaves, |b, t| {
            let groups = b.ctx().group_rows(&t[2], N_EXPERT);
            let bias = biased.then(|| t[3].clone());
            b.multiply_rows(&Linear::new(t[1].clone(), bias), &t[0], &groups)
        });
    }
    let leaves = [variable(1, &[6, 4]), variable(2, &[1, 4])];
    check("gated", &leaves, |b, t| b.gate_rows(&t[0], &t[1]));
}

#[test]
fn mixtures_of_experts() {
    const D: usize = 6;
    const F: usize = 10;
    const N_EXPERT: usize = 5;
    const T: usize = 4;
    // Logits lie far enough apart that no difference makes other experts of those that are chosen.
    let router = random(2, D * N_EXPERT).iter().map(|x| 3.0 * x).collect();
    let leaves = [
        variable(1, &[D, T]),
        Leaf::Constant(vec![D, N_EXPERT], router),
        constant(3, &[D, F, N_EXPERT]),
        constant(4, &[D, F, N_EXPERT]),
        constant(5, &[F, D, N_EXPERT]),
        constant(6, &[D, F]),
        constant(7, &[D, F]),
        constant(8, &[F, D]),
        constant(9, &[D, 1]),
        constant(10, &[F, N_EXPERT]),
        constant(11, &[F, N_EXPERT]),
        constant(12, &[D, N_EXPERT]),
    ];
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let silu = |x: f64| x * sigmoid(x);
    // `W x` of one token, by the matrix `e` of a leaf.
    let times = |leaf: &Leaf, e: usize, n: usize, x: &[f64]| -> Vec<f64> {
        let w = &values(leaf)[e * n * x.len()..];
        let rows = w.chunks_exact(x.len()).take(n);
        let dot = |row: &[f32]| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
        rows.map(dot).collect()
    };
    let network = |[gate, up, down]: [&Leaf; 3], e: usize, x: &[f64]| -> Vec<f64> {
        let (gate, up) = (times(gate, e, F, x), times(up, e, F, x));
        let h: Vec<f64> = gate.iter().zip(up).map(|(&g, u)| silu(g) * u).collect();
        times(down, e, D, &h)
    };
    // gpt-oss: other gates, and biases, which stand in the last leaves.
    let biased = |leaves: &[Leaf], e: usize, x: &[f64]| -> Vec<f64> {
        let of = |matrix: usize, bias: usize, n: usize, x: &[f64]| -> Vec<f64> {
            let bias = &values(&leaves[bias])[e * n..][..n];
            let said = times(&leaves[matrix], e, n, x);
            said.iter()
                .zip(bias)
                .map(|(y, &b)| y + f64::from(b))
                .collect()
        };
        let (gate, up) = (of(2, 9, F, x), of(3, 10, F, x));
        let both = gate.iter().zip(up);
        let h: Vec<f64> = both
            .map(|(&g, u)| oai(g) * (u.clamp(-7.0, 7.0) + 1.0))
            .collect();
        of(4, 11, D, &h)
    };
    use Weighting::*;
    let kinds = [
        (1, Probability, None),
        (2, Probability, Some(false)),
        (2, Normalized, None),
        (3, Normalized, Some(true)),
        (N_EXPERT, Probability, None),
        (1, AmongChosen, None),
        (3, AmongChosen, None),
    ];
    for (n_used, weighting, shared) in kinds {
        let of_gpt = weighting == AmongChosen;
        let forward = |leaves: &[Leaf]| {
            let mut out = Vec::new();
            for x in wide(values(&leaves[0])).chunks_exact(D) {
                let logits = times(&leaves[1], 0, N_EXPERT, x);
                let sum: f64 = logits.iter().map(|z| z.exp()).sum();
                let mut order: Vec<usize> = (0..N_EXPERT).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
                order.truncate(n_used);
                let p = |e: usize| logits[e].exp() / sum;
                let mass: f64 = order.iter().map(|&e| p(e)).sum();
                let mut y = vec![0.0; D];
                for &e in &order {
                    let weight = match weighting {
                        Probability => p(e),
                        Normalized | AmongChosen => p(e) / mass,
                    };
                    let said = match of_gpt {
                        true => biased(leaves, e, x),
                        false => network([&leaves[2], &leaves[3], &leaves[4]], e, x),
                    };
                    y.iter_mut().zip(said).for_each(|(y, s)| *y += weight * s);
                }
                if let Some(gated) = shared {
                    let weight = match gated {
                        true => sigmoid(times(&leaves[8], 0, 1, x)[0]),
                        false => 1.0,
                    };
                    let said = network([&leaves[5], &leaves[6], &leaves[7]], 0, x);
                    y.iter_mut().zip(said).for_each(|(y, s)| *y += weight * s);
                }
                out.extend(y);
            }
            out
        };
        let verb = |b: &Builder, t: &[Tensor]| {
            let linear = |i: usize| Linear::new(t[i].clone(), None);
            let of_experts =
                |i: usize, bias: usize| Linear::new(t[i].clone(), of_gpt.then(|| t[bias].clone()));
            let shared = shared.map(|gated| SharedExpert {
                mlp: Mlp {
                    hidden: Hidden::Gated {
                        gate: linear(5),
                        up: linear(6),
                    },
                    down: linear(7),
                },
                gate: gated.then(|| linear(8)),
            });
            let experts = Experts {
                n_used,
                weighting,
                router: linear(1),
                gate: of_experts(2, 9),
                up: of_experts(3, 10),
                down: of_experts(4, 11),
                shared,
            };
            let ffn = FeedForward::Experts(Box::new(experts));
            let f = match of_gpt {
                true => Activation::SwigluOai,
                false => Activation::Silu,
            };
            b.feed_forward(f, &ffn, Some(0), &t[0])
        };
        let name = format!("{n_used} experts, {weighting:?}, {shared:?}");
        check_against(&name, &leaves, verb, forward);
    }
}
