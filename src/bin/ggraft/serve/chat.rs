//! `POST /v1/chat/completions`.

use super::answer::{Form, Question, finish_reason, respond};
use super::app::{App, blocking};
use super::body::JsonBody;
use super::error::{ApiError, Result};
use super::keys::Caller;
use super::sampling::{Sampling, check_logprobs, refuse_unsupported};
use super::speaker::Wanted;
use axum::extract::State;
use axum::response::Response;
use ggraft::Model;
use ggraft::infer::{Generated, TokenLogprobs};
use ggraft::model::chat::ChatMessage;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;

#[derive(Deserialize)]
struct Chat {
    messages: Option<Vec<Map<String, Value>>>,
    logprobs: Option<bool>,
    top_logprobs: Option<usize>,
}

pub(super) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response> {
    refuse_unsupported(&body)?;
    let (chat, sampling): (Chat, Sampling) = (body.read()?, body.read()?);
    let wanted: Wanted = body.read()?;
    let logprobs = chat.logprobs()?;
    let n_vocab = app.model.shape().n_vocab;
    let mut generate = sampling.generate(n_vocab, None, caller.max_tokens())?;
    generate.logprobs = logprobs;
    let (n, delivery) = (sampling.n()?, sampling.delivery());
    let messages = messages(chat.messages)?;
    let (speaker, prompt) = {
        let (app, caller) = (app.clone(), caller.clone());
        blocking(move || {
            let speaker = wanted.find(&app, &caller)?;
            let prompt = app.model.vocab().tokenize_chat(&messages, true);
            Ok((speaker, prompt.map_err(ggraft::Error::from)?))
        })
        .await?
        .map_err(|e: ApiError| e)?
    };
    let question = Question {
        prompts: vec![prompt],
        n,
        generate,
        delivery,
    };
    let form = ChatForm {
        model: app.model.clone(),
    };
    respond(app, &caller, speaker, question, form).await
}

impl Chat {
    fn logprobs(&self) -> Result<Option<usize>> {
        match (self.logprobs, self.top_logprobs) {
            (Some(true), n) => check_logprobs("top_logprobs", n.unwrap_or(0)).map(Some),
            (_, Some(1..)) => Err(ApiError::field("top_logprobs", "needs \"logprobs\": true")),
            _ => Ok(None),
        }
    }
}

/// The messages as templates read them: a content of several texts is one.
fn messages(given: Option<Vec<Map<String, Value>>>) -> Result<Vec<ChatMessage>> {
    let given = given.filter(|messages| !messages.is_empty());
    let given = given.ok_or_else(|| ApiError::field("messages", "there must be at least one"))?;
    let message = |(i, mut message): (usize, Map<String, Value>)| {
        let wrong = |why: &str| ApiError::field(&format!("messages[{i}].content"), why);
        let content = message.entry("content").or_insert(Value::Null);
        match content {
            Value::String(_) => {}
            Value::Array(parts) => {
                let text = parts
                    .iter()
                    .map(text_of_part)
                    .collect::<Option<String>>()
                    .ok_or_else(|| wrong("only parts of type \"text\" are supported"))?;
                *content = text.into();
            }
            _ => return Err(wrong("must be a text, or a list of parts")),
        }
        ChatMessage::from_json(message.into())
            .map_err(|e| ApiError::field(&format!("messages[{i}]"), e))
    };
    given.into_iter().enumerate().map(message).collect()
}

fn text_of_part(part: &Value) -> Option<&str> {
    let is_text = part.get("type").is_none_or(|kind| kind == "text");
    part.get("text")?.as_str().filter(|_| is_text)
}

struct ChatForm {
    model: Model,
}

impl ChatForm {
    /// How likely each token was, if that was asked.
    fn logprobs(&self, answer: &Generated) -> Value {
        if answer.logprobs.is_empty() {
            return Value::Null;
        }
        let tokens = answer.tokens.iter().zip(&answer.logprobs);
        let of_token = |(&id, likely): (&i32, &TokenLogprobs)| {
            let mut value = self.token(id, likely.logprob);
            let top = likely.top.iter().map(|&(id, p)| self.token(id, p));
            value["top_logprobs"] = top.collect();
            value
        };
        json!({"content": tokens.map(of_token).collect::<Vec<_>>(), "refusal": null})
    }

    fn token(&self, id: i32, logprob: f32) -> Value {
        let bytes = self.model.vocab().token_bytes(id, true);
        json!({
            "token": String::from_utf8_lossy(&bytes),
            "logprob": finite(logprob),
            "bytes": bytes,
        })
    }
}

/// JSON has no infinity: what OpenAI gives for a token that is next to impossible.
pub(super) fn finite(logprob: f32) -> f32 {
    logprob.max(-9999.0)
}

impl Form for ChatForm {
    const PREFIX: &'static str = "chatcmpl";
    const OBJECTS: [&'static str; 2] = ["chat.completion", "chat.completion.chunk"];

    fn whole(&self, answer: &Generated) -> Value {
        json!({
            "message": {"role": "assistant", "content": answer.text, "refusal": null},
            "logprobs": self.logprobs(answer),
            "finish_reason": finish_reason(answer.reason),
        })
    }

    fn first(&self) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        Some(json!({"delta": delta, "logprobs": null, "finish_reason": null}))
    }

    fn piece(&self, text: &str) -> Value {
        json!({"delta": {"content": text}, "logprobs": null, "finish_reason": null})
    }

    fn last(&self, answer: &Generated) -> Value {
        json!({
            "delta": {},
            "logprobs": self.logprobs(answer),
            "finish_reason": finish_reason(answer.reason),
        })
    }
}
