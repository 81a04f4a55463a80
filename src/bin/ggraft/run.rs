//! `ggraft run`: text in, text out.

use crate::args::{
    ChatArgs, EnsembleArgs, Limit, ModelArgs, SampleArgs, SessionArgs, StopArgs, parse_limit,
};
use crate::failure::{Failure, Result};
use crate::{interrupt, io};
use clap::Args;
use ggraft::infer::engine::{Event, Request, RequestId, Scheduler};
use ggraft::infer::{GenerateOptions, Generated, KvType, SessionError, StopReason, Timings};
use ggraft::model::chat::ChatMessage;
use ggraft::{Model, Session};
use serde_json::json;
use std::io::IsTerminal;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const EXAMPLES: &str = "Examples:
  ggraft run -m model.gguf -p \"Once upon a time\"
  ggraft run -m model.gguf -a pirate.gguf -p \"The rain has not stopped.\" -n 64 --temp 0
  ggraft run -m model.gguf -a my-peft-folder -f question.txt
  ggraft run -m model.gguf -a one.gguf -a two.gguf --ensemble mean-prob --weights 2,1 -p \"Good\"
  ggraft run -m model.gguf --chat -p \"Why is the sky blue?\"
  cat letter.txt | ggraft run -m model.gguf -n -1 --stop \"THE END\"";

/// Generate text from a prompt
///
/// The text is printed as it is generated, whole characters only, and with a line feed behind it only at a terminal; timings go
/// to stderr. The prompt comes from -p, from a file, or from standard input
/// (also when neither is given and something is piped in), and is used as it is, a line feed at its end included.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Run {
    #[command(flatten)]
    model: ModelArgs,
    /// The prompt
    #[arg(short, long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// `-` reads the prompt from standard input
    #[arg(value_name = "-", value_parser = ["-"], hide_possible_values = true, conflicts_with_all = ["prompt", "file"])]
    stdin: Option<String>,
    /// Understand \n, \t, \r, \" and \\ in the prompt
    #[arg(short, long)]
    escape: bool,
    /// Put the prompt into the model's chat template as the user's message
    #[arg(long)]
    chat: bool,
    /// With --chat: the system message
    #[arg(long, value_name = "TEXT", requires = "chat")]
    system: Option<String>,
    /// Tokens to generate at most; -1: until the text ends (running out of context is an error)
    #[arg(short, value_name = "N", default_value = "128", value_parser = parse_limit)]
    n: Limit,
    #[command(flatten)]
    stops: StopArgs,
    /// Print one JSON object instead: text, tokens, stop reason, timings
    #[arg(long)]
    json: bool,
    /// No timings on stderr
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    adapter: EnsembleArgs,
    #[command(flatten)]
    sample: SampleArgs,
    #[command(flatten)]
    chat_format: ChatArgs,
    #[command(flatten)]
    session: SessionArgs,
}

/// Milliseconds and rates of one run.
struct Report {
    load: Duration,
    /// Reading the adapter and putting it in place; `None` without one.
    attach: Option<Duration>,
    prefill_tokens: usize,
    prefill: Duration,
    decode: Timings,
}

