//! Rows as tokens: what is given, and what is to be predicted.

use super::row::ASSISTANT;
use super::{Content, DataError, Example, Instruction, Prompt, Row};
use crate::model::Model;
use crate::model::chat::{ChatMessage, ChatScript, Conversation};
use crate::model::vocab::VocabError;

/// Token ids, and whether each counts.
type Counted = Vec<(i32, bool)>;

impl Row {
    /// What the row gives and what it asks for, for a loss.
    ///
    /// Special tokens in a prompt, a completion or a text are recognised, as Transformers' tokenizers do; in messages and
    /// instructions, whether or not the model has a chat template, they are text unless
    /// [`ChatOptions::parse_special`](crate::model::vocab::ChatOptions::parse_special) says otherwise.
    ///
    /// # Errors
    /// If nothing can be predicted, if the text cannot be tokenized, or if there are messages and the model's chat template
    /// cannot tell them apart.
    pub fn example(&self, model: &Model) -> Result<Example, DataError> {
        match &self.content {
            Content::Completion {
                prompt,
                completion: Some(completion),
            } => self.pair(model, prompt, completion, true),
            Content::Completion { .. } => Err(self.no_completion("'completion'")),
            Content::Text(text) => self.text(model, text),
            Content::Messages {
                conversation,
                given,
                skipped,
            } => self.conversation(model, conversation, *given, skipped),
            Content::Instruction(instruction) => match &instruction.output {
                None => Err(self.no_completion("'output', 'response' or 'answer'")),
                Some(_) if model.vocab().chat_template().is_some() => {
                    self.conversation(model, &instruction.conversation(), 0, &[])
                }
                Some(output) => {
                    let special = model.vocab().parses_special();
                    self.pair(model, &instruction.alpaca(), output, special)
                }
            },
        }
    }

    /// What the row asks for, for a completion: of a conversation, the message that comes next or the assistant's last.
    ///
    /// # Errors
    /// As [`Row::example`].
    pub fn prompt(&self, model: &Model) -> Result<Prompt, DataError> {
        match &self.content {
            Content::Completion { prompt, completion } => {
                self.plain_prompt(model, prompt, completion.as_deref(), true)
            }
            Content::Messages { conversation, .. } => self.chat_prompt(model, conversation),
            Content::Instruction(instruction) if model.vocab().chat_template().is_some() => {
                self.chat_prompt(model, &instruction.conversation())
            }
            Content::Instruction(instruction) => {
                let special = model.vocab().parses_special();
                let output = instruction.output.as_deref();
                self.plain_prompt(model, &instruction.alpaca(), output, special)
            }
            Content::Text(_) => Err(DataError::NoPrompt {
                place: self.place.clone(),
            }),
        }
    }

    /// A text and how it goes on, in which special tokens are tokens if `special`.
    fn pair(
        &self,
        model: &Model,
        prompt: &str,
        completion: &str,
        special: bool,
    ) -> Result<Example, DataError> {
        let given = self.try_vocab(model.vocab().tokenize_start_with(prompt, special))?;
        self.completion(model, given, completion, special)
    }

    /// As [`Row::pair`], perhaps without the completion.
    fn plain_prompt(
        &self,
        model: &Model,
        prompt: &str,
        completion: Option<&str>,
        special: bool,
    ) -> Result<Prompt, DataError> {
        let tokens = self.try_vocab(model.vocab().tokenize_start_with(prompt, special))?;
        Ok(Prompt {
            text: prompt.to_owned(),
            answer: completion
                .map(|text| self.completion(model, tokens.clone(), text, special))
                .transpose()?,
            tokens,
        })
    }

    fn chat_prompt(&self, model: &Model, conversation: &Conversation) -> Result<Prompt, DataError> {
        let script = self.script(model, conversation)?;
        let messages = &conversation.messages;
        let answered = messages.last().is_some_and(|last| last.role() == ASSISTANT);
        let given = messages.len() - usize::from(answered);
        let text = self.try_vocab(script.render(given, true).map_err(Into::into))?;
        let tokens = self.try_vocab(script.tokens_from_start(&text))?;
        let answer = answered
            .then(|| {
                let (all, turns) = self.try_vocab(script.turns(given).map_err(Into::into))?;
                let mut cut = Cut::new(&script, &all);
                self.try_vocab(cut.up_to(turns[0].start))?;
                let answer = self.answer(model, &mut cut, turns[0].end)?;
                self.start(model, tokens.clone(), answer)
            })
            .transpose()?;
        Ok(Prompt {
            text: script.plain(&text),
            tokens,
            answer,
        })
    }

