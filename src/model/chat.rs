//! Chat templates: Jinja, rendered with what Transformers gives them.
//!
//! A template comes with the model's file, so it is not trusted: the work, the nesting, the values and the text of one rendering
//! are bounded, and it reaches nothing but the values that it is given.
//!
//! minijinja reads the statements and keeps the variables. Values, operators, filters, methods and tests are our own, since what a
//! template computes must be what Python computes: `source` rewrites a template's expressions so that they call them.

mod arguments;
mod date;
mod filters;
mod format;
mod functions;
mod grammar;
mod json;
mod limits;
mod lists;
mod methods;
mod numbers;
mod operators;
mod pieces;
mod predicates;
mod python;
mod script;
mod sequences;
mod source;
mod tokens;
mod turns;
mod values;

pub(crate) use script::ChatFormat;
pub use script::{ChatScript, Conversation};

use functions::Raised;
use limits::NeedsStack;
use minijinja::value::{Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, UndefinedBehavior};
use python::python_str;
use serde_json::{Map, Value as Json};
use std::borrow::Cow;
use std::sync::OnceLock;
use std::{io, thread};

/// Instructions of one rendering: far beyond any conversation that a context holds, about a second of work.
const FUEL: u64 = 20_000_000;
/// Depth of scopes that any stack holds; a macro has about six. Real templates seldom go beyond.
const MAX_DEPTH: usize = 64;
/// Depth of scopes on a stack of [`LARGE`] bytes: about seventy macros within each other. It is the most that minijinja takes.
const MAX_LARGE_DEPTH: usize = 500;
/// Bytes of a large stack. What is not used takes no memory.
const LARGE: usize = 256 << 20;
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
pub struct ChatTemplate {
    env: Environment<'static>,
    /// The same for a large stack.
    deep: OnceLock<Environment<'static>>,
}

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
        env.set_debug(false);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_fuel(Some(FUEL));
        env.set_recursion_limit(MAX_DEPTH);
        env.set_formatter(|out, _, value| {
            let text = python_str(value)?;
            limits::charge(text.len())?;
            out.write_str(&text)
                .map_err(|e| Error::new(ErrorKind::WriteFailure, "").with_source(e))
        });
        filters::register(&mut env);
        functions::register(&mut env);
        lists::register(&mut env);
        operators::register(&mut env);
        predicates::register(&mut env);
        sequences::register(&mut env);
        env.add_filter("tojson", json::to_json);
        let source = source::for_minijinja(source).map_err(|e| ChatError::Syntax {
            reason: e.to_string(),
        })?;
        env.add_template_owned(NAME, source)
            .map_err(|e| ChatError::Syntax { reason: text(&e) })?;
        Ok(Self {
            env,
            deep: OnceLock::new(),
        })
    }

    /// Formats a conversation. `values` are the other variables of the template: `bos_token`, `tools`, ...
    ///
    /// # Errors
    /// [`ChatError::Refused`], [`ChatError::Failed`], [`ChatError::Endless`], [`ChatError::TooLong`].
    pub fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
        values: &Map<String, Json>,
    ) -> Result<String, ChatError> {
        let mut all: Map<String, Json> = Map::new();
        // Transformers gives both, whether there are any or not.
        all.insert("tools".to_owned(), Json::Null);
        all.insert("documents".to_owned(), Json::Null);
        all.extend(values.clone());
        let list = messages.iter().map(|m| Json::Object(m.0.clone())).collect();
        all.insert("messages".to_owned(), Json::Array(list));
        all.insert(
            "add_generation_prompt".to_owned(),
            Json::Bool(add_generation_prompt),
        );
        let all = Json::Object(all);
        let result = Self::render_with(&self.env, &all, false);
        match result {
            Err(Failure::NeedsStack) => self.render_deeply(&all),
            Err(Failure::Chat(e)) => Err(e),
            Ok(text) => Ok(text),
        }
    }

    /// On a thread of its own, whose stack is large.
    fn render_deeply(&self, values: &Json) -> Result<String, ChatError> {
        let env = self.deep.get_or_init(|| {
            let mut env = self.env.clone();
            env.set_recursion_limit(MAX_LARGE_DEPTH);
            env
        });
        let rendered = thread::scope(|scope| {
            let large = thread::Builder::new().stack_size(LARGE);
            let started = large.spawn_scoped(scope, || Self::render_with(env, values, true));
            started.map(|thread| thread.join())
        });
        let reason = match rendered {
            Ok(Ok(Ok(text))) => return Ok(text),
            Ok(Ok(Err(Failure::Chat(e)))) => return Err(e),
            Ok(Ok(Err(Failure::NeedsStack))) => "it nests too deeply".to_owned(),
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(e) => format!("it nests deeply, and no thread could be started for it: {e}"),
        };
        Err(ChatError::Failed { reason })
    }

    fn render_with(env: &Environment<'_>, values: &Json, large: bool) -> Result<String, Failure> {
        limits::begin(large);
        let values = values::from_json(values).map_err(|e| failed(&e, large))?;
        let template = env.get_template(NAME).map_err(|e| failed(&e, large))?;
        let mut out = Bounded::default();
        let rendered = template.render_captured_to(values, &mut out);
        match rendered {
            Err(_) if out.full => Err(ChatError::TooLong.into()),
            Err(e) => Err(failed(&e, large)),
            Ok(_) => Ok(String::from_utf8(out.text).expect("templates write strings")),
        }
    }
}

/// Why a rendering came to nothing.
enum Failure {
    /// It may do better with more stack.
    NeedsStack,
    Chat(ChatError),
}

impl From<ChatError> for Failure {
    fn from(e: ChatError) -> Self {
        Self::Chat(e)
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

/// Whether Jinja has a filter of this name.
fn is_filter(name: &str) -> bool {
    name == "tojson" || filters::has(name) || sequences::has(name)
}

/// An operation that Python refuses.
fn invalid(what: impl Into<Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// What a value is, for messages.
fn kind(value: &Value) -> &'static str {
    match value.kind() {
        ValueKind::Undefined => "what is not defined",
        ValueKind::None => "none",
        ValueKind::Bool => "a boolean",
        ValueKind::Number => "a number",
        ValueKind::String => "a text",
        ValueKind::Seq | ValueKind::Iterable => "a list",
        ValueKind::Map => "a dictionary",
        _ => "an object",
    }
}

/// `large`: whether there was a large stack already.
fn failed(e: &Error, large: bool) -> Failure {
    let mut source = std::error::Error::source(e);
    while let Some(inner) = source {
        if let Some(Raised(reason)) = inner.downcast_ref() {
            let reason = reason.clone();
            return ChatError::Refused { reason }.into();
        }
        if inner.is::<NeedsStack>() {
            return Failure::NeedsStack;
        }
        source = inner.source();
    }
    let too_deep = |e: &Error| e.detail() == Some("recursion limit exceeded");
    match e.kind() {
        ErrorKind::OutOfFuel => ChatError::Endless.into(),
        ErrorKind::InvalidOperation if !large && too_deep(e) => Failure::NeedsStack,
        _ => ChatError::Failed { reason: text(e) }.into(),
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
