//! Answers are the engine's own, in the API's forms.

use crate::server::{Answer, MODEL, Server};
use ggraft::infer::engine::{EngineOptions, Event, Request, Scheduler};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{Combine, Ensemble, GenerateOptions};
use ggraft::{Adapter, Model, ModelOptions};
use serde_json::{Value, json};
use std::io::Write;
use std::net::TcpStream;
use std::time::Instant;

const PROMPT: &str = "An old teacher is waiting at the harbour.";

fn load(name: &str) -> Adapter {
    Adapter::load(format!("models/adapters/{name}.gguf").as_ref()).unwrap()
}

/// What the engine says without a server.
fn engine(ensemble: &Ensemble, sampler: SamplerParams, n: usize) -> String {
    let model = Model::open(MODEL, &ModelOptions::default()).unwrap();
    let mut options = EngineOptions::default();
    options.n_threads = Some(1);
    let mut scheduler = Scheduler::new(&model, &options).unwrap();
    let generate = GenerateOptions::default().sampler(sampler).max_tokens(n);
    let request = Request::text(format!("{PROMPT}\n"))
        .ensemble(ensemble)
        .generate(generate);
    scheduler.submit(request).unwrap();
    loop {
        for (_, event) in scheduler.step() {
            match event {
                Event::Done(out) => return out.text,
                Event::Failed(e) => panic!("{e}"),
                _ => {}
            }
        }
    }
}

