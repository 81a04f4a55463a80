//! Who asks, and what that allows.

use super::app::App;
use super::error::{ApiError, Result, code};
use crate::failure::Failure;
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;
use subtle::ConstantTimeEq;

/// Stands for all adapters of the folder.
const ALL: &str = "*";

/// The file of keys.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    shared: BTreeSet<String>,
    key: Vec<KeyEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyEntry {
    user: String,
    /// The key itself, or its hash: then the file opens nothing for who reads it.
    key: Option<String>,
    sha256: Option<String>,
    #[serde(default)]
    admin: bool,
    #[serde(default)]
    adapters: BTreeSet<String>,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
    max_tokens: Option<usize>,
    max_stored_mb: Option<u64>,
}

/// The keys that open the server.
pub(super) struct Keys(Vec<Key>);

struct Key {
    hash: [u8; 32],
    access: Arc<Access>,
}

/// What a key allows.
struct Access {
    user: String,
    admin: bool,
    adapters: BTreeSet<String>,
    max_tokens: Option<usize>,
    stored_bytes: Option<u64>,
    requests: Option<Mutex<Bucket>>,
    tokens: Option<Mutex<Bucket>>,
}

impl Keys {
    pub(super) fn read(path: &Path) -> Result<Self, Failure> {
        let text = crate::io::read_text(path)?;
        let wrong = |why: String| Failure::Unsuitable(format!("{}: {why}", path.display()));
        // The parser's own message shows lines of the file, which holds keys.
        let file: File = toml::from_str(&text).map_err(|e| {
            let at = e.span().map_or(0, |span| span.start);
            let line = text[..at].lines().count().max(1);
            wrong(format!("line {line}: {}", e.message()))
        })?;
        if file.key.is_empty() {
            return Err(wrong("there is no [[key]]".to_owned()));
        }
        let shared = &file.shared;
        let keys = file.key.into_iter().map(|entry| entry.key(shared));
        let keys: Vec<Key> = keys.collect::<Result<_, String>>().map_err(wrong)?;
        let mut hashes: Vec<_> = keys.iter().map(|key| key.hash).collect();
        hashes.sort_unstable();
        if hashes.windows(2).any(|two| two[0] == two[1]) {
            return Err(wrong("two entries have the same key".to_owned()));
        }
        Ok(Self(keys))
    }

    /// What a key allows. All are compared, and each in the same time however much of it is right.
    fn find(&self, key: &str) -> Option<Arc<Access>> {
        let hash: [u8; 32] = Sha256::digest(key).into();
        let mut found = None;
        for key in &self.0 {
            if bool::from(key.hash.ct_eq(&hash)) {
                found = Some(key.access.clone());
            }
        }
        found
    }
}

impl KeyEntry {
    fn key(self, shared: &BTreeSet<String>) -> Result<Key, String> {
        let user = self.user;
        if user.is_empty() {
            return Err("a user has no name".to_owned());
        }
        let hash = match (self.key, self.sha256) {
            (Some(key), None) if key.len() < 16 => {
                return Err(format!("the key of {user:?} has fewer than 16 characters"));
            }
            (Some(key), None) => Sha256::digest(key).into(),
            (None, Some(hex)) => from_hex(&hex)
                .ok_or_else(|| format!("sha256 of {user:?}: must be 64 hexadecimal digits"))?,
            _ => return Err(format!("{user:?} needs either key or sha256")),
        };
        let bucket = |per_minute: Option<u32>| per_minute.map(|n| Mutex::new(Bucket::new(n)));
        Ok(Key {
            hash,
            access: Arc::new(Access {
                user,
                admin: self.admin,
                adapters: self.adapters.union(shared).cloned().collect(),
                max_tokens: self.max_tokens,
                stored_bytes: self.max_stored_mb.map(|mb| mb.saturating_mul(1_000_000)),
                requests: bucket(self.requests_per_minute),
                tokens: bucket(self.tokens_per_minute),
            }),
        })
    }
}

fn from_hex(hex: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if hex.len() != 64 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, i) in bytes.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(&hex[i..i + 2], 16).ok()?;
    }
    Some(bytes)
}

/// Fills up evenly, to what a minute may take.
struct Bucket {
    per_minute: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(per_minute: u32) -> Self {
        Self {
            per_minute: per_minute.into(),
            level: per_minute.into(),
            at: Instant::now(),
        }
    }

