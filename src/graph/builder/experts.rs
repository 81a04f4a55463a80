//! Mixtures of experts.

use super::Builder;
use crate::ggml::{Grouped, Tensor};
use crate::kernels::Bits;
use crate::model::{Experts, Linear, Weighting};
use crate::operation::Activation;

/// What the experts of a mixture read: rows in order of their experts, as each of the products reads them.
struct Spread<'a> {
    x: &'a Tensor,
    groups: &'a Grouped,
    /// By what they are rounded to.
    found: Vec<(Option<Bits>, Tensor)>,
}

impl Builder {
    /// A mixture of experts (Shazeer et al. 2017) of layer `layer`, gated by activation `f`: `sum(weight * expert(x))` over the most probable experts of each token, and the
    /// shared one. x `ne = [D, T]` -> `ne = [D, T]`. Which experts these are is no function that could be differentiated; what they count is.
    pub(super) fn mixture(
        &self,
        f: Activation,
        e: &Experts,
        layer: Option<usize>,
        x: &Tensor,
    ) -> Tensor {
        let logits = self.named("ffn_moe_logits", layer, self.linear(&e.router, x));
        let (ids, weights) = self.choice(e, layer, &logits);
        let groups = self.ctx.group_rows(&ids, logits.ne()[0]);

        let mut spread = Spread {
            x,
            groups: &groups,
            found: Vec::new(),
        };
        let up = self.linear_of_experts(&e.up, &mut spread);
        let gate = self.linear_of_experts(&e.gate, &mut spread);
        // Gradients of weights are products with what experts say.
        let h = self.gated(f, &gate, &up, true);
        let y = self.multiply_rows(&e.down, &h, &groups);
        let y = self.named("ffn_moe_out", layer, self.mix_rows(&y, &weights, &groups));

        let Some(shared) = &e.shared else {
            return y;
        };
        let mut s = self.mlp(f, &shared.mlp, x, shared.gate.is_some());
        s = self.named("ffn_shexp", layer, s);
        if let Some(gate) = &shared.gate {
            s = self.gate_rows(&s, &self.linear(gate, x));
        }
        self.add(&y, &s)
    }

    /// Which experts each token goes through, I32 `ne = [k, T]`, and what they count, `ne = [k, T]`: logits `ne = [E, T]`.
    fn choice(&self, e: &Experts, layer: Option<usize>, logits: &Tensor) -> (Tensor, Tensor) {
        let probabilities = |logits: &Tensor| {
            let p = self.softmax_rows(logits);
            self.named("ffn_moe_probs", layer, p)
        };
        let normalized = match e.weighting {
            Weighting::Probability => false,
            Weighting::Normalized => true,
            Weighting::AmongChosen => {
                let ids = self.ctx.choose_experts(logits, e.n_used);
                // Their logits, as they are.
                let chosen = self.expert_weights(logits, &ids, false);
                return (ids, probabilities(&chosen));
            }
        };
        let p = probabilities(logits);
        let ids = self.ctx.choose_experts(&p, e.n_used);
        let weights = self.expert_weights(&p, &ids, normalized);
        (ids, weights)
    }

    /// `softmax(x)` of rows.
    pub(super) fn softmax_rows(&self, x: &Tensor) -> Tensor {
        let p = self.ctx.softmax_rows(x);
        let kept = p.clone();
        self.note(&[x], &p, move |c, dp| vec![c.softmax_rows_back(&kept, dp)]);
        p
    }

    /// What the experts `ids`, I32 `ne = [k, T]`, of each token count: p `ne = [E, T]` -> `ne = [k, T]`.
    pub(super) fn expert_weights(&self, p: &Tensor, ids: &Tensor, normalized: bool) -> Tensor {
        let weights = self.ctx.expert_weights(p, ids, normalized);
        let (kept, ids) = (p.clone(), ids.clone());
        self.note(&[p], &weights, move |c, dw| {
            vec![c.expert_weights_back(&kept, &ids, normalized, dw)]
        });
        weights
    }

