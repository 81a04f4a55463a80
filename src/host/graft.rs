//! What is put into a context.

/// An adapter in the form of one context, see [`Host::prepare`](super::Host::prepare).
#[derive(Clone, Debug)]
pub struct Graft {
    /// Whose form it has.
    pub(super) host: u64,
    pub(super) n_rows: usize,
    /// What the context's sequence is set to.
    pub(super) state: Vec<u8>,
}

impl Graft {
    /// P, the positions that it takes.
    pub fn length(&self) -> usize {
        self.n_rows
    }

    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.state.len()
    }
}

/// Part of a prompt, for a batch of its own.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    /// Token ids.
    Tokens(Vec<i32>),
    /// Virtual tokens, `ne = [D, n]`, as `llama_batch::embd` takes them.
    Rows(Vec<f32>),
}
