//! The messages of a row, in the words of chat templates.

use super::row::{ASSISTANT, Object};
use super::{Content, DataError};
use crate::model::chat::{ChatMessage, Conversation};
use serde_json::{Map, Value as Json};

/// Messages, and the indices of those that say that they are not learned.
type Marked = (Vec<ChatMessage>, Vec<usize>);

impl Object<'_> {
    /// Messages that are given, and how they go on.
    pub(super) fn goes_on(
        &mut self,
        prompt: Vec<Json>,
        completion: Option<Json>,
    ) -> Result<Content, DataError> {
        let (mut messages, mut skipped) = self.messages("prompt", prompt)?;
        let given = messages.len();
        match completion {
            None => {}
            Some(Json::String(text)) => messages.push(ChatMessage::new(ASSISTANT, text)),
            Some(Json::Array(list)) => {
                let (more, marked) = self.messages("completion", list)?;
                messages.extend(more);
                skipped.extend(marked.into_iter().map(|i| given + i));
            }
            Some(other) => {
                let expected = "a list of messages, as the prompt is";
                return Err(self.wrong("completion", &other, expected));
            }
        }
        self.with_tools((messages, skipped), given)
    }

    pub(super) fn conversation(&mut self, field: &'static str) -> Result<Content, DataError> {
        let list = match self.take(field) {
            Some(Json::Array(list)) => list,
            other => {
                let other = other.unwrap_or(Json::Null);
                return Err(self.wrong(field, &other, "a list of messages"));
            }
        };
        let (mut messages, mut skipped) = self.messages(field, list)?;
        if field != "messages"
            && let Some(system) = self.text("system")?
            && !system.is_empty()
        {
            messages.insert(0, ChatMessage::new("system", system));
            skipped.iter_mut().for_each(|i| *i += 1);
        }
        self.with_tools((messages, skipped), 0)
    }

    /// The row's `tools`, a list or one written as JSON in a text, belong to its messages.
    fn with_tools(
        &mut self,
        (messages, skipped): Marked,
        given: usize,
    ) -> Result<Content, DataError> {
        let tools = match self.take("tools") {
            Some(Json::String(text)) if text.trim().is_empty() => None,
            Some(Json::String(text)) => {
                let parsed = serde_json::from_str::<Json>(&text)
                    .ok()
                    .filter(Json::is_array);
                let wrong = || self.wrong("tools", &Json::String(text.clone()), "a list");
                Some(parsed.ok_or_else(wrong)?)
            }
            Some(list @ Json::Array(_)) => Some(list),
            Some(other) => return Err(self.wrong("tools", &other, "a list")),
            None => None,
        };
        let tools = tools.filter(|list| list.as_array().is_some_and(|l| !l.is_empty()));
        Ok(Content::Messages {
            conversation: Conversation { messages, tools },
            given,
            skipped,
        })
    }

    fn messages(&self, field: &'static str, list: Vec<Json>) -> Result<Marked, DataError> {
        if list.is_empty() {
            return Err(DataError::NoMessages {
                place: self.place.clone(),
                field,
            });
        }
        let mut messages = Vec::with_capacity(list.len());
        let mut skipped = Vec::new();
        for (i, value) in list.into_iter().enumerate() {
            let name = format!("{field}[{i}]");
            let Json::Object(mut fields) = value else {
                return Err(self.wrong(name, &value, "an object with a role and a content"));
            };
            let weight = self.weight_mark(&name, &mut fields)?;
            let train = self.train_mark(&name, &mut fields)?;
            let fields = Json::Object(self.in_our_terms(fields)?);
            let message = ChatMessage::from_json(fields).map_err(|source| DataError::Message {
                place: self.place.clone(),
                source,
            })?;
            self.check_says_something(&name, &message)?;
            let wrong = |expected| {
                let got = train == Some(true);
                self.wrong(format!("{name}.train"), &got.into(), expected)
            };
            match (weight, train) {
                (Some(true), Some(false)) => return Err(wrong("true, as the weight is 1")),
                (Some(false), Some(true)) => return Err(wrong("false, as the weight is 0")),
                (_, Some(true)) if message.role() != ASSISTANT => {
                    return Err(wrong("false: only what the assistant says is learned"));
                }
                (Some(false), _) | (_, Some(false)) => skipped.push(i),
                _ => {}
            }
            messages.push(message);
        }
        Ok((messages, skipped))
    }

    /// A message of nothing but misspelt fields would be learned as an empty one. Templates may look at lists (calls, parts) and
    /// thoughts instead.
    fn check_says_something(&self, name: &str, message: &ChatMessage) -> Result<(), DataError> {
        let says = |(field, value): (&String, &Json)| {
            let known = ["content", "reasoning_content", "reasoning", "thinking"];
            known.contains(&field.as_str()) || value.is_array() || value.is_object()
        };
        if message.fields().iter().any(says) {
            return Ok(());
        }
        Err(DataError::Field {
            place: self.place.clone(),
            field: format!("{name}.content").into(),
            got: "not there".into(),
            expected: "what is said",
        })
    }

    /// Whether a message is learned, in OpenAI's words: `weight`, which is 0 or 1. Templates do not see it.
    fn weight_mark(
        &self,
        name: &str,
        fields: &mut Map<String, Json>,
    ) -> Result<Option<bool>, DataError> {
        let Some(mark) = fields.shift_remove("weight") else {
            return Ok(None);
        };
        match mark.as_f64() {
            Some(0.0) => Ok(Some(false)),
            Some(1.0) => Ok(Some(true)),
            None if mark.is_null() => Ok(None),
            _ => Err(self.wrong(format!("{name}.weight"), &mark, "0 or 1")),
        }
    }

    /// The same in Axolotl's words: `train`.
    fn train_mark(
        &self,
        name: &str,
        fields: &mut Map<String, Json>,
    ) -> Result<Option<bool>, DataError> {
        match fields.shift_remove("train") {
            None | Some(Json::Null) => Ok(None),
            Some(Json::Bool(mark)) => Ok(Some(mark)),
            Some(mark) => Err(self.wrong(format!("{name}.train"), &mark, "true or false")),
        }
    }

    /// ShareGPT's `from` and `value` are `role` and `content`, and so are other names that mean the same.
    fn in_our_terms(&self, mut fields: Map<String, Json>) -> Result<Map<String, Json>, DataError> {
        if let Some(role) = fields.get_mut("role") {
            if let Some(known) = role.as_str().and_then(one_of_two) {
                *role = known.into();
            }
        } else if let Some(Json::String(from)) = fields.shift_remove("from") {
            let role = match &from.to_lowercase()[..] {
                "function_call" => ASSISTANT,
                "tool" | "observation" | "function_response" | "function" | "tool_response" => {
                    "tool"
                }
                _ => one_of_two(&from).ok_or_else(|| DataError::Speaker {
                    place: self.place.clone(),
                    role: from,
                })?,
            };
            fields.insert("role".to_owned(), role.into());
        }
        if !fields.contains_key("content") {
            let is_text = fields.get("text").is_some_and(Json::is_string);
            let said = fields
                .shift_remove("value")
                .or_else(|| is_text.then(|| fields.shift_remove("text"))?);
            fields.extend(said.map(|said| ("content".to_owned(), said)));
        }
        Ok(fields)
    }
}

/// The role of somebody who is not called by it. Templates know other roles of their own.
fn one_of_two(name: &str) -> Option<&'static str> {
    Some(match &name.to_lowercase()[..] {
        "user" | "human" | "prompter" => "user",
        "assistant" | "gpt" | "chatgpt" | "gpt-3.5" | "gpt-4" | "bing" | "bard" | "claude"
        | "gemini" | "bot" | "chatbot" | "ai" | "model" | "llm" => ASSISTANT,
        "system" => "system",
        _ => return None,
    })
}
