//! Files of rows: one JSON object per line or one array of them, in UTF-8 or UTF-16.

use super::{Content, DataError, Place, Row};
use crate::error::{Error, Result};
use serde::Deserializer as _;
use serde::de::{SeqAccess, Visitor};
use serde_json::Value as Json;
use std::fmt;
use std::io::{self, BufRead, Cursor, Read};
use std::path::Path;
use std::string::FromUtf8Error;
use std::sync::Arc;

/// Longest line, in bytes: far beyond any context, and an endless device ends here.
const MAX_LINE: usize = 64 << 20;
/// Longest file that must be in memory as a whole (UTF-16, plain text), in bytes.
const MAX_WHOLE: u64 = 1 << 30;

const UTF8_BOM: &[u8] = b"\xef\xbb\xbf";

/// What is done with a row.
type Each<'a> = &'a mut dyn FnMut(Row) -> Result<()>;

/// All rows that `from` holds, which errors call `name`, one after the other.
pub(super) fn rows(mut from: impl BufRead, name: &Path, each: Each<'_>) -> Result<()> {
    let source = Source {
        name,
        file: name.into(),
    };
    let mut head = Vec::new();
    let read = from.by_ref().take(4).read_to_end(&mut head);
    read.map_err(|e| source.io(e))?;
    if let Some(kind) = binary(&head) {
        return Err(source.other(kind));
    }
    let utf16: Option<fn([u8; 2]) -> u16> = match head[..] {
        [0xFF, 0xFE, ..] | [b'{' | b'[', 0, ..] => Some(u16::from_le_bytes),
        [0xFE, 0xFF, ..] | [0, b'{' | b'[', ..] => Some(u16::from_be_bytes),
        _ => None,
    };
    let skip = if head.starts_with(UTF8_BOM) { 3 } else { 0 };
    let mut from = Cursor::new(head.split_off(skip)).chain(from);
    if let Some(unit) = utf16 {
        let text = source.decode_utf16(&source.whole(&mut from)?, unit)?;
        return source.read(Cursor::new(text.into_bytes()), each);
    }
    source.read(from, each)
}

/// What begins with these bytes, and what to do with it.
fn binary(head: &[u8]) -> Option<(&'static str, &'static str)> {
    let unpack = "unpack it first";
    Some(match head {
        [0x1F, 0x8B, ..] => ("this is a gzip archive", unpack),
        [0x28, 0xB5, 0x2F, 0xFD] => ("this is a zstd archive", unpack),
        [b'P', b'K', 3, 4] => ("this is a zip archive (or a spreadsheet)", unpack),
        b"PAR1" => (
            "this is a Parquet file",
            "python3 -c 'import pandas,sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient=\"records\", \
             lines=True)' IN.parquet OUT.jsonl converts it",
        ),
        b"GGUF" => ("this is a model or an adapter", "give the data file here"),
        _ => return None,
    })
}

struct Source<'a> {
    name: &'a Path,
    /// The same for the places of all rows.
    file: Arc<Path>,
}

impl Source<'_> {
    fn io(&self, source: io::Error) -> Error {
        Error::Io {
            path: self.name.to_owned(),
            source,
        }
    }

    /// What the file seems to be, and what to do with it.
    fn other(&self, (what, hint): (&'static str, &'static str)) -> Error {
        let source_name = self.name.display().to_string();
        DataError::OtherFile {
            source_name,
            what,
            hint,
        }
        .into()
    }

    fn utf8(&self, bytes: Vec<u8>, place: Place) -> Result<String> {
        let not_utf8 = |e: FromUtf8Error| DataError::NotUtf8 {
            place,
            byte: e.utf8_error().valid_up_to(),
        };
        Ok(String::from_utf8(bytes).map_err(not_utf8)?)
    }

    fn place(&self, number: usize, in_array: bool) -> Place {
        Place {
            file: Some(self.file.clone()),
            number,
            in_array,
        }
    }

    fn whole(&self, from: &mut impl Read) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        from.take(MAX_WHOLE + 1)
            .read_to_end(&mut bytes)
            .map_err(|e| self.io(e))?;
        match bytes.len() as u64 > MAX_WHOLE {
            true => Err(DataError::LineTooLong {
                place: self.place(1, false),
                max: MAX_WHOLE,
            }
            .into()),
            false => Ok(bytes),
        }
    }

    fn decode_utf16(&self, bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Result<String> {
        let not_text = || {
            self.other((
                "this looks like UTF-16, but is not valid",
                "save it as UTF-8",
            ))
        };
        let (pairs, rest) = bytes.as_chunks::<2>();
        if !rest.is_empty() {
            return Err(not_text());
        }
        let mut units = pairs.iter().map(|&pair| unit(pair)).peekable();
        units.next_if_eq(&0xFEFF);
        char::decode_utf16(units)
            .collect::<Result<_, _>>()
            .map_err(|_| not_text())
    }

    /// From text without byte order mark.
    fn read(&self, mut from: impl BufRead, each: Each<'_>) -> Result<()> {
        if self
            .name
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("txt"))
        {
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
            let trimmed = line.trim();
            if trimmed.is_empty() {
                continue;
            }
            if std::mem::take(&mut first) && !trimmed.starts_with('{') {
                return Err(self.other(match is_table(trimmed) {
                    true => ("this looks like a table (CSV)", CSV_HINT),
                    false => ("this is plain text", TEXT_HINT),
                }));
            }
            each(row(&line, &place)?)?;
        }
        Ok(())
    }

    fn line(&self, lines: &mut Lines, from: &mut impl BufRead) -> Result<Option<String>> {
        let bytes = lines.next(from).map_err(|e| self.io(e))?;
        let place = self.place(lines.number, false);
        let Some(bytes) = bytes else { return Ok(None) };
        if bytes.len() > MAX_LINE {
            let max = MAX_LINE as u64;
            return Err(DataError::LineTooLong { place, max }.into());
        }
        self.utf8(bytes, place).map(Some)
    }

    /// One row of text.
    fn text(&self, mut from: impl Read, each: Each<'_>) -> Result<()> {
        let place = self.place(1, false);
        let text = self.utf8(self.whole(&mut from)?, place.clone())?;
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
        let mut json = serde_json::Deserializer::from_reader(from);
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
                what: message(&e),
                column: e.column(),
            }
            .into()),
        }
    }
}

