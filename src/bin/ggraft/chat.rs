//! `ggraft chat`: a conversation, with adapters swapped in between.

mod saved;
mod turns;

use crate::args::{
    ChatArgs, Limit, ModelArgs, NONE, SampleArgs, SessionArgs, load_adapter, new_session,
    parse_limit, stem,
};
use crate::failure::{Failure, Result};
use crate::{interrupt, io};
use clap::Args;
use ggraft::infer::{ExistingText, GenerateOptions, KvType};
use ggraft::model::chat::{ChatMessage, Conversation};
use ggraft::{Adapter, Session, SessionOptions};
use std::ffi::OsString;
use std::ops::ControlFlow;
use std::path::PathBuf;
use turns::Turn;

const EXAMPLES: &str = "In the conversation:
  /adapter NAME   swap to this adapter; the conversation so far is computed again under it
  /adapter none   go on without an adapter
  /adapters       list them; * marks the one in use
  /undo           take back the last line and its answer
  /save FILE      keep the conversation in a file, with what was computed of it
  /load FILE      go on with it, under the same model and adapter, without computing it again
  /reset          forget the conversation
  /help, /quit

Ctrl-C ends the answer that is being written.

Examples:
  ggraft chat -m model.gguf
  ggraft chat -m model.gguf -a pirate.gguf -a polite=butler-v2.gguf
  printf '/adapter pirate\\nThe rain has not stopped.\\n' |
      ggraft chat -m model.gguf -a pirate.gguf --temp 0

A model with a chat template gets each line as the user's message. A model without one (a base model) gets it as text, with a \
line feed behind it, and continues until it ends the text; the next line continues that text on a line of its own.";

/// Talk to a model, swapping adapters in mid-conversation
///
/// Reads lines and answers each. Works in a pipe, too: then only the answers are printed, and the first error ends it.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Chat {
    #[command(flatten)]
    model: ModelArgs,
    /// Adapter (GGUF file or PEFT folder) to have at hand, under the name of its file if none is given; can be given several
    /// times. The first is in use at the start
    #[arg(short, long, value_name = "[NAME=]FILE")]
    adapter: Vec<OsString>,
    /// Use adapters even if they were made for another model of the same shape
    #[arg(long, requires = "adapter")]
    force: bool,
    /// The system message (needs a chat template)
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Tokens of one answer at most; -1: until the answer ends
    #[arg(short, value_name = "N", default_value = "512", value_parser = parse_limit)]
    n: Limit,
    #[command(flatten)]
    sample: SampleArgs,
    #[command(flatten)]
    chat_format: ChatArgs,
    #[command(flatten)]
    session: SessionArgs,
}

impl Chat {
    pub(crate) fn execute(self) -> Result<()> {
        let model = self.model.open_with(&self.chat_format)?;
        if self.system.is_some() {
            crate::run::require_template(&model)?;
        }
        let mut options = GenerateOptions::default().sampler(self.sample.params(&model)?);
        options.max_tokens = self.n.0;
        let mut adapters: Vec<(String, Adapter)> = Vec::new();
        for arg in &self.adapter {
            let (name, path) = named_path(arg);
            if name == NONE || adapters.iter().any(|(other, _)| *other == name) {
                return Err(Failure::Usage(format!(
                    "the adapter name '{name}' is taken: give another one with -a NAME={}",
                    path.display()
                )));
            }
            let adapter = load_adapter(&path, &model, None).map_err(|e| e.forced(self.force))?;
            adapters.push((name, adapter));
        }
        let first = adapters.first().map(|(_, adapter)| adapter);
        let how = self.session.options(KvType::F16);
        let session = new_session(&model, how.clone(), first, self.force)?;
        let system: Vec<_> = self
            .system
            .iter()
            .map(|text| ChatMessage::new("system", text.as_str()))
            .collect();
        let mut talk = Talk {
            session,
            how,
            adapters,
            options,
            templated: model.vocab().chat_template().is_some(),
            messages: system.clone(),
            system,
            fed: None,
            turns: Vec::new(),
            force: self.force,
            interactive: io::is_interactive(),
        };
        talk.greet();
        talk.converse()
    }
}

