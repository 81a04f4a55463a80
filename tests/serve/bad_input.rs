//! Bodies, names and connections that are wrong: the API's own errors, and nobody else notices.

use crate::server::Server;
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;

fn chat(more: Value) -> Value {
    let mut body = json!({
        "model": "base", "max_tokens": 1, "messages": [{"role": "user", "content": "Hi"}],
    });
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

#[test]
fn wrong_bodies_are_refused_in_the_form_of_the_api() {
    let server = Server::start(&["--max-body", "1"]);
    let send = |body: &[u8]| server.send("/v1/chat/completions", "application/json", body);
    for body in [
        "",
        "{",
        "[]",
        "3",
        "{\"model\": \"base\"}",
        "{\"a\": 1} x",
        "\u{feff}{}",
    ] {
        send(body.as_bytes()).error(400);
    }
    send(b"{\"model\": \"\xff\"}").error(400);
    send("[".repeat(100_000).as_bytes()).error(400);
    send(&vec![b' '; 1_000_001]).error(413);
    server
        .send("/v1/chat/completions", "text/plain", b"{}")
        .error(415);
    for (field, value) in [
        ("model", json!(3)),
        ("messages", json!([])),
        ("messages", json!("Hi")),
        ("messages", json!([{"content": "Hi"}])),
        (
            "messages",
            json!([{"role": "user", "content": [{"type": "image_url"}]}]),
        ),
        ("temperature", json!(-1)),
        ("temperature", json!("hot")),
        ("top_p", json!(1.5)),
        ("n", json!(0)),
        ("n", json!(1e9)),
        ("max_tokens", json!(-1)),
        ("stop", json!("")),
        ("stop", json!(vec!["a"; 17])),
        ("logit_bias", json!({"a": 1})),
        ("logit_bias", json!({"99999999": 1})),
        ("logit_bias", json!({"3": 1e9})),
        ("top_logprobs", json!(21)),
        ("seed", json!("a")),
        ("stream", json!("yes")),
        ("ensemble", json!("vote")),
    ] {
        let error = server.post("/v1/chat/completions", &chat(json!({field: value})));
        let message = error.error(400)["message"].as_str().unwrap().to_owned();
        assert!(!message.contains('\n'), "{field}: {message}");
    }
    assert_eq!(
        server.post("/v1/chat/completions", &chat(json!({}))).status,
        200
    );
}

#[test]
fn what_is_not_supported_is_said_and_what_is_unknown_ignored() {
    let server = Server::start(&[]);
    for (field, value) in [
        ("response_format", json!({"type": "json_object"})),
        ("tools", json!([{"type": "function"}])),
        ("tool_choice", json!("required")),
        ("modalities", json!(["audio"])),
        ("best_of", json!(2)),
    ] {
        let error = server
            .post("/v1/chat/completions", &chat(json!({field: value})))
            .error(400);
        assert_eq!(error["param"], field);
        assert_eq!(error["code"], "unsupported_parameter");
    }
    let fine = json!({
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "user": "anna",
        "store": false, "metadata": {"a": "b"}, "something": [1], "seed": -5, "stop": null,
    });
    assert_eq!(server.post("/v1/chat/completions", &chat(fine)).status, 200);
}

#[test]
fn names_lead_nowhere() {
    let server = Server::start(&[]);
    for name in [
        "../adapters/pirate",
        "pirate.gguf",
        "/etc/passwd",
        "",
        "\0",
        "..",
        "Pirate",
    ] {
        let error = server.chat(name, "Hi").error(404);
        assert_eq!(error["code"], "model_not_found");
    }
    server.get("/v1/models/..%2Fpirate").error(404);
    server.get("/v1/models/%ff").error(400);
    server.get("/v2/models").error(404);
    server.get("/v1/completions").error(405);
    assert_eq!(server.get("/v1/models/pirate").json()["id"], "pirate");
    assert_eq!(server.get("/v1/models/tinylm-q8_0").json()["id"], "base");
}

#[test]
fn a_prompt_that_does_not_fit_is_refused_and_an_answer_ends_with_the_context() {
    let server = Server::start(&["-c", "64"]);
    let long = json!({"model": "base", "prompt": "a b c d ".repeat(40)});
    let error = server.post("/v1/completions", &long).error(400);
    assert_eq!(error["code"], "context_length_exceeded");
    let full =
        json!({"model": "base", "prompt": "Once", "max_tokens": 900, "logit_bias": {"1": -100}});
    let answer = server.post("/v1/completions", &full).json();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert!(answer["usage"]["total_tokens"].as_u64().unwrap() <= 66);
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = Server::start(&["--queue", "2"]);
    let body = json!({"model": "base", "prompt": "Once", "n": 3});
    let answer = server.post("/v1/completions", &body);
    assert_eq!(answer.error(429)["code"], "queue_full");
    assert_eq!(answer.retry_after.as_deref(), Some("1"));
}

#[test]
fn malformed_http_and_floods_of_headers_end_their_connection_only() {
    let server = Server::start(&[]);
    let mut idle = TcpStream::connect(&server.address).unwrap();
    idle.write_all(b"POST /v1/chat/comp").unwrap();
    assert!(
        server
            .raw(b"\x16\x03\x01\x02garbage\r\n\r\n")
            .starts_with("HTTP/1.1 400")
    );
    let flood = format!(
        "GET /health HTTP/1.1\r\nHost: localhost\r\n{}\r\n",
        "A: b\r\n".repeat(500)
    );
    assert!(server.raw(flood.as_bytes()).starts_with("HTTP/1.1 431"));
    let long = format!(
        "GET /health HTTP/1.1\r\nHost: localhost\r\nA: {}\r\n\r\n",
        "b".repeat(200_000)
    );
    let answer = server.raw(long.as_bytes());
    assert!(
        answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
        "{answer}"
    );
    // Connections that say nothing take nothing from others.
    let silent: Vec<_> = (0..200)
        .map(|_| TcpStream::connect(&server.address))
        .collect();
    assert!(silent.iter().all(Result::is_ok));
    assert_eq!(server.get("/health").json()["status"], "ok");
    idle.write_all(b"letions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .unwrap();
    let mut rest = String::new();
    idle.read_to_string(&mut rest).unwrap();
    assert!(rest.starts_with("HTTP/1.1 415"), "{rest}");
}

#[test]
fn pages_of_others_do_not_reach_it() {
    let server = Server::start(&[]);
    let get = |headers: &str| {
        let request = format!("GET /v1/models HTTP/1.1\r\n{headers}Connection: close\r\n\r\n");
        server.raw(request.as_bytes())
    };
    let host = &server.address;
    assert!(get("Host: rebound.example\r\n").starts_with("HTTP/1.1 403"));
    let foreign = format!("Host: {host}\r\nOrigin: http://other.example\r\n");
    assert!(get(&foreign).starts_with("HTTP/1.1 403"));
    let own = format!("Host: {host}\r\nOrigin: http://{host}\r\n");
    assert!(get(&own).starts_with("HTTP/1.1 200"));
    assert!(get("Host: localhost\r\n").starts_with("HTTP/1.1 200"));
}
