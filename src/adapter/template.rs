//! Where the virtual tokens of a P-tuning adapter stand: `{v:4} {prompt} {v:3}`.

use super::MAX_LENGTH;
use std::fmt;
use std::str::FromStr;

/// A template that cannot be used, one variant per cause. `at` counts bytes from the start of the template.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TemplateError {
    /// `{` without `}`.
    #[error("template: `{{` at byte {at} is never closed; write `{{{{` for a literal brace")]
    Unclosed {
        /// Byte of the brace.
        at: usize,
    },
    /// `}` without `{`.
    #[error("template: `}}` at byte {at} closes nothing; write `}}}}` for a literal brace")]
    Unopened {
        /// Byte of the brace.
        at: usize,
    },
    /// Neither `{v:N}` nor `{prompt}` nor `{bos}`.
    #[error("template: unknown placeholder `{{{name}}}`; use {{v:N}}, {{prompt}} or {{bos}}")]
    UnknownPlaceholder {
        /// What stands between the braces.
        name: String,
    },
    /// The N of `{v:N}` is not a decimal number.
    #[error("template: `{{v:{count}}}` needs a decimal count, for example {{v:4}}")]
    BadCount {
        /// What stands after `v:`.
        count: String,
    },
    /// `{v:0}`.
    #[error(
        "template: `{{v:0}}` at byte {at} places no virtual token; remove it or raise the count"
    )]
    ZeroCount {
        /// Byte of the opening brace.
        at: usize,
    },
    /// More virtual tokens than an adapter may have.
    #[error("template: more than {max} virtual tokens")]
    TooMany {
        /// The limit.
        max: usize,
    },
    /// No `{v:N}`.
    #[error("template: no virtual tokens; add at least one {{v:N}}")]
    NoVirtual,
    /// No `{prompt}`.
    #[error("template: no {{prompt}}; add it where the text goes")]
    NoPrompt,
    /// More than one `{prompt}`.
    #[error("template: more than one {{prompt}}")]
    ManyPrompts,
    /// More than one `{bos}`.
    #[error("template: more than one {{bos}}")]
    ManyBos,
    /// The counts do not add up to the adapter's length.
    #[error("template places {placed} virtual tokens, the adapter has {length}")]
    CountMismatch {
        /// Sum of the template's counts.
        placed: usize,
        /// P of the adapter.
        length: usize,
    },
}

/// One part of a template, in order of position.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// The next n virtual tokens of the adapter.
    Virtual(usize),
    /// The text the caller gives.
    Prompt,
    /// Fixed text, tokenized without special tokens.
    Text(String),
    /// The beginning-of-sequence token.
    Bos,
}

/// Order of virtual tokens, prompt and fixed text.
///
/// Grammar: `{v:N}` stands for the next N virtual tokens, `{prompt}` for the caller's text (exactly once), `{bos}` for the
/// beginning-of-sequence token (at most once), `{{` and `}}` for braces; anything else is fixed text. A stretch of only
/// spaces beside a placeholder or the template's end separates and is dropped; spaces that touch other text, and line feeds
/// and tabs, are kept. Without `{bos}` that token comes before the first piece if the tokenizer adds one.
///
/// ```
/// use ggraft::adapter::{Piece, Template};
///
/// let template = Template::parse("{v:4} {prompt} {v:3}")?;
/// assert_eq!(template.pieces(), [Piece::Virtual(4), Piece::Prompt, Piece::Virtual(3)]);
/// assert_eq!(template.virtual_tokens(), 7);
/// # Ok::<(), ggraft::adapter::TemplateError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Template {
    pieces: Vec<Piece>,
    virtual_tokens: usize,
}

impl Template {
    /// Parses the text form.
    pub fn parse(source: &str) -> Result<Self, TemplateError> {
        let mut pieces = Vec::new();
        let mut text = String::new();
        let mut chars = source.char_indices().peekable();
        while let Some((at, c)) = chars.next() {
            match c {
                '{' | '}' if chars.next_if(|&(_, next)| next == c).is_some() => text.push(c),
                '{' => {
                    let rest = &source[at + 1..];
                    let end = rest
                        .find(['{', '}'])
                        .filter(|&end| rest.as_bytes()[end] == b'}');
                    let name = &rest[..end.ok_or(TemplateError::Unclosed { at })?];
                    push_text(&mut pieces, &mut text);
                    pieces.push(placeholder(name, at)?);
                    while chars.next_if(|&(i, _)| i <= at + 1 + name.len()).is_some() {}
                }
                '}' => return Err(TemplateError::Unopened { at }),
                c => text.push(c),
            }
        }
        push_text(&mut pieces, &mut text);
        Self::from_pieces(pieces)
    }

