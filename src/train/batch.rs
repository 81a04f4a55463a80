//! Rows of text packed into one sequence: no padding, and what all rows begin with is computed once.

use std::borrow::Borrow;
use std::iter::Peekable;
use std::ops::Range;

/// Tokens in one graph, if the rows are not longer: enough to multiply matrices at full speed. Larger batches are computed
/// in several graphs, so that memory does not grow with the batch.
pub(crate) const MAX_TOKENS: usize = 1024;

/// What stands at a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Slot {
    /// A token id.
    Token(i32),
    /// A virtual token.
    Virtual(usize),
}

/// What should follow a position.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    /// Index of the position in its sequence.
    pub(crate) at: usize,
    /// What stands there.
    pub(crate) tokens: Expected,
}

/// A distribution over tokens. Most are of one token, which takes no memory of its own: data sets have millions of them.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Expected {
    /// This token.
    One(i32),
    /// These, with their probabilities.
    Many(Box<[(i32, f32)]>),
}

impl Expected {
    /// Tokens with a probability.
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::One(_) => 1,
            Self::Many(all) => all.len(),
        }
    }

    /// The tokens and their probabilities.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (i32, f32)> + '_ {
        let (one, many) = match self {
            Self::One(id) => (Some((*id, 1.0)), &[][..]),
            Self::Many(all) => (None, &all[..]),
        };
        one.into_iter().chain(many.iter().copied())
    }
}

/// One row, ready to be computed.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sequence {
    pub(crate) slots: Vec<Slot>,
    pub(crate) targets: Vec<Target>,
    /// Factor of the row in the loss.
    pub(crate) weight: f32,
    /// Which example it is made of.
    pub(crate) example: usize,
    /// Index of the first slot behind what is given.
    pub(crate) follows: usize,
}

impl Sequence {
    /// What its targets add to the loss's denominator.
    pub(crate) fn mass(&self) -> f64 {
        f64::from(self.weight) * self.targets.len() as f64
    }

    /// What the base reads of it when there is no adapter: the text, and the same targets but that of a token with no text in
    /// front of it. `None` if no target is left.
    pub(crate) fn without_virtual(&self) -> Option<Self> {
        let is_text = |slot: &Slot| matches!(slot, Slot::Token(_));
        // How many text tokens stand in front of each slot.
        let mut before = Vec::with_capacity(self.slots.len() + 1);
        before.push(0);
        for slot in &self.slots {
            before.push(before[before.len() - 1] + usize::from(is_text(slot)));
        }
        let targets: Vec<_> = self
            .targets
            .iter()
            .filter_map(|t| {
                Some(Target {
                    at: before[t.at + 1].checked_sub(1)?,
                    tokens: t.tokens.clone(),
                })
            })
            .collect();
        (!targets.is_empty()).then(|| Self {
            slots: self.slots.iter().copied().filter(is_text).collect(),
            targets,
            follows: before[self.follows],
            ..*self
        })
    }
}

/// Sequences in one graph. Tokens 0..shared are what all sequences begin with; the rest of each follows.
pub(crate) struct Packed {
    pub(crate) slots: Vec<Slot>,
    /// Position of each token, without the prefix.
    pub(crate) positions: Vec<usize>,
    pub(crate) shared: usize,
    /// Own tokens of each sequence.
    pub(crate) rows: Vec<Range<usize>>,
    /// Tokens whose logits are wanted, in any order, possibly more than once.
    pub(crate) outputs: Vec<usize>,
    /// What they should say.
    pub(crate) targets: Vec<Expected>,
    /// Weight of each, not normalized.
    pub(crate) weights: Vec<f32>,
}

impl Packed {
    /// Packs sequences, none of them empty.
    pub(crate) fn new<S: Borrow<Sequence>>(sequences: &[S]) -> Self {
        let shared = shared_start(sequences);
        let mut packed = Self {
            slots: sequences[0].borrow().slots[..shared].to_vec(),
            positions: (0..shared).collect(),
            shared,
            rows: Vec::new(),
            outputs: Vec::new(),
            targets: Vec::new(),
            weights: Vec::new(),
        };
        for s in sequences.iter().map(Borrow::borrow) {
            let start = packed.slots.len();
            packed.slots.extend_from_slice(&s.slots[shared..]);
            packed.positions.extend(shared..s.slots.len());
            packed.rows.push(start..packed.slots.len());
            for target in &s.targets {
                packed.outputs.push(if target.at < shared {
                    target.at
                } else {
                    start + target.at - shared
                });
                packed.targets.push(target.tokens.clone());
                packed.weights.push(s.weight);
            }
        }
        packed
    }

    /// T.
    pub(crate) fn n_tokens(&self) -> usize {
        self.slots.len()
    }

    /// Most tokens with a probability in any target.
    pub(crate) fn n_choices(&self) -> usize {
        self.targets.iter().map(Expected::len).max().unwrap_or(1)
    }
}

/// Slots that all sequences begin with; every sequence keeps at least one of its own.
fn shared_start<S: Borrow<Sequence>>(sequences: &[S]) -> usize {
    let (first, rest) = sequences.split_first().expect("a batch has a sequence");
    let shared = |s: &S| shared_by(first.borrow(), s.borrow());
    rest.iter().map(shared).min().unwrap_or(0)
}

/// Slots that two sequences begin with, short of the last one of either.
fn shared_by(a: &Sequence, b: &Sequence) -> usize {
    let longest = a.slots.len().min(b.slots.len()) - 1;
    let equal = |i: &usize| a.slots[*i] == b.slots[*i];
    (0..longest).take_while(equal).count()
}