fn sampled(model: &str, more: &Value) -> Value {
    let mut body = json!({"model": model, "prompt": format!("{PROMPT}\n"), "max_tokens": 24});
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn text_of(events: &[Value], index: usize) -> String {
    let choices = events.iter().filter_map(|event| event["choices"].get(0));
    let own = choices.filter(|choice| choice["index"] == index);
    own.filter_map(|c| c["delta"]["content"].as_str().or(c["text"].as_str()))
        .collect()
}

#[test]
fn an_adapter_is_chosen_by_its_name_and_says_what_the_engine_says() {
    let server = Server::start(&[]);
    for name in ["pirate", "butler", "base"] {
        let member = (name != "base").then(|| load(name));
        let expected = engine(&Ensemble::of_one(member), SamplerParams::greedy(), 40);
        let body = json!({
            "model": name, "temperature": 0, "max_completion_tokens": 40,
            "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
        });
        let answer = server.post("/v1/chat/completions", &body);
        assert_eq!(answer.said(), expected);
        let json = answer.json();
        assert_eq!(
            (&json["model"], &json["object"]),
            (&json!(name), &json!("chat.completion"))
        );
        assert_eq!(json["choices"][0]["message"]["role"], "assistant");
        let usage = &json["usage"];
        assert_eq!(usage["prompt_tokens"], 11);
        assert_eq!(
            usage["total_tokens"],
            11 + usage["completion_tokens"].as_u64().unwrap()
        );
    }
}

#[test]
fn a_seed_draws_the_same_text_streamed_or_not_and_alone_or_not() {
    let server = Server::start(&[]);
    let pirate = Ensemble::of_one(Some(load("pirate")));
    let expected: Vec<String> = (0..3)
        .map(|i| {
            let seed = Some(7 + i);
            let sampler = SamplerParams {
                seed,
                temperature: 1.5,
                ..SamplerParams::default()
            };
            engine(&pirate, sampler, 24)
        })
        .collect();
    let more = json!({"seed": 7, "temperature": 1.5, "n": 3});
    let whole = server
        .post("/v1/completions", &sampled("pirate", &more))
        .json();
    for (i, expected) in expected.iter().enumerate() {
        assert_eq!(whole["choices"][i]["text"], expected.as_str());
        assert_eq!(whole["choices"][i]["index"], i);
    }
    let more = json!({
        "seed": 7, "temperature": 1.5, "n": 3, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let events = server
        .post("/v1/completions", &sampled("pirate", &more))
        .events();
    for (i, expected) in expected.iter().enumerate() {
        assert_eq!(text_of(&events, i), *expected);
    }
    // The prompt was computed by the first request.
    let usage = &events.last().unwrap()["usage"];
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 10);
    assert_eq!(
        usage["completion_tokens"],
        whole["usage"]["completion_tokens"]
    );
}

#[test]
fn a_stream_of_a_chat_has_roles_pieces_and_one_end() {
    let server = Server::start(&[]);
    let body = json!({
        "model": "pirate", "temperature": 0, "stream": true,
        "messages": [{"role": "user", "content": PROMPT}],
    });
    let events = server.post("/v1/chat/completions", &body).events();
    assert_eq!(text_of(&events, 0), server.chat("pirate", PROMPT).said());
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    let reasons = events.iter().map(|e| &e["choices"][0]["finish_reason"]);
    assert_eq!(reasons.filter(|r| **r == "stop").count(), 1);
    assert!(events.len() > 10 && events.iter().all(|e| e["id"] == events[0]["id"]));
    assert!(
        events
            .iter()
            .all(|e| e["object"] == "chat.completion.chunk" && e["usage"].is_null())
    );
}

#[test]
fn several_adapters_speak_as_one() {
    let server = Server::start(&[]);
    let members = [Some(load("pirate")), Some(load("butler")), None];
    let ensemble = Ensemble::new(members, Combine::MeanProb).unwrap();
    let ensemble = ensemble.weights(&[0.5, 0.3, 0.2]).unwrap();
    let expected = engine(&ensemble, SamplerParams::greedy(), 24);
    let more = json!({
        "adapters": ["pirate", "butler", "base"], "ensemble": "mean-prob", "weights": [0.5, 0.3, 0.2],
        "temperature": 0,
    });
    assert_eq!(
        server
            .post("/v1/completions", &sampled("any", &more))
            .said(),
        expected
    );
    let answer = |more| server.post("/v1/completions", &sampled("any", &more));
    let error = answer(json!({"adapters": ["pirate", "base"]})).error(400);
    assert_eq!(error["param"], "ensemble");
    let weights = json!({"adapters": ["pirate", "base"], "ensemble": "vote", "weights": [1.0]});
    assert_eq!(answer(weights).error(400)["param"], "weights");
    assert_eq!(
        answer(json!({"adapters": ["pirat"]})).error(404)["code"],
        "model_not_found"
    );
}

#[test]
fn probabilities_of_tokens_are_told_in_both_forms() {
    let server = Server::start(&[]);
    let body = json!({
        "model": "pirate", "temperature": 0, "max_tokens": 4, "logprobs": true, "top_logprobs": 3,
        "messages": [{"role": "user", "content": PROMPT}],
    });
    let chat = server.post("/v1/chat/completions", &body).json();
    let tokens = chat["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(tokens.len(), 4);
    for token in tokens {
        // Greedy: the most likely one was taken.
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["logprob"], token["top_logprobs"][0]["logprob"]);
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
    }
    let more = json!({"temperature": 0, "max_tokens": 4, "logprobs": 3});
    let text = server
        .post("/v1/completions", &sampled("pirate", &more))
        .json();
    let legacy = &text["choices"][0]["logprobs"];
    let joined: String = tokens
        .iter()
        .map(|t| t["token"].as_str().unwrap())
        .collect();
    assert_eq!(text["choices"][0]["text"], joined.as_str());
    for (i, token) in tokens.iter().enumerate() {
        assert_eq!(legacy["token_logprobs"][i], token["logprob"]);
        assert_eq!(legacy["tokens"][i], token["token"]);
    }
}

#[test]
fn prompts_stops_biases_and_lengths_are_obeyed() {
    let server = Server::start(&[]);
    let ask = |more| server.post("/v1/completions", &sampled("pirate", &more));
    let choice = |answer: &Answer| answer.json()["choices"][0].clone();
    let all = ask(json!({"temperature": 0, "max_tokens": 60})).said();
    let stopped = choice(&ask(json!({"temperature": 0, "stop": ["teacher"]})));
    assert_eq!(stopped["text"], all.split("teacher").next().unwrap());
    assert_eq!(stopped["finish_reason"], "stop");
    let short = choice(&ask(json!({"temperature": 0, "max_tokens": 3})));
    assert_eq!(short["finish_reason"], "length");
    assert!(all.starts_with(short["text"].as_str().unwrap()));

    let model = Model::open(MODEL, &ModelOptions::default()).unwrap();
    let first = model.vocab().tokenize("\"", false, false).unwrap()[0];
    let bias = json!({first.to_string(): -100});
    let other = ask(json!({"temperature": 0, "logit_bias": bias})).said();
    assert!(!other.starts_with('"'), "{other}");

    // Texts and tokens, several at once.
    let tokens = model
        .vocab()
        .tokenize(&format!("{PROMPT}\n"), false, true)
        .unwrap();
    let texts = json!([format!("{PROMPT}\n"), "The rain has not stopped.\n"]);
    let both = ask(json!({"prompt": texts, "temperature": 0, "max_tokens": 60})).json();
    assert_eq!(both["choices"][0]["text"], all.as_str());
    assert_ne!(both["choices"][1]["text"], all.as_str());
    let same = ask(json!({"prompt": tokens, "temperature": 0, "max_tokens": 60})).said();
    assert_eq!(same, all);
}

#[test]
#[cfg(unix)]
fn a_signal_lets_what_is_being_answered_end() {
    let mut server = Server::start(&[]);
    std::thread::scope(|scope| {
        let address = server.address.clone();
        let body = sampled(
            "base",
            &json!({"temperature": 0, "max_tokens": 200, "stop": null}),
        );
        let client = scope.spawn(move || {
            let mut answer = ureq::post(format!("http://{address}/v1/completions"))
                .content_type("application/json")
                .send(body.to_string())
                .unwrap();
            answer.body_mut().read_to_string().unwrap()
        });
        while server.get("/health").json()["running"] == 0 && !client.is_finished() {}
        assert_eq!(server.stop().code(), Some(0));
        let answer: Value = serde_json::from_str(&client.join().unwrap()).unwrap();
        assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() > 0);
    });
}

#[test]
fn who_goes_is_computed_no_more() {
    let server = Server::start(&["--parallel", "1"]);
    let running = || server.get("/health").json()["running"].as_u64().unwrap();
    for streamed in [true, false, true, false] {
        let more = json!({"max_tokens": 900, "logit_bias": {"1": -100}, "stream": streamed});
        let text = sampled("base", &more).to_string();
        let request = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\
             Content-Type: application/json\r\n\r\n{text}",
            text.len()
        );
        let mut stream = TcpStream::connect(&server.address).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let begun = Instant::now();
        while running() == 0 {
            assert!(begun.elapsed().as_secs() < 20, "it begins");
        }
        drop(stream);
        while running() != 0 {
            assert!(begun.elapsed().as_secs() < 40, "nobody waits for it");
        }
    }
    let metrics = server.get("/metrics").text;
    let none = "ggraft_answers_total{adapter=\"base\"} 0";
    assert!(metrics.contains(none), "{metrics}");
    assert!(server.chat("pirate", PROMPT).said().contains("Arr"));
}
