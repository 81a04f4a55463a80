//! Which parts of a formatted conversation the assistant says: found by formatting it again, cut short or with a flag, a character that
//! no message has, in one of its texts. A template is a program, so nothing else tells.

use super::script::ChatScript;
use super::{ChatError, ChatMessage};
use serde_json::{Value as Json, json};
use std::ops::Range;

const ASSISTANT: &str = "assistant";
/// Texts of a message that are tried for a flag.
const MOST_TEXTS: usize = 64;

#[derive(Clone, Copy)]
enum Side {
    Begin,
    End,
}

impl ChatScript<'_> {
    /// The text of all messages, and in it the turns of the assistant among those from `given` on: from where the answer begins up
    /// to where the next message may begin.
    ///
    /// # Errors
    /// [`ChatError::NotAdditive`], and what the template refuses.
    pub(crate) fn turns(&self, given: usize) -> Result<(String, Vec<Range<usize>>), ChatError> {
        let all = self.render(self.messages.len(), false)?;
        let mut turns: Vec<Range<usize>> = Vec::new();
        for (i, message) in self.messages.iter().enumerate().skip(given) {
            if message.role() == ASSISTANT {
                let from = turns.last().map_or(0, |turn| turn.end);
                let turn = self.begin_of(i, &all).and_then(|begin| {
                    let end = self.end_of(i, &all, begin)?;
                    (from <= begin && begin <= end).then_some(begin..end)
                });
                turns.push(turn.ok_or(ChatError::NotAdditive)?);
            }
        }
        Ok((all, turns))
    }

    /// Where in `all` the answer that message `i` is begins: behind what the template writes to ask for one.
    fn begin_of(&self, i: usize, all: &str) -> Option<usize> {
        // Some templates refuse a conversation that ends here.
        let asked = self.render(i, true).unwrap_or_default();
        let common = common_prefix(&asked, all);
        if common == asked.len() && !asked.is_empty() {
            return Some(common);
        }
        let text = self.first_text(i, all);
        // The same header, behind something that was not there yet.
        let header = &asked[common..];
        if let Some(text) = text.filter(|&text| !header.is_empty() && all[..text].ends_with(header))
        {
            return Some(text);
        }
        // What asks for an answer is not always what stands before one, such as an empty thought. Both have the header, and then perhaps
        // the same letters by chance, which belong to the answer.
        let common = self.before_control(all, common);
        // A conversation of nothing tells nothing: a first message may bring a system's with it.
        let history = self.render(i, false).ok().filter(|h| !h.is_empty());
        match history.filter(|h| all.starts_with(h) && common > h.len()) {
            Some(_) => Some(text.map_or(common, |text| text.min(common))),
            None => text,
        }
    }

    /// Where in `all` the turn of message `i` ends.
    fn end_of(&self, i: usize, all: &str, begin: usize) -> Option<usize> {
        if let Ok(done) = self.render(i + 1, false)
            && done.len() >= begin
            && all.starts_with(&done)
        {
            return Some(done.len());
        }
        // The template writes the last message otherwise than earlier ones.
        let last = self.last_text(i, all).filter(|&last| last >= begin);
        let next = self.first_text(i + 1, all).unwrap_or(all.len());
        if let Some(end) = self.end_of_generation(all, last.unwrap_or(begin)..next) {
            return Some(end);
        }
        let last = last?;
        let rest = all[last..].trim_start();
        let end = self.format.controls.at(rest).map(str::len);
        Some(end.map_or(last, |len| all.len() - rest.len() + len))
    }

    /// Where in `all` the first text of message `i` begins, or would begin if it had one.
    fn first_text(&self, i: usize, all: &str) -> Option<usize> {
        let message = self.messages.get(i)?;
        let n = n_texts(message, "content");
        let mut found = (0..n).filter_map(|n| self.locate(i, all, ("content", n), Side::Begin));
        found.next().or_else(|| {
            let flag = self.flag()?;
            let plain = json!({"role": message.role(), "content": flag.to_string()});
            let rendered = self.render_with(i, ChatMessage::from_json(plain).ok()?)?;
            let before = &rendered[..rendered.find(flag)?];
            all.starts_with(before).then_some(before.len())
        })
    }

    /// Where in `all` the last text of message `i` ends, be it said or part of a call.
    fn last_text(&self, i: usize, all: &str) -> Option<usize> {
        let last = |field| {
            let texts = (0..n_texts(&self.messages[i], field)).rev();
            let mut found = texts.filter_map(|n| self.locate(i, all, (field, n), Side::End));
            found.next()
        };
        last("tool_calls").max(last("content"))
    }

    /// Where in `all` a text of message `i` begins or ends, given its field and number: with a flag there.
    fn locate(&self, i: usize, all: &str, (field, n): (&str, usize), side: Side) -> Option<usize> {
        let flag = self.flag()?;
        let mut message = self.written()[i].clone();
        let text = nth_text(message.0.get_mut(field)?, &mut { n })?;
        // Templates trim, and ask whether there is a text at all.
        let at = match side {
            Side::Begin => text.len() - text.trim_start().len(),
            Side::End => text.trim_end().len(),
        };
        if text.trim().is_empty() {
            return None;
        }
        text.insert(at, flag);
        let rendered = self.render_with(i, message)?;
        let at = rendered.find(flag)?;
        (rendered.replace(flag, "") == all).then_some(at)
    }

    /// The text of all messages, with another one in place of message `i`.
    fn render_with(&self, i: usize, message: ChatMessage) -> Option<String> {
        let mut messages = self.written().to_vec();
        messages[i] = message;
        let values = self.marked.as_ref().map_or(&self.values, |m| &m.values);
        let template = &self.format.template;
        template.render(&messages, false, values).ok()
    }

    /// The messages, with marks if there are any.
    fn written(&self) -> &[ChatMessage] {
        let marked = self.marked.as_ref();
        marked.map_or(&self.messages, |m| &m.messages)
    }

    fn flag(&self) -> Option<char> {
        self.unused(self.marker())
    }

    fn marker(&self) -> Option<char> {
        self.marked.as_ref().map(|m| m.mark)
    }

    /// `at`, or if that is within a control token, where this begins.
    fn before_control(&self, all: &str, at: usize) -> usize {
        let cut = self.controls_in(all).find(|c| c.start < at && at < c.end);
        cut.map_or(at, |c| c.start)
    }

    /// Where the first control token of the template's that ends a generation ends.
    fn end_of_generation(&self, all: &str, part: Range<usize>) -> Option<usize> {
        let inside = |c: &Range<usize>| part.start <= c.start && c.end <= part.end;
        let ends = |c: &Range<usize>| self.format.controls.ends(&all[c.clone()]);
        let mut found = self.controls_in(all).filter(inside).filter(ends);
        found.next().map(|c| c.end)
    }

    /// The control tokens that the template wrote.
    fn controls_in<'a>(&'a self, all: &'a str) -> impl Iterator<Item = Range<usize>> + 'a {
        let mut at = 0;
        std::iter::from_fn(move || {
            while let Some(c) = all[at..].chars().next() {
                let said = self.marker() == Some(c);
                at += if said { c.len_utf8() } else { 0 };
                let control = self.format.controls.at(&all[at..]).map(str::len);
                let begin = at;
                at += control.unwrap_or(if said { 0 } else { c.len_utf8() });
                if control.is_some() && !said {
                    return Some(begin..at);
                }
            }
            None
        })
    }
}

