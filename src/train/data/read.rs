//! Files of rows: one JSON object per line or one array of them, in any of Unicode's encodings.

use super::encoding::{BOM, Decoder, Encoding, NotText, Utf8Only, not_utf8};
use super::kind::{self, Kind};
use super::lines::{Lines, MAX_LINE};
use super::{Content, DataError, Place, Row};
use crate::error::{Error, Result};
use serde::Deserializer as _;
use serde::de::{SeqAccess, Visitor};
use serde_json::Value as Json;
use std::fmt;
use std::io::{self, BufRead, Cursor, Read};
use std::path::Path;
use std::sync::Arc;

/// Bytes that tell what a file is.
const HEAD: u64 = 4 << 10;
/// Longest file that must be in memory as a whole (plain text), in bytes.
const MAX_WHOLE: u64 = 1 << 30;
/// Lines that tell a table from prose.
const TABLE_LINES: usize = 4;
/// Bytes around one that is not UTF-8 that tell what it may be.
const AROUND: usize = 2 << 10;

const UTF8_BOM: &[u8] = b"\xef\xbb\xbf";

/// What is done with a row.
type Each<'a> = &'a mut dyn FnMut(Row) -> Result<()>;

/// All rows that `from` holds, which errors call `name`, one after the other.
pub(super) fn rows(mut from: impl BufRead, name: &Path, each: Each<'_>) -> Result<()> {
    let mut source = Source {
        name,
        file: name.into(),
        head: Vec::new(),
        encoding: Encoding::Utf8,
    };
    let read = from.by_ref().take(HEAD).read_to_end(&mut source.head);
    read.map_err(|e| source.io(e))?;
    let head = &source.head[..];
    if let Some(kind) = kind::binary(head) {
        return Err(source.other(kind));
    }
    source.encoding = Encoding::of(head);
    let skip = if head.starts_with(UTF8_BOM) { 3 } else { 0 };
    let all = Cursor::new(&head[skip..]).chain(from);
    match source.encoding {
        Encoding::Utf8 => match kind::unknown(&head[skip..]) {
            Some(kind) => Err(source.other(kind)),
            None => source.read(all, each),
        },
        encoding => source.read(Decoder::new(all, encoding), each),
    }
}

struct Source<'a> {
    name: &'a Path,
    /// The same for the places of all rows.
    file: Arc<Path>,
    /// How the file begins.
    head: Vec<u8>,
    encoding: Encoding,
}

