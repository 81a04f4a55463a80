//! `ggraft batch`: many requests at once, each with its own adapter.

use crate::args::{
    ChatArgs, EnsembleArgs, Limit, ModelArgs, SampleArgs, SessionArgs, StopArgs, combine, count,
    parse_limit, warn_of_threads,
};
use crate::data;
use crate::failure::{Failure, Result};
use crate::outputs::Files;
use crate::{interrupt, io, run};
use clap::Args;
use ggraft::infer::engine::{EngineOptions, Jobs, Request, Scheduler};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{Combine, Ensemble, GenerateOptions, Generated, KvType, TokenLogprobs};
use ggraft::train::data::{Dataset, Row};
use ggraft::{Adapter, Model};
use indicatif::ProgressBar;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "Examples:
  ggraft batch -m model.gguf --data requests.jsonl -o answers.jsonl --parallel 8
  ggraft batch -m model.gguf -a pirate.gguf --data requests.jsonl -o answers.jsonl -n 64 --temp 0

A row has a \"prompt\" or \"messages\", as the rows of `ggraft predict`, and may have
  \"adapter\"      a GGUF adapter file or a PEFT folder instead of -a; null: none. A list of them
                 speaks as one, as \"ensemble\" (or --ensemble) says, with its \"weights\"
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
    #[command(flatten)]
    adapter: EnsembleArgs,
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
    /// `None` among them is no adapter.
    adapters: Option<Vec<Option<PathBuf>>>,
    ensemble: Option<String>,
    weights: Option<Vec<f32>>,
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
            adapters: match fields.get("adapter") {
                Some(Value::Null) => Some(vec![None]),
                Some(Value::Array(_)) => take(&mut fields, "adapter")?,
                _ => take(&mut fields, "adapter")?.map(|path| vec![Some(path)]),
            },
            ensemble: take(&mut fields, "ensemble")?,
            weights: take(&mut fields, "weights")?,
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
    args: &'a EnsembleArgs,
    loaded: HashMap<PathBuf, Adapter>,
}

impl Adapters<'_> {
    fn get(&mut self, path: &Path) -> Result<Adapter> {
        if let Some(adapter) = self.loaded.get(path) {
            return Ok(adapter.clone());
        }
        let adapter = self.args.load_one(path, self.model)?;
        self.loaded.insert(path.to_owned(), adapter.clone());
        Ok(adapter)
    }

    /// Whoever answers a row.
    fn ensemble(&mut self, default: &Ensemble, wishes: &Wishes) -> Result<Ensemble> {
        let named = wishes.ensemble.as_deref().map(combine).transpose();
        let named = named.map_err(|why| wrong("ensemble", why))?;
        let combine = named.or(self.args.combine());
        let members = match &wishes.adapters {
            None => default.members().to_vec(),
            Some(paths) => (paths.iter())
                .map(|path| path.as_deref().map(|path| self.get(path)).transpose())
                .collect::<Result<_>>()?,
        };
        if members.len() > 1 && combine.is_none() {
            let methods = Combine::ALL.map(Combine::name).join(", ");
            return Err(wrong(
                "adapter",
                format!("several: \"ensemble\" says how they speak together, one of {methods}"),
            ));
        }
        let ensemble = Ensemble::new(members, combine.unwrap_or_default())?;
        Ok(match &wishes.weights {
            Some(weights) => ensemble.weights(weights)?,
            None if wishes.adapters.is_none() => ensemble.weights(default.member_weights())?,
            None => ensemble,
        })
    }
}

