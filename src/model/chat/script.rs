//! One conversation as one model writes it: the text, what of it becomes control tokens, and what of it the assistant says.

use super::{ChatError, ChatMessage, ChatTemplate};
use crate::model::vocab::{Vocab, VocabError};
use serde_json::{Map, Value as Json};
use std::collections::HashSet;

/// Messages, and what else a chat template looks at.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// In their order.
    pub messages: Vec<ChatMessage>,
    /// The tools that the assistant may call (a list of JSON schemas), if any.
    pub tools: Option<Json>,
}

impl Conversation {
    /// Messages without tools.
    pub fn new(messages: Vec<ChatMessage>) -> Self {
        Self {
            messages,
            tools: None,
        }
    }
}

/// A model's chat template and the control tokens of its vocabulary.
#[derive(Debug)]
pub(crate) struct ChatFormat {
    pub(super) template: ChatTemplate,
    /// `bos_token` and `eos_token`.
    tokens: Map<String, Json>,
    pub(super) controls: Controls,
}

impl ChatFormat {
    pub(crate) fn new(source: &str, vocab: &Vocab) -> Result<Self, VocabError> {
        let template = ChatTemplate::new(source)?;
        vocab.preload()?;
        let mut tokens = Map::new();
        for (name, id) in [("bos_token", vocab.bos()), ("eos_token", vocab.eos())] {
            if let Some(text) = id.and_then(|id| vocab.token_text(id)) {
                tokens.insert(name.to_owned(), text.into());
            }
        }
        Ok(Self {
            template,
            tokens,
            controls: Controls::new(vocab.control_texts()),
        })
    }
}

/// Texts of control tokens.
#[derive(Debug)]
pub(super) struct Controls {
    /// The longest first.
    texts: Vec<String>,
    /// Those that end a generation.
    ends: HashSet<String>,
    /// Whether one of them begins with this byte.
    begins: [bool; 256],
}

impl Controls {
    /// Texts, and whether they end a generation.
    fn new(mut controls: Vec<(String, bool)>) -> Self {
        controls.retain(|(text, _)| !text.is_empty());
        let ends = controls.iter().filter(|(_, ends)| *ends);
        let ends = ends.map(|(text, _)| text.clone()).collect();
        let mut texts: Vec<_> = controls.into_iter().map(|(text, _)| text).collect();
        texts.sort_by_key(|t| std::cmp::Reverse(t.len()));
        let mut begins = [false; 256];
        for text in &texts {
            begins[usize::from(text.as_bytes()[0])] = true;
        }
        Self {
            texts,
            ends,
            begins,
        }
    }

    /// The longest one that `text` begins with.
    pub(super) fn at(&self, text: &str) -> Option<&str> {
        let first = *text.as_bytes().first()?;
        if !self.begins[usize::from(first)] {
            return None;
        }
        let found = self.texts.iter().find(|t| text.starts_with(t.as_str()));
        found.map(String::as_str)
    }

    /// Whether it ends a generation.
    pub(super) fn ends(&self, control: &str) -> bool {
        self.ends.contains(control)
    }

    /// Where in `text` one of them stands, or begins at its end: another text may follow.
    fn places(&self, text: &str) -> impl Iterator<Item = usize> {
        text.char_indices().map(|(at, _)| at).filter(move |&at| {
            let rest = &text[at..];
            self.at(rest).is_some() || self.texts.iter().any(|t| t.starts_with(rest))
        })
    }

    /// `text` with `mark` in front of each of them.
    fn marked(&self, text: &str, mark: char) -> String {
        let mut out = String::with_capacity(text.len() + 8);
        let mut from = 0;
        for at in self.places(text) {
            out.push_str(&text[from..at]);
            out.push(mark);
            from = at;
        }
        out + &text[from..]
    }
}

