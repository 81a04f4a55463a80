//! Taking back the end of a text.

use super::{Segment, Session};
use crate::adapter::Item;
use crate::error::Result;
use crate::infer::text::Utf8Stream;

impl Session {
    /// Takes back the end of the text: of [`Session::tokens`] the first `n` stay, and so does what was computed of them. With `n` tokens or fewer nothing
    /// happens, but `truncate(0)` is [`Session::reset`]. What follows is what would follow had the session been given the rest in the same way: a prompt
    /// that is cut is the shorter prompt.
    ///
    /// Nothing is computed here as a rule: the last token that stays is computed again when something asks for its logits or
    /// follows it. There are two exceptions. What an adapter's template puts behind the first prompt is computed anew if the cut
    /// is in that prompt, or right behind it: virtual tokens and text keep their places around what is left. And all that stays
    /// is computed anew where layers with a sliding window need keys and values again that they have given back; texts that are
    /// longer than the window by more than a page of 64 tokens have.
    ///
    /// The text ends with a whole character then, whatever the tokens say: what [`Session::generate`] shows next does not
    /// complete one that was cut.
    ///
    /// # Errors
    /// If what must be computed cannot be: [`SessionError::Cancelled`](crate::infer::SessionError::Cancelled),
    /// [`SessionError::OutOfMemory`](crate::infer::SessionError::OutOfMemory) (until it is computed, what is replaced stays in
    /// memory). The session is then as it was.
    pub fn truncate(&mut self, n: usize) -> Result<()> {
        if n == 0 {
            self.reset();
            return Ok(());
        }
        let n_tokens: usize = self.history.iter().map(|s| s.tokens.len()).sum();
        if n >= n_tokens {
            return Ok(());
        }
        let history = beginning(&self.history, n);
        if self.uncomputed.is_some() && n + 1 == n_tokens && !self.logits.is_empty() {
            // The one token that goes was never computed: the logits are those of the token in front of it.
            self.uncomputed = None;
            self.ends_with(history);
            return Ok(());
        }
        // Only the first segment has positions that are no tokens of the text.
        let attached = self.attached.as_ref();
        let mut rest = self.items(attached, &history[0], true)?;
        let more = &history[1..];
        rest.extend(more.iter().map(|s| Item::Tokens(s.tokens.clone())));
        let before = self.items(attached, &self.history[0], true)?;
        let total = rest.iter().map(Item::len).sum::<usize>();
        let same = match more.is_empty() {
            true => in_common(&before, &rest),
            false => total,
        };
        // The last position is computed again, for its logits.
        let stays = same.min(total - 1);
        let n_past = self.prefix_len() + stays;
        drop_front(&mut rest, stays);
        let last = history.last().and_then(|s| s.tokens.last()).copied();
        if !self.text.reaches(n_past) {
            return self.replace(|s| {
                s.text.truncate(0);
                s.recompute(history)
            });
        }
        match (&rest[..], last) {
            ([Item::Tokens(tokens)], Some(last)) if *tokens == [last] => {
                self.text.truncate(n_past);
                self.uncomputed = Some(last);
                self.logits.clear();
                self.ends_with(history);
                Ok(())
            }
            _ => self.replace(|s| {
                s.text.truncate(n_past);
                s.run_items(&rest, None)?;
                s.text.forget_unseen();
                s.ends_with(history);
                Ok(())
            }),
        }
    }

    /// The text is this one, whose last character is whole.
    fn ends_with(&mut self, history: Vec<Segment>) {
        self.history = history;
        self.unfinished = Utf8Stream::new();
    }

    /// Another text by `work`, which begins with what was computed and no text, or the one that there is.
    fn replace(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let text = self.text.fork();
        let history = std::mem::take(&mut self.history);
        let logits = std::mem::take(&mut self.logits);
        let uncomputed = self.uncomputed.take();
        let unfinished = self.take_unfinished();
        work(self).inspect_err(|_| {
            self.text = text;
            self.history = history;
            self.logits = logits;
            self.uncomputed = uncomputed;
            self.unfinished = unfinished;
        })
    }
}

/// The first `n` tokens, at least one of them.
fn beginning(history: &[Segment], mut n: usize) -> Vec<Segment> {
    let mut kept = Vec::new();
    for segment in history {
        let tokens = &segment.tokens[..n.min(segment.tokens.len())];
        kept.push(Segment {
            tokens: tokens.to_vec(),
            prompt: segment.prompt,
        });
        n -= tokens.len();
        if n == 0 {
            break;
        }
    }
    kept
}

/// Positions at the beginning that two orders have in common.
fn in_common(a: &[Item], b: &[Item]) -> usize {
    let mut n = 0;
    for (a, b) in a.iter().zip(b) {
        let same = match (a, b) {
            (Item::Tokens(a), Item::Tokens(b)) => {
                a.iter().zip(b).take_while(|(a, b)| a == b).count()
            }
            (Item::Virtual(a), Item::Virtual(b)) if a == b => a.len(),
            _ => 0,
        };
        n += same;
        if same < a.len() || same < b.len() {
            break;
        }
    }
    n
}

/// Takes the first `n` positions away.
fn drop_front(items: &mut Vec<Item>, mut n: usize) {
    items.retain_mut(|item| {
        let gone = n.min(item.len());
        n -= gone;
        match item {
            Item::Tokens(tokens) => drop(tokens.drain(..gone)),
            Item::Virtual(rows) => rows.start += gone,
        }
        item.len() > 0
    });
}