const CSV_HINT: &str = "python3 -c 'import csv,json,sys; [print(json.dumps(r)) for r in csv.DictReader(open(sys.argv[1]))]' IN.csv > OUT.jsonl \
                        converts it";
const TEXT_HINT: &str = "write each text as {\"text\": \"...\"} in a line, or name the file .txt to take it as one text";

/// Names of columns that rows are made of, separated as tables separate them.
fn is_table(line: &str) -> bool {
    [',', ';', '\t'].iter().any(|&separator| {
        let mut cells = line.split(separator).map(|c| c.trim().trim_matches('"'));
        let known = |c: &str| super::row::FIELDS.contains(&c.to_ascii_lowercase().as_str());
        line.contains(separator) && cells.any(known)
    })
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
    if [&b"NaN"[..], b"Infinity", b"-Infinity"]
        .iter()
        .any(|n| at.starts_with(n))
    {
        ": JSON has no such number, write one or leave the field out"
    } else if text.contains("surrogate") || text.contains("hex escape") {
        ": half of a character, which no text can hold; complete or remove it"
    } else if e.is_eof() && line.ends_with(['{', '[', ',']) || line == "{" {
        ": an object must end in its own line, unless the file is one array"
    } else {
        ""
    }
}

/// Lines that end in LF, CR LF or CR.
#[derive(Default)]
struct Lines {
    /// Of the last line, counted from 1.
    number: usize,
    /// The last line ended in CR: an LF belongs to it.
    after_cr: bool,
}

impl Lines {
    /// Leaves out lines that are empty or blank; returns the white space that the first other line begins with and what stands
    /// behind it, which `from` still has.
    fn skip_blank(&mut self, from: &mut impl BufRead) -> io::Result<(Vec<u8>, Option<u8>)> {
        let mut indent = Vec::new();
        loop {
            let buffer = match from.fill_buf() {
                Ok(buffer) => buffer,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            let blank = buffer.iter().take_while(|b| b.is_ascii_whitespace());
            let n = blank.count();
            for &b in &buffer[..n] {
                let after_cr = std::mem::replace(&mut self.after_cr, b == b'\r');
                match b {
                    b'\n' if after_cr => {}
                    b'\n' | b'\r' => {
                        self.number += 1;
                        indent.clear();
                    }
                    _ => indent.push(b),
                }
            }
            // Longer than a line may be: the caller says so.
            if n == 0 || indent.len() > MAX_LINE {
                return Ok((indent, buffer.first().copied()));
            }
            from.consume(n);
        }
    }

    /// The next line without its end, or more than [`MAX_LINE`] bytes of it; `None` at the end.
    fn next(&mut self, from: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
        self.number += 1;
        let mut line = Vec::new();
        let mut begun = false;
        loop {
            let buffer = match from.fill_buf() {
                Ok(buffer) => buffer,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            if buffer.is_empty() {
                return Ok(begun.then_some(line));
            }
            if std::mem::take(&mut self.after_cr) && buffer[0] == b'\n' {
                from.consume(1);
                continue;
            }
            begun = true;
            let end = buffer.iter().position(|&b| b == b'\n' || b == b'\r');
            line.extend_from_slice(&buffer[..end.unwrap_or(buffer.len())]);
            let Some(end) = end else {
                let n = buffer.len();
                from.consume(n);
                if line.len() > MAX_LINE {
                    return Ok(Some(line));
                }
                continue;
            };
            self.after_cr = buffer[end] == b'\r';
            from.consume(end + 1);
            return Ok(Some(line));
        }
    }
}
