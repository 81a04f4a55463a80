//! `ggraft batch`: many requests at once, each with its own adapter.

use crate::args::{
    ChatArgs, Limit, ModelArgs, SampleArgs, SessionArgs, StopArgs, count, load_adapter,
    parse_limit, warn_of_threads,
};
use crate::data;
use crate::failure::{Failure, Result};
use crate::outputs::Files;
use crate::{interrupt, io, run};
use clap::Args;
use ggraft::infer::engine::{EngineOptions, Event, Request, RequestId, Scheduler};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{GenerateOptions, KvType};
use ggraft::train::data::{Dataset, Row};
use ggraft::{Adapter, Model};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const EXAMPLES: &str = "Examples:
  ggraft batch -m model.gguf --data requests.jsonl -o answers.jsonl --parallel 8
  ggraft batch -m model.gguf -a pirate.gguf --data requests.jsonl -o answers.jsonl -n 64 --temp 0

A row has a \"prompt\" or \"messages\", as the rows of `ggraft predict`, and may have
  \"adapter\"      a GGUF adapter file or a PEFT folder instead of -a; null: none
  \"max_tokens\", \"temperature\", \"top_k\", \"top_p\", \"min_p\", \"seed\", \"stop\" (a text or a list of them)
                 instead of the options
  \"priority\"     rows with a higher one begin first
  \"logprobs\"     how many of the most likely tokens to give with each token
  \"id\"           stands in the answer
Other fields are ignored. The output has a row {\"id\", \"text\", \"tokens\", \"stop_reason\"} for each of them, in their order, or {\"id\", \
\"error\"} for one that cannot be served. Each answer is what it would be alone: with the same seed the same text, whatever other \
rows there are. Ctrl-C keeps the answers that are complete.";

/// Complete many prompts at once, each with an adapter of its own
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Batch {
    #[command(flatten)]
    model: ModelArgs,
    /// The requests, one JSON object per line; `-` is standard input
    #[arg(long, value_name = "FILE.jsonl")]
    data: PathBuf,
    /// The file to write
    #[arg(short, long, value_name = "OUT.jsonl")]
    output: PathBuf,
    /// Texts that are computed at a time
    #[arg(long, value_name = "N", default_value = "8", value_parser = count::<usize>)]
    parallel: usize,
    /// Megabytes of keys and values at most [default: as much as it takes]
    #[arg(long, value_name = "MB", value_parser = count::<usize>)]
    kv_memory: Option<usize>,
    /// Tokens of one answer at most; -1: until the text ends
    #[arg(short, value_name = "N", default_value = "128", value_parser = parse_limit)]
    n: Limit,
    #[command(flatten)]
    stops: StopArgs,
    /// Adapter of rows that name none: a GGUF adapter file or a PEFT folder
    #[arg(short, long, value_name = "FILE|FOLDER", help_heading = "Adapter")]
    adapter: Option<PathBuf>,
    /// Use adapters even if they were made for another model of the same shape
    #[arg(long, help_heading = "Adapter")]
    force: bool,
    #[command(flatten)]
    sample: SampleArgs,
    #[command(flatten)]
    chat_format: ChatArgs,
    #[command(flatten)]
    session: SessionArgs,
}

/// What a row may say besides its prompt.
struct Wishes {
    id: Option<Value>,
    /// `Some(None)`: none.
    adapter: Option<Option<PathBuf>>,
    max_tokens: Option<Limit>,
    temperature: Option<f32>,
    top_k: Option<u32>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    seed: Option<u32>,
    stop: Option<Stops>,
    priority: Option<i32>,
    logprobs: Option<usize>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Stops {
    One(String),
    Many(Vec<String>),
}

impl Wishes {
    fn of(value: Value) -> Result<Self> {
        let Value::Object(mut fields) = value else {
            return Err(Failure::Unsuitable("a request is an object".to_owned()));
        };
        let limit = |n: i64| parse_limit(&n.to_string());
        let max_tokens = take(&mut fields, "max_tokens")?.map(limit).transpose();
        Ok(Self {
            adapter: match fields.get("adapter") {
                Some(Value::Null) => Some(None),
                _ => take(&mut fields, "adapter")?.map(Some),
            },
            max_tokens: max_tokens.map_err(|why| wrong("max_tokens", why))?,
            temperature: take(&mut fields, "temperature")?,
            top_k: take(&mut fields, "top_k")?,
            top_p: take(&mut fields, "top_p")?,
            min_p: take(&mut fields, "min_p")?,
            seed: take(&mut fields, "seed")?,
            stop: take(&mut fields, "stop")?,
            priority: take(&mut fields, "priority")?,
            logprobs: take(&mut fields, "logprobs")?,
            id: fields.remove("id"),
        })
    }
}

/// Takes a field, if it is there and not null.
fn take<T: DeserializeOwned>(fields: &mut Map<String, Value>, name: &str) -> Result<Option<T>> {
    let value = fields.remove(name).unwrap_or_default();
    serde_json::from_value(value).map_err(|e| wrong(name, e))
}

fn wrong(field: &str, why: impl Display) -> Failure {
    Failure::Unsuitable(format!("\"{field}\": {why}"))
}

/// A row, ready to be submitted.
struct Job {
    id: Option<Value>,
    request: Request,
}

/// Adapters by the names that rows have for them.
struct Adapters<'a> {
    model: &'a Model,
    force: bool,
    loaded: HashMap<PathBuf, Adapter>,
}

impl Adapters<'_> {
    fn get(&mut self, path: &Path) -> Result<Adapter> {
        if let Some(adapter) = self.loaded.get(path) {
            return Ok(adapter.clone());
        }
        let adapter = load_adapter(path, self.model, None).map_err(|e| e.forced(self.force))?;
        self.loaded.insert(path.to_owned(), adapter.clone());
        Ok(adapter)
    }
}