    fn from_pieces(pieces: Vec<Piece>) -> Result<Self, TemplateError> {
        let mut virtual_tokens = 0usize;
        let (mut prompts, mut bos) = (0, 0);
        for piece in &pieces {
            match piece {
                Piece::Virtual(n) => virtual_tokens = virtual_tokens.saturating_add(*n),
                Piece::Prompt => prompts += 1,
                Piece::Bos => bos += 1,
                Piece::Text(_) => {}
            }
        }
        match (prompts, bos, virtual_tokens) {
            (0, _, _) => Err(TemplateError::NoPrompt),
            (2.., _, _) => Err(TemplateError::ManyPrompts),
            (_, 2.., _) => Err(TemplateError::ManyBos),
            (_, _, 0) => Err(TemplateError::NoVirtual),
            (_, _, n) if n > MAX_LENGTH => Err(TemplateError::TooMany { max: MAX_LENGTH }),
            _ => Ok(Self {
                pieces,
                virtual_tokens,
            }),
        }
    }

    /// The parts, in order of position.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Virtual tokens the template places, over all pieces.
    pub fn virtual_tokens(&self) -> usize {
        self.virtual_tokens
    }

    /// Whether the template says itself where the beginning-of-sequence token goes.
    pub fn places_bos(&self) -> bool {
        self.pieces.contains(&Piece::Bos)
    }

    /// Checks that all `length` virtual tokens of an adapter have a place, and no more.
    pub fn check_length(&self, length: usize) -> Result<(), TemplateError> {
        if self.virtual_tokens == length {
            return Ok(());
        }
        Err(TemplateError::CountMismatch {
            placed: self.virtual_tokens,
            length,
        })
    }
}

fn push_text(pieces: &mut Vec<Piece>, text: &mut String) {
    let text = std::mem::take(text);
    if !text.trim_matches(' ').is_empty() {
        pieces.push(Piece::Text(text));
    }
}

fn placeholder(name: &str, at: usize) -> Result<Piece, TemplateError> {
    match name {
        "prompt" => return Ok(Piece::Prompt),
        "bos" => return Ok(Piece::Bos),
        _ => {}
    }
    let Some(count) = name.strip_prefix("v:") else {
        return Err(TemplateError::UnknownPlaceholder {
            name: name.to_owned(),
        });
    };
    if count.is_empty() || !count.bytes().all(|b| b.is_ascii_digit()) {
        return Err(TemplateError::BadCount {
            count: count.to_owned(),
        });
    }
    match count.parse() {
        Ok(0) => Err(TemplateError::ZeroCount { at }),
        Ok(n) if n <= MAX_LENGTH => Ok(Piece::Virtual(n)),
        _ => Err(TemplateError::TooMany { max: MAX_LENGTH }),
    }
}

impl TryFrom<String> for Template {
    type Error = TemplateError;

    fn try_from(source: String) -> Result<Self, TemplateError> {
        Self::parse(&source)
    }
}

impl From<Template> for String {
    fn from(template: Template) -> Self {
        template.to_string()
    }
}

impl FromStr for Template {
    type Err = TemplateError;
    fn from_str(s: &str) -> Result<Self, TemplateError> {
        Self::parse(s)
    }
}

impl fmt::Display for Template {
    /// The text form, which parses to the same template; placeholders that touch are separated by one space.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut after_placeholder = false;
        for piece in &self.pieces {
            let is_text = matches!(piece, Piece::Text(_));
            if after_placeholder && !is_text {
                f.write_str(" ")?;
            }
            match piece {
                Piece::Virtual(n) => write!(f, "{{v:{n}}}")?,
                Piece::Prompt => f.write_str("{prompt}")?,
                Piece::Bos => f.write_str("{bos}")?,
                Piece::Text(text) => f.write_str(&text.replace('{', "{{").replace('}', "}}"))?,
            }
            after_placeholder = !is_text;
        }
        Ok(())
    }
}