impl Batch {
    pub(crate) fn execute(self) -> Result<()> {
        Files::default()
            .reads("-m", Some(&self.model.model))
            .reads("-a", self.adapter.paths())
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
        let members = |job: &Job| job.request.ensemble.members().len();
        let largest = jobs.iter().map(members).max().unwrap_or(1);
        let mut scheduler = Scheduler::new(&model, &self.options(largest))?;
        warn_of_threads(self.session.options(KvType::F16).n_threads);

        let cancel = scheduler.cancel_token();
        let guard = interrupt::Guard::new(cancel.clone());
        let n = jobs.len();
        let (answers, done) = answer_all(&mut scheduler, jobs);
        drop(guard);
        io::write_file(&self.output, |file| {
            answers.iter().try_for_each(|answer| {
                let line = format!("{answer}\n");
                file.write_all(line.as_bytes())
            })
        })?;
        let output = self.output.display();
        if cancel.is_cancelled() {
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

    /// There is room for the largest ensemble in any case.
    fn options(&self, largest: usize) -> EngineOptions {
        let mut options = self.adapter.engine(self.session.options(KvType::F16), 1);
        options.kv_bytes = self.kv_memory.map(|mb| mb.saturating_mul(1_000_000));
        options.max_running = self.parallel.max(largest);
        options
    }

    /// All rows. One that is no request fails before anything is computed.
    fn jobs(&self, model: &Model, data: &Dataset, wishes: Vec<Wishes>) -> Result<Vec<Job>> {
        let params = self.sample.params(model)?;
        let mut adapters = Adapters {
            model,
            args: &self.adapter,
            loaded: HashMap::new(),
        };
        let default = self.adapter.load(model)?;
        let mut job = |(row, wishes): (&Row, Wishes)| {
            let generate = self.generate(&params, &wishes);
            let ensemble = adapters.ensemble(&default, &wishes)?;
            let mut request = Request::tokens(row.prompt(model)?.tokens).generate(generate);
            request.ensemble = ensemble;
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
fn answer_all(scheduler: &mut Scheduler, jobs: Vec<Job>) -> (Vec<Value>, usize) {
    // Highest priorities first, each in the order of the rows.
    let n = jobs.len();
    let mut order: Vec<_> = (0..n).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(jobs[i].request.priority));
    let (ids, requests): (Vec<_>, Vec<_>) =
        jobs.into_iter().map(|j| (j.id, Some(j.request))).unzip();
    let answer = |id: Option<Value>| id.into_iter().map(|id| ("id".to_owned(), id)).collect();
    let mut answers = Answers {
        requests,
        order: order.into_iter(),
        answers: ids.into_iter().map(answer).collect(),
        done: 0,
        progress: io::progress(n),
    };
    scheduler.serve(&mut answers);
    answers.progress.finish_and_clear();
    let Answers {
        mut answers, done, ..
    } = answers;
    for answer in &mut answers {
        if !answer.contains_key("text") && !answer.contains_key("error") {
            answer.insert("error".to_owned(), "interrupted".into());
        }
    }
    (answers.into_iter().map(Value::Object).collect(), done)
}

/// Requests, and what comes of them.
struct Answers {
    /// `None` are those that were submitted.
    requests: Vec<Option<Request>>,
    /// Those that were not submitted yet.
    order: std::vec::IntoIter<usize>,
    answers: Vec<Map<String, Value>>,
    done: usize,
    progress: ProgressBar,
}

impl Jobs for Answers {
    type Key = usize;

    fn next(&mut self) -> Option<(usize, Request)> {
        let i = self.order.next()?;
        Some((i, self.requests[i].take()?))
    }

    fn end(&mut self, i: usize, outcome: ggraft::Result<Generated>) {
        let answer = &mut self.answers[i];
        match outcome {
            Ok(out) => {
                self.done += 1;
                answer.insert("text".to_owned(), out.text.clone().into());
                answer.insert("tokens".to_owned(), out.tokens.len().into());
                let reason = run::stop_reason(out.reason);
                answer.insert("stop_reason".to_owned(), reason.into());
                if !out.logprobs.is_empty() {
                    answer.insert("logprobs".to_owned(), logprobs(&out));
                }
            }
            Err(e) => {
                let why = Failure::from(e).line();
                answer.insert("error".to_owned(), why.into());
            }
        }
        self.progress.inc(1);
    }
}

/// For each token its id and how likely it was, and the most likely ones.
fn logprobs(out: &Generated) -> Value {
    let tokens = out.tokens.iter().zip(&out.logprobs);
    let of_token = |(id, token): (&i32, &TokenLogprobs)| {
        let pair = |(id, logprob): &(i32, f32)| json!({"id": id, "logprob": logprob});
        let top: Vec<_> = token.top.iter().map(pair).collect();
        json!({"id": id, "logprob": token.logprob, "top": top})
    };
    tokens.map(of_token).collect()
}
