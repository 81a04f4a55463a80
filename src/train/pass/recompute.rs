//! Activations that are not kept but computed again when the gradient arrives (Chen et al. 2016).

use super::forward::{Stack, Taped};
use crate::ggml::Tensor;
use crate::graph::Builder;

/// What the forward pass leaves of a layer: everything, or only what it takes to compute it again.
pub(super) struct Passed {
    /// What entered the layer, `ne = [D, T]`.
    pub(super) input: Tensor,
    pub(super) taped: Option<Taped>,
}

impl Passed {
    /// The tape of layer `il`, computed again if it was not kept, and what entered the layer.
    pub(super) fn tape(self, b: &mut Builder, stack: &mut Stack<'_>, il: usize) -> (Taped, Tensor) {
        let taped = self
            .taped
            .unwrap_or_else(|| stack.taped_layer(b, il, &self.input));
        (taped, self.input)
    }
}

/// The graph with the fewest recomputed layers of `n_layer` that fits, or with all of them recomputed.
/// `graph(n)` recomputes the lowest n: the lowest, because the memory of those above is free again by then.
pub(super) fn fewest<T>(
    n_layer: usize,
    graph: impl Fn(usize) -> T,
    fits: impl Fn(&T) -> bool,
) -> T {
    let all_kept = graph(0);
    if fits(&all_kept) {
        return all_kept;
    }
    let (mut too_few, mut enough) = (0, n_layer);
    while enough - too_few > 1 {
        let middle = (too_few + enough) / 2;
        if fits(&graph(middle)) {
            enough = middle;
        } else {
            too_few = middle;
        }
    }
    graph(enough)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_it_takes() {
        for needed in 0..=7 {
            assert_eq!(fewest(7, |n| n, |&n| n >= needed), needed);
        }
        // Too large whatever is done: everything is computed twice.
        assert_eq!(fewest(7, |n| n, |_| false), 7);
    }
}