/// A conversation as one model writes it.
///
/// Its texts carry marks, characters that no message has, in front of what looks like a control token inside a message. So the
/// template's own control tokens can be told from those that somebody wrote. [`ChatScript::plain`] is the text without marks.
#[derive(Debug)]
pub struct ChatScript<'v> {
    vocab: &'v Vocab,
    pub(super) format: &'v ChatFormat,
    pub(super) messages: Vec<ChatMessage>,
    pub(super) values: Map<String, Json>,
    pub(super) marked: Option<Marked>,
}

/// The same with marks.
#[derive(Debug)]
pub(super) struct Marked {
    pub(super) mark: char,
    pub(super) messages: Vec<ChatMessage>,
    pub(super) values: Map<String, Json>,
}

/// Characters for private use: no text has a meaning for them.
const PRIVATE_USE: std::ops::RangeInclusive<char> = '\u{E000}'..='\u{F8FF}';

impl<'v> ChatScript<'v> {
    pub(crate) fn new(
        vocab: &'v Vocab,
        format: &'v ChatFormat,
        conversation: &Conversation,
        parse_special: bool,
    ) -> Result<Self, ChatError> {
        let mut values = format.tokens.clone();
        if let Some(tools) = &conversation.tools {
            values.insert("tools".to_owned(), tools.clone());
        }
        let mut script = Self {
            vocab,
            format,
            messages: conversation.messages.clone(),
            values,
            marked: None,
        };
        if !parse_special {
            script.marked = script.mark()?;
        }
        Ok(script)
    }

    /// `None` if nothing in the messages looks like a control token.
    fn mark(&self) -> Result<Option<Marked>, ChatError> {
        let controls = &self.format.controls;
        if !self.any_text(&mut |text| controls.places(text).next().is_some()) {
            return Ok(None);
        }
        // Without a mark the tokens would be taken for the template's.
        let mark = self.unused(None).ok_or(ChatError::NoMark)?;
        let marked = |text: &str| controls.marked(text, mark);
        let messages = self.messages.iter().map(|m| {
            let fields = m.fields().iter();
            ChatMessage(
                fields
                    .map(|(k, v)| (marked(k), map_texts(v, &marked)))
                    .collect(),
            )
        });
        let mut values = self.values.clone();
        if let Some(tools) = values.get_mut("tools") {
            *tools = map_texts(tools, &marked);
        }
        Ok(Some(Marked {
            mark,
            messages: messages.collect(),
            values,
        }))
    }

    /// Whether `found` says so of any text in the messages or tools.
    fn any_text(&self, found: &mut dyn FnMut(&str) -> bool) -> bool {
        let mut fields = self.messages.iter().flat_map(|m| m.fields());
        fields.any(|(key, value)| found(key) || any_text(value, found))
            || self.values.get("tools").is_some_and(|v| any_text(v, found))
    }

    /// A character that occurs in no text and is not `taken`.
    pub(super) fn unused(&self, taken: Option<char>) -> Option<char> {
        let mut used: HashSet<char> = taken.into_iter().collect();
        self.any_text(&mut |text| {
            used.extend(text.chars().filter(|c| PRIVATE_USE.contains(c)));
            false
        });
        PRIVATE_USE.into_iter().find(|c| !used.contains(c))
    }

    /// The text of the first `n` messages, with marks; with `add_assistant` it ends where the answer begins.
    ///
    /// # Errors
    /// [`ChatError`], for what the template refuses.
    pub fn render(&self, n: usize, add_assistant: bool) -> Result<String, ChatError> {
        let template = &self.format.template;
        let plain = template.render(&self.messages[..n], add_assistant, &self.values)?;
        let Some(marked) = &self.marked else {
            return Ok(plain);
        };
        let text = template.render(&marked.messages[..n], add_assistant, &marked.values);
        match text {
            Ok(text) if self.plain(&text) == plain => Ok(text),
            _ => Err(ChatError::SpecialInMessage {
                token: self.first_control(),
            }),
        }
    }

