//! A row from the JSON object that it is written as.

use super::{Content, DataError, Instruction, Place, Row};
use crate::model::chat::{ChatMessage, Conversation, json_kind};
use serde_json::{Map, Value as Json, json};

/// Fields that a row may be made of.
pub(super) const FIELDS: [&str; 8] = [
    "prompt",
    "completion",
    "messages",
    "text",
    "conversations",
    "instruction",
    "input",
    "output",
];

/// The role of the model's own messages.
pub(super) const ASSISTANT: &str = "assistant";

pub(super) fn check_weight(weight: f64, place: &Place) -> Result<(), DataError> {
    if (0.0..=f64::from(f32::MAX)).contains(&weight) {
        return Ok(());
    }
    Err(DataError::Weight {
        place: place.clone(),
        weight,
    })
}

/// Whether a row of a table can be read whose columns are these.
pub(super) fn is_layout(columns: &[String]) -> bool {
    let value = |name: &str| match name {
        "weight" => json!(1),
        "messages" | "conversations" | "conversation" => {
            json!([{"role": ASSISTANT, "content": ""}])
        }
        _ => json!(""),
    };
    let fields = columns.iter().map(|name| (name.clone(), value(name)));
    Row::from_json(Json::Object(fields.collect()), &Place::default()).is_ok()
}

impl Row {
    pub(super) fn from_json(value: Json, place: &Place) -> Result<Self, DataError> {
        let mut object = match value {
            Json::Object(fields) => Object { fields, place },
            other => {
                return Err(DataError::NotAnObject {
                    place: place.clone(),
                    got: json_kind(&other),
                });
            }
        };
        let weight = object.weight()?;
        Ok(Self {
            content: object.content()?,
            weight: weight as f32,
            place: place.clone(),
            goes_on: false,
        })
    }
}

/// The fields of a row that were not taken yet.
struct Object<'a> {
    fields: Map<String, Json>,
    place: &'a Place,
}

impl Object<'_> {
    /// A field; one that is null is not there.
    fn take(&mut self, field: &str) -> Option<Json> {
        self.fields
            .get_mut(field)
            .map(Json::take)
            .filter(|v| !v.is_null())
    }

    fn has(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(|v| !v.is_null())
    }

    fn wrong(&self, field: &'static str, got: &Json, expected: &'static str) -> DataError {
        DataError::Field {
            place: self.place.clone(),
            field,
            got: json_kind(got),
            expected,
        }
    }

    fn text(&mut self, field: &'static str) -> Result<Option<String>, DataError> {
        match self.take(field) {
            None => Ok(None),
            Some(Json::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(field, &other, "a text")),
        }
    }

    fn weight(&mut self) -> Result<f64, DataError> {
        let weight = match self.take("weight") {
            None => return Ok(1.0),
            Some(weight) => weight,
        };
        let number = weight
            .as_f64()
            .ok_or_else(|| self.wrong("weight", &weight, "a number"))?;
        check_weight(number, self.place)?;
        Ok(number)
    }

    fn content(&mut self) -> Result<Content, DataError> {
        let place = || self.place.clone();
        let (prompt, messages, text) = (self.has("prompt"), self.has("messages"), self.has("text"));
        // Alpaca's own file has the whole prompt as a text beside its parts.
        let instruction = self.has("instruction") && !prompt && !messages;
        match (prompt, messages, text && !instruction) {
            (true, false, false) => self.completion(),
            (false, true, false) | (false, false, true) if self.has("completion") => {
                Err(DataError::ManyContents { place: place() })
            }
            (false, true, false) => self.conversation("messages"),
            (false, false, true) => Ok(Content::Text(self.text("text")?.unwrap_or_default())),
            (false, false, false) if self.has("conversations") => {
                self.conversation("conversations")
            }
            (false, false, false) if instruction => Ok(Content::Instruction(Instruction {
                system: self.text("system")?,
                instruction: self.text("instruction")?.unwrap_or_default(),
                input: self.text("input")?.unwrap_or_default(),
                output: self.text("output")?,
            })),
            (false, false, false) if self.has("completion") => {
                Err(DataError::CompletionWithoutPrompt { place: place() })
            }
            (false, false, false) => Err(DataError::NoContent {
                place: place(),
                there: self
                    .fields
                    .keys()
                    .filter(|k| *k != "weight")
                    .cloned()
                    .collect(),
            }),
            _ => Err(DataError::ManyContents { place: place() }),
        }
    }

    fn completion(&mut self) -> Result<Content, DataError> {
        let completion = self.take("completion");
        match self.take("prompt") {
            Some(Json::String(prompt)) => {
                let completion = match completion {
                    None => None,
                    Some(Json::String(text)) => Some(text),
                    Some(other) => {
                        return Err(self.wrong("completion", &other, "a text, as the prompt is"));
                    }
                };
                Ok(Content::Completion { prompt, completion })
            }
            Some(Json::Array(list)) => {
                let mut messages = self.messages("prompt", list)?;
                let given = messages.len();
                match completion {
                    None => {}
                    Some(Json::String(text)) => messages.push(ChatMessage::new(ASSISTANT, text)),
                    Some(Json::Array(list)) => messages.extend(self.messages("completion", list)?),
                    Some(other) => {
                        return Err(self.wrong(
                            "completion",
                            &other,
                            "a list of messages, as the prompt is",
                        ));
                    }
                }
                self.with_tools(messages, given)
            }
            other => Err(self.wrong(
                "prompt",
                &other.unwrap_or(Json::Null),
                "a text or a list of messages",
            )),
        }
    }

    fn conversation(&mut self, field: &'static str) -> Result<Content, DataError> {
        let list = match self.take(field) {
            Some(Json::Array(list)) => list,
            other => {
                let other = other.unwrap_or(Json::Null);
                return Err(self.wrong(field, &other, "a list of messages"));
            }
        };
        let mut messages = self.messages(field, list)?;
        if field == "conversations"
            && let Some(system) = self.text("system")?
            && !system.is_empty()
        {
            messages.insert(0, ChatMessage::new("system", system));
        }
        self.with_tools(messages, 0)
    }

    /// The row's `tools`, a list or one written as JSON in a text, belong to its messages.
    fn with_tools(
        &mut self,
        messages: Vec<ChatMessage>,
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
        })
    }

    fn messages(
        &self,
        field: &'static str,
        list: Vec<Json>,
    ) -> Result<Vec<ChatMessage>, DataError> {
        let message = |value: Json| {
            let Json::Object(fields) = value else {
                return Err(self.wrong(field, &value, "a list of objects"));
            };
            ChatMessage::from_json(Json::Object(self.in_our_terms(fields)?)).map_err(|source| {
                DataError::Message {
                    place: self.place.clone(),
                    source,
                }
            })
        };
        list.into_iter().map(message).collect()
    }

    /// ShareGPT's `from` and `value` are `role` and `content`.
    fn in_our_terms(&self, mut fields: Map<String, Json>) -> Result<Map<String, Json>, DataError> {
        if fields.contains_key("role") {
            return Ok(fields);
        }
        if let Some(Json::String(from)) = fields.remove("from") {
            let role = match from.as_str() {
                "human" | "user" => "user",
                "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "model" | "function_call" => {
                    ASSISTANT
                }
                "system" => "system",
                "tool" | "observation" | "function_response" | "function" => "tool",
                _ => {
                    return Err(DataError::Speaker {
                        place: self.place.clone(),
                        role: from,
                    });
                }
            };
            fields.insert("role".to_owned(), role.into());
            if let Some(value) = fields.remove("value") {
                fields.insert("content".to_owned(), value);
            }
        }
        Ok(fields)
    }
}
