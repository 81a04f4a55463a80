//! A request's text as one member of its ensemble has it.

use super::prefix::{Key, PrefixCache, is_same};
use crate::adapter::{Adapter, Item};
use crate::error::Result;
use crate::ggml::KV_PAGE;
use crate::infer::attached::{Attached, arranged};
use crate::infer::core::{Input, Part};
use crate::infer::memory::{KvText, Memory};
use crate::model::Model;

/// A text behind or around one adapter, as far as it is computed and as far as it is known.
pub(super) struct Voice {
    attached: Option<Attached>,
    /// Keys and values of what is computed.
    text: KvText,
    /// The prompt, then the answer.
    items: Vec<Item>,
    /// The same, for [`PrefixCache`].
    keys: Vec<Key>,
    /// How many of them it has.
    kept: usize,
    /// Positions of all of it, the adapter's in front included.
    n: usize,
    /// Of the prompt.
    n_prompt: usize,
    /// Of it, those that were found computed when the text began.
    n_cached: usize,
    /// The answer is known: nobody waits for its tokens one by one.
    is_given: bool,
    /// Tokens of the answer whose logits were used.
    n_used: usize,
    /// Logits that were not, `ne = [V, n]`: they wait for those of other members.
    pub(super) logits: Vec<f32>,
}

/// The item that token `at` is in, and which one it is of it.
fn find_item(items: &[Item], mut at: usize) -> Option<(&Item, usize)> {
    for item in items {
        if at < item.len() {
            return Some((item, at));
        }
        at -= item.len();
    }
    None
}

fn keys(item: &Item) -> Vec<Key> {
    match item {
        Item::Tokens(tokens) => tokens.iter().map(|&id| id.into()).collect(),
        Item::Virtual(rows) => rows.clone().map(|row| -1 - row as Key).collect(),
    }
}

impl Voice {
    /// A prompt, of which nothing is computed yet.
    ///
    /// # Errors
    /// If the adapter's template does not go with it.
    pub(super) fn new(
        model: &Model,
        attached: Option<Attached>,
        prompt: &[i32],
        memory: &Memory,
    ) -> Result<Self> {
        let items = arranged(model, attached.as_ref(), prompt, true)?;
        let own: usize = items.iter().map(Item::len).sum();
        let n = own + attached.as_ref().map_or(0, Attached::prefix_len);
        let mut text = memory.text();
        text.restart(attached.as_ref().and_then(Attached::block));
        Ok(Self {
            attached,
            text,
            keys: items.iter().flat_map(keys).collect(),
            kept: 0,
            items,
            n,
            n_prompt: n,
            n_cached: 0,
            is_given: false,
            n_used: 0,
            logits: Vec::new(),
        })
    }

    /// Positions of all that is known, the adapter's in front included.
    pub(super) fn len(&self) -> usize {
        self.n
    }

    /// Of these, those that take pages.
    pub(super) fn own_len(&self) -> usize {
        self.n - self.prefix_len()
    }

    /// Tokens that are known and not computed.
    pub(super) fn left(&self) -> usize {
        self.n - self.text.len()
    }

    /// Its text is being written: of what is known, only the last token is not computed.
    pub(super) fn is_written(&self) -> bool {
        !self.is_given && self.n > self.n_prompt && self.left() == 1
    }

    /// The answer, all but its last token, which predicts nothing.
    pub(super) fn give(&mut self, answer: &[i32]) {
        self.is_given = true;
        self.append(answer);
    }

    fn prefix_len(&self) -> usize {
        self.attached.as_ref().map_or(0, Attached::prefix_len)
    }

    /// Makes room for `n` tokens. False if the pool is full.
    pub(super) fn reserve(&mut self, n: usize) -> bool {
        self.text.reserve(n).is_ok()
    }

    /// Gives back all memory; the text is computed anew.
    pub(super) fn preempt(&mut self) {
        let block = self.attached.as_ref().and_then(Attached::block);
        self.text.restart(block);
        self.kept = 0;
        self.logits = Vec::new();
    }

