//! Cross-entropy between logits and what they should say.

use crate::ggml::context::{Context, Tensor};
use crate::ggml::custom::{Kernel, Op};
use crate::ggml::kernels::exp_sub_sum;
use std::sync::Arc;

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
    fn run(&self, op: &Op<'_>) {
        let (ids, probabilities) = (op.ids(1), op.operand(2).contiguous());
        let weights = op.operand(3).contiguous();
        let [v, c, ..] = op.ne();
        let k = ids.len() / c;
        let (first, rows) = op.share_mut(c);
        let keep = 1.0 - self.smoothing;
        for (i, row) in (first..).zip(rows.chunks_exact_mut(v)) {
            let targets = || {
                let range = i * k..(i + 1) * k;
                ids[range.clone()].iter().zip(&probabilities[range])
            };
            let max = row.iter().fold(f32::NEG_INFINITY, |m, &x| m.max(x));
            let mut mass = 0.0;
            let mut expected = 0.0;
            for (&id, &p) in targets() {
                let p = f64::from(keep * p);
                mass += p;
                expected += p * f64::from(row[id as usize]);
            }
            if self.smoothing > 0.0 {
                let smoothing = f64::from(self.smoothing);
                mass += smoothing;
                expected += smoothing * row.iter().map(|&x| f64::from(x)).sum::<f64>() / v as f64;
            }
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

impl Context {
    /// Replaces `logits`, `ne = [V, C]`, by the gradient of the weighted sum of the rows' cross-entropies, and writes those to
    /// `targets.losses`.
    pub(crate) fn cross_entropy(
        self: &Arc<Self>,
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
