//! Training by the public API: gradients and trajectories of the reference implementation, derivatives against differences
//! of the loss, what must not depend on how a batch is computed, and what is refused.

mod conformance;