impl Batch {
    pub(crate) fn execute(self) -> Result<()> {
        Files::default()
            .reads("-m", Some(&self.model.model))
            .reads("-a", self.adapter.as_deref())
            .reads_data("--data", Some(&self.data))
            .reads("--chat-template", self.chat_format.chat_template.as_deref())
            .writes("-o", Some(&self.output))
            .check()?;
        let text = io::read_text(&self.data)?;
        let name = match self.data == Path::new("-") {
            true => Path::new("standard input"),
            false => &self.data,
        };
        let data = Dataset::from_reader(text.as_bytes(), name)?;
        data::Kinds::of(&data).warn(&self.chat_format, false);
        let wishes = objects(&text, data.rows())?;
        let model = self.model.open_with(&self.chat_format)?;
        let jobs = self.jobs(&model, &data, wishes)?;
        let mut scheduler = Scheduler::new(&model, &self.options())?;
        warn_of_threads(self.session.options(KvType::F16).n_threads);

        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = interrupted.clone();
        let guard = interrupt::Guard::calling(move || flag.store(true, Ordering::Relaxed));
        let n = jobs.len();
        let (answers, done) = answer_all(&mut scheduler, jobs, &interrupted);
        drop(guard);
        io::write_file(&self.output, |file| {
            answers.iter().try_for_each(|answer| {
                let line = format!("{answer}\n");
                file.write_all(line.as_bytes())
            })
        })?;
        let output = self.output.display();
        if interrupted.load(Ordering::Relaxed) {
            return Err(Failure::Interrupted(format!(
                "interrupted after {done} of {n} rows, which {output} has"
            )));
        }
        match n - done {
            0 => Ok(()),
            left => Err(Failure::Unsuitable(format!(
                "{left} of {n} rows could not be served: {output} says why"
            ))),
        }
    }

    fn options(&self) -> EngineOptions {
        let session = self.session.options(KvType::F16);
        let mut options = EngineOptions::from(&session.accept_other_base(self.force));
        options.kv_bytes = self.kv_memory.map(|mb| mb.saturating_mul(1_000_000));
        options.max_running = self.parallel;
        options
    }

    /// All rows. One that is no request fails before anything is computed.
    fn jobs(&self, model: &Model, data: &Dataset, wishes: Vec<Wishes>) -> Result<Vec<Job>> {
        let params = self.sample.params(model)?;
        let mut adapters = Adapters {
            model,
            force: self.force,
            loaded: HashMap::new(),
        };
        let default = self.adapter.as_deref();
        let default = default.map(|path| adapters.get(path)).transpose()?;
        let mut job = |(row, wishes): (&Row, Wishes)| {
            let generate = self.generate(&params, &wishes);
            let adapter = match &wishes.adapter {
                Some(path) => path.as_deref().map(|path| adapters.get(path)).transpose()?,
                None => default.clone(),
            };
            let mut request = Request::tokens(row.prompt(model)?.tokens).generate(generate);
            request.adapter = adapter;
            request.priority = wishes.priority.unwrap_or(0);
            Ok(Job {
                id: wishes.id,
                request,
            })
        };
        let rows = data.rows().iter().zip(wishes);
        rows.map(|(row, wishes)| job((row, wishes)).map_err(|why| Failure::at(row.place(), why)))
            .collect()
    }

