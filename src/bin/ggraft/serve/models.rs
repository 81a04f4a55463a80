//! `/v1/models`: the base and the adapters that the caller may use.

use super::app::{App, blocking, with_data};
use super::catalog::{BASE, Entry};
use super::data::{TunedEntry, files};
use super::error::{ApiError, Result};
use super::keys::Caller;
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

pub(super) async fn list(State(app): State<Arc<App>>, caller: Caller) -> Result<Json<Value>> {
    let models = blocking(move || all(&app, &caller)).await?;
    Ok(Json(json!({"object": "list", "data": models})))
}

pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Json<Value>> {
    let models = {
        let app = app.clone();
        blocking(move || all(&app, &caller)).await?
    };
    let id = match name == app.base_name {
        true => BASE,
        false => &name,
    };
    let found = models.into_iter().find(|model| model["id"] == id);
    found.map(Json).ok_or_else(|| ApiError::no_model(&name))
}

fn all(app: &App, caller: &Caller) -> Vec<Value> {
    let base = json!({
        "id": BASE,
        "object": "model",
        "created": app.created,
        "owned_by": "ggraft",
        "file": app.base_name,
    });
    let adapter = |entry: Entry| {
        json!({
            "id": entry.name,
            "object": "model",
            "created": entry.created,
            "owned_by": "ggraft",
            "parent": BASE,
            "kind": entry.adapter.kind().name(),
            "virtual_tokens": entry.adapter.length(),
        })
    };
    let tuned = |entry: TunedEntry| {
        json!({
            "id": entry.name,
            "object": "model",
            "created": entry.created,
            "owned_by": caller.user().unwrap_or("local"),
            "parent": BASE,
        })
    };
    let entries = app.catalog.list().into_iter();
    let usable = entries.filter(|entry| caller.may_use(&entry.name));
    let made = app.data.iter().flat_map(|data| data.models(caller));
    std::iter::once(base)
        .chain(usable.map(adapter))
        .chain(made.map(tuned))
        .collect()
}

/// Only what jobs have made can be deleted: the files of the folder are the operator's.
pub(super) async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    Path(name): Path<String>,
) -> Result<Json<Value>> {
    let id = name.clone();
    with_data(app, move |data| files::delete_model(data, &caller, &id)).await?;
    Ok(Json(
        json!({"id": name, "object": "model", "deleted": true}),
    ))
}