/// Texts that are tried in a field of a message.
fn n_texts(message: &ChatMessage, field: &str) -> usize {
    fn count(value: &Json) -> usize {
        match value {
            Json::String(_) => 1,
            Json::Array(list) => list.iter().map(count).sum(),
            Json::Object(fields) => fields.values().map(count).sum(),
            Json::Null | Json::Bool(_) | Json::Number(_) => 0,
        }
    }
    message.0.get(field).map_or(0, count).min(MOST_TEXTS)
}

/// Text number `n` within `value`, in their order; `n` becomes less by those that were passed.
fn nth_text<'a>(value: &'a mut Json, n: &mut usize) -> Option<&'a mut String> {
    match value {
        Json::String(text) if *n == 0 => Some(text),
        Json::String(_) => {
            *n -= 1;
            None
        }
        Json::Array(list) => list.iter_mut().find_map(|value| nth_text(value, n)),
        Json::Object(fields) => fields.values_mut().find_map(|value| nth_text(value, n)),
        Json::Null | Json::Bool(_) | Json::Number(_) => None,
    }
}

/// Bytes that both begin with, whole characters.
fn common_prefix(a: &str, b: &str) -> usize {
    let same = a.chars().zip(b.chars()).take_while(|(x, y)| x == y);
    same.map(|(c, _)| c.len_utf8()).sum()
}
