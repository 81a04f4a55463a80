//! Typed inputs of a decoder graph, and the one place where masks are computed.

use crate::file::types::GgmlType;
use crate::ggml::{Context, Tensor};
use crate::kernels::visible;
use crate::model::HParams;
use half::f16;

/// What decides a graph's topology. Steps with equal topology share a graph, whatever texts and adapters take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Topology {
    /// T, of all texts together.
    pub(crate) n_tokens: usize,
    /// Of these, virtual ones.
    pub(crate) n_virtual: usize,
    /// Rows of logits.
    pub(crate) n_outputs: usize,
    /// N, keys that attention reads side by side; `None`: it reads them where they lie.
    pub(crate) n_kv: Option<usize>,
}

/// Virtual tokens among real ones.
pub(crate) struct VirtualTokens {
    /// F32 `ne = [D, P]`.
    pub(crate) values: Tensor,
    /// I32 `ne = [T]`: which virtual token stands at each position, or -1.
    pub(crate) slots: Tensor,
}

/// What the decoder itself reads.
pub(crate) struct Inputs {
    /// I32 `ne = [T]`; at virtual tokens any that there is.
    pub(crate) tokens: Tensor,
    /// I32 `ne = [T]`.
    pub(crate) positions: Tensor,
    /// I32 `ne = [n_outputs]`: which tokens need logits; `None` if all do.
    pub(crate) outputs: Option<Tensor>,
    /// Virtual tokens that replace embeddings at some positions.
    pub(crate) virtual_tokens: Option<VirtualTokens>,
}

impl Inputs {
    /// Inputs for `n_tokens` at once, none of them virtual, `n_outputs` of which need logits.
    pub(crate) fn new(ctx: &Context, n_tokens: usize, n_outputs: usize) -> Self {
        Self {
            tokens: ctx.input(GgmlType::I32, &[n_tokens], "inp_tokens"),
            positions: ctx.input(GgmlType::I32, &[n_tokens], "inp_pos"),
            outputs: (n_outputs > 0 && n_outputs < n_tokens)
                .then(|| ctx.input(GgmlType::I32, &[n_outputs], "inp_outputs")),
            virtual_tokens: None,
        }
    }
}

impl VirtualTokens {
    /// `n` of them among `n_tokens`.
    pub(crate) fn new(ctx: &Context, hp: &HParams, n: usize, n_tokens: usize) -> Self {
        Self {
            values: ctx.input(GgmlType::F32, &[hp.n_embd, n], "inp_embd"),
            slots: ctx.input(GgmlType::I32, &[n_tokens], "inp_slots"),
        }
    }
}

/// What attention over keys side by side reads besides: for each of the windows that layers have, F16 `ne = [N, T]`: 0 or -inf.
pub(crate) struct Masks(pub(crate) Vec<(Option<usize>, Tensor)>);

impl Masks {
    /// For `n_tokens` queries and `n_kv` keys.
    pub(crate) fn new(ctx: &Context, hp: &HParams, n_tokens: usize, n_kv: usize) -> Self {
        let mask = |window: Option<usize>| {
            let name = match window {
                None => "inp_mask",
                Some(_) => "inp_window_mask",
            };
            (window, ctx.input(GgmlType::F16, &[n_kv, n_tokens], name))
        };
        Self(hp.windows().into_iter().map(mask).collect())
    }

    /// The mask of layers with this window.
    ///
    /// # Panics
    /// If no layer has it.
    pub(crate) fn of(&self, window: Option<usize>) -> &Tensor {
        let found = self.0.iter().find(|(w, _)| *w == window);
        &found.expect("made for every window of the model").1
    }
}

/// Fills `mask` `ne = [n_kv, positions.len()]` for a text whose key i has position i; who sees whom is [`visible`]'s to say.
pub(crate) fn causal_mask(mask: &mut [f16], n_kv: usize, positions: &[i32], window: Option<usize>) {
    for (row, &p) in mask.chunks_exact_mut(n_kv).zip(positions) {
        let seen = visible(p as usize, window);
        let (start, end) = (seen.start.min(n_kv), seen.end.min(n_kv));
        row[..start].fill(f16::NEG_INFINITY);
        row[start..end].fill(f16::ZERO);
        row[end..].fill(f16::NEG_INFINITY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(n_kv: usize, positions: &[i32], window: Option<usize>) -> Vec<Vec<usize>> {
        let mut mask = vec![f16::ONE; n_kv * positions.len()];
        causal_mask(&mut mask, n_kv, positions, window);
        assert!(
            mask.iter()
                .all(|&m| m == f16::ZERO || m == f16::NEG_INFINITY)
        );
        mask.chunks(n_kv)
            .map(|row| (0..n_kv).filter(|&i| row[i] == f16::ZERO).collect())
            .collect()
    }

    #[test]
    fn tokens_behind_a_prefix_see_all_of_it_and_the_past() {
        // Two virtual tokens in cells 0 and 1, three real ones behind them: the rectangular case.
        assert_eq!(
            seen(6, &[2, 3, 4], None),
            [vec![0, 1, 2], vec![0, 1, 2, 3], vec![0, 1, 2, 3, 4]]
        );
    }

    #[test]
    fn a_window_counts_the_token_itself_and_hides_the_prefix_behind_it() {
        assert_eq!(
            seen(6, &[2, 3, 4], Some(3)),
            [vec![0, 1, 2], vec![1, 2, 3], vec![2, 3, 4]]
        );
        assert_eq!(seen(4, &[3], Some(1)), [vec![3]]);
        assert_eq!(seen(4, &[0], Some(100)), [vec![0]]);
    }
}
