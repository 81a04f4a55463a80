//! What a client is told when something is wrong, in OpenAI's form.

use crate::failure::Failure;
use axum::extract::Request;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use ggraft::infer::SessionError;
use ggraft::infer::engine::EngineError;
use ggraft::infer::sampler::SamplerError;
use serde_json::{Value, json};

pub(super) type Result<T, E = ApiError> = std::result::Result<T, E>;

/// A refusal, with the status that clients of the API expect for it.
#[derive(Clone, Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    /// For programs, where the status says too little.
    code: Option<&'static str>,
    /// The field of the request that is wrong.
    param: Option<String>,
    message: String,
    /// Seconds after which another try makes sense.
    retry_after: Option<u64>,
}

/// What the codes of refusals are called that programs look for.
pub(super) mod code {
    pub(in crate::serve) const CONTEXT: &str = "context_length_exceeded";
    pub(in crate::serve) const DAMAGED: &str = "damaged_adapter";
    pub(in crate::serve) const KEY: &str = "invalid_api_key";
    pub(in crate::serve) const MODEL: &str = "model_not_found";
    pub(in crate::serve) const QUEUE: &str = "queue_full";
    pub(in crate::serve) const RATE: &str = "rate_limit_exceeded";
    pub(in crate::serve) const UNSUPPORTED: &str = "unsupported_parameter";
}

impl ApiError {
    pub(super) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self {
            status,
            code: None,
            param: None,
            message: message.into(),
            retry_after: None,
        }
    }

    /// The request cannot be served as it is.
    pub(super) fn bad(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// One of its fields is wrong.
    pub(super) fn field(name: &str, why: impl std::fmt::Display) -> Self {
        Self::bad(format!("{name}: {why}")).param(name)
    }

    /// A field that the API has and this server has not.
    pub(super) fn unsupported(name: &str, why: &str) -> Self {
        Self::field(name, why).code(code::UNSUPPORTED)
    }

    /// No such thing, or none for this user.
    pub(super) fn not_found(what: &str, name: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            format!("there is no {what} {name:?}"),
        )
    }

    /// No such model, or none for this user.
    pub(super) fn no_model(name: &str) -> Self {
        Self::not_found("model", name)
            .code(code::MODEL)
            .param("model")
    }

    /// Something of the server's own failed. What it was is in its log: it may name files.
    pub(super) fn internal(why: impl std::fmt::Display) -> Self {
        tracing::error!("{why}");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the server failed; its log says why",
        )
    }

    pub(super) fn code(mut self, code: &'static str) -> Self {
        self.code = Some(code);
        self
    }

    pub(super) fn param(mut self, name: impl Into<String>) -> Self {
        self.param = Some(name.into());
        self
    }

    pub(super) fn retry_after(mut self, seconds: u64) -> Self {
        self.retry_after = Some(seconds);
        self
    }

    /// The body of the response, or of the last event of a stream.
    pub(super) fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }})
    }
}

/// Bytes of a refusal that is no object.
const MAX_TEXT: usize = 4096;

/// Gives refusals of the framework's own, which are plain text, the form of the others.
pub(super) async fn in_form(request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    let status = response.status();
    let kind = response.headers().get(header::CONTENT_TYPE);
    let is_json = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if is_json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let text = axum::body::to_bytes(response.into_body(), MAX_TEXT).await;
    let text = String::from_utf8_lossy(&text.unwrap_or_default()).into_owned();
    ApiError::new(status, text).into_response()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let bearer = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, bearer);
        }
        response
    }
}

impl std::fmt::Display for ApiError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

/// What goes wrong with the server's own files is its own concern.
impl From<Failure> for ApiError {
    fn from(e: Failure) -> Self {
        Self::internal(e.line())
    }
}

impl From<ggraft::Error> for ApiError {
    fn from(e: ggraft::Error) -> Self {
        use ggraft::Error as E;
        let message = e.to_string();
        let bad = || Self::bad(message.clone());
        let later = || Self::new(StatusCode::SERVICE_UNAVAILABLE, message.clone()).retry_after(1);
        match e {
            E::Engine(EngineError::Busy { .. }) => {
                Self::new(StatusCode::TOO_MANY_REQUESTS, message)
                    .code(code::QUEUE)
                    .retry_after(1)
            }
            E::Engine(EngineError::TooLarge { .. } | EngineError::TooManyMembers { .. }) => bad(),
            E::Engine(_) => later(),
            E::Session(SessionError::ContextFull { needed, n_ctx }) => Self::bad(format!(
                "the prompt takes {needed} positions, the adapter's included, and the context has {n_ctx}"
            ))
            .code(code::CONTEXT),
            E::Session(SessionError::NonFiniteLogits) | E::Sampler(SamplerError::NonFinite) => {
                bad().code(code::DAMAGED)
            }
            E::Session(SessionError::OutOfMemory | SessionError::Cancelled) => later(),
            E::Session(SessionError::Llama(_)) | E::Io { .. } => Self::internal(message),
            _ => bad(),
        }
    }
}
