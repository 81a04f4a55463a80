//! What HTTP costs: `ggraft serve` beside an engine in this process, with the same requests.
//!
//!     cargo bench --bench serve
//!
//! Clients that all wait for an answer at the same time, whole and streamed, in tokens per second; the time until the first text of an answer while nobody else is served; the time from
//! the start of the command to its first answer.
//!
//! `cargo bench -- --test` runs all of it once, with few tokens: its figures say nothing.
//!
//! Environment: `GGRAFT_BENCH_MODEL` (models/tinylm-q8_0.gguf), `GGRAFT_BENCH_CLIENTS` (16), `GGRAFT_BENCH_TOKENS` (128), `GGRAFT_BENCH_ROUNDS` (7).

use ggraft::infer::GenerateOptions;
use ggraft::infer::engine::{Engine, EngineOptions, Request};
use ggraft::infer::sampler::SamplerParams;
use ggraft::{Model, ModelOptions};
use ggraft_testkit::bench::{is_quick, median, number, var};
use serde_json::json;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Tokens of a prompt.
const PROMPT: usize = 12;

struct Setup {
    model: String,
    clients: usize,
    tokens: usize,
    rounds: usize,
}

fn setup() -> Setup {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/tinylm-q8_0.gguf");
    let quick = is_quick();
    let either = |full, small| if quick { small } else { full };
    Setup {
        model: var("GGRAFT_BENCH_MODEL", model),
        clients: number("GGRAFT_BENCH_CLIENTS", either(16, 2)),
        tokens: number("GGRAFT_BENCH_TOKENS", either(128, 4)),
        rounds: number("GGRAFT_BENCH_ROUNDS", either(7, 1)),
    }
}

struct Server {
    child: Child,
    address: String,
    /// Until it could be asked, in seconds.
    ready: f64,
}

impl Server {
    fn start(setup: &Setup) -> Self {
        let begun = Instant::now();
        let mut child = Command::new(env!("CARGO_BIN_EXE_ggraft"))
            .args(["serve", "--port", "0", "-m", &setup.model, "--parallel"])
            .arg(setup.clients.to_string())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the command");
        let mut line = String::new();
        let stdout = child.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("a line");
        let address = line
            .split("http://")
            .nth(1)
            .and_then(|s| s.split(',').next());
        let address = address.unwrap_or_else(|| panic!("{line}")).to_owned();
        let mut server = Self {
            child,
            address,
            ready: 0.0,
        };
        let mut answer = String::new();
        let mut health = server.send("GET /health HTTP/1.1", "");
        health.read_to_string(&mut answer).expect("an answer");
        assert!(answer.contains("\"ok\""), "{answer}");
        server.ready = begun.elapsed().as_secs_f64();
        server
    }

    fn send(&self, line: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.address).expect("a connection");
        stream.set_nodelay(true).expect("an option of sockets");
        let request = format!(
            "{line}\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        );
        stream.write_all(request.as_bytes()).expect("room");
        stream
    }

    fn ask(&self, prompt: &[i32], tokens: usize, eos: i32, stream: bool) -> TcpStream {
        let body = json!({
            "model": "base", "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "logit_bias": {eos.to_string(): -100}, "stream": stream,
        });
        self.send("POST /v1/completions HTTP/1.1", &body.to_string())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A prompt that no other has the beginning of.
fn prompt(i: usize, n_vocab: usize) -> Vec<i32> {
    let token = |k: usize| (4 + (i * 131 + k * 17) % (n_vocab - 4)) as i32;
    (0..PROMPT).map(token).collect()
}

fn request(prompt: &[i32], tokens: usize, eos: i32) -> Request {
    let sampler = SamplerParams {
        logit_bias: vec![(eos, -100.0)],
        ..SamplerParams::greedy()
    };
    let generate = GenerateOptions::default().sampler(sampler);
    Request::tokens(prompt).generate(generate.max_tokens(tokens))
}

/// How long clients take that ask at the same time.
fn together(setup: &Setup, ask: impl Fn(usize) + Sync) -> Duration {
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for client in 0..setup.clients {
            let ask = &ask;
            scope.spawn(move || ask(client));
        }
    });
    begun.elapsed()
}

fn main() {
    let setup = setup();
    let model = Model::open(&setup.model, &ModelOptions::default()).expect("a model");
    let n_vocab = model.shape().n_vocab;
    let eos = model.vocab().eos().expect("an end of texts");
    let mut options = EngineOptions::default();
    options.max_running = setup.clients;
    let engine = Engine::new(&model, &options).expect("an engine");
    let server = Server::start(&setup);
    println!("start to first answer: {:.3} s", server.ready);

    let mut count = 0;
    let mut prompts = || {
        count += setup.clients;
        (count..count + setup.clients)
            .map(|i| prompt(i, n_vocab))
            .collect::<Vec<_>>()
    };
    let mut times = [vec![], vec![], vec![]];
    for _ in 0..setup.rounds {
        let asked = prompts();
        times[0].push(together(&setup, |client| {
            let request = request(&asked[client], setup.tokens, eos);
            let out = engine.submit(request).and_then(|reply| reply.wait());
            assert_eq!(out.expect("an answer").tokens.len(), setup.tokens);
        }));
        for (times, stream) in times[1..].iter_mut().zip([false, true]) {
            let asked = prompts();
            times.push(together(&setup, |client| {
                let mut answer = String::new();
                let mut socket = server.ask(&asked[client], setup.tokens, eos, stream);
                socket.read_to_string(&mut answer).expect("an answer");
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
            }));
        }
    }
    let all = (setup.clients * setup.tokens) as f64;
    let [alone, whole, streamed] = times.map(|times| all / median(times));
    println!("{} clients, {} tokens each", setup.clients, setup.tokens);
    println!("engine   {alone:8.1} tokens/s");
    for (name, rate) in [("whole", whole), ("streamed", streamed)] {
        let more = 100.0 * (alone / rate - 1.0);
        println!("{name:8} {rate:8.1} tokens/s, {more:+.1} % time");
    }

    let mut times = [vec![], vec![]];
    for _ in 0..10 * setup.rounds {
        let asked = prompts();
        let begun = Instant::now();
        let mut reply = engine.submit(request(&asked[0], 8, eos)).expect("a reply");
        reply.next().expect("a text").expect("a text");
        times[0].push(begun.elapsed());
        drop(reply.wait());
        let begun = Instant::now();
        let mut answer = BufReader::new(server.ask(&asked[0], 8, eos, true));
        let mut line = String::new();
        while !line.starts_with("data: ") {
            line.clear();
            answer.read_line(&mut line).expect("a line");
        }
        times[1].push(begun.elapsed());
        answer.read_to_string(&mut line).expect("the rest");
    }
    let [alone, http] = times.map(|times| 1e3 * median(times));
    println!(
        "first text: engine {alone:.2} ms, HTTP {http:.2} ms, {:+.2} ms",
        http - alone
    );
}
