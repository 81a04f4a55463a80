//! `ggraft bench`: how fast this machine opens, attaches, swaps, reads and writes.

use crate::args::{ModelArgs, SessionArgs, count, load_adapter, warn_of_threads, whole};
use crate::failure::{Failure, Result};
use crate::{interrupt, io};
use clap::Args;
use ggraft::infer::engine::{EngineOptions, Event, Request, Scheduler};
use ggraft::infer::sampler::SamplerParams;
use ggraft::infer::{ExistingText, GenerateOptions, KvType, SessionOptions};
use ggraft::{Adapter, CpuLevel, Model, Session};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const EXAMPLES: &str = "Examples:
  ggraft bench -m model.gguf
  ggraft bench -m model.gguf -a adapter.gguf -p 512 -n 128 -d 1024 -t 4
  ggraft bench -m model.gguf -a one.gguf -a two.gguf -p 0 --parallel 1,2,4,8,16

Rows, as llama-bench has them: mean and standard deviation of -r runs after one that is not counted.
  open      map the model and check it (the file is in the page cache; the tokenizer's tables are
            built later, with the first text)
  load      read and check the adapter
  compile   put the adapter in place for the first time: a prompt adapter is run through the model
            once
  attach    put it in place again
  swap      replace one resident adapter by another
  ppN       compute a prompt of N tokens
  tgN       generate N tokens, one at a time, sampling left out
  tgN xU    U users who generate N tokens each in the same steps (--parallel), of all together, of
            each, and how many times the speed of tgN that is; behind 32 tokens, or as many as -d
            says, with the most likely token taken
`@ dN`: with N tokens in the context before. The adapter's tokens come on top. Without --ctx the context is as long as the longest \
test needs, but no longer than what the model was trained on: what needs more is refused. Progress goes to stderr, if there is any.";

/// Measure speed and memory
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Bench {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt; 0 leaves the test out [default: 512, or what the context holds]
    #[arg(short = 'p', long = "n-prompt", value_name = "N", value_parser = whole::<usize>)]
    prompt: Option<usize>,
    /// Tokens to generate; 0 leaves the test out [default: 128, or what the context holds]
    #[arg(short = 'n', long = "n-gen", value_name = "N", value_parser = whole::<usize>)]
    generate: Option<usize>,
    /// Tokens in the context before each test
    #[arg(short, long, value_name = "N", default_value_t = 0, value_parser = whole::<usize>)]
    depth: usize,
    /// Users who generate at the same time, a test for each number
    #[arg(long, value_name = "USERS", value_delimiter = ',', value_parser = count::<usize>)]
    parallel: Vec<usize>,
    /// Runs of each test
    #[arg(short, long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    repetitions: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Adapter to measure with: a GGUF adapter file or a PEFT folder. Can be given several times: users (--parallel) take them in turn, the other tests take the first
    #[arg(short, long, value_name = "FILE|FOLDER", help_heading = "Adapter")]
    adapter: Vec<PathBuf>,
    /// Which task of a multitask PEFT folder, counted from 0
    #[arg(long, value_name = "N", requires = "adapter", value_parser = whole::<usize>, help_heading = "Adapter")]
    task: Option<usize>,
    /// Use adapters even if they were made for another model of the same shape
    #[arg(long, requires = "adapter", help_heading = "Adapter")]
    force: bool,
    #[command(flatten)]
    session: SessionArgs,
}

/// Tokens of a prompt that are computed without a word about progress in between: one step of a session.
const CHUNK: usize = 512;
/// Tokens that users have in their context before they generate.
const BEFORE: usize = 32;
/// How long a test may say nothing.
const SILENCE: Duration = Duration::from_secs(2);

/// What is measured, and the context that it takes.
struct Schedule {
    prompt: usize,
    generate: usize,
    n_ctx: usize,
}

/// Samples of one test.
struct Test {
    name: String,
    unit: &'static str,
    samples: Vec<f64>,
    /// Of tests with several users.
    users: Option<Users>,
}

/// Who shares a test's tokens.
struct Users {
    n: usize,
    /// What one alone has.
    of_one: f64,
}