    fn adapter(&self) -> Option<&Adapter> {
        self.attached.as_ref().map(Attached::adapter)
    }

    /// Tokens behind the adapter's rows that are computed.
    fn computed(&self) -> usize {
        self.text.len() - self.prefix_len()
    }

    /// Tokens behind the adapter's rows in front of the first one whose logits are needed.
    fn silent(&self) -> usize {
        self.n_prompt - 1 + self.n_used - self.prefix_len()
    }

    /// Takes what is known of its beginning, but for tokens whose logits are needed.
    pub(super) fn find(&mut self, prefixes: &mut PrefixCache) {
        let known = prefixes.find(self.adapter(), &self.keys[..self.silent()]);
        if self.n_used == 0 {
            self.n_cached = known.n;
        }
        self.text.adopt(known.pages, known.n);
    }

    /// Positions of the prompt that were computed for another text.
    pub(super) fn n_cached(&self) -> usize {
        self.n_cached
    }

    /// Whether `other`, which is not that far yet, computes a part of this one's beginning, of `least` tokens or more.
    pub(super) fn waits_for(&self, other: &Self, least: usize) -> bool {
        let may_find = other.n_used == 0 && self.text.is_shareable();
        if may_find && is_same(self.adapter(), other.adapter()) {
            let both = self.keys[..self.silent()].iter().zip(&other.keys);
            let common = both.take_while(|(a, b)| a == b).count();
            return common >= least.max(other.computed()).max(self.computed() + 1);
        }
        false
    }

    /// Leaves what is computed to those who begin with the same, whenever a page, the prompt or all of it is complete.
    pub(super) fn keep(&mut self, prefixes: &mut PrefixCache, over: bool) {
        let n = self.computed();
        let is_complete = over || n.is_multiple_of(KV_PAGE) || self.text.len() == self.n_prompt;
        if is_complete && n > self.kept && self.text.is_shareable() {
            prefixes.insert(self.adapter(), &self.keys[..n], |i| self.text.page(i));
            self.kept = n;
        }
    }

    /// How many tokens are computed next, of at most `most` with at most `logits` rows of logits: those of one item, and none as long as logits wait for those of others.
    pub(super) fn next(&self, most: usize, logits: usize) -> usize {
        if !self.logits.is_empty() {
            return 0;
        }
        let at = self.computed();
        let in_item = find_item(&self.items, at).map_or(0, |(item, at)| item.len() - at);
        let with_logits = self.silent().saturating_sub(at) + logits;
        most.min(in_item).min(with_logits)
    }

    /// Of the next `n` tokens those whose logits are needed.
    pub(super) fn outputs(&self, n: usize) -> std::ops::Range<usize> {
        self.silent().saturating_sub(self.computed()).min(n)..n
    }

    /// The next `n` tokens, of one item, as part of a step.
    pub(super) fn part(&mut self, n: usize) -> Part<'_> {
        let outputs = self.outputs(n);
        let (item, at) = find_item(&self.items, self.computed()).expect("there are tokens left");
        let input = match item {
            Item::Tokens(tokens) => Input::Tokens(&tokens[at..at + n]),
            Item::Virtual(rows) => {
                let (first, attached) = (rows.start + at, self.attached.as_ref());
                let attached = attached.expect("items are its template's");
                Input::Virtual(attached.placed(first..first + n))
            }
        };
        Part {
            text: &mut self.text,
            input,
            outputs,
        }
    }

    /// The logits of one more token were used.
    pub(super) fn use_logits(&mut self) {
        self.n_used += 1;
    }

    /// Tokens that the text goes on with.
    pub(super) fn append(&mut self, ids: &[i32]) {
        self.n += ids.len();
        self.keys.extend(ids.iter().map(|&id| Key::from(id)));
        match self.items.last_mut() {
            _ if ids.is_empty() => {}
            Some(Item::Tokens(tokens)) => tokens.extend(ids),
            _ => self.items.push(Item::Tokens(ids.to_vec())),
        }
    }

    pub(super) fn forget_unseen(&mut self) {
        self.text.forget_unseen();
    }
}