    /// To how many bits rows are rounded for the products of `l` with our own kernel; `None`: ggml's computes them.
    fn bits_of_experts(&self, l: &Linear, n_rows: usize) -> Option<Bits> {
        // So many an expert has on average.
        l.own(n_rows.div_ceil(l.w.ne()[2]), self.invariant)
    }

    /// `W x` of each expert with its tokens: w `ne = [D, F, E]` -> `ne = [F, R]`.
    fn linear_of_experts(&self, l: &Linear, spread: &mut Spread<'_>) -> Tensor {
        let (x, groups) = (spread.x, spread.groups);
        let bits = self.bits_of_experts(l, groups.n_rows());
        let found = spread.found.iter().find(|(of, _)| *of == bits);
        let rows = match found {
            Some((_, rows)) => rows.clone(),
            None => {
                let packed = match bits {
                    Some(bits) => self.ctx.pack_few(x, bits),
                    None => x.clone(),
                };
                // Packed or not, these rows are x to the tape.
                let rows = self.ctx.spread_rows(&packed, groups);
                let (t, of) = (x.ne()[1], groups.clone());
                self.note(&[x], &rows, move |c, dy| {
                    vec![c.spread_rows_back(dy, &of, t)]
                });
                spread.found.push((bits, rows.clone()));
                rows
            }
        };
        self.multiply_packed_rows(l, &rows, bits, groups)
    }

    /// `W x` of each expert with its rows: w `ne = [F, D, E]`, x `ne = [F, R]` -> `ne = [D, R]`.
    pub(super) fn multiply_rows(&self, l: &Linear, x: &Tensor, groups: &Grouped) -> Tensor {
        let bits = self.bits_of_experts(l, groups.n_rows());
        match bits {
            Some(bits) if bits != Bits::All => {
                let packed = self.ctx.pack_few(x, bits);
                self.note(&[x], &packed, |_, dx| vec![dx.clone()]);
                self.multiply_packed_rows(l, &packed, Some(bits), groups)
            }
            bits => self.multiply_packed_rows(l, x, bits, groups),
        }
    }

    fn multiply_packed_rows(
        &self,
        l: &Linear,
        x: &Tensor,
        bits: Option<Bits>,
        groups: &Grouped,
    ) -> Tensor {
        let y = self.ctx.mul_mat_experts(&l.w, x, bits, groups);
        let y = match &l.b {
            Some(b) => self.ctx.add_expert_biases(&y, b, groups),
            None => y,
        };
        let (w, groups) = (l.w.clone(), groups.clone());
        self.note(&[x], &y, move |c, dy| {
            vec![c.mul_mat_experts_back(&w, dy, &groups)]
        });
        y
    }

    /// Sums of a token's rows y `ne = [D, R]` by their weights `ne = [k, T]` -> `ne = [D, T]`.
    pub(super) fn mix_rows(&self, y: &Tensor, weights: &Tensor, groups: &Grouped) -> Tensor {
        let out = self.ctx.mix_rows(y, weights, groups);
        let (rows, kept, groups) = (y.clone(), weights.clone(), groups.clone());
        self.note(&[y, weights], &out, move |c, dout| {
            let (dy, dw) = c.mix_rows_back(&rows, &kept, &groups, dout);
            vec![dy, dw]
        });
        out
    }

    /// `sigmoid(gate) * x`: x `ne = [D, T]`, a gate for each row `ne = [1, T]`.
    pub(super) fn gate_rows(&self, x: &Tensor, gates: &Tensor) -> Tensor {
        let y = self.ctx.gate_rows(x, gates);
        let (kept, by) = (x.clone(), gates.clone());
        self.note(&[x, gates], &y, move |c, dy| {
            let (dx, dgates) = c.gate_rows_back(&kept, &by, dy);
            vec![dx, dgates]
        });
        y
    }
}