impl Bench {
    pub(crate) fn execute(self) -> Result<()> {
        let mut tests = Vec::new();
        let (open, model) = self.time("open", || self.model.open())?;
        tests.push(open);
        let load = |path: &PathBuf| self.load(path, &model);
        let adapters: Vec<_> = self.adapter.iter().map(load).collect::<Result<_>>()?;
        let adapter = adapters.first();
        let schedule = self.schedule(&model, &adapters)?;
        let options = self.session.options(KvType::F16).n_ctx(schedule.n_ctx);
        let options = options.accept_other_base(self.force);
        let mut session = Session::new(&model, &options)?;
        warn_of_threads(options.n_threads);
        let _guard = interrupt::Guard::new(session.cancel_token());
        if let Some(adapter) = adapter {
            self.adapters(&model, adapter, &mut session, &mut tests)?;
        }
        let mut of_one = None;
        for (name, n, step) in [("pp", schedule.prompt, CHUNK), ("tg", schedule.generate, 1)] {
            if n > 0 {
                let test = self.throughput(name, n, step, &mut session)?;
                of_one = (step == 1).then(|| test.mean());
                tests.push(test);
            }
        }
        for &users in &self.parallel {
            if schedule.generate > 0 {
                let n = schedule.generate;
                let mut test = self.together(&model, &adapters, &options, users, n)?;
                test.users = of_one.map(|of_one| Users { n: users, of_one });
                tests.push(test);
            }
        }
        self.print(&model, adapter, &session, &tests)
    }

    fn load(&self, path: &Path, model: &Model) -> Result<Adapter> {
        load_adapter(path, model, self.task).map_err(|e| e.forced(self.force))
    }

    /// Tests that were asked for must fit; where the length was not said, it is what fits.
    fn schedule(&self, model: &Model, adapters: &[Adapter]) -> Result<Schedule> {
        let (n_ctx, whose) = match self.session.ctx {
            Some(n) => (n, "--ctx has"),
            None => (model.n_ctx_train(), "the model was trained on"),
        };
        // BOS and fixed text of a template.
        let before = |a: &Adapter| a.length().saturating_add(a.template().map_or(0, |_| 64));
        let before = adapters.iter().map(before).max().unwrap_or(0);
        let before = before.saturating_add(self.depth);
        let room = n_ctx.saturating_sub(before);
        let prompt = self.prompt.unwrap_or(room.min(512));
        let generate = self.generate.unwrap_or(room.min(128));
        let needed = before.saturating_add(prompt.max(generate));
        if needed > n_ctx {
            return Err(Failure::Usage(format!(
                "these tests need a context of {needed} tokens, {whose} {n_ctx}: ask for less, or for more with --ctx"
            )));
        }
        Ok(Schedule {
            prompt,
            generate,
            n_ctx: self.session.ctx.unwrap_or(needed.max(1)),
        })
    }

    fn adapters(
        &self,
        model: &Model,
        adapter: &Adapter,
        session: &mut Session,
        tests: &mut Vec<Test>,
    ) -> Result<()> {
        let load = || self.load(&self.adapter[0], model);
        let (test, _) = self.time("load", load)?;
        tests.push(test);

        // An adapter that was just loaded is compiled when it is first put in place.
        let (mut compile, mut attach, mut swap) = (Vec::new(), Vec::new(), Vec::new());
        session
            .attach(adapter, ExistingText::Drop)
            .map_err(|e| Failure::from(e).forced(self.force))?;
        for _ in 0..=self.repetitions {
            let other = load()?;
            session.detach(ExistingText::Drop)?;
            for samples in [&mut compile, &mut attach] {
                let begin = Instant::now();
                session.attach(&other, ExistingText::Drop)?;
                samples.push(milliseconds(begin.elapsed()));
                session.detach(ExistingText::Drop)?;
            }
            session.attach(&other, ExistingText::Drop)?;
            let begin = Instant::now();
            session.swap(adapter, ExistingText::Drop)?;
            swap.push(milliseconds(begin.elapsed()));
        }
        for (name, samples) in [("compile", compile), ("attach", attach), ("swap", swap)] {
            tests.push(Test::new(name, "ms", samples));
        }
        Ok(())
    }

    /// Times `work`, in milliseconds, and hands out what it made last.
    fn time<T>(&self, name: &str, mut work: impl FnMut() -> Result<T>) -> Result<(Test, T)> {
        let mut samples = Vec::new();
        let mut run = || {
            let begin = Instant::now();
            let made = work()?;
            samples.push(milliseconds(begin.elapsed()));
            Ok::<T, Failure>(made)
        };
        let mut last = run()?;
        for _ in 0..self.repetitions {
            drop(last);
            last = run()?;
        }
        Ok((Test::new(name, "ms", samples), last))
    }

