//! Rows as tokens: what is given, and what is to be predicted.

use super::row::ASSISTANT;
use super::{Content, DataError, Example, Prompt, Row};
use crate::model::Model;
use crate::model::chat::{ChatMessage, ChatScript, Conversation};
use crate::model::vocab::VocabError;
use std::ops::Range;

/// Token ids, and whether each counts.
type Counted = Vec<(i32, bool)>;

impl Row {
    /// What the row gives and what it asks for, for a loss.
    ///
    /// Special tokens in a prompt, a completion or a text are recognised, as Transformers' tokenizers do; in messages they are
    /// text unless [`ChatOptions::parse_special`](crate::model::vocab::ChatOptions::parse_special) says otherwise.
    ///
    /// # Errors
    /// If nothing can be predicted, if the text cannot be tokenized, or if there are messages and the model's chat template
    /// cannot tell them apart.
    pub fn example(&self, model: &Model) -> Result<Example, DataError> {
        match &self.content {
            Content::Completion {
                prompt,
                completion: Some(completion),
            } => {
                let given = self.try_vocab(model.vocab().tokenize_start(prompt))?;
                self.completion(model, given, completion)
            }
            Content::Completion { .. } => Err(self.no_completion()),
            Content::Text(text) => self.text(model, text),
            Content::Messages {
                conversation,
                given,
            } => self.conversation(model, conversation, *given),
            Content::Instruction { output: None, .. } => Err(self.no_completion()),
            Content::Instruction {
                system,
                instruction,
                input,
                output: Some(output),
            } => match model.vocab().chat_template() {
                Some(_) => {
                    let mut conversation = instruct(system.as_deref(), instruction, input);
                    let messages = &mut conversation.messages;
                    messages.push(ChatMessage::new(ASSISTANT, output.as_str()));
                    self.conversation(model, &conversation, 0)
                }
                None => {
                    let prompt = alpaca(instruction, input);
                    let given = self.try_vocab(model.vocab().tokenize_start(&prompt))?;
                    self.completion(model, given, output)
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
                self.plain_prompt(model, prompt, completion.as_deref())
            }
            Content::Messages { conversation, .. } => self.chat_prompt(model, conversation),
            Content::Instruction {
                system,
                instruction,
                input,
                output,
            } => match model.vocab().chat_template() {
                Some(_) => {
                    let mut conversation = instruct(system.as_deref(), instruction, input);
                    let answer = output
                        .iter()
                        .map(|o| ChatMessage::new(ASSISTANT, o.as_str()));
                    conversation.messages.extend(answer);
                    self.chat_prompt(model, &conversation)
                }
                None => self.plain_prompt(model, &alpaca(instruction, input), output.as_deref()),
            },
            Content::Text(_) => Err(DataError::NoPrompt {
                place: self.place.clone(),
            }),
        }
    }

    fn plain_prompt(
        &self,
        model: &Model,
        prompt: &str,
        completion: Option<&str>,
    ) -> Result<Prompt, DataError> {
        let tokens = self.try_vocab(model.vocab().tokenize_start(prompt))?;
        Ok(Prompt {
            text: prompt.to_owned(),
            answer: completion
                .map(|text| self.completion(model, tokens.clone(), text))
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
                let answer = self.answer(model, &script, &all, turns[0].clone())?;
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
    fn completion(&self, model: &Model, given: Vec<i32>, text: &str) -> Result<Example, DataError> {
        let ids = self.try_vocab(model.vocab().tokenize_end(text))?;
        self.start(model, given, ids.into_iter().map(|id| (id, true)).collect())
    }

    fn text(&self, model: &Model, text: &str) -> Result<Example, DataError> {
        let vocab = model.vocab();
        let mut ids = self.try_vocab(match self.goes_on {
            true => vocab.tokenize(text, false, true),
            false => vocab.tokenize_end(text),
        })?;
        vocab.strip_bos(&mut ids);
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

    /// The assistant's messages among those from `given` on, and the ends of their turns.
    fn conversation(
        &self,
        model: &Model,
        conversation: &Conversation,
        given: usize,
    ) -> Result<Example, DataError> {
        let mut asked = conversation.messages.iter().skip(given);
        if !asked.any(|m| m.role() == ASSISTANT) {
            return Err(DataError::NoAnswer {
                place: self.place.clone(),
            });
        }
        let script = self.script(model, conversation)?;
        let (all, turns) = self.try_vocab(script.turns(given).map_err(Into::into))?;
        let first = &turns[0];
        let start = self.try_vocab(script.tokens_from_start(&all[..first.start]))?;
        let mut then = Counted::new();
        let mut at = first.start;
        for turn in turns {
            let between = self.try_vocab(part(&script, &all, at..turn.start))?;
            then.extend(between.into_iter().map(|id| (id, false)));
            at = turn.end;
            then.extend(self.answer(model, &script, &all, turn)?);
        }
        // Nothing is learned behind the last turn.
        let end = then.iter().rposition(|&(_, counts)| counts);
        then.truncate(end.map_or(0, |at| at + 1));
        self.start(model, start, then)
    }

    /// The tokens of one turn. Its end counts as a part of the answer, what the template puts behind it does not.
    fn answer(
        &self,
        model: &Model,
        script: &ChatScript<'_>,
        all: &str,
        turn: Range<usize>,
    ) -> Result<Counted, DataError> {
        let ids = self.try_vocab(part(script, all, turn))?;
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

    /// Adds the row, or the rows that it is cut into.
    pub(super) fn split_text(
        self,
        model: &Model,
        max_tokens: usize,
        rows: &mut Vec<Self>,
    ) -> Result<(), DataError> {
        let Content::Text(text) = &self.content else {
            rows.push(self);
            return Ok(());
        };
        let ids = self.try_vocab(model.vocab().tokenize(text, false, true))?;
        if ids.len() <= max_tokens {
            rows.push(self);
            return Ok(());
        }
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
        Ok(())
    }

    fn no_completion(&self) -> DataError {
        DataError::NoCompletion {
            place: self.place.clone(),
        }
    }

    fn try_vocab<T>(&self, result: Result<T, VocabError>) -> Result<T, DataError> {
        result.map_err(|source| DataError::Vocab {
            place: self.place.clone(),
            source,
        })
    }
}

/// The tokens of a part of a conversation. Where the tokens of the text up to its end begin with those of the text before it, they are
/// the rest, as if the whole was tokenized at once.
fn part(script: &ChatScript<'_>, all: &str, part: Range<usize>) -> Result<Vec<i32>, VocabError> {
    if part.is_empty() {
        return Ok(Vec::new());
    }
    let before = script.tokens(&all[..part.start])?;
    let to_end = script.tokens(&all[..part.end])?;
    match to_end.strip_prefix(&before[..]) {
        Some(rest) => Ok(rest.to_vec()),
        None => script.tokens(&all[part]),
    }
}

/// Instruction and input as the user's message.
fn instruct(system: Option<&str>, instruction: &str, input: &str) -> Conversation {
    let user = match input {
        "" => instruction.to_owned(),
        input => format!("{instruction}\n{input}"),
    };
    let system = system.filter(|text| !text.is_empty());
    let mut messages: Vec<_> = system
        .map(|text| ChatMessage::new("system", text))
        .into_iter()
        .collect();
    messages.push(ChatMessage::new("user", user));
    Conversation::new(messages)
}

/// The prompt of Stanford's Alpaca.
fn alpaca(instruction: &str, input: &str) -> String {
    match input {
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
