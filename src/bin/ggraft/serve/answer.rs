//! From the engine's replies to a response: as one object, or as events while they come.

use super::app::App;
use super::error::{ApiError, Result};
use super::keys::Caller;
use super::metrics::Meter;
use super::sampling::Delivery;
use super::speaker::Speaker;
use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{self, BoxStream, StreamExt};
use ggraft::infer::engine::{Reply, Request};
use ggraft::infer::{GenerateOptions, Generated, StopReason};
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use uuid::Uuid;

/// How a kind of answer is written: chats and completions differ in that.
pub(super) trait Form: Send + 'static {
    /// What names of such answers begin with.
    const PREFIX: &'static str;
    /// What such an answer is called, whole and in pieces.
    const OBJECTS: [&'static str; 2];

    /// A whole answer.
    fn whole(&self, answer: &Generated) -> Value;
    /// What comes before the first piece, if anything does.
    fn first(&self) -> Option<Value>;
    /// A piece of its text.
    fn piece(&self, text: &str) -> Value;
    /// What is behind the last piece.
    fn last(&self, answer: &Generated) -> Value;
}

/// What is asked, in tokens.
pub(super) struct Question {
    /// Prompts without BOS, at least one.
    pub(super) prompts: Vec<Vec<i32>>,
    /// Answers to each.
    pub(super) n: usize,
    pub(super) generate: GenerateOptions,
    pub(super) delivery: Delivery,
}

/// What came of an answer.
enum Update {
    Text(String),
    End(Box<Generated>),
    Failed(ApiError),
}

/// Answers on their way, those to one prompt beside each other.
struct Answers {
    replies: Vec<Reply>,
    /// Answers to one prompt.
    n: usize,
    prompt_tokens: usize,
    meter: Meter,
}

/// Asks the engine, and answers as was wished. The engine stops with what nobody waits for any more: dropping a reply cancels it.
pub(super) async fn respond<F: Form>(
    app: Arc<App>,
    caller: &Caller,
    speaker: Speaker,
    question: Question,
    form: F,
) -> Result<Response> {
    let delivery = question.delivery;
    let name = speaker.name.clone();
    let begun = app.metrics.meter(&speaker.label);
    let submitted = {
        let app = app.clone();
        // The first use of an adapter may compute its rows.
        super::app::blocking(move || submit(&app, speaker, question, begun))
    };
    let answers = submitted.await??;
    caller.spend(answers.prompt_tokens);
    let head = Head::new::<F>(name, delivery);
    match delivery {
        Delivery::Whole => whole(answers, &head, &form, caller).await,
        Delivery::Stream { usage } => Ok(events(answers, head, form, usage, caller.clone())),
    }
}

fn submit(app: &App, speaker: Speaker, question: Question, meter: Meter) -> Result<Answers> {
    let bos = usize::from(app.model.vocab().leading_bos().is_some());
    let mut replies = Vec::new();
    let mut prompt_tokens = 0;
    for tokens in question.prompts {
        prompt_tokens += tokens.len() + bos;
        let request = Request::tokens(tokens)
            .ensemble(&speaker.ensemble)
            .generate(question.generate.clone())
            .until_full(true);
        replies.extend(app.engine.fork(request, question.n)?);
    }
    Ok(Answers {
        replies,
        n: question.n,
        prompt_tokens,
        meter,
    })
}

impl Answers {
    /// All that comes, each with the number of its answer.
    fn updates(self) -> BoxStream<'static, (usize, Update)> {
        let Self { replies, meter, .. } = self;
        let meter = Arc::new(meter);
        let of_reply = |(i, reply): (usize, Reply)| {
            let meter = meter.clone();
            stream::unfold(Some(reply), move |reply| {
                let meter = meter.clone();
                async move {
                    let mut reply = reply?;
                    let (update, rest) = match StreamExt::next(&mut reply).await {
                        Some(Ok(text)) => {
                            meter.first_text();
                            (Update::Text(text), Some(reply))
                        }
                        Some(Err(e)) => (Update::Failed(e.into()), None),
                        None => (end(&mut reply, &meter), None),
                    };
                    Some(((i, update), rest))
                }
            })
            .boxed()
        };
        stream::select_all(replies.into_iter().enumerate().map(of_reply)).boxed()
    }
}

fn end(reply: &mut Reply, meter: &Meter) -> Update {
    match reply.take_end() {
        Ok(answer) => {
            meter.ended(&answer);
            Update::End(Box::new(answer))
        }
        Err(e) => Update::Failed(e.into()),
    }
}

