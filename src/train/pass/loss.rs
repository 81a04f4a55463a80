//! From the last layer to the loss and its gradient, a few rows of logits at a time.

use crate::ggml::{Targets, Tensor};
use crate::graph::{Builder, Decoder};

/// Logits of so many bytes exist at a time: large enough to use the caches when the output matrix is multiplied backwards,
/// small beside the activations of a model with a large vocabulary.
const LOGIT_BYTES: usize = 32 << 20;

/// Rows `ne = [D, C]`, a chunk of them at a time.
pub(super) struct Chunks {
    /// C.
    n: usize,
    size: usize,
}

impl Chunks {
    /// Of `n` rows that have `n_vocab` logits each.
    pub(super) fn new(n: usize, n_vocab: usize) -> Self {
        let size = LOGIT_BYTES / size_of::<f32>() / n_vocab / 16 * 16;
        Self {
            n,
            size: size.clamp(16, n.max(16)),
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.n.div_ceil(self.size)
    }

    /// First row and number of rows of each.
    fn iter(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        (0..self.n)
            .step_by(self.size)
            .map(|start| (start, self.size.min(self.n - start)))
    }
}

/// Output matrix and loss over one set of targets.
pub(super) struct Head<'a> {
    pub(super) decoder: &'a Decoder<'a>,
    pub(super) chunks: &'a Chunks,
    /// Logits are soft-capped.
    pub(super) capped: bool,
}

impl Head<'_> {
    /// The losses of the rows `x`, written to `targets`; with `backward`, the gradient of their weighted sum with respect to
    /// `x`.
    pub(super) fn losses(
        &self,
        b: &mut Builder,
        x: &Tensor,
        targets: &Targets,
        smoothing: f32,
        backward: bool,
    ) -> Option<Tensor> {
        let mut dx: Option<Tensor> = None;
        for (start, n) in self.chunks.iter() {
            let part = rows(b, x, start, n);
            b.record([&part]);
            let result = self.logits(b, &part);
            let tape = b.recorded();
            let logits = if self.capped {
                // The cap's derivative reads the capped logits, which the loss would overwrite.
                b.ctx().cont(&result)
            } else {
                result.clone()
            };
            let targets = Targets {
                ids: rows(b, &targets.ids, start, n),
                probabilities: rows(b, &targets.probabilities, start, n),
                weights: values(b, &targets.weights, start, n),
                losses: values(b, &targets.losses, start, n),
            };
            let gradient = b.ctx().cross_entropy(&logits, &targets, smoothing);
            b.demand(&gradient);
            if backward {
                let gradients = tape.backward(b.ctx(), &result, &gradient);
                let part_dx = gradients.of(&part).expect("logits depend on x").clone();
                let sum = match dx {
                    Some(dx) => b.ctx().concat_rows(&dx, &part_dx),
                    None => part_dx,
                };
                b.demand(&sum);
                dx = Some(sum);
            }
        }
        dx
    }

    /// The `k` most probable tokens behind the rows `x` and their probabilities, I32 and F32 `ne = [k, n]`, chunk by chunk.
    pub(super) fn predictions(
        &self,
        b: &mut Builder,
        x: &Tensor,
        k: usize,
    ) -> Vec<(Tensor, Tensor)> {
        let mut found = Vec::with_capacity(self.chunks.len());
        for (start, n) in self.chunks.iter() {
            let logits = self.logits(b, &rows(b, x, start, n));
            let (ids, probabilities) = b.ctx().top_k(&logits, k);
            found.push((b.output(ids), b.output(probabilities)));
        }
        found
    }

    fn logits(&self, b: &Builder, x: &Tensor) -> Tensor {
        self.decoder.logits(b, &self.decoder.output_norm(b, x))
    }
}

/// `n` rows of a matrix.
fn rows(b: &Builder, t: &Tensor, start: usize, n: usize) -> Tensor {
    let [n0, _, ..] = t.ne();
    let nb = t.nb()[1];
    b.ctx()
        .view(t, [n0, n, 1, 1], [nb, nb * n, nb * n], start * nb)
}

/// `n` values of a vector.
fn values(b: &Builder, t: &Tensor, start: usize, n: usize) -> Tensor {
    let size = size_of::<f32>();
    b.ctx().view(t, [n, 1, 1, 1], [n * size; 3], start * size)
}
