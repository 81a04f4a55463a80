//! Chat templates: Jinja, rendered with what Transformers gives them.
//!
//! A template comes with the model's file, so it is not trusted: the work, the nesting and the text of one rendering are bounded,
//! and it reaches nothing but the values that it is given. (What a template keeps in variables is bounded by its work alone.)

mod json;
mod python;
mod script;
mod source;
mod turns;

pub(crate) use script::ChatFormat;
pub use script::{ChatScript, Conversation};

use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use python::{is_space, python_str};
use serde_json::{Map, Value as Json};
use std::fmt::Write as _;
use std::io;

/// Instructions of one rendering: far beyond any conversation that a context holds, about a second of work.
const FUEL: u64 = 20_000_000;
/// Depth of macros that call each other. Real templates stay below 5.
const MAX_DEPTH: usize = 64;
/// Bytes of one formatted conversation: far beyond any context.
const MAX_TEXT: usize = 64 << 20;

/// A conversation that cannot be formatted, one variant per cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The template is not one that can be read.
    #[error(
        "the chat template cannot be read: {reason}; another one can be given with --chat-template"
    )]
    Syntax {
        /// What is wrong, and where.
        reason: String,
    },
    /// The template itself refuses the conversation (`raise_exception`).
    #[error("the chat template refuses the conversation: {reason}")]
    Refused {
        /// In the template's own words.
        reason: String,
    },
    /// The template cannot work with these messages, as Jinja could not: a text joined with `null`, a field of nothing.
    #[error("the chat template cannot format the conversation: {reason}")]
    Failed {
        /// What it tried, and where.
        reason: String,
    },
    /// The template computes without end.
    #[error("the chat template needs more than {FUEL} instructions for the conversation")]
    Endless,
    /// The formatted conversation is longer than any context holds.
    #[error("the chat template writes more than {MAX_TEXT} bytes for the conversation")]
    TooLong,
    /// The template treats the text of a control token inside a message in a way of its own, so that the text and the token
    /// cannot be told apart.
    #[error(
        "a message contains the text of the control token {token:?}, which the chat template looks for: remove it, or let texts in \
         messages become tokens (--parse-special)"
    )]
    SpecialInMessage {
        /// The token's text.
        token: String,
    },
    /// No character is left to tell the control tokens inside messages from the template's own.
    #[error(
        "the messages contain the text of a control token and every one of Unicode's private characters: remove one of these, or let \
         texts in messages become tokens (--parse-special)"
    )]
    NoMark,
    /// A message is not a JSON object.
    #[error("a message must be an object with a role and a content, not {got}")]
    NotAnObject {
        /// What it is.
        got: &'static str,
    },
    /// A message does not say who speaks.
    #[error("a message must have a role that is a text")]
    NoRole,
    /// The template writes a conversation differently when it goes on, so that no part of it belongs to one message.
    #[error(
        "the chat template changes earlier messages when later ones are added: write the row as prompt and completion"
    )]
    NotAdditive,
}

/// One message of a conversation: a JSON object with a `role` and whatever else the model's template looks at (`content`, which
/// may be a text, null or a list of parts, `tool_calls`, `name`, ...).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage(Map<String, Json>);

impl ChatMessage {
    /// A message of text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".to_owned(), Json::String(role.into()));
        fields.insert("content".to_owned(), Json::String(content.into()));
        Self(fields)
    }

    /// A message with all its fields.
    ///
    /// # Errors
    /// [`ChatError::NotAnObject`], [`ChatError::NoRole`].
    pub fn from_json(message: Json) -> Result<Self, ChatError> {
        match message {
            Json::Object(fields) if fields.get("role").is_some_and(Json::is_string) => {
                Ok(Self(fields))
            }
            Json::Object(_) => Err(ChatError::NoRole),
            other => Err(ChatError::NotAnObject {
                got: json_kind(&other),
            }),
        }
    }

    /// Who speaks: `system`, `user`, `assistant`, `tool`, ...
    pub fn role(&self) -> &str {
        self.0.get("role").and_then(Json::as_str).unwrap_or("")
    }

    /// What was said, if it is a text.
    pub fn text(&self) -> Option<&str> {
        self.0.get("content").and_then(Json::as_str)
    }

    /// All fields.
    pub fn fields(&self) -> &Map<String, Json> {
        &self.0
    }
}

pub(crate) fn json_kind(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a text",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

/// Templates that can be named instead of a file: name and source.
const BUILT_IN: &[(&str, &str)] = &[
    ("chatml", include_str!("chat/chatml.jinja")),
    ("gemma", include_str!("chat/gemma.jinja")),
    ("llama2", include_str!("chat/llama2.jinja")),
    ("llama3", include_str!("chat/llama3.jinja")),
    ("phi3", include_str!("chat/phi3.jinja")),
    ("zephyr", include_str!("chat/zephyr.jinja")),
];

/// Source of the built-in chat template `name`: chatml, gemma, llama2, llama3, phi3 or zephyr.
pub fn built_in_template(name: &str) -> Option<&'static str> {
    BUILT_IN
        .iter()
        .find(|(known, _)| *known == name)
        .map(|&(_, source)| source)
}

