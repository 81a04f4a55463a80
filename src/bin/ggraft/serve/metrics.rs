//! `/metrics`, in Prometheus' text format.

use super::app::App;
use super::error::{ApiError, Result};
use super::keys::Caller;
use axum::extract::{MatchedPath, Request, State};
use axum::http::header;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use ggraft::infer::Generated;
use ggraft::infer::engine::Usage;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The content type that OpenMetrics asks for.
const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByAdapter {
    adapter: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ByRoute {
    route: String,
    status: u16,
}

pub(super) struct Metrics {
    registry: Registry,
    responses: Family<ByRoute, Counter>,
    tokens: Family<ByAdapter, Counter>,
    cached: Family<ByAdapter, Counter>,
    answers: Family<ByAdapter, Counter>,
    first_text: Family<ByAdapter, Histogram, fn() -> Histogram>,
    running: Gauge,
    waiting: Gauge,
    kv_bytes: Gauge,
}

/// From 1 ms to half a minute.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 16))
}

impl Metrics {
    pub(super) fn new() -> Self {
        let first_text = Family::new_with_constructor(seconds as fn() -> Histogram);
        let mut metrics = Self {
            registry: Registry::with_prefix("ggraft"),
            responses: Family::default(),
            tokens: Family::default(),
            cached: Family::default(),
            answers: Family::default(),
            first_text,
            running: Gauge::default(),
            waiting: Gauge::default(),
            kv_bytes: Gauge::default(),
        };
        let to = &mut metrics.registry;
        to.register(
            "responses",
            "Responses by route and status",
            metrics.responses.clone(),
        );
        to.register("tokens", "Tokens of answers", metrics.tokens.clone());
        to.register(
            "cached_tokens",
            "Tokens of prompts that were computed for another text before",
            metrics.cached.clone(),
        );
        to.register("answers", "Complete answers", metrics.answers.clone());
        to.register(
            "first_text_seconds",
            "Time until the first text of an answer",
            metrics.first_text.clone(),
        );
        to.register(
            "running",
            "Texts that are computed",
            metrics.running.clone(),
        );
        to.register("waiting", "Requests that wait", metrics.waiting.clone());
        to.register(
            "kv_bytes",
            "Bytes of keys and values, those that are kept for others included",
            metrics.kv_bytes.clone(),
        );
        metrics
    }

    /// Of a request to that adapter, which comes now.
    pub(super) fn meter(&self, adapter: &str) -> Meter {
        let label = ByAdapter {
            adapter: adapter.to_owned(),
        };
        Meter {
            begun: Instant::now(),
            has_text: AtomicBool::new(false),
            tokens: self.tokens.get_or_create(&label).clone(),
            cached: self.cached.get_or_create(&label).clone(),
            answers: self.answers.get_or_create(&label).clone(),
            first_text: self.first_text.get_or_create(&label).clone(),
        }
    }

    fn text(&self, usage: Usage) -> Result<String, std::fmt::Error> {
        for (gauge, value) in [
            (&self.running, usage.running),
            (&self.waiting, usage.waiting),
            (&self.kv_bytes, usage.kv_bytes),
        ] {
            gauge.set(value as i64);
        }
        let mut text = String::new();
        encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// What is counted of one request.
pub(super) struct Meter {
    begun: Instant,
    has_text: AtomicBool,
    tokens: Counter,
    cached: Counter,
    answers: Counter,
    first_text: Histogram,
}

impl Meter {
    /// There is text; the first time counts.
    pub(super) fn first_text(&self) {
        if !self.has_text.swap(true, Ordering::Relaxed) {
            self.first_text.observe(self.begun.elapsed().as_secs_f64());
        }
    }

    pub(super) fn ended(&self, answer: &Generated) {
        self.tokens.inc_by(answer.tokens.len() as u64);
        self.cached.inc_by(answer.timings.cached_tokens as u64);
        self.answers.inc();
    }
}

pub(super) async fn show(State(app): State<Arc<App>>, caller: Caller) -> Result<Response> {
    caller.check_admin()?;
    let usage = app.engine.usage();
    let text = app.metrics.text(usage).map_err(ApiError::internal)?;
    Ok(([(header::CONTENT_TYPE, TEXT)], text).into_response())
}

/// Counts responses. Neither bodies nor keys are ever logged.
pub(super) async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = request.method().clone();
    let path = request.extensions().get::<MatchedPath>();
    let route = path.map_or("(none)", MatchedPath::as_str).to_owned();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    tracing::info!(
        "{method} {route}: {status} after {:.1} ms",
        1e3 * begun.elapsed().as_secs_f64()
    );
    let label = ByRoute { route, status };
    app.metrics.responses.get_or_create(&label).inc();
    response
}
