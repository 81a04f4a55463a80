//! `POST /v1/completions`.

use super::answer::{Form, Question, finish_reason, respond};
use super::app::{App, blocking};
use super::body::JsonBody;
use super::chat::finite;
use super::error::{ApiError, Result};
use super::keys::Caller;
use super::sampling::{Sampling, check_logprobs, refuse_unsupported};
use super::speaker::Wanted;
use axum::extract::State;
use axum::response::Response;
use ggraft::Model;
use ggraft::infer::Generated;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Tokens of an answer where nothing is said, as the API has it.
const USUAL_TOKENS: usize = 16;
/// Prompts of a request at most.
const MAX_PROMPTS: usize = 128;

#[derive(Deserialize)]
struct Completion {
    prompt: Option<Prompts>,
    logprobs: Option<usize>,
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "must be a text, a list of texts, a list of tokens or a list of such lists"
)]
enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<i32>),
    Lists(Vec<Vec<i32>>),
}

pub(super) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response> {
    refuse_unsupported(&body)?;
    let (completion, sampling): (Completion, Sampling) = (body.read()?, body.read()?);
    let wanted: Wanted = body.read()?;
    let logprobs = completion.logprobs;
    let n_vocab = app.model.shape().n_vocab;
    let mut generate = sampling.generate(n_vocab, Some(USUAL_TOKENS), caller.max_tokens())?;
    generate.logprobs = logprobs
        .map(|n| check_logprobs("logprobs", n))
        .transpose()?;
    let (n, delivery) = (sampling.n()?, sampling.delivery());
    let prompts = completion
        .prompt
        .ok_or_else(|| ApiError::field("prompt", "is missing"))?;
    let (speaker, prompts) = {
        let (app, caller) = (app.clone(), caller.clone());
        blocking(move || -> Result<_> {
            Ok((wanted.find(&app, &caller)?, prompts.tokens(&app.model)?))
        })
        .await??
    };
    let question = Question {
        prompts,
        n,
        generate,
        delivery,
    };
    let form = TextForm {
        model: app.model.clone(),
    };
    respond(app, &caller, speaker, question, form).await
}

impl Prompts {
    fn tokens(self, model: &Model) -> Result<Vec<Vec<i32>>> {
        let of_text = |text: &String| {
            let tokens = model.vocab().tokenize_start(text);
            Ok(tokens.map_err(ggraft::Error::from)?)
        };
        let prompts = match self {
            Self::Text(text) => vec![of_text(&text)?],
            Self::Texts(texts) => texts.iter().map(of_text).collect::<Result<_>>()?,
            // An empty list is one of neither.
            Self::Tokens(tokens) => vec![tokens],
            Self::Lists(lists) => lists,
        };
        match prompts.len() {
            1..=MAX_PROMPTS => Ok(prompts),
            n => Err(ApiError::field(
                "prompt",
                format_args!("{n} prompts, there must be 1 to {MAX_PROMPTS}"),
            )),
        }
    }
}

struct TextForm {
    model: Model,
}

impl TextForm {
    /// How likely each token was, if that was asked, in the older API's form.
    fn logprobs(&self, answer: &Generated) -> Value {
        if answer.logprobs.is_empty() {
            return Value::Null;
        }
        let text = |&id: &i32| {
            let bytes = self.model.vocab().token_bytes(id, true);
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let tokens: Vec<String> = answer.tokens.iter().map(text).collect();
        let starts = tokens.iter().scan(0, |at, token| {
            let start = *at;
            *at += token.chars().count();
            Some(start)
        });
        let offsets: Vec<usize> = starts.collect();
        let top = answer.logprobs.iter().map(|likely| {
            let pair = |(id, p): &(i32, f32)| (text(id), finite(*p).into());
            likely.top.iter().map(pair).collect::<Map<_, Value>>()
        });
        let logprobs = answer.logprobs.iter().map(|likely| finite(likely.logprob));
        json!({
            "tokens": tokens,
            "token_logprobs": logprobs.collect::<Vec<_>>(),
            "top_logprobs": top.collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}

impl Form for TextForm {
    const PREFIX: &'static str = "cmpl";
    const OBJECTS: [&'static str; 2] = ["text_completion", "text_completion"];

    fn whole(&self, answer: &Generated) -> Value {
        json!({
            "text": answer.text,
            "logprobs": self.logprobs(answer),
            "finish_reason": finish_reason(answer.reason),
        })
    }

    fn first(&self) -> Option<Value> {
        None
    }

    fn piece(&self, text: &str) -> Value {
        json!({"text": text, "logprobs": null, "finish_reason": null})
    }

    fn last(&self, answer: &Generated) -> Value {
        json!({
            "text": "",
            "logprobs": self.logprobs(answer),
            "finish_reason": finish_reason(answer.reason),
        })
    }
}
