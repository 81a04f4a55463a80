//! A conversation in a file: the session's text, with the conversation's own knowledge as the note.

use super::Talk;
use super::turns::Turn;
use crate::failure::{Failure, Result};
use ggraft::Session;
use ggraft::infer::ExistingText;
use ggraft::model::chat::ChatMessage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// Grows when the meaning of anything in the note changes.
const VERSION: u32 = 1;

/// What the conversation knows besides the session.
#[derive(Serialize, Deserialize)]
struct Note {
    ggraft_chat: u32,
    templated: bool,
    messages: Vec<Map<String, Value>>,
    fed: Option<String>,
    turns: Vec<NotedTurn>,
}

#[derive(Serialize, Deserialize)]
struct NotedTurn {
    tokens: usize,
    messages: usize,
    /// Bytes at the beginning of [`Note::fed`].
    fed: Option<usize>,
}

impl Talk {
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let fed = self.fed.as_deref().unwrap_or_default();
        let turn = |turn: &Turn| NotedTurn {
            tokens: turn.tokens,
            messages: turn.messages,
            fed: (turn.fed.as_ref())
                .filter(|before| fed.starts_with(before.as_str()))
                .map(String::len),
        };
        let note = Note {
            ggraft_chat: VERSION,
            templated: self.templated,
            messages: self.messages.iter().map(|m| m.fields().clone()).collect(),
            fed: self.fed.clone(),
            turns: self.turns.iter().map(turn).collect(),
        };
        let note = serde_json::to_string(&note).expect("texts and numbers");
        Ok(self.session.save(path, &note)?)
    }

    /// Whatever is wrong with the file, the conversation that there is stays.
    pub(super) fn load(&mut self, path: &Path) -> Result<()> {
        let how = self.how.clone().accept_other_base(self.force);
        let mut session = Session::new(self.session.model(), &how)?;
        if let Some(adapter) = self.session.adapter() {
            session.attach(adapter, ExistingText::Drop)?;
        }
        let note = session.load(path)?;
        let unsuitable = |why: &str| Failure::Unsuitable(format!("{}: {why}", path.display()));
        let note: Note = serde_json::from_str(&note)
            .ok()
            .filter(|note: &Note| note.ggraft_chat == VERSION)
            .ok_or_else(|| unsuitable("the text was not saved by this version's ggraft chat"))?;
        if note.templated != self.templated {
            return Err(unsuitable(match note.templated {
                true => "the conversation has messages: give the chat template it was saved with",
                false => "the text has no messages: it was saved without a chat template",
            }));
        }
        let messages = note.messages.into_iter();
        let messages = messages.map(|m| ChatMessage::from_json(Value::Object(m)));
        let messages = messages.collect::<Result<_, _>>();
        self.messages = messages.map_err(ggraft::Error::from)?;
        let fed = note.fed.as_deref().unwrap_or_default();
        let turn = |turn: NotedTurn| Turn {
            tokens: turn.tokens,
            messages: turn.messages,
            fed: turn.fed.and_then(|n| fed.get(..n)).map(str::to_owned),
        };
        self.turns = note.turns.into_iter().map(turn).collect();
        self.fed = note.fed;
        self.session = session;
        Ok(())
    }
}
