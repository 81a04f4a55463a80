//! Values of the arguments of `ggraft train`, as they are written.

use crate::args::load_adapter;
use crate::failure::{Failure, Result};
use crate::io;
use ggraft::Model;
use ggraft::train::{Init, Objective};
use std::fmt::Display;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// How often a run saves what it has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Every {
    Never,
    Steps(u64),
    Time(Duration),
}

impl Every {
    /// What a crash may cost.
    pub(crate) const DEFAULT: Self = Self::Time(Duration::from_secs(600));

    /// After step `step`, if the last time was `last`.
    pub(crate) fn is_due(self, step: u64, last: Instant) -> bool {
        match self {
            Self::Never => false,
            Self::Steps(n) => step.is_multiple_of(n),
            Self::Time(time) => last.elapsed() >= time,
        }
    }
}

impl FromStr for Every {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "never" {
            return Ok(Self::Never);
        }
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let n = text[..end].parse().ok().filter(|&n: &u64| n > 0);
        let unit = match &text[end..] {
            "" => None,
            "s" => Some(1),
            "m" => Some(60),
            "h" => Some(3600),
            _ => Some(0),
        };
        match (n, unit) {
            (Some(n), None) => Ok(Self::Steps(n)),
            (Some(n), Some(unit @ 1..)) if n < 1 << 32 => {
                Ok(Self::Time(Duration::from_secs(n * unit)))
            }
            _ => Err("must be a number of steps, a time as 30s, 10m or 2h, or never".to_owned()),
        }
    }
}

impl Display for Every {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Steps(n) => write!(f, "{n}"),
            Self::Time(time) => match time.as_secs() {
                s if s.is_multiple_of(3600) => write!(f, "{}h", s / 3600),
                s if s.is_multiple_of(60) => write!(f, "{}m", s / 60),
                s => write!(f, "{s}s"),
            },
        }
    }
}

/// Which members of an ensemble are trained, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Members {
    pub(super) first: usize,
    pub(super) last: usize,
}

impl FromStr for Members {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (first, last) = text.split_once("..").unwrap_or(("1", text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if 1 <= first && first <= last && last <= Self::MOST => {
                Ok(Self { first, last })
            }
            _ => Err(format!(
                "must be a number of members from 1 to {}, or those FROM..TO",
                Self::MOST
            )),
        }
    }
}

impl Members {
    /// Nobody trains more, and a slip of the finger should not fill a disk.
    const MOST: usize = 100;
}

/// `--init`, before any file is read.
#[derive(Clone)]
pub(super) enum InitArg {
    Random,
    Zeros,
    Vocab,
    Prompts,
    Mean,
    Text(String),
    Adapter(PathBuf),
}

impl FromStr for InitArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "random" => Ok(Self::Random),
            None if text == "zeros" => Ok(Self::Zeros),
            None if text == "vocab" => Ok(Self::Vocab),
            None if text == "prompts" => Ok(Self::Prompts),
            None if text == "mean" => Ok(Self::Mean),
            Some(("text", "")) => Err("no text behind 'text:'".to_owned()),
            Some(("text", text)) => Ok(Self::Text(text.to_owned())),
            Some(("adapter", "")) => Err("no file behind 'adapter:'".to_owned()),
            Some(("adapter", path)) => Ok(Self::Adapter(path.into())),
            _ => Err(
                "must be random, zeros, vocab, prompts, mean, text:\"...\" or adapter:FILE"
                    .to_owned(),
            ),
        }
    }
}

impl InitArg {
    pub(super) fn load(&self, model: &Model) -> Result<Init> {
        Ok(match self {
            Self::Random => Init::Random,
            Self::Zeros => Init::Zeros,
            Self::Vocab => Init::Vocab,
            Self::Prompts => Init::Prompts,
            Self::Mean => Init::Mean,
            Self::Text(text) => Init::Text(text.clone()),
            Self::Adapter(path) => Init::Adapter(load_adapter(path, model, None)?),
        })
    }
}

