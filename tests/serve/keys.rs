//! Users and their keys: what is another's does not exist.

use crate::server::{Server, refused};
use serde_json::{Value, json};
use std::fs;

/// Of "anna-has-a-long-key".
const ANNA: &str = "anna-has-a-long-key";
const BEN: &str = "ben-has-a-long-key-too";
const ROOT: &str = "the-operator-has-one-as-well";

fn with_keys(limits: &str) -> Server {
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys.toml");
    let text = format!(
        "shared = [\"pirate\"]\n\
         [[key]]\nuser = \"anna\"\nkey = \"{ANNA}\"\nadapters = [\"butler\"]\n{limits}\n\
         [[key]]\nuser = \"ben\"\nkey = \"{BEN}\"\n\
         [[key]]\nuser = \"root\"\nkey = \"{ROOT}\"\nadapters = [\"*\"]\nadmin = true\n"
    );
    fs::write(&keys, text).unwrap();
    let args = [
        "--adapters",
        "models/adapters",
        "--keys",
        keys.to_str().unwrap(),
    ];
    Server::start_in(folder, &args)
}

fn names(server: &Server) -> Vec<String> {
    let list = server.get("/v1/models").json();
    let name = |model: &Value| model["id"].as_str().unwrap().to_owned();
    list["data"].as_array().unwrap().iter().map(name).collect()
}

#[test]
fn a_user_sees_what_is_shared_and_own() {
    let mut server = with_keys("");
    assert_eq!(
        server.get("/v1/models").error(401)["code"],
        "invalid_api_key"
    );
    for wrong in ["", "anna", "anna-has-a-long-keY", "anna-has-a-long-key2"] {
        server.with_key(wrong).get("/v1/models").error(401);
        server.chat("pirate", "Hi").error(401);
    }
    assert_eq!(names(server.with_key(ANNA)), ["base", "butler", "pirate"]);
    assert_eq!(server.chat("butler", "Hi").status, 200);
    server.get("/metrics").error(403);
    assert_eq!(names(server.with_key(BEN)), ["base", "pirate"]);
    // What is another's is told in the words of what is not there.
    let other = server.chat("butler", "Hi").error(404);
    let nothing = server.chat("butlex", "Hi").error(404);
    let text = |error: &Value| error.to_string().replace("butlex", "butler");
    assert_eq!(text(&other), text(&nothing));
    server.get("/v1/models/butler").error(404);
    assert_eq!(names(server.with_key(ROOT)).len(), 7);
    assert!(server.get("/metrics").text.contains("ggraft_running"));
    assert_eq!(server.get("/health").status, 200);
    assert!(!server.log().contains(ANNA));
}

#[test]
fn a_key_has_its_limits() {
    let mut server = with_keys("requests_per_minute = 2\nmax_tokens = 3");
    server.with_key(ANNA);
    let answer = server.chat("pirate", "Hi").json();
    assert_eq!(answer["usage"]["completion_tokens"], 3);
    assert_eq!(server.chat("pirate", "Hi").status, 200);
    let refused = server.chat("pirate", "Hi");
    assert_eq!(refused.error(429)["code"], "rate_limit_exceeded");
    assert!(refused.retry_after.unwrap().parse::<u64>().unwrap() > 0);
    assert_eq!(server.with_key(BEN).chat("pirate", "Hi").status, 200);

    let mut server = with_keys("tokens_per_minute = 20");
    server.with_key(ANNA);
    let body =
        json!({"model": "pirate", "prompt": "Hi", "max_tokens": 60, "logit_bias": {"1": -100}});
    assert_eq!(server.post("/v1/completions", &body).status, 200);
    assert_eq!(server.post("/v1/completions", &body).status, 429);
}

#[test]
fn a_wrong_file_of_keys_is_said_without_its_keys() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("keys.toml");
    for (text, words) in [
        ("", "key"),
        ("[[key]]\nuser = \"a\"\nkey = \"short\"", "16 characters"),
        (
            "[[key]]\nuser = \"a\"\nkeys = \"a-secret-of-somebody\"",
            "unknown field",
        ),
        ("[[key]]\nuser = \"a\"", "key or sha256"),
        (
            "[[key]]\nuser = \"a\"\nsha256 = \"a-secret-of-somebody\"",
            "64",
        ),
        (
            "[[key]]\nuser = \"a\nkey = \"a-secret-of-somebody\"",
            "line 2",
        ),
        (
            "[[key]]\nuser = \"a\"\nkey = \"a-secret-of-somebody\"\n[[key]]\nuser = \"b\"\nkey = \"a-secret-of-somebody\"",
            "same key",
        ),
    ] {
        fs::write(&path, text).unwrap();
        let line = refused(&["--keys", path.to_str().unwrap()]);
        assert!(line.contains(words), "{text}: {line}");
        assert!(!line.contains("secret"), "{line}");
    }
}