impl Run {
    pub(crate) fn execute(self) -> Result<()> {
        let ChatArgs {
            chat_template,
            parse_special,
        } = &self.chat_format;
        for (option, given) in [
            ("--chat-template formats", chat_template.is_some()),
            ("--parse-special is about", *parse_special),
        ] {
            if given && !self.chat {
                return Err(Failure::Usage(format!(
                    "{option} a conversation: add --chat"
                )));
            }
        }
        let text = self.prompt_text()?;
        let begin = Instant::now();
        let model = self.model.open_with(&self.chat_format)?;
        let load = begin.elapsed();
        let params = self.sample.params(&model)?;
        let seed = params.seed;

        let begin = Instant::now();
        let ensemble = self.adapter.load(&model)?;
        let session = self.session.options(KvType::F16);
        let tokens = match self.chat {
            true => chat_prompt(&model, self.system.as_deref(), text)?,
            false => model.vocab().tokenize_start(&text)?,
        };
        let mut options = GenerateOptions::default().sampler(params);
        options.max_tokens = self.n.0;
        options.stop = self.stops.stop.clone();
        let show = !self.json;
        let (attach, prefill_tokens, prefill, output) =
            match (self.adapter.combine(), ensemble.members()) {
                (None, [member]) => {
                    let mut session = self.adapter.session(&model, session, member.as_ref())?;
                    let attach = begin.elapsed();
                    let _guard = interrupt::Guard::new(session.cancel_token());
                    let (begin, before) = (Instant::now(), session.n_past());
                    session.prompt_tokens(&tokens)?;
                    let (prefill, n) = (begin.elapsed(), session.n_past() - before);
                    let output = generate(&mut session, &options, show)?;
                    (attach, n, prefill, output)
                }
                _ => {
                    let mut scheduler = self.adapter.scheduler(&model, &ensemble, session, 1)?;
                    let request = Request::tokens(tokens).generate(options);
                    let id = scheduler.submit(request.ensemble(&ensemble).until_full(true))?;
                    let attach = begin.elapsed();
                    let _guard = interrupt::Guard::new(scheduler.cancel_token());
                    let begin = Instant::now();
                    let output = together(&mut scheduler, id, show)?;
                    let decoded = ensemble.members().len() * output.timings.decode_tokens;
                    let prefill = begin.elapsed().saturating_sub(output.timings.decode);
                    let n = scheduler.positions_computed().saturating_sub(decoded);
                    (attach, n, prefill, output)
                }
            };
        let report = Report {
            load,
            attach: (!self.adapter.adapter.is_empty()).then_some(attach),
            prefill_tokens,
            prefill,
            decode: output.timings,
        };
        if self.json {
            let object = json!({
                "text": output.text,
                "tokens": output.tokens,
                "stop_reason": output.stop_reason,
                "seed": seed,
                "timings": report.json(),
            });
            io::print(&format!("{object}\n"))?;
        } else if std::io::stdout().is_terminal() {
            // What follows on the screen begins a line of its own. A file or a pipe gets the text as it is.
            io::print("\n")?;
        }
        if !self.quiet {
            io::note(&report.to_string());
        }
        output.failure.map_or(Ok(()), Err)
    }

    fn prompt_text(&self) -> Result<String> {
        let text = match (&self.prompt, &self.file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => io::read_text(path)?,
            (None, None) if self.stdin.is_some() || !std::io::stdin().is_terminal() => {
                io::read_text(Path::new("-"))?
            }
            (None, None) => {
                return Err(Failure::Usage(
                    "no prompt: give one with -p TEXT or -f FILE, or pipe it in".to_owned(),
                ));
            }
        };
        Ok(if self.escape { unescape(&text) } else { text })
    }
}

/// What one generation gave, up to the failure that ended it.
struct Output {
    text: String,
    tokens: Vec<i32>,
    stop_reason: &'static str,
    timings: Timings,
    failure: Option<Failure>,
}

