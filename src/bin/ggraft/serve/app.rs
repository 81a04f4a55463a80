//! What all requests share, and the routes to it.

use super::catalog::{BASE, Catalog};
use super::data::{Data, files, jobs};
use super::error::{ApiError, Result};
use super::keys::{Caller, Keys};
use super::metrics::{self, Metrics};
use super::{chat, completions, models};
use axum::Router;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{Method, StatusCode, Uri};
use axum::routing::{get, post};
use ggraft::infer::engine::Engine;
use ggraft::{Adapter, Model};
use std::sync::Arc;

pub(super) struct App {
    pub(super) model: Model,
    /// Of the base's file, which is a name for it as well.
    pub(super) base_name: String,
    pub(super) engine: Engine,
    pub(super) catalog: Catalog,
    pub(super) keys: Option<Keys>,
    pub(super) limits: Limits,
    pub(super) metrics: Metrics,
    /// Uploads and jobs, if there is a place for them.
    pub(super) data: Option<Data>,
    /// Threads that compute.
    pub(super) threads: usize,
    /// When it began, in seconds since 1970.
    pub(super) created: u64,
}

/// What a request may take at most.
pub(super) struct Limits {
    /// Bytes of a JSON body.
    pub(super) json_bytes: usize,
    /// Bytes of an upload.
    pub(super) upload_bytes: usize,
}

impl App {
    /// The adapter of that name; `None` is the base without one.
    pub(super) fn adapter(&self, caller: &Caller, name: &str) -> Result<Option<Adapter>> {
        if name == BASE || name == self.base_name {
            return Ok(None);
        }
        let made = (self.data.as_ref()).and_then(|data| data.adapter(caller, name));
        let found = made.or_else(|| {
            let found = caller.may_use(name).then(|| self.catalog.get(name));
            found.flatten()
        });
        found.map(Some).ok_or_else(|| ApiError::no_model(name))
    }

    /// Where uploads and jobs are.
    pub(super) fn data(&self) -> Result<&Data> {
        self.data.as_ref().ok_or_else(|| {
            ApiError::new(
                StatusCode::NOT_IMPLEMENTED,
                "the server was started without --data-dir, where files and fine-tuning jobs would be",
            )
        })
    }
}

/// Runs what may take a while, beside the tasks that must answer at once.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(ApiError::internal)
}

/// Does what reads or writes records and files, each time waiting for the disk or for who waits for it.
pub(super) async fn with_data<T: Send + 'static>(
    app: Arc<App>,
    work: impl FnOnce(&Data) -> Result<T> + Send + 'static,
) -> Result<T> {
    blocking(move || work(app.data()?)).await?
}

pub(super) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/health", get(health))
        .route("/metrics", get(metrics::show))
        .route("/v1/models", get(models::list))
        .route(
            "/v1/models/{name}",
            get(models::retrieve).delete(models::delete),
        )
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .merge(data_routes())
        .merge(super::page::routes())
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(axum::middleware::from_fn(super::error::in_form))
        .layer(axum::middleware::from_fn_with_state(
            app.clone(),
            metrics::count,
        ))
        .with_state(app)
}

/// Uploads and fine-tuning jobs.
fn data_routes() -> Router<Arc<App>> {
    // What is too long is said by those who read it, in the API's form.
    let upload = post(files::upload).layer(DefaultBodyLimit::disable());
    Router::new()
        .route("/v1/files", upload.get(files::list))
        .route("/v1/files/{id}", get(files::retrieve).delete(files::delete))
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/fine_tuning/jobs", post(jobs::create).get(jobs::list))
        .route("/v1/fine_tuning/jobs/{id}", get(jobs::retrieve))
        .route("/v1/fine_tuning/jobs/{id}/cancel", post(jobs::cancel))
        .route("/v1/fine_tuning/jobs/{id}/events", get(jobs::events))
        .route(
            "/v1/fine_tuning/jobs/{id}/checkpoints",
            get(jobs::checkpoints),
        )
}

async fn health(State(app): State<Arc<App>>) -> axum::Json<serde_json::Value> {
    let usage = app.engine.usage();
    axum::Json(serde_json::json!({
        "status": "ok",
        "running": usage.running,
        "waiting": usage.waiting,
    }))
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::not_found("path", uri.path())
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        format!("{} does not take {method}", uri.path()),
    )
}