    fn generate(&self, params: &SamplerParams, wishes: &Wishes) -> GenerateOptions {
        let mut generate = GenerateOptions::default().sampler(SamplerParams {
            temperature: wishes.temperature.unwrap_or(params.temperature),
            top_k: wishes.top_k.unwrap_or(params.top_k),
            top_p: wishes.top_p.unwrap_or(params.top_p),
            min_p: wishes.min_p.unwrap_or(params.min_p),
            seed: wishes.seed.or(params.seed),
            ..params.clone()
        });
        generate.max_tokens = wishes.max_tokens.unwrap_or(self.n).0;
        generate.stop = match &wishes.stop {
            Some(Stops::One(stop)) => vec![stop.clone()],
            Some(Stops::Many(stops)) => stops.clone(),
            None => self.stops.stop.clone(),
        };
        generate.logprobs = wishes.logprobs;
        generate
    }
}

/// What the rows say besides their prompts: objects one after the other, or in a list.
fn objects(text: &str, rows: &[Row]) -> Result<Vec<Wishes>> {
    let mut values = Vec::with_capacity(rows.len());
    for value in serde_json::Deserializer::from_str(text).into_iter::<Value>() {
        match value {
            Ok(Value::Array(list)) => values.extend(list),
            Ok(value) => values.push(value),
            Err(_) => break,
        }
    }
    if values.len() != rows.len() {
        return Err(Failure::Unsuitable(
            "requests are JSON objects, one per line or all of them in one array".to_owned(),
        ));
    }
    let wishes = |(row, value): (&Row, Value)| {
        Wishes::of(value).map_err(|why| Failure::at(row.place(), why))
    };
    rows.iter().zip(values).map(wishes).collect()
}

/// The answers in the order of the requests, and how many are complete.
fn answer_all(
    scheduler: &mut Scheduler,
    jobs: Vec<Job>,
    interrupted: &AtomicBool,
) -> (Vec<Value>, usize) {
    let progress = io::progress(jobs.len());
    let mut answers: Vec<Map<String, Value>> = Vec::with_capacity(jobs.len());
    let mut done = 0;
    let mut running: HashMap<RequestId, usize> = HashMap::new();
    let mut waiting = jobs;
    // Highest priorities first, each in the order of the rows.
    let mut order: Vec<_> = (0..waiting.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(waiting[i].request.priority));
    for job in &mut waiting {
        let id = job.id.take().map(|id| ("id".to_owned(), id));
        answers.push(id.into_iter().collect());
    }
    let mut order = order.into_iter();
    let mut next = order.next();
    while !interrupted.load(Ordering::Relaxed) {
        // Some more than can run: who begins with the same waits for the first of them.
        while let Some(i) = next
            && scheduler.len()[1] < 64
        {
            match scheduler.submit(waiting[i].request.clone()) {
                Ok(id) => drop(running.insert(id, i)),
                Err(e) => {
                    answers[i].insert("error".to_owned(), Failure::from(e).line().into());
                    progress.inc(1);
                }
            }
            next = order.next();
        }
        if scheduler.is_idle() {
            break;
        }
        for (id, event) in scheduler.step() {
            let row = match event {
                Event::Done(out) => {
                    done += 1;
                    let mut row = json!({
                        "text": out.text,
                        "tokens": out.tokens.len(),
                        "stop_reason": run::stop_reason(out.reason),
                    });
                    if !out.logprobs.is_empty() {
                        row["logprobs"] = logprobs(&out);
                    }
                    row
                }
                Event::Failed(e) => json!({"error": Failure::from(e).line()}),
                _ => continue,
            };
            let (Some(i), Value::Object(row)) = (running.remove(&id), row) else {
                continue;
            };
            answers[i].extend(row);
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    for answer in &mut answers {
        if !answer.contains_key("text") && !answer.contains_key("error") {
            answer.insert("error".to_owned(), "interrupted".into());
        }
    }
    (answers.into_iter().map(Value::Object).collect(), done)
}

/// For each token its id and how likely it was, and the most likely ones.
fn logprobs(out: &ggraft::infer::Generated) -> Value {
    let tokens = out.tokens.iter().zip(&out.logprobs);
    let of_token = |(id, token): (&i32, &ggraft::infer::TokenLogprobs)| {
        let pair = |(id, logprob): &(i32, f32)| json!({"id": id, "logprob": logprob});
        let top: Vec<_> = token.top.iter().map(pair).collect();
        json!({"id": id, "logprob": token.logprob, "top": top})
    };
    tokens.map(of_token).collect()
}