    /// `text` and EOS behind `given`, all of it counted.
    fn completion(
        &self,
        model: &Model,
        given: Vec<i32>,
        text: &str,
        special: bool,
    ) -> Result<Example, DataError> {
        let ids = self.try_vocab(model.vocab().tokenize_end(text, special))?;
        self.start(model, given, ids.into_iter().map(|id| (id, true)).collect())
    }

    fn text(&self, model: &Model, text: &str) -> Result<Example, DataError> {
        let vocab = model.vocab();
        let mut ids = self.try_vocab(match self.goes_on {
            true => vocab.tokenize(text, false, true),
            false => vocab.tokenize_end(text, true),
        })?;
        vocab.drop_doubled_bos(&mut ids);
        self.start(
            model,
            Vec::new(),
            ids.into_iter().map(|id| (id, true)).collect(),
        )
    }

    /// Where nothing stands before the first token (no prompt, no BOS), nothing can predict it: it is given.
    fn start(
        &self,
        model: &Model,
        mut given: Vec<i32>,
        mut then: Counted,
    ) -> Result<Example, DataError> {
        if given.is_empty() && !model.vocab().add_bos() && !then.is_empty() {
            given.push(then.remove(0).0);
        }
        if then.is_empty() {
            return Err(DataError::NoTargets {
                place: self.place.clone(),
            });
        }
        Ok(Example {
            given,
            then,
            weight: self.weight,
            bos: true,
        })
    }

    /// The assistant's messages among those from `given` on that are not `skipped`, and the ends of their turns.
    fn conversation(
        &self,
        model: &Model,
        conversation: &Conversation,
        given: usize,
        skipped: &[usize],
    ) -> Result<Example, DataError> {
        let messages = conversation.messages.iter().enumerate().skip(given);
        let said = messages.filter(|(_, m)| m.role() == ASSISTANT);
        let learned: Vec<bool> = said.map(|(i, _)| !skipped.contains(&i)).collect();
        let place = || self.place.clone();
        if learned.is_empty() {
            return Err(DataError::NoAnswer { place: place() });
        }
        let script = self.script(model, conversation)?;
        let (all, turns) = self.try_vocab(script.turns(given).map_err(Into::into))?;
        let turns = turns.into_iter().zip(learned);
        let turns: Vec<_> = turns.filter_map(|(turn, l)| l.then_some(turn)).collect();
        let Some(first) = turns.first() else {
            return Err(DataError::NoTargets { place: place() });
        };
        let mut cut = Cut::new(&script, &all);
        let mut start = self.try_vocab(cut.up_to(first.start))?;
        model.vocab().strip_bos(&mut start);
        let mut then = Counted::new();
        for turn in turns {
            let between = self.try_vocab(cut.up_to(turn.start))?;
            then.extend(between.into_iter().map(|id| (id, false)));
            then.extend(self.answer(model, &mut cut, turn.end)?);
        }
        // Nothing is learned behind the last turn.
        let end = then.iter().rposition(|&(_, counts)| counts);
        then.truncate(end.map_or(0, |at| at + 1));
        self.start(model, start, then)
    }

    /// The tokens of one turn, which ends at `end`. Its end counts as a part of the answer, what the template puts behind it does not.
    fn answer(&self, model: &Model, cut: &mut Cut<'_>, end: usize) -> Result<Counted, DataError> {
        let ids = self.try_vocab(cut.up_to(end))?;
        let end = ids.iter().position(|&id| model.vocab().is_eog(id));
        if end.is_none() {
            model.vocab().warn_of_endless_turn(&self.place);
        }
        let counted = end.map_or(ids.len(), |at| at + 1);
        let count = |(i, id)| (id, i < counted);
        Ok(ids.into_iter().enumerate().map(count).collect())
    }

