//! Who sees whom.

use crate::kernels::visible;
use std::ops::Range;

/// Queries at a time.
const TILE: usize = 48;

/// From products of queries and keys to what the softmax takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Scoring {
    /// Factor of scores.
    pub(crate) scale: f32,
    /// Soft cap of scaled scores, `softcap * tanh(score / softcap)`; 0 is none.
    pub(crate) softcap: f32,
}

/// Who sees whom. Keys in order of position: P rows of a prefix, S tokens that all rows begin with, a row's own tokens.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Spans {
    /// P.
    pub(crate) prefix: usize,
    /// S: tokens 0..S are seen by all that follow.
    pub(crate) shared: usize,
    /// Tokens of each row behind the shared ones, in order, without gaps from S to T.
    pub(crate) rows: Vec<Range<usize>>,
    /// See [`visible`].
    pub(crate) window: Option<usize>,
    pub(crate) scoring: Scoring,
}

/// A run of tokens that follow each other in position.
pub(super) struct Span {
    pub(super) tokens: Range<usize>,
    /// Keys in front of them.
    before: usize,
}

/// Some queries of a span.
pub(super) struct Tile {
    /// The first of them.
    pub(super) token: usize,
    /// How many there are.
    pub(super) n: usize,
    /// The key of the first.
    pub(super) at: usize,
    /// Keys of the span that some of them see.
    pub(super) keys: Range<usize>,
}

/// Where a key comes from.
pub(super) enum Source {
    Prefix(usize),
    Token(usize),
}

impl Span {
    /// Keys that its last token may see.
    pub(super) fn keys(&self) -> usize {
        self.before + self.tokens.len()
    }
}

impl Spans {
    pub(super) fn spans(&self) -> impl Iterator<Item = Span> + '_ {
        let shared = (self.shared > 0).then_some(Span {
            tokens: 0..self.shared,
            before: self.prefix,
        });
        shared.into_iter().chain(self.rows.iter().map(|r| Span {
            tokens: r.clone(),
            before: self.prefix + self.shared,
        }))
    }

    /// T.
    pub(super) fn n_tokens(&self) -> usize {
        self.rows.last().map_or(self.shared, |r| r.end)
    }

    /// Keys that the query at key `at` sees.
    pub(super) fn visible(&self, at: usize) -> Range<usize> {
        visible(at, self.window)
    }

    /// The tokens of `span`, a few at a time.
    pub(super) fn tiles<'a>(&'a self, span: &'a Span) -> impl Iterator<Item = Tile> + 'a {
        let n = span.tokens.len();
        (0..n).step_by(TILE).map(move |i| {
            let (at, n) = (span.before + i, TILE.min(n - i));
            Tile {
                token: span.tokens.start + i,
                n,
                at,
                keys: self.visible(at).start..at + n,
            }
        })
    }

    /// Where key `n` of a span comes from: a row of the prefix or a token.
    pub(super) fn source(&self, span: &Span, n: usize) -> Source {
        if n < self.prefix {
            Source::Prefix(n)
        } else if n < span.before {
            Source::Token(n - self.prefix)
        } else {
            Source::Token(span.tokens.start + n - span.before)
        }
    }
}