/// `NAME=FILE`, or a path that names itself. A `=` behind a separator belongs to the path.
fn named_path(arg: &OsString) -> (String, PathBuf) {
    if let Some((name, path)) = arg.to_str().and_then(|text| text.split_once('='))
        && !name.is_empty()
        && !name.contains(['/', '\\'])
    {
        return (name.to_owned(), path.into());
    }
    let path = PathBuf::from(arg);
    (stem(&path), path)
}

struct Talk {
    session: Session,
    /// Options of the session.
    how: SessionOptions,
    adapters: Vec<(String, Adapter)>,
    options: GenerateOptions,
    /// The model has a chat template.
    templated: bool,
    system: Vec<ChatMessage>,
    /// With a template: the conversation so far.
    messages: Vec<ChatMessage>,
    /// With a template: the formatted text (as `ChatScript::render` gives it) that the session has computed; `None` if it must be
    /// computed from the start.
    fed: Option<String>,
    /// What can be taken back, the last turn at the end.
    turns: Vec<Turn>,
    /// Adapters of other models of the same shape are welcome.
    force: bool,
    interactive: bool,
}

enum Next {
    Continue,
    Quit,
}

impl Talk {
    fn greet(&self) {
        if self.interactive {
            let names: Vec<_> = self
                .adapters
                .iter()
                .map(|(name, _)| name.as_str())
                .collect();
            if !names.is_empty() {
                io::note(&format!(
                    "adapters: {} (in use: {})",
                    names.join(", "),
                    names[0]
                ));
            }
            io::note("/help lists the commands, /quit or Ctrl-D ends");
        }
    }

    fn converse(&mut self) -> Result<()> {
        let mut lines = io::Lines::stdin();
        loop {
            if self.interactive {
                io::print("> ")?;
            }
            let done = match lines.next() {
                None => break,
                Some(line) => line.and_then(|line| self.answer(&line)),
            };
            match done {
                Ok(Next::Continue) => {}
                Ok(Next::Quit) => return Ok(()),
                // At a terminal the conversation goes on, whatever went wrong with this line.
                Err(e) if self.interactive && !matches!(e, Failure::Stdout(_)) => {
                    io::note(&format!("error: {}", e.line()));
                }
                Err(e) => return Err(e),
            }
        }
        if self.interactive {
            io::print("\n")?;
        }
        Ok(())
    }

    fn answer(&mut self, line: &str) -> Result<Next> {
        if line.trim().is_empty() {
            return Ok(Next::Continue);
        }
        match line.strip_prefix('/') {
            Some(command) => self.command(command),
            None => {
                let _guard = interrupt::Guard::new(self.session.cancel_token());
                let result = if self.templated {
                    self.turn(line)
                } else {
                    self.text(line)
                };
                // The answer's line ends here, whether it is whole or not.
                io::print("\n")?;
                result.map(|()| Next::Continue)
            }
        }
    }

    fn command(&mut self, command: &str) -> Result<Next> {
        let (name, argument) = command
            .split_once(char::is_whitespace)
            .map_or((command, ""), |(name, rest)| (name, rest.trim()));
        match (name, argument) {
            ("quit" | "exit", "") => return Ok(Next::Quit),
            ("help", "") => io::print(
                "/adapter NAME  /adapter none  /adapters  /undo  /save FILE  /load FILE  /reset  /help  /quit; anything else is text\n",
            )?,
            ("reset", "") => {
                self.session.reset();
                self.messages = self.system.clone();
                self.fed = None;
                self.turns.clear();
            }
            ("undo", "") => self.undo()?,
            ("save", file) if !file.is_empty() => self.save(file.as_ref())?,
            ("load", file) if !file.is_empty() => self.load(file.as_ref())?,
            ("adapters", "") => io::print(&self.list())?,
            ("adapter", NONE) => self.change(None)?,
            ("adapter", wanted) if !wanted.is_empty() => {
                let found = self.adapters.iter().find(|(name, _)| name == wanted);
                let Some((_, adapter)) = found else {
                    let names: Vec<_> = self.adapters.iter().map(|(n, _)| n.as_str()).collect();
                    return Err(Failure::Unsuitable(format!(
                        "no adapter is called '{wanted}' (there are: {})",
                        [&names[..], &[NONE]].concat().join(", ")
                    )));
                };
                self.change(Some(adapter.clone()))?;
            }
            _ => {
                return Err(Failure::Unsuitable(format!(
                    "unknown command '/{command}': /help lists the commands"
                )));
            }
        }
        Ok(Next::Continue)
    }