impl Source<'_> {
    fn io(&self, source: io::Error) -> Error {
        match source.get_ref().and_then(|e| e.downcast_ref()) {
            Some(NotText::Wide { encoding, byte }) => {
                let name = encoding.name();
                self.other_file(
                    format!("this looks like {name}, but is not valid (byte {byte})"),
                    "save it as UTF-8".to_owned(),
                )
            }
            Some(&NotText::Utf8 {
                line,
                byte,
                value,
                hint,
            }) => {
                let place = self.place(line, false);
                let e = DataError::NotUtf8 {
                    place,
                    byte,
                    value,
                    hint,
                };
                e.into()
            }
            Some(&NotText::Nul { line, byte }) => self.nul_at(self.place(line, false), byte).into(),
            None => Error::Io {
                path: self.name.to_owned(),
                source,
            },
        }
    }

    /// What the file seems to be, and what to do with it.
    fn other(&self, Kind { what, hint }: Kind) -> Error {
        self.other_file(what.to_owned(), hint)
    }

    fn other_file(&self, what: String, hint: String) -> Error {
        let source_name = self.name.display().to_string();
        DataError::OtherFile {
            source_name,
            what,
            hint,
        }
        .into()
    }

    /// The text of bytes of which the first is in line `line`.
    fn utf8(&self, bytes: Vec<u8>, line: usize) -> Result<String> {
        let e = match String::from_utf8(bytes) {
            Ok(text) => return Ok(text),
            Err(e) => e,
        };
        let (bytes, at) = (e.as_bytes(), e.utf8_error().valid_up_to());
        let (place, byte) = self.place_in(line, &bytes[..at]);
        let ascii = |at: &usize| bytes.get(*at).is_none_or(u8::is_ascii);
        let from = (0..at.saturating_sub(AROUND)).rev().find(ascii);
        let to = (at + AROUND..bytes.len()).find(ascii);
        Err(DataError::NotUtf8 {
            place,
            byte,
            value: bytes[at],
            hint: not_utf8(&bytes[from.unwrap_or(0)..to.unwrap_or(bytes.len())]),
        }
        .into())
    }

    fn nul(&self, line: usize, before: &[u8]) -> DataError {
        let (place, byte) = self.place_in(line, before);
        self.nul_at(place, byte)
    }

    fn nul_at(&self, place: Place, byte: usize) -> DataError {
        DataError::Nul {
            place,
            byte,
            // Every other byte of ASCII text in UTF-16 is 0.
            hint: match self.encoding {
                Encoding::Utf8 => " (tr -d '\\000' < IN > OUT removes such bytes)",
                _ => "",
            },
        }
    }

    /// Where what stands behind `before` is, which begins in line `line`: the line, and the byte of it, counted from 1.
    fn place_in(&self, line: usize, before: &[u8]) -> (Place, usize) {
        let in_line = before.iter().rev().take_while(|&&b| b != b'\n').count();
        let lines = before.iter().filter(|&&b| b == b'\n').count();
        (self.place(line + lines, false), in_line + 1)
    }

    fn place(&self, number: usize, in_array: bool) -> Place {
        Place {
            file: Some(self.file.clone()),
            number,
            in_array,
        }
    }

    /// From text without byte order mark.
    fn read(&self, mut from: impl BufRead, each: Each<'_>) -> Result<()> {
        if self.is_named("txt") {
            return self.text(from, each);
        }
        let mut lines = Lines::default();
        let (indent, next) = lines.skip_blank(&mut from).map_err(|e| self.io(e))?;
        let mut from = Cursor::new(indent).chain(from);
        if next == Some(b'[') {
            return self.array(from, lines.number + 1, each);
        }
        let mut first = true;
        while let Some(line) = self.line(&mut lines, &mut from)? {
            let place = self.place(lines.number, false);
            // Where files were joined.
            let line = line.trim_start_matches(BOM);
            if line.trim().is_empty() {
                continue;
            }
            if let Some(at) = line.find('\0') {
                return Err(self.nul(lines.number, &line.as_bytes()[..at]).into());
            }
            if std::mem::take(&mut first) && !line.trim_start().starts_with('{') {
                return Err(self.other(self.no_rows(line, &mut lines, &mut from)));
            }
            each(row(line, &place)?)?;
        }
        Ok(())
    }

    fn is_named(&self, extension: &str) -> bool {
        let found = self.name.extension();
        found.is_some_and(|e| e.eq_ignore_ascii_case(extension))
    }

    fn line(&self, lines: &mut Lines, from: &mut impl BufRead) -> Result<Option<String>> {
        let bytes = lines.next(from).map_err(|e| self.io(e))?;
        let Some(bytes) = bytes else { return Ok(None) };
        if bytes.len() > MAX_LINE {
            let (place, max) = (self.place(lines.number, false), MAX_LINE as u64);
            return Err(DataError::LineTooLong { place, max }.into());
        }
        self.utf8(bytes, lines.number).map(Some)
    }

    /// What the file is whose first line is `first` and no JSON.
    fn no_rows(&self, first: &str, lines: &mut Lines, from: &mut impl BufRead) -> Kind {
        let mut begin = vec![first.to_owned()];
        while begin.len() < TABLE_LINES
            && let Ok(Some(line)) = self.line(lines, from)
        {
            begin.extend((!line.trim().is_empty()).then_some(line));
        }
        let named = ["csv", "tsv", "tab"].iter().any(|e| self.is_named(e));
        kind::of_text(&begin, named, self.encoding.python(&self.head))
    }

    /// One row of text.
    fn text(&self, from: impl Read, each: Each<'_>) -> Result<()> {
        let mut bytes = Vec::new();
        from.take(MAX_WHOLE + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| self.io(e))?;
        let place = self.place(1, false);
        if bytes.len() as u64 > MAX_WHOLE {
            let max = MAX_WHOLE;
            return Err(DataError::LineTooLong { place, max }.into());
        }
        let mut text = self.utf8(bytes, 1)?;
        if let Some(at) = text.find('\0') {
            return Err(self.nul(1, &text.as_bytes()[..at]).into());
        }
        // Where files were joined.
        if text.contains(BOM) {
            let joined = text.trim_start_matches(BOM);
            text = joined.replace(&format!("\n{BOM}"), "\n");
        }
        if text.trim().is_empty() {
            return Ok(());
        }
        each(Row {
            place,
            ..Row::new(Content::Text(text))
        })
    }

    /// One array of objects, which begins in line `first`; read as it comes.
    fn array(&self, from: impl Read, first: usize, each: Each<'_>) -> Result<()> {
        let mut json = serde_json::Deserializer::from_reader(Utf8Only::new(from, first));
        let mut rows = Elements {
            source: self,
            each,
            done: 0,
            error: None,
        };
        let read = json.deserialize_seq(&mut rows).and_then(|()| json.end());
        match (rows.error, read) {
            (Some(e), _) => Err(e),
            (None, Ok(())) => Ok(()),
            (None, Err(e)) if e.is_io() => Err(self.io(e.into())),
            (None, Err(e)) => Err(DataError::Json {
                place: self.place(first + e.line() - 1, false),
                what: message(&e) + hint("", &e),
                column: e.column(),
            }
            .into()),
        }
    }
}

