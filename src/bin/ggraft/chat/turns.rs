//! Turns of a conversation, to be taken back.

use super::Talk;
use crate::failure::{Failure, Result};
use crate::interrupt;

/// What there was before a line and its answer.
pub(super) struct Turn {
    /// Tokens of the session's text.
    pub(super) tokens: usize,
    pub(super) messages: usize,
    /// With a template: as [`Talk::fed`]; `None` also if the session's text is another one by now.
    pub(super) fed: Option<String>,
}

impl Talk {
    /// The session's text is not that of the turns any more: they are taken back by their messages, if they have any.
    pub(super) fn forget_fed(&mut self) {
        self.fed = None;
        for turn in &mut self.turns {
            turn.fed = None;
        }
        if !self.templated && self.session.tokens().is_empty() {
            self.turns.clear();
        }
    }

    pub(super) fn turn_begins(&mut self) {
        self.turns.push(Turn {
            tokens: self.session.tokens().len(),
            messages: self.messages.len(),
            fed: self.fed.clone(),
        });
    }

    /// Takes back the last line and its answer.
    pub(super) fn undo(&mut self) -> Result<()> {
        let Some(turn) = self.turns.last() else {
            return Err(Failure::Unsuitable(
                "there is nothing to take back: no line was answered".to_owned(),
            ));
        };
        if self.templated && turn.fed.is_none() {
            self.session.reset();
        } else {
            let _guard = interrupt::Guard::new(self.session.cancel_token());
            self.session.truncate(turn.tokens)?;
        }
        self.messages.truncate(turn.messages);
        self.fed = self.turns.pop().and_then(|turn| turn.fed);
        Ok(())
    }
}