/// What all parts of a response have in common.
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Head {
    fn new<F: Form>(model: String, delivery: Delivery) -> Self {
        let [whole, chunk] = F::OBJECTS;
        Self {
            id: format!("{}-{}", F::PREFIX, Uuid::new_v4().simple()),
            object: match delivery {
                Delivery::Whole => whole,
                Delivery::Stream { .. } => chunk,
            },
            created: super::catalog::seconds(SystemTime::now()),
            model,
        }
    }

    fn with(&self, choices: Value, usage: Option<Value>) -> Value {
        let mut value = json!({
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        });
        if let Some(usage) = usage {
            value["usage"] = usage;
        }
        value
    }
}

/// What is counted of some answers.
#[derive(Clone, Copy, Default)]
struct Spent {
    prompt: usize,
    completion: usize,
    cached: usize,
}

impl Spent {
    fn add(&mut self, answer: &Generated, is_first: bool) {
        self.completion += answer.tokens.len();
        // The others find the prompt computed by the first.
        if is_first {
            self.cached += answer.timings.cached_tokens;
        }
    }

    fn json(self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached.min(self.prompt)},
        })
    }
}

async fn whole(
    answers: Answers,
    head: &Head,
    form: &impl Form,
    caller: &Caller,
) -> Result<Response> {
    let n = answers.n;
    let mut spent = Spent {
        prompt: answers.prompt_tokens,
        ..Spent::default()
    };
    let mut choices = vec![Value::Null; answers.replies.len()];
    let mut updates = answers.updates();
    while let Some((i, update)) = updates.next().await {
        match update {
            Update::Text(_) => {}
            Update::End(answer) => {
                spent.add(&answer, i.is_multiple_of(n));
                choices[i] = choice(i, form.whole(&answer));
            }
            Update::Failed(e) => return Err(e),
        }
    }
    caller.spend(spent.completion);
    let value = head.with(choices.into(), Some(spent.json()));
    Ok(Json(value).into_response())
}

fn choice(index: usize, mut value: Value) -> Value {
    value["index"] = index.into();
    value
}

/// Server-sent events: the first chunk of each answer, its pieces, its end; then the usage, if it was asked for, and `[DONE]`. An error is the last event.
fn events(
    answers: Answers,
    head: Head,
    form: impl Form,
    with_usage: bool,
    caller: Caller,
) -> Response {
    let n = answers.n;
    let spent = Spent {
        prompt: answers.prompt_tokens,
        ..Spent::default()
    };
    let first = form.first().map(|first| {
        let of = |i| data(&head.with(json!([choice(i, first.clone())]), None));
        (0..answers.replies.len()).map(of).collect::<Vec<_>>()
    });
    let state = (answers.updates(), head, form, caller, Some(spent));
    let rest = stream::unfold(
        state,
        move |(mut updates, head, form, caller, spent)| async move {
            let mut spent = spent?;
            let (events, spent) = match updates.next().await {
                Some((i, Update::Text(text))) => {
                    let chunk = head.with(json!([choice(i, form.piece(&text))]), None);
                    (vec![data(&chunk)], Some(spent))
                }
                Some((i, Update::End(answer))) => {
                    spent.add(&answer, i.is_multiple_of(n));
                    caller.spend(answer.tokens.len());
                    let chunk = head.with(json!([choice(i, form.last(&answer))]), None);
                    (vec![data(&chunk)], Some(spent))
                }
                Some((_, Update::Failed(e))) => (vec![data(&e.body())], None),
                None => {
                    let usage = head.with(json!([]), Some(spent.json()));
                    let done = Event::default().data("[DONE]");
                    let usage = with_usage.then(|| data(&usage));
                    (usage.into_iter().chain([done]).collect(), None)
                }
            };
            Some((stream::iter(events), (updates, head, form, caller, spent)))
        },
    );
    let all = stream::iter(first.unwrap_or_default()).chain(rest.flatten());
    // A comment now and then: proxies and clients know that somebody is at work.
    let alive = KeepAlive::new().interval(Duration::from_secs(15));
    Sse::new(all.map(Ok::<_, Infallible>))
        .keep_alive(alive)
        .into_response()
}

fn data(value: &Value) -> Event {
    Event::default().data(value.to_string())
}

/// Why an answer ended, in the words of the API.
pub(super) fn finish_reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::EndOfGeneration | StopReason::StopString | StopReason::Callback => "stop",
        StopReason::MaxTokens | StopReason::ContextFull => "length",
    }
}