/// The rows of an array.
struct Elements<'a> {
    source: &'a Source<'a>,
    each: Each<'a>,
    done: usize,
    error: Option<Error>,
}

impl<'de> Visitor<'de> for &mut Elements<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while let Some(value) = seq.next_element::<Json>()? {
            let place = self.source.place(self.done + 1, true);
            let row = Row::from_json(value, &place).map_err(Error::from);
            if let Err(e) = row.and_then(&mut *self.each) {
                self.error = Some(e);
                return Err(serde::de::Error::custom("the reading ends here"));
            }
            self.done += 1;
        }
        Ok(())
    }
}

fn row(line: &str, place: &Place) -> Result<Row, DataError> {
    // Lines cut out of an array.
    let line = line.trim_end();
    let line = line.strip_suffix(',').unwrap_or(line);
    let value: Json = serde_json::from_str(line).map_err(|e| DataError::Json {
        place: place.clone(),
        what: message(&e) + hint(line, &e),
        column: e.column(),
    })?;
    Row::from_json(value, place)
}

/// What the parser says, without its own place.
fn message(e: &serde_json::Error) -> String {
    let text = e.to_string();
    text.split(" at line ")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// What to do about a line that is no JSON.
fn hint(line: &str, e: &serde_json::Error) -> &'static str {
    let from = e.column().saturating_sub(1).min(line.len());
    let at = line.as_bytes().get(from..).unwrap_or_default();
    let text = e.to_string();
    let is_one = |names: [&str; 3]| names.iter().any(|name| at.starts_with(name.as_bytes()));
    if is_one(["NaN", "Infinity", "-Infinity"]) {
        ": JSON has no such number, write one or leave the field out"
    } else if text.contains("surrogate") || text.contains("hex escape") {
        ": half of a character, which no text can hold; complete or remove it"
    } else if text.contains("control character") {
        ": a tab or line end inside a text is written \\t or \\n"
    } else if at.starts_with(b"'") {
        ": texts and names of fields stand between \", not '"
    } else if is_one(["None", "True", "False"]) {
        ": JSON writes null, true and false"
    } else if at.starts_with(UTF8_BOM) {
        ": a byte order mark within the line, files were joined without a line end"
    } else if e.is_eof() && line.ends_with(['{', '[', ',']) || line == "{" {
        ": an object must end in its own line, unless the file is one array"
    } else {
        ""
    }
}
