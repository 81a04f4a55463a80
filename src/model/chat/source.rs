//! Template source, as minijinja must see it to do what Jinja does.

use std::mem;

/// Rewrites what minijinja takes for something else:
///
/// - slices, `x[a:b:c]`: its own panic on empty texts and end elsewhere than Python's when they go backwards. They become calls of
///   the method [`SLICE`].
/// - Transformers' `{% generation %}`, which marks what the assistant says and changes nothing in the text: an `if` that holds.
///
/// Lines stay where they are. What is no Jinja is left for minijinja to refuse.
pub(super) fn for_minijinja(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let len = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or(tag.len(), |end| end + 2),
            Some(b'{') => expression(tag, "}}", &mut out),
            Some(b'%') => {
                let from = out.len();
                let len = expression(tag, "%}", &mut out);
                let word =
                    out[from..].trim_matches(|c: char| "{%}-+".contains(c) || c.is_whitespace());
                match word {
                    "generation" => replace_word(&mut out, from, "generation", "if true"),
                    "endgeneration" => replace_word(&mut out, from, "endgeneration", "endif"),
                    "raw" => {
                        let raw = &tag[len..];
                        let end = end_of_raw(raw);
                        out.push_str(&raw[..end]);
                        rest = &raw[end..];
                        continue;
                    }
                    _ => {}
                }
                rest = &tag[len..];
                continue;
            }
            _ => 1,
        };
        if !tag.starts_with("{{") {
            out.push_str(&tag[..len]);
        }
        rest = &tag[len..];
    }
    out + rest
}

/// Name of the method `(start, stop, step)` that stands for a slice.
pub(super) const SLICE: &str = "__slice__";

fn replace_word(out: &mut String, from: usize, word: &str, instead: &str) {
    let tag = out.split_off(from);
    out.push_str(&tag.replacen(word, instead, 1));
}

/// Where the tag that ends raw text begins.
fn end_of_raw(text: &str) -> usize {
    text.match_indices("{%")
        .map(|(at, _)| at)
        .find(|&at| {
            let tag = text[at + 2..].trim_start_matches(['-', '+']);
            tag.trim_start().starts_with("endraw")
        })
        .unwrap_or(text.len())
}

/// An open bracket: itself, and the text inside, cut at its colons.
struct Open {
    bracket: char,
    parts: Vec<String>,
    last: String,
}

impl Open {
    fn new(bracket: char) -> Self {
        Self {
            bracket,
            parts: Vec::new(),
            last: String::new(),
        }
    }

    fn ends_with(&self, end: char) -> bool {
        matches!((self.bracket, end), ('(', ')') | ('[', ']') | ('{', '}'))
    }

    /// As it was written, without its end.
    fn unchanged(mut self) -> String {
        self.parts.push(self.last);
        format!("{}{}", self.bracket, self.parts.join(":"))
    }

    /// With its end.
    fn close(mut self, end: char) -> String {
        // A colon stands in a slice or, in braces, between key and value.
        if self.bracket != '[' || self.parts.is_empty() {
            let mut text = self.unchanged();
            text.push(end);
            return text;
        }
        self.parts.push(self.last);
        let bounds = self.parts.iter().map(|part| match part.trim().is_empty() {
            true => format!("{part}none"),
            false => part.clone(),
        });
        format!(".{SLICE}({})", bounds.collect::<Vec<_>>().join(","))
    }
}

/// Writes the tag at the start of `text`, which ends with `end`, to `out`. Returns its length in `text`.
fn expression(text: &str, end: &str, out: &mut String) -> usize {
    out.push_str(&text[..2]);
    // The innermost last; without any, text goes to `out`.
    let mut open: Vec<Open> = Vec::new();
    let mut at = 2;
    while let Some(c) = text[at..].chars().next() {
        if open.is_empty() && text[at..].starts_with(end) {
            out.push_str(end);
            return at + end.len();
        }
        let len = match c {
            '\'' | '"' => string_len(&text[at..], c),
            _ => c.len_utf8(),
        };
        let piece = &text[at..at + len];
        at += len;
        match c {
            '(' | '[' | '{' => open.push(Open::new(c)),
            ')' | ']' | '}' if open.last().is_some_and(|o| o.ends_with(c)) => {
                let closed = open.pop().map(|o| o.close(c)).unwrap_or_default();
                open.last_mut()
                    .map_or(&mut *out, |o| &mut o.last)
                    .push_str(&closed);
            }
            _ => match open.last_mut() {
                Some(inner) if c == ':' => {
                    let part = mem::take(&mut inner.last);
                    inner.parts.push(part);
                }
                inner => inner.map_or(&mut *out, |o| &mut o.last).push_str(piece),
            },
        }
    }
    for inner in open {
        out.push_str(&inner.unchanged());
    }
    at
}

/// Length of the string at the start of `text`, both quotes included.
fn string_len(text: &str, quote: char) -> usize {
    let mut escaped = true;
    for (i, c) in text.char_indices() {
        if i > 0 && !escaped && c == quote {
            return i + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::for_minijinja;

    #[test]
    fn slices_become_calls_and_nothing_else_changes() {
        for (source, expected) in [
            ("{{ a[1:] }}", "{{ a.__slice__(1,none) }}"),
            (
                "{{ a[:-1][::-1] }}",
                "{{ a.__slice__(none,-1).__slice__(none,none,-1) }}",
            ),
            (
                "{% for m in a[b[1:2][0] : ] %}",
                "{% for m in a.__slice__(b.__slice__(1,2)[0] , none) %}",
            ),
            (
                "{{ a[x|length:(1, 2)[0]] }}",
                "{{ a.__slice__(x|length,(1, 2)[0]) }}",
            ),
            (
                "{% generation %}x{%- endgeneration -%}",
                "{% if true %}x{%- endif -%}",
            ),
        ] {
            assert_eq!(for_minijinja(source), expected);
        }
        for same in [
            "a[1:] { } [:] {",
            "{# a[1:] {{ #}b[1:]",
            "{% raw %}{{ a[1:] }}{% generation %}{%- endraw %}",
            "{{ {'a': [1, {'b': 2}]} }}",
            "{{ {'a': {}}}}",
            "{{ 'a[1:]' ~ \"]\\\"[:\" ~ '\\\\' }}",
            "{{ a[1: }}",
            "{{ a] b[(1:) ",
            "{{ '",
            "{{",
            "{%",
            "{",
            "",
        ] {
            assert_eq!(for_minijinja(same), same);
        }
    }

    /// A template comes from strangers: brackets within brackets must not use the stack.
    #[test]
    fn nesting_is_no_recursion() {
        let deep = format!("{{{{ {}", "a[1:".repeat(100_000));
        assert_eq!(for_minijinja(&deep), deep);
    }
}
