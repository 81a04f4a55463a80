//! Cross-entropy between logits and what they should say.

use crate::ggml::context::Context;
use crate::ggml::custom::{Kernel, Op, Output, Parts};
use crate::ggml::tensor::Tensor;
use crate::kernels::{exp_sub_sum, largest};

/// What each row of logits should say: a distribution over k tokens.
#[derive(Clone)]
pub(crate) struct Targets {
    /// I32 `ne = [k, C]`: token ids.
    pub(crate) ids: Tensor,
    /// F32 `ne = [k, C]`: their probabilities; 1 for the one token of a plain target.
    pub(crate) probabilities: Tensor,
    /// F32 `ne = [C]`: factor of each row's gradient.
    pub(crate) weights: Tensor,
    /// F32 `ne = [C]`: each row's loss without its weight is written here.
    pub(crate) losses: Tensor,
}

/// Replaces logits by the gradient of the loss. Operands: logits, ids, probabilities, weights, losses.
struct CrossEntropy {
    /// Probability that is spread evenly over the vocabulary (Szegedy et al. 2016).
    smoothing: f32,
}

impl Kernel for CrossEntropy {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let (ids, probabilities) = (op.ids(1), op.operand(2).contiguous());
        let weights = op.operand(3).contiguous();
        let [v, c, ..] = op.ne();
        let k = ids.len() / c;
        let (first, rows) = out.share(c);
        let keep = 1.0 - self.smoothing;
        for (i, row) in (first..).zip(rows.chunks_exact_mut(v)) {
            let targets = || {
                let range = i * k..(i + 1) * k;
                ids[range.clone()].iter().zip(&probabilities[range])
            };
            let max = largest(row);
            let pairs = targets().map(|(&id, &p)| (id, p));
            let (mass, expected) = expected_logit(row, pairs, self.smoothing);
            let sum = exp_sub_sum(row, max);
            let loss = mass * (f64::from(max) + f64::from(sum).ln()) - expected;
            // SAFETY: element i of `losses`, written by this thread alone.
            unsafe { *op.second_dst(4).add(i) = loss as f32 };
            let weight = weights[i];
            let factor = weight * mass as f32 / sum;
            let even = weight * self.smoothing / v as f32;
            row.iter_mut().for_each(|x| *x = *x * factor - even);
            for (&id, &p) in targets() {
                row[id as usize] -= weight * keep * p;
            }
        }
    }
}

/// Of a row of logits: the probability that its targets have together, and the sum of the logits weighted with it. The cross-entropy is the one times the logarithm of the
/// sum of the logits' exponentials, less the other.
pub(crate) fn expected_logit(
    row: &[f32],
    targets: impl Iterator<Item = (i32, f32)>,
    smoothing: f32,
) -> (f64, f64) {
    let keep = 1.0 - smoothing;
    let (mut mass, mut expected) = (0.0, 0.0);
    for (id, p) in targets {
        let p = f64::from(keep * p);
        mass += p;
        expected += p * f64::from(row[id as usize]);
    }
    if smoothing > 0.0 {
        let smoothing = f64::from(smoothing);
        mass += smoothing;
        let sum: f64 = row.iter().map(|&x| f64::from(x)).sum();
        expected += smoothing * sum / row.len() as f64;
    }
    (mass, expected)
}

/// The most probable tokens of each row. Operand: logits. Result `ne = [k, C, 2]`: ids (their bits), then probabilities that
/// sum to 1.
struct TopK {
    k: usize,
}

impl Kernel for TopK {
    fn run(&self, op: &Op<'_>, out: Output<'_>) {
        let logits = op.operand(0);
        let (k, c) = (self.k, logits.ne[1]);
        for i in op.share(c) {
            let row = logits.row(i, 0);
            let mut best: Vec<u32> = (0..row.len() as u32).collect();
            let order =
                |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
            if k < best.len() {
                best.select_nth_unstable_by(k, order);
                best.truncate(k);
            }
            best.sort_unstable_by(order);
            let mut probabilities: Vec<f32> = best.iter().map(|&id| row[id as usize]).collect();
            let max = probabilities[0];
            let sum = exp_sub_sum(&mut probabilities, max);
            for (j, (&id, p)) in best.iter().zip(probabilities).enumerate() {
                // SAFETY: elements (j, i) of both halves of the result, written by this thread alone.
                unsafe {
                    *out.as_mut_ptr().add(i * k + j) = f32::from_bits(id);
                    *out.as_mut_ptr().add((c + i) * k + j) = p / sum;
                }
            }
        }
    }

    /// A row is sorted.
    fn parts(&self, op: &Op<'_>) -> Parts {
        Parts::AtMost(op.operand(0).ne[1])
    }
}

impl Context {
    /// The `k` most probable tokens of each row of logits `ne = [V, C]`: ids (I32 bits in an F32 tensor) and probabilities
    /// that sum to 1, `ne = [k, C]` each.
    pub(crate) fn top_k(&self, logits: &Tensor, k: usize) -> (Tensor, Tensor) {
        let c = logits.ne()[1];
        let both = self.custom(TopK { k }, &[logits], [k, c, 2, 1]);
        let (row, half) = (both.nb()[1], both.nb()[2]);
        let view = |offset| self.view(&both, [k, c, 1, 1], [row, half, half], offset);
        (view(0), view(half))
    }

    /// Replaces `logits`, `ne = [V, C]`, by the gradient of the weighted sum of the rows' cross-entropies, and writes those to
    /// `targets.losses`.
    pub(crate) fn cross_entropy(
        &self,
        logits: &Tensor,
        targets: &Targets,
        smoothing: f32,
    ) -> Tensor {
        let Targets {
            ids,
            probabilities,
            weights,
            losses,
        } = targets;
        self.custom_inplace(
            CrossEntropy { smoothing },
            logits,
            &[ids, probabilities, weights, losses],
        )
    }
}
