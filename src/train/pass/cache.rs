//! Graphs that were built before, by what decides how they are built: the same rows come again in every evaluation, and in
//! every step of a run whose rows are all in one batch.

use super::Goal;
use crate::train::batch::Packed;
use crate::train::variables::Variables;
use std::collections::VecDeque;
use std::ops::Range;

/// Graphs that are kept: a description takes about a megabyte, so this is little beside the activations.
const KEPT: usize = 16;

/// Everything that a pass's graph depends on: two passes with equal keys differ in the numbers that are written to the inputs
/// only.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Key {
    goal: Goal,
    smoothing: f32,
    variables: Trained,
    n_tokens: usize,
    n_outputs: usize,
    n_choices: usize,
    shared: usize,
    rows: Vec<Range<usize>>,
}

/// What is trained, and P.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Trained {
    None,
    Prefix(usize),
    Virtual(usize),
}

impl Key {
    pub(super) fn new(batch: &Packed, variables: &Variables, smoothing: f32, goal: Goal) -> Self {
        Self {
            goal,
            smoothing,
            variables: match variables {
                Variables::None => Trained::None,
                Variables::Prefix { length, .. } => Trained::Prefix(*length),
                Variables::Virtual { length, .. } => Trained::Virtual(*length),
            },
            n_tokens: batch.n_tokens(),
            n_outputs: batch.outputs.len(),
            n_choices: batch.n_choices(),
            shared: batch.shared,
            rows: batch.rows.clone(),
        }
    }
}

/// The graphs that were used last.
pub(super) struct Cache<T> {
    /// The oldest first.
    kept: VecDeque<(Key, T)>,
}

impl<T> Default for Cache<T> {
    fn default() -> Self {
        Self {
            kept: VecDeque::new(),
        }
    }
}

impl<T> Cache<T> {
    /// Takes out what was put in under `key`.
    pub(super) fn take(&mut self, key: &Key) -> Option<T> {
        let at = self.kept.iter().position(|(k, _)| k == key)?;
        self.kept.remove(at).map(|(_, graph)| graph)
    }

    /// Keeps `graph`, and forgets the one that was used longest ago if there are too many.
    pub(super) fn put(&mut self, key: Key, graph: T) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back((key, graph));
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::batch::{Expected, Sequence, Slot, Target};

    /// With the first position as its target.
    fn row(slots: Vec<Slot>) -> Sequence {
        Sequence {
            slots,
            targets: vec![Target {
                at: 0,
                tokens: Expected::One(1),
            }],
            weight: 1.0,
            example: 0,
            follows: 0,
        }
    }

    fn key(n: usize) -> Key {
        Key::new(
            &Packed::new(&[&row(vec![Slot::Token(1); n])]),
            &Variables::None,
            0.0,
            Goal::Losses,
        )
    }

    #[test]
    fn the_last_ones_are_kept() {
        let mut cache = Cache::default();
        for n in 2..2 + KEPT {
            cache.put(key(n), n);
        }
        assert_eq!(cache.take(&key(1)), None);
        // Used again: not the oldest any more.
        assert_eq!(cache.take(&key(2)), Some(2));
        assert_eq!(cache.take(&key(2)), None);
        cache.put(key(2), 2);
        cache.put(key(100), 100);
        assert_eq!(cache.take(&key(3)), None);
        assert_eq!(cache.take(&key(2)), Some(2));
        assert_eq!(cache.take(&key(100)), Some(100));
    }

    #[test]
    fn whatever_decides_a_graph_is_in_the_key() {
        let of = |batch: &Packed, variables: &Variables, smoothing, goal| {
            Key::new(batch, variables, smoothing, goal)
        };
        let row = row([1, 2, 3, 4].map(Slot::Token).to_vec());
        let rows = |length| Variables::Virtual {
            length,
            values: Vec::new(),
        };
        let prefix = |length| Variables::Prefix {
            length,
            layers: Vec::new(),
        };
        let mut more = row.clone();
        more.targets.push(Target {
            at: 1,
            tokens: Expected::Many([(1, 0.5), (2, 0.5)].into()),
        });
        let one = Packed::new(&[&row]);
        let mut keys = vec![
            of(&one, &rows(2), 0.0, Goal::Losses),
            of(&one, &rows(3), 0.0, Goal::Losses),
            of(&one, &prefix(2), 0.0, Goal::Losses),
            of(&one, &Variables::None, 0.0, Goal::Losses),
            of(&one, &rows(2), 0.1, Goal::Losses),
            of(&one, &rows(2), 0.0, Goal::Gradients),
            of(&one, &rows(2), 0.0, Goal::Predictions(1)),
            of(&one, &rows(2), 0.0, Goal::Predictions(2)),
            of(&Packed::new(&[&more]), &rows(2), 0.0, Goal::Losses),
            of(&Packed::new(&[&row, &row]), &rows(2), 0.0, Goal::Losses),
        ];
        // As many tokens, divided otherwise.
        let mut other = Packed::new(&[&row, &row]);
        other.shared -= 1;
        other.rows[0].start -= 1;
        keys.push(of(&other, &rows(2), 0.0, Goal::Losses));
        for (i, a) in keys.iter().enumerate() {
            for (j, b) in keys.iter().enumerate() {
                assert_eq!(a == b, i == j, "{i} {j}");
            }
        }
        // Other numbers in the same places.
        let mut same = row.clone();
        same.slots[1] = Slot::Token(7);
        same.weight = 0.5;
        let again = of(&Packed::new(&[&same]), &rows(2), 0.0, Goal::Losses);
        assert_eq!(again, keys[0]);
    }
}