    /// Computes the conversation so far again under another adapter, or none.
    fn change(&mut self, adapter: Option<Adapter>) -> Result<()> {
        let _guard = interrupt::Guard::new(self.session.cancel_token());
        let result = match adapter {
            Some(adapter) => self.session.swap(&adapter, ExistingText::Recompute),
            None if self.session.adapter().is_none() => Ok(()),
            None => self.session.detach(ExistingText::Recompute),
        };
        if result.is_err() {
            // What the session still holds is not known.
            self.forget_fed();
        }
        result.map_err(|e| Failure::from(e).forced(self.force))
    }

    fn list(&self) -> String {
        let current = self.session.adapter().map(Adapter::id);
        let mark = |on| if on { '*' } else { ' ' };
        let mut out = String::new();
        for (name, adapter) in &self.adapters {
            out += &format!(
                "{} {name}: {}, {} virtual tokens\n",
                mark(current == Some(adapter.id())),
                adapter.kind(),
                adapter.length()
            );
        }
        out + &format!("{} {NONE}\n", mark(current.is_none()))
    }

    /// One turn of a conversation in the model's own format. Only what is new since the last turn is computed.
    fn turn(&mut self, line: &str) -> Result<()> {
        let before = self.messages.len();
        self.turn_begins();
        self.messages.push(ChatMessage::new("user", line));
        let result = self.reply();
        if let Err(e) = &result {
            // What the session holds is not known: the next turn computes the conversation afresh.
            self.fed = None;
            let answered = self.messages.len() == before + 2;
            // An answer that was interrupted stays as it is.
            if !(answered && e.is_cancelled()) {
                self.messages.truncate(before);
                self.turns.pop();
            }
        }
        result
    }

    fn reply(&mut self) -> Result<()> {
        let model = self.session.model().clone();
        let conversation = Conversation::new(self.messages.clone());
        let script = model.vocab().script(&conversation)?;
        let text = script
            .render(self.messages.len(), true)
            .map_err(ggraft::Error::from)?;
        let new = match &self.fed {
            Some(fed) if text.starts_with(fed.as_str()) => script.tokens(&text[fed.len()..])?,
            _ => {
                self.session.reset();
                self.forget_fed();
                script.tokens_from_start(&text)?
            }
        };
        self.prefill(|session| session.prompt_tokens(&new))?;
        let mut answer = String::new();
        let result = self.generate(&mut answer);
        // Most templates trim what they are given: the text that the session holds is the same for the model.
        let answer = answer.trim();
        self.messages.push(ChatMessage::new("assistant", answer));
        result?;
        self.fed = Some(text + answer);
        Ok(())
    }

    /// One line for a model that only continues text.
    fn text(&mut self, line: &str) -> Result<()> {
        let begins = self.session.tokens().is_empty();
        let before = if begins { "" } else { "\n" };
        let text = format!("{before}{line}\n");
        self.turn_begins();
        let prefilled = self.prefill(|session| session.prompt(&text));
        if prefilled.is_err() {
            // Nothing of it is there.
            self.turns.pop();
        }
        prefilled?;
        self.generate(&mut String::new())
    }

    fn prefill(&mut self, prompt: impl FnOnce(&mut Session) -> ggraft::Result<()>) -> Result<()> {
        let before = self.session.n_past();
        prompt(&mut self.session)?;
        tracing::info!("prefill of {} tokens", self.session.n_past() - before);
        Ok(())
    }

    fn generate(&mut self, answer: &mut String) -> Result<()> {
        let mut stdout = Ok(());
        let result = self.session.generate(&self.options, |piece| {
            answer.push_str(piece);
            stdout = io::print(piece);
            match stdout {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        });
        stdout?;
        result?;
        Ok(())
    }
}