/// `--loss`, before any file is read.
#[derive(Clone)]
pub(super) enum LossArg {
    Completion,
    All,
    Distill(PathBuf),
}

impl FromStr for LossArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "completion" => Ok(Self::Completion),
            None if text == "all" => Ok(Self::All),
            Some(("distill", "")) => Err("no file behind 'distill:'".to_owned()),
            Some(("distill", path)) => Ok(Self::Distill(path.into())),
            _ => Err("must be completion, all or distill:CONTEXT.txt".to_owned()),
        }
    }
}

impl LossArg {
    pub(super) fn load(&self) -> Result<Objective> {
        Ok(match self {
            Self::Completion => Objective::Completion,
            Self::All => Objective::All,
            Self::Distill(path) => {
                let context = io::read_text(path)?;
                if context.trim().is_empty() {
                    return Err(Failure::Unsuitable(format!(
                        "{}: there is no text to distill",
                        path.display()
                    )));
                }
                Objective::Distill {
                    context,
                    top_k: Objective::DEFAULT_TOP_K,
                }
            }
        })
    }
}

/// A number for which `valid` holds; `why` says what it must be.
fn number<T>(text: &str, valid: impl Fn(f64) -> bool, why: &str) -> Result<T, String>
where
    T: FromStr<Err: Display> + Into<f64> + Copy,
{
    let x: T = text.parse().map_err(|e: T::Err| e.to_string())?;
    valid(x.into()).then_some(x).ok_or_else(|| why.to_owned())
}

/// A finite number above 0.
pub(super) fn positive<T: FromStr<Err: Display> + Into<f64> + Copy>(
    text: &str,
) -> Result<T, String> {
    let valid = |x: f64| x.is_finite() && x > 0.0;
    number(text, valid, "must be a finite number above 0")
}

/// A finite number, 0 or more.
pub(super) fn not_negative(text: &str) -> Result<f64, String> {
    let valid = |x| (0.0..=f64::MAX).contains(&x);
    number(text, valid, "must be a finite number, 0 or more")
}

/// A number from 0 to below 1.
pub(super) fn fraction<T: FromStr<Err: Display> + Into<f64> + Copy>(
    text: &str,
) -> Result<T, String> {
    number(
        text,
        |x| (0.0..1.0).contains(&x),
        "must be from 0 to below 1",
    )
}

/// Bytes, with a unit as GNU's tools have them.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || "must be a number of bytes, or one with K, M or G, for example 256M".to_owned();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let number: f64 = text[..end].parse().map_err(|_| wrong())?;
    let unit: f64 = match text[end..].trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kib" => 1024.0,
        "m" | "mib" => 1024f64.powi(2),
        "g" | "gib" => 1024f64.powi(3),
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => return Err(wrong()),
    };
    match (number * unit).round() {
        bytes if bytes < 1.0 => Err("must be at least one byte".to_owned()),
        // Sizes beyond are none of this world, and the conversion is exact enough below.
        bytes if bytes > 1e18 => Err("is more than any machine has".to_owned()),
        bytes => Ok(bytes as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units_and_steps_have_none() {
        for (text, expected) in [
            ("never", Every::Never),
            ("7", Every::Steps(7)),
            ("90s", Every::Time(Duration::from_secs(90))),
            ("10m", Every::DEFAULT),
            ("2h", Every::Time(Duration::from_secs(7200))),
        ] {
            let found: Every = text.parse().unwrap();
            assert_eq!((found, found.to_string()), (expected, text.to_owned()));
        }
        for text in ["", "0", "0s", "m", "-1", "1d", "1.5m", "99999999999999h"] {
            assert!(text.parse::<Every>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("1", 1),
            ("256M", 256 << 20),
            ("256m", 256 << 20),
            ("800MiB", 800 << 20),
            ("800 MB", 800_000_000),
            ("1.5G", 3 << 29),
            ("64k", 64 << 10),
            ("2GB", 2_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "M",
            "0",
            "0.0001K",
            "-1M",
            "1T1",
            "1e3",
            "1.2.3M",
            "999999999999G",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
