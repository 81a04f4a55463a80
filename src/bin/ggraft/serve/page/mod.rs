//! The page at `/`: embedded, and with nothing from elsewhere.

use axum::Router;
use axum::http::{HeaderName, header};
use axum::routing::get;

/// No scripts, styles, pictures or connections but its own, and no frame around it.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

const PARTS: [(&str, &str, &str); 4] = [
    ("/", "text/html; charset=utf-8", include_str!("index.html")),
    (
        "/page.css",
        "text/css; charset=utf-8",
        include_str!("page.css"),
    ),
    (
        "/chat.js",
        "text/javascript; charset=utf-8",
        include_str!("chat.js"),
    ),
    (
        "/train.js",
        "text/javascript; charset=utf-8",
        include_str!("train.js"),
    ),
];

/// Its parts, which show nothing that needs a key.
pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let add = |router: Router<S>, (path, kind, text): (&str, &'static str, &'static str)| {
        let headers: [(HeaderName, &str); 4] = [
            (header::CONTENT_TYPE, kind),
            (header::CONTENT_SECURITY_POLICY, POLICY),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
        ];
        router.route(path, get(move || async move { (headers, text) }))
    };
    PARTS.into_iter().fold(Router::new(), add)
}
