//! A row from the JSON object that it is written as.

use super::{Content, DataError, Instruction, Place, Row};
use crate::model::chat::json_kind;
use serde_json::{Map, Value as Json, json};

/// Fields that a row may be made of.
pub(super) const FIELDS: [&str; 18] = [
    "prompt",
    "messages",
    "text",
    "conversations",
    "conversation",
    "instruction",
    "question",
    "query",
    "input",
    "context",
    "output",
    "response",
    "answer",
    "user",
    "assistant",
    "source",
    "target",
    "completion",
];

/// Names of what is asked.
const ASKED: [&str; 3] = ["instruction", "question", "query"];
/// Names of what is asked, where there is an answer of that name.
const ASKED_BESIDE: [(&str, &[&str]); 2] = [
    ("input", &ANSWERS),
    ("user", &["assistant", "response", "answer"]),
];
/// Names of what is answered.
const ANSWERS: [&str; 4] = ["output", "response", "answer", "assistant"];

/// Names of the better and the worse answer.
const PREFERENCES: [(&str, &str); 5] = [
    ("chosen", "rejected"),
    ("accepted", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_response", "rejected_response"),
    ("response_j", "response_k"),
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
        let content = object.content()?;
        // Nothing of it counts, whatever it says of itself.
        let weight = match content.is_all_skipped() {
            true => 0.0,
            false => weight,
        };
        Ok(Self {
            content,
            weight: weight as f32,
            place: place.clone(),
            goes_on: false,
        })
    }
}

impl Content {
    /// A conversation in which the assistant speaks and all that it says is skipped.
    fn is_all_skipped(&self) -> bool {
        let Self::Messages {
            conversation,
            given,
            skipped,
        } = self
        else {
            return false;
        };
        let messages = conversation.messages.iter().enumerate().skip(*given);
        let mut said = messages.filter(|(_, m)| m.role() == ASSISTANT).peekable();
        said.peek().is_some() && said.all(|(i, _)| skipped.contains(&i))
    }
}

/// The fields of a row that were not taken yet.
pub(super) struct Object<'a> {
    fields: Map<String, Json>,
    pub(super) place: &'a Place,
}

