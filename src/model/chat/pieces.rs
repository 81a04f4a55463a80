//! Parts of expressions, as they are written for minijinja.

use std::fmt::Write as _;

/// Names of what Python's texts, lists and dictionaries can do.
const METHODS: &str = " append capitalize casefold center clear copy count decode encode endswith expandtabs extend find format format_map \
    fromkeys get index insert isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle \
    isupper items join keys ljust lower lstrip maketrans partition pop popitem remove removeprefix removesuffix replace reverse rfind \
    rindex rjust rpartition rsplit rstrip setdefault sort split splitlines startswith strip swapcase title translate update upper \
    values zfill changed cycle ";

/// Whether Python's values have a method of this name.
pub(super) fn is_method(name: &str) -> bool {
    METHODS.split(' ').any(|method| method == name) && !name.is_empty()
}

/// An expression as it is written for minijinja.
pub(super) struct Piece {
    pub(super) text: String,
    /// Whether a dot or a bracket may follow at once: not behind a filter.
    pub(super) closed: bool,
    /// Whether it holds, for literals: minijinja folds `0 and 2` to a boolean.
    pub(super) truth: Option<bool>,
}

impl Piece {
    pub(super) fn closed(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            closed: true,
            truth: None,
        }
    }

    pub(super) fn literal(text: impl Into<String>, truth: bool) -> Self {
        Self {
            truth: Some(truth),
            ..Self::closed(text)
        }
    }

    /// With a filter behind it.
    pub(super) fn filtered(mut self, name: &str, arguments: &str) -> Self {
        self.text.push('|');
        self.text.push_str(name);
        if !arguments.is_empty() {
            let _ = write!(self.text, "({arguments})");
        }
        self.closed = false;
        self.truth = None;
        self
    }

    pub(super) fn bracketed(self) -> Self {
        match self.closed {
            true => self,
            false => Self::closed(format!("({})", self.text)),
        }
    }
}

/// A string literal that minijinja reads as `text`.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::from("'");
    for c in text.chars() {
        match c {
            '\\' | '\'' => out.extend(['\\', c]),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            c => out.push(c),
        }
    }
    out + "'"
}

/// Items as arguments of a filter that makes one value of them.
pub(super) fn listed(filter: &str, items: &[String]) -> Piece {
    Piece {
        truth: Some(!items.is_empty()),
        ..Piece::closed("none")
            .filtered(filter, &items.join(","))
            .bracketed()
    }
}
