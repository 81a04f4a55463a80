//! From the gradient of the last layer's output back to what is trained.

use super::forward::{Forward, Stack};
use crate::ggml::Tensor;
use crate::graph::{Builder, Gradients};

/// The gradients of the leaves, in their order, given `dx` of the forward pass's output.
pub(super) fn backward(
    b: &mut Builder,
    stack: &mut Stack<'_>,
    forward: Forward,
    mut dx: Tensor,
) -> Vec<Tensor> {
    let leaves = stack.leaves();
    // From the last layer to the first.
    let mut pairs: Vec<[Tensor; 2]> = Vec::new();
    let mut entered = None;
    for (il, passed) in forward.layers.into_iter().enumerate().rev() {
        let (taped, x) = passed.tape(b, stack, il);
        let grads = taped.tape.backward(b.ctx(), &taped.output, &dx);
        if let Some(pair) = leaves.prefix(il) {
            pairs.push(pair.each_ref().map(|leaf| demand(b, &grads, leaf)));
        }
        if let Some(g) = grads.of(&x) {
            b.demand(g);
            dx = g.clone();
        }
        entered = Some(x);
    }
    if let (Some(tape), Some(rows), Some(x)) = (forward.embed, leaves.virtual_tokens(), entered) {
        let grads = tape.backward(b.ctx(), &x, &dx);
        return vec![demand(b, &grads, rows)];
    }
    pairs.into_iter().rev().flatten().collect()
}

/// The gradient of a leaf, to be read after the graph has run.
fn demand(b: &mut Builder, gradients: &Gradients, leaf: &Tensor) -> Tensor {
    let found = gradients.of(leaf);
    b.output(found.expect("every layer depends on it").clone())
}