    /// Whether there are so many; otherwise the seconds until there are.
    fn check(&mut self, n: f64) -> Result<(), u64> {
        let now = Instant::now();
        let since = now.duration_since(self.at).as_secs_f64();
        self.level = (self.level + since * self.per_minute / 60.0).min(self.per_minute);
        self.at = now;
        match self.level >= n {
            true => Ok(()),
            false => Err((((n - self.level) * 60.0 / self.per_minute).ceil() as u64).max(1)),
        }
    }

    /// What was used may have been more than there was: then nothing is left for a while.
    fn take(&mut self, n: f64) {
        self.level -= n;
    }
}

/// Who asks. Without keys everybody is the same local user, who may see everything.
#[derive(Clone)]
pub(super) struct Caller(Option<Arc<Access>>);

impl Caller {
    /// The user; `None` if there are no keys.
    pub(super) fn user(&self) -> Option<&str> {
        self.0.as_ref().map(|access| access.user.as_str())
    }

    /// Whether an adapter of the folder is for this user.
    pub(super) fn may_use(&self, name: &str) -> bool {
        let Some(access) = &self.0 else { return true };
        access.adapters.contains(name) || access.adapters.contains(ALL)
    }

    /// Whether what `owner` has made is this user's. Without keys everything is.
    pub(super) fn owns(&self, owner: Option<&str>) -> bool {
        let user = self.user();
        user.is_none() || user == owner
    }

    /// Tokens of an answer at most.
    pub(super) fn max_tokens(&self) -> Option<usize> {
        self.0.as_ref()?.max_tokens
    }

    /// Bytes of uploads and results that may be stored at most.
    pub(super) fn stored_bytes(&self) -> Option<u64> {
        self.0.as_ref()?.stored_bytes
    }

    pub(super) fn check_admin(&self) -> Result<()> {
        match &self.0 {
            Some(access) if !access.admin => Err(ApiError::new(
                StatusCode::FORBIDDEN,
                "this is for keys with admin = true",
            )),
            _ => Ok(()),
        }
    }

    /// Counts tokens of prompts and answers.
    pub(super) fn spend(&self, tokens: usize) {
        if let Some(bucket) = self.0.as_ref().and_then(|access| access.tokens.as_ref()) {
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.take(tokens as f64);
        }
    }

    /// A request is taken, if there may be one now.
    fn admit(&self) -> Result<()> {
        let Some(access) = &self.0 else { return Ok(()) };
        let limits = [
            (&access.requests, 1.0, "requests"),
            (&access.tokens, 0.0, "tokens"),
        ];
        for (bucket, n, what) in limits {
            let Some(bucket) = bucket else { continue };
            let mut bucket = bucket.lock().unwrap_or_else(PoisonError::into_inner);
            bucket.check(n).map_err(|seconds| {
                ApiError::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    format!("too many {what}: try again in {seconds} s"),
                )
                .code(code::RATE)
                .retry_after(seconds)
            })?;
            bucket.take(n);
        }
        Ok(())
    }
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self> {
        let Some(keys) = &app.keys else {
            check_local(&parts.headers)?;
            return Ok(Self(None));
        };
        let authorization = parts.headers.get(header::AUTHORIZATION);
        let text = authorization.and_then(|value| value.to_str().ok());
        let key = text.and_then(|text| text.strip_prefix("Bearer "));
        let access = key.and_then(|key| keys.find(key.trim())).ok_or_else(|| {
            let what = match key {
                Some(_) => "the key in the header Authorization is not one of this server's",
                None => "a key is needed: Authorization: Bearer KEY",
            };
            ApiError::new(StatusCode::UNAUTHORIZED, what).code(code::KEY)
        })?;
        let caller = Self(Some(access));
        caller.admit()?;
        Ok(caller)
    }
}

/// Without keys nothing but the machine protects the server: web pages of others, which a browser on it shows, must not reach it, under its own name or under one
/// that leads to it.
fn check_local(headers: &HeaderMap) -> Result<()> {
    let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or(""));
    let host = text(header::HOST).unwrap_or("");
    let refuse = |what| Err(ApiError::new(StatusCode::FORBIDDEN, what));
    if !is_local(host) {
        return refuse("without keys the server answers on this machine's own names only");
    }
    match text(header::ORIGIN) {
        Some(origin) if origin != format!("http://{host}") => {
            refuse("without keys the server answers no pages of others")
        }
        _ => Ok(()),
    }
}

fn is_local(host: &str) -> bool {
    let Ok(uri) = format!("http://{host}/").parse::<Uri>() else {
        return false;
    };
    let name = uri.host().unwrap_or("");
    let address = name.trim_start_matches('[').trim_end_matches(']');
    let is_loopback = |ip: std::net::IpAddr| ip.is_loopback();
    name == "localhost" || address.parse().is_ok_and(is_loopback)
}