/// Generates; with `show` the text appears as it comes. Failures after the first token are part of the output.
fn generate(session: &mut Session, options: &GenerateOptions, show: bool) -> Result<Output> {
    let (begin, before) = (Instant::now(), session.tokens().len());
    let mut text = String::new();
    let mut stdout = Ok(());
    let result = session.generate(options, |piece| {
        text.push_str(piece);
        if show {
            stdout = io::print(piece);
        }
        match stdout {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    });
    stdout?;
    match result {
        Ok(done) => {
            let reason = stop_reason(done.reason);
            Ok(Output::new(done, reason, None))
        }
        Err(e) => {
            let failure = Failure::from(e);
            let stop_reason = if failure.is_context_full() {
                "context_full"
            } else if failure.is_cancelled() {
                "cancelled"
            } else {
                return Err(failure);
            };
            let tokens = session.tokens().split_off(before);
            let timings = Timings {
                // The last one is where it failed.
                decode_tokens: tokens.len().saturating_sub(1),
                decode: begin.elapsed(),
                ..Timings::default()
            };
            Ok(Output {
                text,
                tokens,
                stop_reason,
                timings,
                failure: Some(failure),
            })
        }
    }
}

/// Lets an ensemble answer; otherwise as [`generate`].
fn together(scheduler: &mut Scheduler, id: RequestId, show: bool) -> Result<Output> {
    let cancel = scheduler.cancel_token();
    loop {
        if cancel.is_cancelled() {
            let broken = scheduler.cancel(id);
            let out = broken.expect("a request that is not over");
            let failure = Some(Failure::from(SessionError::Cancelled));
            return Ok(Output::new(out, "cancelled", failure));
        }
        for (_, event) in scheduler.step() {
            match event {
                Event::Text(piece) if show => io::print(&piece)?,
                Event::Done(out) => {
                    let reason = stop_reason(out.reason);
                    let is_full = out.reason == StopReason::ContextFull;
                    return Ok(Output::new(out, reason, is_full.then_some(Failure::NoRoom)));
                }
                Event::Failed(e) => return Err(e.into()),
                _ => {}
            }
        }
    }
}

impl Output {
    fn new(out: Generated, stop_reason: &'static str, failure: Option<Failure>) -> Self {
        Self {
            text: out.text,
            tokens: out.tokens,
            stop_reason,
            timings: out.timings,
            failure,
        }
    }
}

pub(crate) fn stop_reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::EndOfGeneration => "end_of_text",
        StopReason::MaxTokens => "max_tokens",
        StopReason::StopString => "stop_string",
        StopReason::Callback => "callback",
        StopReason::ContextFull => "context_full",
    }
}

/// Tokens of `text` as the user's message, up to where the answer begins.
fn chat_prompt(model: &Model, system: Option<&str>, text: String) -> Result<Vec<i32>> {
    require_template(model)?;
    let mut messages: Vec<_> = system
        .map(|text| ChatMessage::new("system", text))
        .into_iter()
        .collect();
    messages.push(ChatMessage::new("user", text));
    Ok(model.vocab().tokenize_chat(&messages, true)?)
}

/// Fails for a model without chat template: any other model's format would only confuse it.
pub(crate) fn require_template(model: &Model) -> Result<()> {
    match model.vocab().chat_template() {
        Some(_) => Ok(()),
        None => Err(Failure::Unsuitable(format!(
            "{} has no chat template: it continues text, it does not chat (--chat-template gives it one)",
            model.path().display()
        ))),
    }
}

/// Replaces \n, \t, \r, \", \' and \\; any other backslash stays.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        let escaped = match chars.clone().next() {
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some(c @ ('"' | '\'' | '\\')) => c,
            _ => {
                out.push('\\');
                continue;
            }
        };
        out.push(escaped);
        chars.next();
    }
    out
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

impl Report {
    fn prefill_rate(&self) -> f64 {
        self.prefill_tokens as f64 / self.prefill.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "load_ms": ms(self.load),
            "attach_ms": self.attach.map(ms),
            "prefill_tokens": self.prefill_tokens,
            "prefill_ms": ms(self.prefill),
            "prefill_tokens_per_second": self.prefill_rate(),
            "decode_tokens": self.decode.decode_tokens,
            "decode_ms": ms(self.decode.decode),
            "decode_tokens_per_second": self.decode.decode_rate(),
        })
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "load {:.1} ms", ms(self.load))?;
        if let Some(attach) = self.attach {
            write!(f, ", adapter {:.1} ms", ms(attach))?;
        }
        write!(
            f,
            ", prefill {} tokens at {:.1} tok/s, decode {} tokens at {:.1} tok/s",
            self.prefill_tokens,
            self.prefill_rate(),
            self.decode.decode_tokens,
            self.decode.decode_rate()
        )
    }
}