    fn script<'m>(
        &self,
        model: &'m Model,
        conversation: &Conversation,
    ) -> Result<ChatScript<'m>, DataError> {
        match model.vocab().script(conversation) {
            Err(VocabError::NoChatTemplate) => Err(DataError::NoChatTemplate {
                place: self.place.clone(),
                model: model.path().to_owned(),
            }),
            other => self.try_vocab(other),
        }
    }

    /// The rows that it is cut into, if its text has more than `max_tokens` tokens.
    pub(super) fn split_text(
        &self,
        model: &Model,
        max_tokens: usize,
    ) -> Result<Option<Vec<Self>>, DataError> {
        let Content::Text(text) = &self.content else {
            return Ok(None);
        };
        let ids = self.try_vocab(model.vocab().tokenize(text, false, true))?;
        if ids.len() <= max_tokens {
            return Ok(None);
        }
        let mut rows = Vec::new();
        // Where each token ends. Token texts may begin with a space that the text has not: places are counted from its end.
        let mut left = 0;
        let mut ends: Vec<_> = ids
            .iter()
            .rev()
            .map(|&id| {
                let mut end = text.len().saturating_sub(left);
                while !text.is_char_boundary(end) {
                    end -= 1;
                }
                left += model.vocab().token_bytes(id, true).len();
                end
            })
            .collect();
        ends.reverse();
        let (mut first, mut from) = (0, 0);
        while from < text.len() {
            let mut n = max_tokens.min(ends.len() - first);
            let to = loop {
                let to = ends[first + n - 1];
                // On its own a piece may have other tokens than it has in the text.
                let piece = self.try_vocab(model.vocab().tokenize(&text[from..to], false, true))?;
                if piece.len() <= max_tokens || n == 1 {
                    break to;
                }
                n = n.saturating_sub(piece.len() - max_tokens).max(1);
            };
            first += n;
            if to > from {
                rows.push(Self {
                    content: Content::Text(text[from..to].to_owned()),
                    weight: self.weight,
                    place: self.place.clone(),
                    goes_on: to < text.len(),
                });
            }
            from = to;
        }
        Ok(Some(rows))
    }

    fn no_completion(&self, field: &'static str) -> DataError {
        DataError::NoCompletion {
            place: self.place.clone(),
            field,
        }
    }

    fn try_vocab<T>(&self, result: Result<T, VocabError>) -> Result<T, DataError> {
        result.map_err(|source| DataError::Vocab {
            place: self.place.clone(),
            source,
        })
    }
}

/// The text of a conversation, handed out as tokens part by part.
struct Cut<'s> {
    script: &'s ChatScript<'s>,
    text: &'s str,
    at: usize,
    /// Tokens of the text up to there.
    done: Vec<i32>,
}

impl<'s> Cut<'s> {
    fn new(script: &'s ChatScript<'s>, text: &'s str) -> Self {
        Self {
            script,
            text,
            at: 0,
            done: Vec::new(),
        }
    }

    /// The tokens of the text from where it was cut last up to byte `end`. Where the tokens of the text up to `end` begin with
    /// those that were handed out, they are the rest, as if the whole was tokenized at once.
    fn up_to(&mut self, end: usize) -> Result<Vec<i32>, VocabError> {
        let from = std::mem::replace(&mut self.at, end);
        if from == end {
            return Ok(Vec::new());
        }
        let whole = self.script.tokens(&self.text[..end])?;
        let new = match whole.strip_prefix(&self.done[..]) {
            Some(rest) => rest.to_vec(),
            None => self.script.tokens(&self.text[from..end])?,
        };
        self.done = whole;
        Ok(new)
    }
}

impl Instruction {
    /// Instruction and input as the user's message, and the output, if there is one, as the assistant's.
    fn conversation(&self) -> Conversation {
        let Self {
            system,
            instruction,
            input,
            output,
        } = self;
        let system = system.as_deref().filter(|text| !text.is_empty());
        let user = match &input[..] {
            "" => instruction.clone(),
            input => format!("{instruction}\n{input}"),
        };
        let said = [
            system.map(|text| ChatMessage::new("system", text)),
            Some(ChatMessage::new("user", user)),
            output
                .as_deref()
                .map(|text| ChatMessage::new(ASSISTANT, text)),
        ];
        Conversation::new(said.into_iter().flatten().collect())
    }

    /// The prompt of Stanford's Alpaca.
    fn alpaca(&self) -> String {
        let instruction = &self.instruction;
        match &self.input[..] {
            "" => format!(
                "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n\
                 ### Instruction:\n{instruction}\n\n### Response:\n"
            ),
            input => format!(
                "Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
                 that appropriately completes the request.\n\n\
                 ### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
            ),
        }
    }
}