impl Object<'_> {
    /// A field; one that is null is not there.
    pub(super) fn take(&mut self, field: &str) -> Option<Json> {
        self.fields
            .get_mut(field)
            .map(Json::take)
            .filter(|v| !v.is_null())
    }

    fn has(&self, field: &str) -> bool {
        self.fields.get(field).is_some_and(|v| !v.is_null())
    }

    pub(super) fn wrong(
        &self,
        field: impl Into<Box<str>>,
        got: &Json,
        expected: &'static str,
    ) -> DataError {
        DataError::Field {
            place: self.place.clone(),
            field: field.into(),
            got: match got {
                Json::Bool(_) | Json::Number(_) => got.to_string().into(),
                other => json_kind(other).into(),
            },
            expected,
        }
    }

    pub(super) fn text(&mut self, field: &'static str) -> Result<Option<String>, DataError> {
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
        self.refuse_preferences()?;
        let [prompt, messages, text] = ["prompt", "messages", "text"].map(|field| self.has(field));
        // Alpaca's own file has the whole prompt as a text beside its parts.
        let instruction = self.has("instruction") && !prompt && !messages;
        match (prompt, messages, text && !instruction) {
            (true, false, false) => self.completion(),
            (false, true, false) | (false, false, true) if self.has("completion") => {
                Err(self.many(&["messages", "text", "completion"]))
            }
            (false, true, false) => self.conversation("messages"),
            (false, false, true) => Ok(Content::Text(self.text("text")?.unwrap_or_default())),
            (false, false, false) => self.in_words_of_others(),
            _ => Err(self.many(&["prompt", "messages", "text"])),
        }
    }

    fn completion(&mut self) -> Result<Content, DataError> {
        let completion = match self.take("completion") {
            None => self.other_completion()?,
            completion => completion,
        };
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
            Some(Json::Array(list)) => self.goes_on(list, completion),
            other => Err(self.wrong(
                "prompt",
                &other.unwrap_or(Json::Null),
                "a text or a list of messages",
            )),
        }
    }

    /// What completes a prompt, by another name.
    fn other_completion(&mut self) -> Result<Option<Json>, DataError> {
        let is_text = |field: &&&str| self.fields.get(**field).is_some_and(Json::is_string);
        let found: Vec<&str> = ANSWERS.iter().filter(is_text).copied().collect();
        match found[..] {
            [] => Ok(None),
            [one] => Ok(self.take(one)),
            _ => Err(self.many(&ANSWERS)),
        }
    }

    /// Conversations, and what is asked and answered, in the fields of other programs.
    fn in_words_of_others(&mut self) -> Result<Content, DataError> {
        for field in ["conversations", "conversation"] {
            if self.has(field) {
                return self.conversation(field);
            }
        }
        let beside = |(asked, answers): &&(&str, &[&str])| {
            self.has(asked) && answers.iter().any(|answer| self.has(answer))
        };
        let asked: Vec<&'static str> = match self.has("instruction") {
            true => vec!["instruction"],
            false => ASKED.into_iter().filter(|asked| self.has(asked)).collect(),
        };
        match (&asked[..], ASKED_BESIDE.iter().find(beside)) {
            (&[asked], _) | (&[], Some(&(asked, _))) => self.instruction(asked),
            (&[], None) if self.has("source") && self.has("target") => Ok(Content::Completion {
                prompt: self.text("source")?.unwrap_or_default(),
                completion: self.text("target")?,
            }),
            (&[], None) if self.has("completion") && !self.fields.contains_key("prompt") => {
                let place = self.place.clone();
                Err(DataError::CompletionWithoutPrompt { place })
            }
            (&[], None) => Err(self.no_content()),
            _ => Err(self.many(&ASKED)),
        }
    }

    /// What `asked` asks, and the answer if there is one.
    fn instruction(&mut self, asked: &'static str) -> Result<Content, DataError> {
        let answers: Vec<&'static str> = match self.has("output") {
            true => vec!["output"],
            false => ANSWERS.into_iter().filter(|name| self.has(name)).collect(),
        };
        let output = match answers[..] {
            [] => None,
            [one] => self.text(one)?,
            _ => return Err(self.many(&ANSWERS)),
        };
        let mut first = |names: [&'static str; 2]| {
            let there = names.into_iter().find(|name| self.has(name));
            there.map_or(Ok(None), |name| self.text(name))
        };
        let system = first(["system", "system_prompt"])?;
        let input = match asked {
            "input" => None,
            _ => first(["input", "context"])?,
        };
        Ok(Content::Instruction(Instruction {
            system,
            instruction: self.text(asked)?.unwrap_or_default(),
            input: input.unwrap_or_default(),
            output,
        }))
    }

    /// Answers of which one is better are no targets, and neither is one that may be a bad one.
    fn refuse_preferences(&self) -> Result<(), DataError> {
        let refused = |what, hint| {
            let place = self.place.clone();
            Err(DataError::Preference { place, what, hint })
        };
        let there = |field: &str| self.fields.contains_key(field);
        let complete = self.has("prompt") && self.has("completion");
        let pair = PREFERENCES.iter().find(|(a, b)| there(a) && there(b));
        if let Some((better, worse)) = pair.filter(|_| !complete) {
            let (name, without) = self.name_of_better(better);
            return refused(
                format!("DPO, '{better}' and '{worse}'"),
                format!("rename '{better}' to '{name}', and leave out '{worse}'{without}"),
            );
        }
        for label in ["label", "kto_tag"] {
            let answers = ["completion", "messages", "conversations", "conversation"];
            let mut answers = answers.into_iter().chain(ANSWERS);
            if self.fields.get(label).is_some_and(Json::is_boolean) && answers.any(|f| self.has(f))
            {
                return refused(
                    format!("KTO, '{label}' says whether the answer is a good one"),
                    format!("keep the rows whose '{label}' is true, without that field"),
                );
            }
        }
        Ok(())
    }

    /// What the better answer must be called to be learned, and what else must be left out then.
    fn name_of_better(&self, better: &str) -> (&'static str, &'static str) {
        let first = self.fields.get(better).and_then(|list| list.get(0));
        let speaker = first.and_then(|m| m.get("role").or(m.get("from"))?.as_str());
        match speaker {
            Some("user" | "human" | "system") if self.has("messages") || self.has("prompt") => {
                ("messages", " and 'prompt'")
            }
            Some("user" | "human" | "system") => ("messages", ""),
            _ if self.has("prompt") => ("completion", ""),
            _ if ASKED.iter().any(|asked| self.has(asked)) => ("output", ""),
            Some(_) => ("completion", "; the messages before it are the 'prompt'"),
            None => ("text", ""),
        }
    }

    /// More than one text in a row: those of `fields` that are there.
    fn many(&self, fields: &[&'static str]) -> DataError {
        let there = fields.iter().copied().filter(|field| self.has(field));
        DataError::ManyContents {
            place: self.place.clone(),
            there: there.collect(),
        }
    }

    /// A row without any of the known fields, or with null where a text should be.
    fn no_content(&self) -> DataError {
        let null = |field: &&&str| self.fields.get(**field).is_some_and(Json::is_null);
        if let Some(&field) = FIELDS.iter().find(null) {
            let expected = match field {
                "prompt" => "a text or a list of messages",
                "messages" | "conversations" | "conversation" => "a list of messages",
                _ => "a text",
            };
            return self.wrong(field, &Json::Null, expected);
        }
        let there: Vec<_> = self
            .fields
            .keys()
            .filter(|k| *k != "weight")
            .cloned()
            .collect();
        let lower = |name: &String| FIELDS.contains(&name.trim().to_lowercase().as_str());
        let rows = self
            .fields
            .iter()
            .find(|(_, value)| value.get(0).is_some_and(Json::is_object));
        let hint = match rows {
            Some((name, _)) if there.len() == 1 => {
                format!("; if its list has the rows: jq -c '.[\"{name}\"][]' IN > OUT writes them")
            }
            _ if there
                .iter()
                .any(|name| !FIELDS.contains(&name.as_str()) && lower(name)) =>
            {
                "; names are written in small letters, without spaces".to_owned()
            }
            _ => String::new(),
        };
        DataError::NoContent {
            place: self.place.clone(),
            there,
            hint,
        }
    }
}
