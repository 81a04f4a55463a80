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

impl Piece {
    /// Positions that it takes, of rows of `n_embd` values.
    pub(crate) fn len(&self, n_embd: usize) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Rows(rows) => rows.len() / n_embd,
        }
    }

    /// Forgets all behind the first `n`.
    pub(crate) fn truncate(&mut self, n: usize, n_embd: usize) {
        match self {
            Self::Tokens(tokens) => tokens.truncate(n),
            Self::Rows(rows) => rows.truncate(n * n_embd),
        }
    }
}