    /// Computes `n` tokens, `step` at a time, at the depth asked for.
    fn throughput(&self, name: &str, n: usize, step: usize, session: &mut Session) -> Result<Test> {
        let mut ids = RandomIds::new(session.model().shape().n_vocab);
        tracing::info!("measuring {name}{n}");
        let depth = match self.depth {
            0 => String::new(),
            d => format!(" @ d{d}"),
        };
        let name = format!("{name}{n}{depth}");
        let mut progress = Progress {
            name: &name,
            runs: self.repetitions,
            all: self.depth + n,
            said: Instant::now(),
        };
        let mut samples = Vec::new();
        for run in 0..=self.repetitions {
            session.reset();
            if session.adapter().is_some_and(|a| a.template().is_some()) {
                // Its virtual tokens enter with the prompt.
                session.prompt_tokens(&[])?;
            }
            let mut done = 0;
            let mut feed = |tokens: &[i32], step| -> Result<()> {
                for chunk in tokens.chunks(step) {
                    session.feed(chunk)?;
                    done += chunk.len();
                    progress.at(run, done);
                }
                Ok(())
            };
            feed(&ids.take(self.depth), CHUNK)?;
            let tokens = ids.take(n);
            let begin = Instant::now();
            feed(&tokens, step)?;
            samples.push(n as f64 / begin.elapsed().as_secs_f64().max(f64::MIN_POSITIVE));
        }
        Ok(Test::new(&name, "t/s", samples))
    }

    /// Generates `n` tokens for each of some users.
    fn together(
        &self,
        model: &Model,
        adapters: &[Adapter],
        session: &SessionOptions,
        users: usize,
        n: usize,
    ) -> Result<Test> {
        let mut ids = RandomIds::new(model.shape().n_vocab);
        let depth = match self.depth {
            0 => String::new(),
            d => format!(" @ d{d}"),
        };
        let name = format!("tg{n} x{users}{depth}");
        tracing::info!("measuring {name}");
        let mut options = EngineOptions::from(session);
        options.n_ctx = self.session.ctx;
        (options.max_running, options.max_waiting) = (users, users);
        // Nobody waits for the others' prompts.
        options.n_batch_beside = Some(CHUNK);
        let mut progress = Progress {
            name: &name,
            runs: self.repetitions,
            all: users * n,
            said: Instant::now(),
        };
        let mut samples = Vec::new();
        for run in 0..=self.repetitions {
            let mut scheduler = Scheduler::new(model, &options)?;
            // Who begins first writes until the last one does, and a little longer.
            let mut generate = GenerateOptions::default().sampler(SamplerParams::greedy());
            generate.ignore_eog = true;
            let before = if self.depth == 0 { BEFORE } else { self.depth };
            generate.max_tokens = Some(n + 16 + users * before.div_ceil(CHUNK));
            for user in 0..users {
                let prompt = ids.take(before);
                let mut request = Request::tokens(prompt).generate(generate.clone());
                if let Some(adapter) = adapters.get(user % adapters.len().max(1)) {
                    request = request.adapter(adapter);
                }
                scheduler.submit(request)?;
            }
            let mut step = || -> Result<usize> {
                let before = scheduler.positions_computed();
                for (_, event) in scheduler.step() {
                    if let Event::Failed(e) = event {
                        return Err(e.into());
                    }
                }
                Ok(scheduler.positions_computed() - before)
            };
            // Two steps in a row with a token for each: all prompts are over.
            let mut in_a_row = 0;
            while in_a_row < 2 {
                in_a_row = if step()? == users { in_a_row + 1 } else { 0 };
            }
            let begin = Instant::now();
            let mut done = 0;
            while done < n * users {
                let computed = step()?;
                if computed == 0 {
                    break;
                }
                done += computed;
                progress.at(run, done);
            }
            samples.push(done as f64 / begin.elapsed().as_secs_f64().max(f64::MIN_POSITIVE));
        }
        Ok(Test::new(&name, "t/s", samples))
    }

    fn print(
        &self,
        model: &Model,
        adapter: Option<&Adapter>,
        session: &Session,
        tests: &[Test],
    ) -> Result<()> {
        let memory = Memory::now();
        let gguf = &model.file().main().gguf;
        let name = match gguf.str("general.name") {
            Ok(Some(name)) => name.to_owned(),
            _ => model.shape().architecture.clone(),
        };
        let (mut size, mut params) = (0, 0);
        for (_, tensor) in model.file().tensors() {
            size += tensor.range.len();
            params += tensor.n_elements();
        }
        let threads = session.n_threads();
        let adapter = adapter.map(|a| match a.name() {
            Some(name) => format!("{name} ({})", io::summary(a)),
            None => io::summary(a),
        });
        if self.json {
            let tests: Vec<_> = tests.iter().map(Test::json).collect();
            let object = json!({
                "model": name,
                "path": model.path().to_string_lossy(),
                "size": size,
                "parameters": params,
                "adapter": adapter,
                "threads": threads,
                "cpu_level": CpuLevel::current()?.name(),
                "kv_bytes": session.kv_bytes(),
                "repacked_bytes": model.repacked_bytes(),
                "tests": tests,
                "peak_rss_bytes": memory.peak_rss,
                "rss_anon_bytes": memory.rss_anon,
            });
            return io::print(&format!("{object}\n"));
        }
        let name = name.replace(['|', '\n', '\r'], " ");
        let (size, params) = (mib(size as u64), params as f64 / 1e6);
        let mut out =
            String::from("| model | size | params | threads | test | mean ± deviation |\n");
        out += "| --- | ---: | ---: | ---: | ---: | ---: |\n";
        for test in tests {
            out += &format!(
                "| {name} | {size:.2} MiB | {params:.2} M | {threads} | {} | {} |\n",
                test.name,
                test.text()
            );
        }
        if let Some(adapter) = adapter {
            out += &format!("\nadapter: {adapter}\n");
        }
        out += &format!("\nkernels: {}\n", self.model.kernels()?);
        if let (Some(peak), Some(anon)) = (memory.peak_rss, memory.rss_anon) {
            out += &format!(
                "memory: peak resident {:.1} MiB, anonymous {:.1} MiB (KV cache of a full context {:.1} MiB)\n",
                mib(peak),
                mib(anon),
                mib(session.kv_bytes() as u64)
            );
        }
        io::print(&out)
    }
}

