//! Bodies of requests: within their limits in length and time, and read with errors that name the field.

use super::app::App;
use super::error::{ApiError, Result};
use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request};
use axum::http::{StatusCode, header};
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;

/// A client sends something of its body within this time.
pub(super) const IDLE: Duration = Duration::from_secs(15);
/// And all of a JSON body within this.
const WHOLE: Duration = Duration::from_secs(60);

/// A JSON object.
pub(super) struct JsonBody(Value);

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self> {
        // Web pages of others may send forms and plain text without being asked for permission, and JSON not.
        if !is_json(&request) {
            return Err(ApiError::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "the body must be JSON, and the header Content-Type must say application/json",
            ));
        }
        let read = read_all(request.into_body(), app.limits.json_bytes);
        let bytes = tokio::time::timeout(WHOLE, read)
            .await
            .map_err(|_| too_slow())??;
        Self::parse(&bytes)
    }
}

fn is_json(request: &Request) -> bool {
    let value = request.headers().get(header::CONTENT_TYPE);
    let text = value.and_then(|v| v.to_str().ok()).unwrap_or("");
    let kind = text.split(';').next().unwrap_or("").trim();
    kind.eq_ignore_ascii_case("application/json")
}

pub(super) fn too_slow() -> ApiError {
    ApiError::new(
        StatusCode::REQUEST_TIMEOUT,
        "the body did not arrive in time",
    )
}

pub(super) fn too_long(limit: usize) -> ApiError {
    ApiError::new(
        StatusCode::PAYLOAD_TOO_LARGE,
        format!("the body is longer than {limit} bytes, as long as it may be"),
    )
}

/// The whole of a body. No more of it is kept than may be.
async fn read_all(body: Body, limit: usize) -> Result<Vec<u8>> {
    let mut chunks = body.into_data_stream();
    let mut bytes = Vec::new();
    loop {
        let chunk = tokio::time::timeout(IDLE, chunks.next()).await;
        let Some(chunk) = chunk.map_err(|_| too_slow())? else {
            return Ok(bytes);
        };
        let chunk: Bytes = chunk.map_err(|e| ApiError::bad(format!("the body: {e}")))?;
        if bytes.len() + chunk.len() > limit {
            return Err(too_long(limit));
        }
        bytes.extend_from_slice(&chunk);
    }
}

impl JsonBody {
    /// What any body is checked for.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self> {
        let text = std::str::from_utf8(bytes).map_err(|e| {
            ApiError::bad(format!(
                "the body is not UTF-8 text (byte {})",
                e.valid_up_to()
            ))
        })?;
        let value = serde_json::from_str(text)
            .map_err(|e| ApiError::bad(format!("the body is not JSON: {e}")))?;
        match value {
            Value::Object(_) => Ok(Self(value)),
            _ => Err(ApiError::bad("the body must be a JSON object")),
        }
    }

    /// Its fields that `T` has; others are left to those who know them.
    pub(super) fn read<T: for<'de> Deserialize<'de>>(&self) -> Result<T> {
        serde_path_to_error::deserialize(&self.0).map_err(|e| {
            let path = e.path().to_string();
            match path.as_str() {
                "." => ApiError::bad(e.into_inner().to_string()),
                _ => ApiError::field(&path, e.inner()),
            }
        })
    }

    /// A field that is there and not null.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }
}
