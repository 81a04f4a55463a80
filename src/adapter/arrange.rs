//! The order of a prompt's tokens, fixed text and virtual tokens: one rule for sessions and for training.

use super::{Piece, Template};
use crate::Result;
use crate::model::vocab::Vocab;
use std::ops::Range;

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
    vocab: &Vocab,
    template: Option<&Template>,
    tokens: &[i32],
    bos: bool,
) -> Result<Vec<Item>> {
    let first = vocab.leading_bos_if(bos);
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
            Piece::Bos => push_tokens(&mut items, vocab.bos().as_slice()),
            Piece::Text(text) => push_tokens(&mut items, &vocab.tokenize(text, false, true)?),
            Piece::Prompt => push_tokens(&mut items, tokens),
            Piece::Virtual(n) => {
                items.push(Item::Virtual(row..row + n));
                row += n;
            }
        }
    }
    Ok(items)
}