/// Takes the first of `sequences` that fit into one graph of `limit` tokens, and at least one. What all of them begin with counts
/// once.
pub(crate) fn first_group<S: Borrow<Sequence>>(
    sequences: &mut Peekable<impl Iterator<Item = S>>,
    limit: usize,
) -> Vec<S> {
    let mut group: Vec<S> = Vec::new();
    let (mut slots, mut shared) = (0, usize::MAX);
    let mut fits = |group: &[S], s: &S| {
        slots += s.borrow().slots.len();
        let first = group.first().unwrap_or(s).borrow();
        shared = shared.min(shared_by(first, s.borrow()));
        group.is_empty() || slots - group.len() * shared <= limit
    };
    while let Some(s) = sequences.next_if(|s| fits(&group, s)) {
        group.push(s);
    }
    group
}

/// All of `sequences`, divided as [`first_group`] does it.
pub(crate) fn groups<S: Borrow<Sequence>>(
    sequences: impl IntoIterator<Item = S>,
    limit: usize,
) -> impl Iterator<Item = Vec<S>> {
    let mut rest = sequences.into_iter().peekable();
    std::iter::from_fn(move || {
        let group = first_group(&mut rest, limit);
        (!group.is_empty()).then_some(group)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(tokens: &[i32], targets: &[usize], weight: f32) -> Sequence {
        Sequence {
            slots: tokens.iter().map(|&id| Slot::Token(id)).collect(),
            targets: targets
                .iter()
                .map(|&at| Target {
                    at,
                    tokens: Expected::One(tokens.get(at + 1).copied().unwrap_or(9)),
                })
                .collect(),
            weight,
            example: 0,
            follows: 0,
        }
    }

    #[test]
    fn what_all_rows_begin_with_is_there_once() {
        let (a, b) = (
            sequence(&[1, 2, 3, 4], &[1, 2], 1.0),
            sequence(&[1, 2, 5], &[1], 0.5),
        );
        let p = Packed::new(&[&a, &b]);
        assert_eq!(p.shared, 2);
        assert_eq!(p.slots, [1, 2, 3, 4, 5].map(Slot::Token));
        assert_eq!(p.positions, [0, 1, 2, 3, 2]);
        assert_eq!(p.rows, [2..4, 4..5]);
        // Both rows have a target behind the shared token 1, with different tokens.
        assert_eq!(p.outputs, [1, 2, 1]);
        assert_eq!(p.targets, [3, 4, 5].map(Expected::One));
        assert_eq!(p.weights, [1.0, 1.0, 0.5]);
    }

    #[test]
    fn what_a_graph_holds() {
        let lengths = |rows: &[&[i32]], limit| -> Vec<usize> {
            let rows: Vec<_> = rows.iter().map(|ids| sequence(ids, &[], 1.0)).collect();
            let packed = groups(rows, limit).inspect(|g| {
                assert!(g.len() == 1 || Packed::new(g).n_tokens() <= limit);
            });
            packed.map(|g| g.len()).collect()
        };
        // Without a common start every token counts.
        assert_eq!(lengths(&[&[1, 2], &[3, 4], &[5, 6]], 5), [2, 1]);
        assert_eq!(lengths(&[&[1, 2], &[3, 4], &[5, 6]], 6), [3]);
        // 1 2 3 once, and a token of each.
        let alike: &[&[i32]] = &[&[1, 2, 3, 4], &[1, 2, 3, 5], &[1, 2, 3, 6]];
        assert_eq!(lengths(alike, 6), [3]);
        assert_eq!(lengths(alike, 5), [2, 1]);
        // The third row shares less: 1 once, then 2 3 4, 2 3 5 and 7.
        let other: &[&[i32]] = &[&[1, 2, 3, 4], &[1, 2, 3, 5], &[1, 7]];
        assert_eq!(lengths(other, 7), [2, 1]);
        assert_eq!(lengths(other, 8), [3]);
        // Longer than the limit, but alone.
        assert_eq!(lengths(&[&[1, 2, 3], &[4], &[5, 6, 7]], 2), [1, 1, 1]);
        assert!(lengths(&[], 2).is_empty());
    }

    #[test]
    fn without_an_adapter_the_text_remains() {
        let mut row = sequence(&[1, 2, 3], &[], 0.5);
        row.slots = vec![
            Slot::Virtual(0),
            Slot::Token(1),
            Slot::Virtual(1),
            Slot::Token(2),
            Slot::Token(3),
        ];
        let target = |at, id| Target {
            at,
            tokens: Expected::One(id),
        };
        // Token 1 has nothing in front of it without the adapter.
        row.targets = vec![target(0, 1), target(2, 2), target(3, 3)];
        let text = row.without_virtual().unwrap();
        assert_eq!(text.slots, [1, 2, 3].map(Slot::Token));
        assert_eq!(text.targets, [target(0, 2), target(1, 3)]);
        assert_eq!(text.weight, 0.5);
        row.targets.truncate(1);
        assert_eq!(row.without_virtual(), None);
    }

    #[test]
    fn equal_rows_keep_a_token_each_and_one_row_shares_nothing() {
        let a = sequence(&[1, 2], &[0], 1.0);
        let p = Packed::new(&[&a, &a]);
        assert_eq!((p.shared, p.rows), (1, vec![1..2, 2..3]));
        assert_eq!(Packed::new(&[&a]).shared, 0);
    }
}
