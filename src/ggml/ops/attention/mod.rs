//! Attention of sessions over a cache ([`cached`]), and of training: several rows of text packed into one sequence, each behind the same prefix, without seeing each
//! other ([`spans`]); forward ([`forward`]) and its derivative ([`backward`]). Nothing of size T x T is kept: both compute the
//! weights ([`weights`]) a few queries at a time (Dao et al. 2022).

mod backward;
mod cached;
mod forward;
mod operands;
mod spans;
mod weights;

pub(crate) use spans::{Scoring, Spans};

use crate::ggml::custom::Output;
use crate::ggml::tensor::Tensor;
use operands::KeysValues;
use std::cell::RefCell;

/// Memory that a thread keeps between operations. Letters as in the paper: scores S, weights P, output O.
#[derive(Default)]
struct Scratch {
    /// Keys and values of a span.
    kv: KeysValues,
    /// S, then P of some queries: `ne = [keys, queries]`.
    p: Vec<f32>,
    /// Derivative of the soft cap at each of S.
    slopes: Vec<f32>,
    /// dP, then dS.
    ds: Vec<f32>,
    /// O or dQ of some queries: `ne = [d, queries]`.
    rows: Vec<f32>,
    /// `ne = [d, keys]` of a span.
    dk: Vec<f32>,
    /// `ne = [d, keys]` of a span.
    dv: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Writes `rows`, `ne = [d, n]`, of head `head` of `h` to a result `ne = [d, h, T]`, from token `token` on.
///
/// # Safety
/// No other thread may write these values of this head.
unsafe fn store_head(
    out: &Output<'_>,
    d: usize,
    (head, h): (usize, usize),
    token: usize,
    rows: &[f32],
) {
    for (t, row) in (token..).zip(rows.chunks_exact(d)) {
        let at = (t * h + head) * d;
        // SAFETY: inside the result; the caller's promise.
        unsafe {
            let to = out.as_mut_ptr().add(at);
            to.copy_from_nonoverlapping(row.as_ptr(), d);
        }
    }
}

/// The operands of both: q, k, v and, with a prefix, its k and v.
fn sources<'a>(
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    prefix: Option<(&'a Tensor, &'a Tensor)>,
) -> Vec<&'a Tensor> {
    let mut srcs = vec![q, k, v];
    srcs.extend(prefix.into_iter().flat_map(|(k, v)| [k, v]));
    srcs
}
