//! The order of a prompt's tokens, fixed text and virtual tokens: one rule for sessions and for training.

use super::{Piece, Template};
use crate::Result;
use std::ops::Range;

/// Whose tokens a template's text has.
pub(crate) trait Words {
    /// The token that begins a text; `None` if there is none.
    fn bos(&self) -> Option<i32>;

    /// BOS, if texts begin with it.
    fn leading_bos(&self) -> Option<i32>;

    /// Tokens of a text, special ones among them, without BOS.
    fn tokens(&self, text: &str) -> Result<Vec<i32>>;
}

#[cfg(feature = "runtime")]
impl Words for crate::model::vocab::Vocab {
    fn bos(&self) -> Option<i32> {
        self.bos()
    }

    fn leading_bos(&self) -> Option<i32> {
        self.leading_bos()
    }

    fn tokens(&self, text: &str) -> Result<Vec<i32>> {
        Ok(self.tokenize(text, false, true)?)
    }
}

/// A piece of input in computing order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Item {
    Tokens(Vec<i32>),
    /// Rows of the adapter's virtual tokens.
    Virtual(Range<usize>),
}

impl Item {
    /// Positions that it takes.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::Tokens(tokens) => tokens.len(),
            Self::Virtual(rows) => rows.len(),
        }
    }
}

fn push_tokens(items: &mut Vec<Item>, tokens: &[i32]) {
    match items.last_mut() {
        _ if tokens.is_empty() => {}
        Some(Item::Tokens(before)) => before.extend_from_slice(tokens),
        _ => items.push(Item::Tokens(tokens.to_vec())),
    }
}

/// Arranges a prompt's `tokens` (without BOS) by `template`. `bos` says whether the text begins here: then BOS comes in front
/// if the model wants one and the template does not place it.
pub(crate) fn arrange(
    words: &impl Words,
    template: Option<&Template>,
    tokens: &[i32],
    bos: bool,
) -> Result<Vec<Item>> {
    let first = if bos { words.leading_bos() } else { None };
    let mut items = Vec::new();
    let Some(template) = template else {
        push_tokens(&mut items, first.as_slice());
        push_tokens(&mut items, tokens);
        return Ok(items);
    };
    if !template.places_bos() {
        push_tokens(&mut items, first.as_slice());
    }
    let mut row = 0;
    for piece in template.pieces() {
        match piece {
            Piece::Bos => push_tokens(&mut items, words.bos().as_slice()),
            Piece::Text(text) => push_tokens(&mut items, &words.tokens(text)?),
            Piece::Prompt => push_tokens(&mut items, tokens),
            Piece::Virtual(n) => {
                items.push(Item::Virtual(row..row + n));
                row += n;
            }
        }
    }
    Ok(items)
}