/// Says on stderr how far a test is, if it takes long.
struct Progress<'a> {
    name: &'a str,
    /// Those that count.
    runs: u32,
    /// Tokens of one run.
    all: usize,
    /// When something was said.
    said: Instant,
}

impl Progress<'_> {
    /// `run` 0 is the one that is not counted.
    fn at(&mut self, run: u32, done: usize) {
        if self.said.elapsed() < SILENCE {
            return;
        }
        self.said = Instant::now();
        let Self {
            name, runs, all, ..
        } = self;
        let run = match run {
            0 => "warm-up".to_owned(),
            run => format!("run {run} of {runs}"),
        };
        io::note(&format!("{name}: {run}, {done} of {all} tokens"));
    }
}

impl Test {
    /// The first sample is the warm-up.
    fn new(name: &str, unit: &'static str, mut samples: Vec<f64>) -> Self {
        samples.remove(0);
        Self {
            name: name.to_owned(),
            unit,
            samples,
            users: None,
        }
    }

    fn mean(&self) -> f64 {
        self.samples.iter().sum::<f64>() / self.samples.len() as f64
    }

    /// Of the sample, divided by n - 1; 0 for a single one.
    fn deviation(&self) -> f64 {
        let (mean, n) = (self.mean(), self.samples.len());
        let squares: f64 = self.samples.iter().map(|x| (x - mean).powi(2)).sum();
        (squares / n.saturating_sub(1).max(1) as f64).sqrt()
    }

    fn text(&self) -> String {
        let digits = if self.mean() < 1.0 { 4 } else { 2 };
        let of_users = match &self.users {
            Some(Users { n, of_one }) => format!(
                ", {:.2} each, {:.2} times tg",
                self.mean() / *n as f64,
                self.mean() / of_one
            ),
            None => String::new(),
        };
        format!(
            "{:.digits$} ± {:.digits$} {}{of_users}",
            self.mean(),
            self.deviation(),
            self.unit
        )
    }

    fn json(&self) -> serde_json::Value {
        let mut object = json!({
            "test": self.name,
            "unit": self.unit,
            "mean": self.mean(),
            "deviation": self.deviation(),
            "samples": self.samples,
        });
        if let Some(Users { n, of_one }) = &self.users {
            object["users"] = (*n).into();
            object["each"] = (self.mean() / *n as f64).into();
            object["of_one"] = (self.mean() / of_one).into();
        }
        object
    }
}

fn milliseconds(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Token ids from a linear congruential generator (Knuth's MMIX constants): the same in every run.
struct RandomIds {
    state: u64,
    n_vocab: u64,
}

impl RandomIds {
    fn new(n_vocab: usize) -> Self {
        Self {
            state: 1,
            n_vocab: n_vocab as u64,
        }
    }

    fn take(&mut self, n: usize) -> Vec<i32> {
        let next = || {
            self.state = self
                .state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // The high bits are the random ones; ids fit i32 because the vocabulary's size does.
            ((self.state >> 33) % self.n_vocab) as i32
        };
        std::iter::repeat_with(next).take(n).collect()
    }
}

/// What the kernel says of this process, in bytes; unknown where there is no /proc.
struct Memory {
    peak_rss: Option<u64>,
    rss_anon: Option<u64>,
}

impl Memory {
    fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|l| l.strip_prefix(name))?;
            let kib: u64 = line
                .trim_start_matches(':')
                .trim()
                .strip_suffix(" kB")?
                .parse()
                .ok()?;
            Some(kib * 1024)
        };
        Self {
            peak_rss: field("VmHWM"),
            rss_anon: field("RssAnon"),
        }
    }
}