/// Names that [`built_in_template`] knows.
pub fn built_in_names() -> impl Iterator<Item = &'static str> {
    BUILT_IN.iter().map(|&(name, _)| name)
}

/// A chat template, compiled.
#[derive(Debug)]
pub struct ChatTemplate(Environment<'static>);

const NAME: &str = "chat template";

impl ChatTemplate {
    /// Compiles Jinja source.
    ///
    /// # Errors
    /// [`ChatError::Syntax`].
    pub fn new(source: &str) -> Result<Self, ChatError> {
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(MAX_DEPTH);
        env.set_unknown_method_callback(python::method);
        env.set_formatter(|out, _, value| {
            if !value.is_undefined() {
                out.write_str(&python_str(value)).map_err(|e| {
                    minijinja::Error::new(ErrorKind::WriteFailure, "").with_source(e)
                })?;
            }
            Ok(())
        });
        env.add_filter("tojson", json::to_json);
        env.add_filter("string", |value: Value| python_str(&value));
        env.add_filter("trim", |text: Value, chars: Option<String>| {
            let text = python_str(&text);
            match chars {
                Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
                None => text.trim_matches(is_space).to_owned(),
            }
        });
        // Python's texts and dictionaries have a length and items, too.
        env.add_test("sequence", |value: Value| {
            matches!(
                value.kind(),
                ValueKind::String | ValueKind::Seq | ValueKind::Map
            )
        });
        env.add_test("iterable", |value: Value| {
            matches!(
                value.kind(),
                ValueKind::String | ValueKind::Seq | ValueKind::Map | ValueKind::Iterable
            )
        });
        env.add_test("callable", |_: Value| false);
        env.add_function("raise_exception", |reason: Value| {
            let reason = python_str(&reason);
            Err::<Value, _>(
                minijinja::Error::new(ErrorKind::InvalidOperation, "refused")
                    .with_source(Raised(reason)),
            )
        });
        env.add_function("strftime_now", |format: String| {
            let mut out = String::new();
            // Writing fails for a directive that does not exist.
            write!(out, "{}", chrono::Local::now().format(&format)).map_err(|_| {
                minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    format!("{format:?} is no format of a date"),
                )
            })?;
            Ok(out)
        });
        env.add_template_owned(NAME, source::for_minijinja(source))
            .map_err(|e| ChatError::Syntax { reason: text(&e) })?;
        Ok(Self(env))
    }

    /// Formats a conversation. `values` are the other variables of the template: `bos_token`, `tools`, ...
    ///
    /// # Errors
    /// [`ChatError::Refused`], [`ChatError::Failed`], [`ChatError::Endless`].
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        values: &Map<String, Json>,
    ) -> Result<String, ChatError> {
        let list = messages.iter().map(|m| Json::Object(m.0.clone())).collect();
        let mut all = Map::new();
        // Transformers gives both, whether there are any or not.
        all.insert("tools".to_owned(), Json::Null);
        all.insert("documents".to_owned(), Json::Null);
        all.extend(values.clone());
        all.insert("messages".to_owned(), Json::Array(list));
        all.insert(
            "add_generation_prompt".to_owned(),
            Json::Bool(add_generation_prompt),
        );
        let template = self.0.get_template(NAME).map_err(|e| failed(&e))?;
        let mut out = Bounded::default();
        let rendered = template.render_captured_to(Value::from_serialize(&all), &mut out);
        match rendered {
            Err(_) if out.full => Err(ChatError::TooLong),
            Err(e) => Err(failed(&e)),
            Ok(_) => Ok(String::from_utf8(out.text).expect("templates write strings")),
        }
    }
}

/// Text of at most [`MAX_TEXT`] bytes.
#[derive(Default)]
struct Bounded {
    text: Vec<u8>,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.full |= bytes.len() > MAX_TEXT - self.text.len();
        if self.full {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The text of `raise_exception`, inside the error that carries it through the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn failed(e: &minijinja::Error) -> ChatError {
    let mut source = std::error::Error::source(e);
    while let Some(inner) = source {
        if let Some(Raised(reason)) = inner.downcast_ref() {
            return ChatError::Refused {
                reason: reason.clone(),
            };
        }
        source = inner.source();
    }
    match e.kind() {
        ErrorKind::OutOfFuel => ChatError::Endless,
        _ => ChatError::Failed { reason: text(e) },
    }
}

/// In one line.
fn text(e: &minijinja::Error) -> String {
    let what = e
        .detail()
        .map_or_else(|| e.kind().to_string(), str::to_owned);
    let line = e.line().map_or(String::new(), |n| format!(" (line {n})"));
    format!("{what}{line}").replace(['\n', '\r'], " ")
}