    /// A control token that a message contains, for the message.
    fn first_control(&self) -> String {
        let mut token = String::new();
        self.any_text(&mut |text| {
            let mut places = self.format.controls.places(text);
            let found = places.find_map(|at| self.format.controls.at(&text[at..]));
            token = found.unwrap_or_default().to_owned();
            found.is_some()
        });
        token
    }

    /// A text of [`ChatScript::render`] without marks.
    pub fn plain(&self, text: &str) -> String {
        match &self.marked {
            Some(marked) => text.replace(marked.mark, ""),
            None => text.to_owned(),
        }
    }

    /// The ids of a part of a rendered text: what the template wrote becomes control tokens, what a message says does not.
    ///
    /// # Errors
    /// As [`Vocab::tokenize`].
    pub fn tokens(&self, text: &str) -> Result<Vec<i32>, VocabError> {
        let Some(Marked { mark, .. }) = self.marked else {
            return self.vocab.tokenize(text, false, true);
        };
        let mut ids = Vec::new();
        // What may be parsed for special tokens, and behind it the text since the last of them.
        let (mut parsed, mut fragment) = (String::new(), String::new());
        let mut literal = false;
        let mut rest = text;
        while let Some(c) = rest.chars().next() {
            if c == mark {
                literal = true;
                rest = &rest[c.len_utf8()..];
                let said = self.format.controls.at(rest).unwrap_or("");
                fragment.push_str(said);
                rest = &rest[said.len()..];
            } else if let Some(control) = self.format.controls.at(rest) {
                self.end_fragment(&mut ids, &mut parsed, &mut fragment, literal)?;
                literal = false;
                parsed.push_str(control);
                rest = &rest[control.len()..];
            } else {
                fragment.push(c);
                rest = &rest[c.len_utf8()..];
            }
        }
        self.end_fragment(&mut ids, &mut parsed, &mut fragment, literal)?;
        if !parsed.is_empty() {
            ids.extend(self.vocab.tokenize(&parsed, false, true)?);
        }
        Ok(ids)
    }

    /// libllama, too, cuts a text at its special tokens and tokenizes each fragment on its own.
    fn end_fragment(
        &self,
        ids: &mut Vec<i32>,
        parsed: &mut String,
        fragment: &mut String,
        literal: bool,
    ) -> Result<(), VocabError> {
        if literal {
            if !parsed.is_empty() {
                ids.extend(self.vocab.tokenize(parsed, false, true)?);
                parsed.clear();
            }
            ids.extend(self.vocab.tokenize(fragment, false, false)?);
        } else {
            parsed.push_str(fragment);
        }
        fragment.clear();
        Ok(())
    }

    /// As [`ChatScript::tokens`], for a text that begins the conversation, without the BOS that whoever computes it adds.
    ///
    /// # Errors
    /// As [`Vocab::tokenize`].
    pub fn tokens_from_start(&self, text: &str) -> Result<Vec<i32>, VocabError> {
        let mut ids = self.tokens(text)?;
        self.vocab.strip_bos(&mut ids);
        Ok(ids)
    }
}

fn any_text(value: &Json, found: &mut dyn FnMut(&str) -> bool) -> bool {
    match value {
        Json::String(text) => found(text),
        Json::Array(list) => list.iter().any(|v| any_text(v, found)),
        Json::Object(fields) => fields.iter().any(|(k, v)| found(k) || any_text(v, found)),
        Json::Null | Json::Bool(_) | Json::Number(_) => false,
    }
}

fn map_texts(value: &Json, map: &dyn Fn(&str) -> String) -> Json {
    match value {
        Json::String(text) => Json::String(map(text)),
        Json::Array(list) => list.iter().map(|v| map_texts(v, map)).collect(),
        Json::Object(fields) => {
            let mapped = fields.iter().map(|(k, v)| (map(k), map_texts(v, map)));
            Json::Object(mapped.collect())
        }
        other => other.clone(),
    }
}
