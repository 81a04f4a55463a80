//! A server of a test's own, and a client.

use ggraft_testkit::command::{command, stderr};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::Duration;
use tempfile::TempDir;
use ureq::http::Response;
use ureq::{Agent, Body};

pub(crate) const MODEL: &str = "models/tinylm-q8_0.gguf";

/// Messages one to a line, as the adapters of the tests have learned prompts.
const TEMPLATE: &str = "{% for message in messages %}{{ message.content }}\n{% endfor %}";

/// A server on a port of its own. It is killed when the test ends.
pub(crate) struct Server {
    child: Child,
    /// `127.0.0.1:PORT`.
    pub(crate) address: String,
    key: Option<String>,
    agent: Agent,
    folder: TempDir,
}

impl Server {
    /// With the example adapters.
    pub(crate) fn start(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let adapters: &[&str] = &["--adapters", "models/adapters"];
        Self::start_in(folder, &[adapters, args].concat())
    }

    /// With a folder of its own for files.
    pub(crate) fn start_in(folder: TempDir, args: &[&str]) -> Self {
        let template = folder.path().join("template.jinja");
        fs::write(&template, TEMPLATE).unwrap();
        let template = template.to_str().unwrap();
        let fixed = [
            "serve",
            "-m",
            MODEL,
            "-t",
            "1",
            "--port",
            "0",
            "--chat-template",
            template,
        ];
        let all = [&fixed[..], args].concat();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut command = command(env!("CARGO_BIN_EXE_ggraft"), &all);
        command.current_dir(env!("CARGO_MANIFEST_DIR")).stderr(log);
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        let stdout = child.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line
            .split("http://")
            .nth(1)
            .and_then(|s| s.split(',').next());
        let address = address.unwrap_or_else(|| {
            panic!(
                "{line:?} {:?}",
                fs::read_to_string(folder.path().join("log"))
            )
        });
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_global(Some(Duration::from_secs(60)));
        Self {
            child,
            address: address.to_owned(),
            key: None,
            agent: config.build().into(),
            folder,
        }
    }

    /// The same server, asked with a key.
    pub(crate) fn with_key(&mut self, key: &str) -> &Self {
        self.key = Some(key.to_owned());
        self
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What it has said on stderr.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    fn authorization(&self) -> String {
        format!("Bearer {}", self.key.as_deref().unwrap_or("none"))
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        let request = self.agent.get(self.url(path));
        Answer::of(request.header("authorization", self.authorization()).call())
    }

    /// What is downloaded.
    pub(crate) fn bytes(&self, path: &str) -> Vec<u8> {
        let request = self.agent.get(self.url(path));
        let request = request.header("authorization", self.authorization());
        let mut response = request.call().unwrap();
        assert_eq!(response.status(), 200);
        response.body_mut().read_to_vec().unwrap()
    }

    pub(crate) fn delete(&self, path: &str) -> Answer {
        let request = self.agent.delete(self.url(path));
        Answer::of(request.header("authorization", self.authorization()).call())
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.send(path, "application/json", body.to_string().as_bytes())
    }

    pub(crate) fn send(&self, path: &str, kind: &str, body: &[u8]) -> Answer {
        let request = self.agent.post(self.url(path));
        let request = request.header("authorization", self.authorization());
        Answer::of(request.header("content-type", kind).send(body))
    }

    /// A greedy chat of one message.
    pub(crate) fn chat(&self, model: &str, message: &str) -> Answer {
        let body = json!({
            "model": model,
            "temperature": 0,
            "messages": [{"role": "user", "content": message}],
        });
        self.post("/v1/chat/completions", &body)
    }

    /// Bytes as they are, and what comes back until the server closes the connection.
    pub(crate) fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        // It may be refused before all of it was sent.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Ends it at once, and gives back its folder.
    pub(crate) fn kill(mut self) -> TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap())
    }

    /// Ends it in order.
    #[cfg(unix)]
    pub(crate) fn stop(&mut self) -> ExitStatus {
        let id = i32::try_from(self.child.id()).unwrap();
        // SAFETY: kill(2) of a child that was not waited for.
        assert_eq!(unsafe { libc::kill(id, libc::SIGTERM) }, 0);
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What the server answered.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) text: String,
    pub(crate) retry_after: Option<String>,
}

impl Answer {
    fn of(response: Result<Response<Body>, ureq::Error>) -> Self {
        let mut response = response.unwrap();
        let header = response.headers().get("retry-after");
        Self {
            status: response.status().as_u16(),
            retry_after: header.map(|value| value.to_str().unwrap().to_owned()),
            text: response.body_mut().read_to_string().unwrap(),
        }
    }

    /// The object, of a request that must succeed.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        serde_json::from_str(&self.text).unwrap()
    }

    /// The text of the first choice.
    #[track_caller]
    pub(crate) fn said(&self) -> String {
        let json = self.json();
        let choice = &json["choices"][0];
        let text = choice["message"]["content"].as_str();
        text.or(choice["text"].as_str()).unwrap().to_owned()
    }

    /// What is wrong, in the API's form, of a request that must fail with this status.
    #[track_caller]
    pub(crate) fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        let value: Value = serde_json::from_str(&self.text).unwrap();
        let error = &value["error"];
        assert!(error["message"].is_string() && error["type"].is_string());
        error.clone()
    }

    /// The objects of a stream, which must be complete.
    #[track_caller]
    pub(crate) fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text);
        let data = self
            .text
            .split("\n\n")
            .filter_map(|e| e.strip_prefix("data: "));
        let mut data: Vec<_> = data.collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        let json = |text: &str| serde_json::from_str(text).unwrap();
        data.into_iter().map(json).collect()
    }
}

/// The line with which a server does not start.
pub(crate) fn refused(args: &[&str]) -> String {
    let fixed = ["serve", "-m", MODEL, "--port", "0"];
    let mut command = command(env!("CARGO_BIN_EXE_ggraft"), &[&fixed[..], args].concat());
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = command.output().unwrap();
    let line = stderr(&output);
    assert!(
        !output.status.success() && line.lines().count() == 1,
        "{line}"
    );
    line
}

/// A folder with these adapters in it.
pub(crate) fn adapters(names: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        let file = format!("{name}.gguf");
        let from = Path::new("models/adapters").join(&file);
        fs::copy(from, folder.path().join(file)).unwrap();
    }
    folder
}
