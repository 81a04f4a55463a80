//! Files that are no rows: what they are, and what to do with them.

use super::encoding::is_control;
use serde_json::Value as Json;

/// What a file is, and what to do with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Kind {
    pub(super) what: &'static str,
    pub(super) hint: String,
}

fn kind(what: &'static str, hint: &str) -> Option<Kind> {
    let hint = hint.to_owned();
    Some(Kind { what, hint })
}

const UNPACK: &str = "unpack it first";
const SAVE: &str = "save its rows as JSON, one object per line";
const GIVE: &str = "give the data file here";
const TEXT: &str = "give a file of JSON objects, one per line, or a .txt file";

/// How files begin that are not text, what they are, and what to do with them.
const BINARY: &[(&[u8], &str, &str)] = &[
    (
        b"\x1f\x8b",
        "this is a gzip archive",
        "unpack it first (gunzip)",
    ),
    (
        b"\xfd7zXZ\0",
        "this is an xz archive",
        "unpack it first (unxz)",
    ),
    (
        b"\x28\xb5\x2f\xfd",
        "this is a zstd archive",
        "unpack it first (unzstd)",
    ),
    (
        b"\x04\x22\x4d\x18",
        "this is an lz4 archive",
        "unpack it first (unlz4)",
    ),
    (
        b"PK\x03\x04",
        "this is a zip archive (or a spreadsheet)",
        UNPACK,
    ),
    (b"PK\x05\x06", "this is an empty zip archive", GIVE),
    (b"7z\xbc\xaf\x27\x1c", "this is a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "this is a rar archive", UNPACK),
    (
        b"PAR1",
        "this is a Parquet file",
        "python3 -c 'import pandas,sys; pandas.read_parquet(sys.argv[1]).to_json(sys.argv[2], orient=\"records\", \
         lines=True)' IN.parquet OUT.jsonl converts it",
    ),
    (b"ARROW1", "this is an Arrow (Feather) file", FEATHER),
    (b"(lp0\n", "this is a Python pickle", SAVE),
    (b"(dp0\n", "this is a Python pickle", SAVE),
    (b"FEA1", "this is a Feather file", FEATHER),
    (
        b"SQLite format 3\0",
        "this is an SQLite database",
        "sqlite3 -json IN 'select ... as prompt, ... as completion from ...' > OUT.json writes rows",
    ),
    (b"\x89HDF\r\n\x1a\n", "this is an HDF5 file", SAVE),
    (b"\x93NUMPY", "this is a NumPy file", SAVE),
    (b"Obj\x01", "this is an Avro file", SAVE),
    (
        b"\xd0\xcf\x11\xe0",
        "this is an old Office document",
        "save it as CSV or text first",
    ),
    (b"GGUF", "this is a model or an adapter", GIVE),
    (
        b"%PDF-",
        "this is a PDF",
        "extract its text first (pdftotext)",
    ),
    (b"\x89PNG", "this is a picture (PNG)", TEXT),
    (b"\xff\xd8\xff", "this is a picture (JPEG)", TEXT),
    (b"GIF8", "this is a picture (GIF)", TEXT),
    (b"\x7fELF", "this is a program (ELF)", TEXT),
    (
        b"{\\rtf",
        "this is a document (RTF)",
        "save it as text first",
    ),
    (
        b"version https://git-lfs.",
        "this is a Git LFS pointer, which stands for a file",
        "git lfs pull fetches the file itself",
    ),
];

const FEATHER: &str = "python3 -c 'import pandas,sys; pandas.read_feather(sys.argv[1]).to_json(sys.argv[2], orient=\"records\", \
     lines=True)' IN.arrow OUT.jsonl converts it";

const ARROW_STREAM: &str = "python3 -c 'import pyarrow.ipc,sys; pyarrow.ipc.open_stream(sys.argv[1]).read_pandas().to_json(sys.argv[2], \
         orient=\"records\", lines=True)' IN.arrow OUT.jsonl converts it";

/// Where a tar archive says that it is one.
const TAR: std::ops::Range<usize> = 257..262;

/// What begins with these bytes, if it is no text.
pub(super) fn binary(head: &[u8]) -> Option<Kind> {
    if let Some((_, what, hint)) = BINARY.iter().find(|(begin, ..)| head.starts_with(begin)) {
        return kind(what, hint);
    }
    match head {
        [
            b'B',
            b'Z',
            b'h',
            b'1'..=b'9',
            b'1',
            b'A',
            b'Y',
            b'&',
            b'S',
            b'Y',
            ..,
        ] => kind("this is a bzip2 archive", "unpack it first (bunzip2)"),
        _ if head.get(TAR) == Some(b"ustar") => {
            kind("this is a tar archive", "unpack it first (tar -xf)")
        }
        // A mark, and the size of what follows.
        [0xFF, 0xFF, 0xFF, 0xFF, _, _, _, 0, ..] => kind("this is an Arrow stream", ARROW_STREAM),
        // Protocols of today.
        [0x80, 2..=5, ..] => kind("this is a Python pickle", SAVE),
        // The size of the JSON text that follows.
        [_, _, _, _, 0, 0, 0, 0, b'{', b'"' | b'}', ..] => kind("this is a safetensors file", GIVE),
        _ => None,
    }
}

/// Bytes that are no text in any encoding that is read, and no kind of file that has a name.
pub(super) fn unknown(head: &[u8]) -> Option<Kind> {
    // Of damaged rows more can be said, and of a single wrong byte, too.
    if head.trim_ascii_start().starts_with(b"{") || head.trim_ascii_start().starts_with(b"[") {
        return None;
    }
    let strange = head.iter().filter(|&&b| is_control(b)).count();
    (strange > 2 && strange * 20 > head.len()).then(|| Kind {
        what: "this is binary data",
        hint: TEXT.to_owned(),
    })
}

/// A file whose first lines are these, and no JSON; its name says that it is a table if `named`.
pub(super) fn of_text(lines: &[String], named: bool, encoding: &str) -> Kind {
    let first = lines.first().map_or("", |line| line.trim());
    let begins = |with: &str| {
        let begin = first.get(..with.len());
        begin.is_some_and(|begin| begin.eq_ignore_ascii_case(with))
    };
    let (what, hint) = if begins("<!doctype html") || begins("<html") {
        let hint = "download the file itself, not the page that shows it";
        ("this is a web page (HTML)", hint.to_owned())
    } else if begins("<?xml") {
        ("this is XML", SAVE.to_owned())
    } else if let Some(table) = Table::of(lines, named) {
        ("this looks like a table (CSV)", table.conversion(encoding))
    } else {
        let hint = "write each text as {\"text\": \"...\"} in a line, or name the file .txt to take it as one text";
        ("this is plain text", hint.to_owned())
    };
    Kind { what, hint }
}

/// What stands between the columns of a table, and their names.
struct Table {
    separator: char,
    columns: Vec<String>,
}

impl Table {
    fn of(lines: &[String], named: bool) -> Option<Self> {
        let header = lines.first()?.trim_end();
        let tables = [',', ';', '\t', '|'].map(|separator| Self {
            separator,
            columns: cells(header, separator),
        });
        let (known, other): (Vec<_>, _) = tables
            .into_iter()
            .filter(|table| table.columns.len() > 1)
            .partition(|table| table.columns.iter().any(|c| is_field(c)));
        let most = |tables: Vec<Self>| tables.into_iter().rev().max_by_key(|t| t.columns.len());
        most(known)
            .or_else(|| {
                most(
                    other
                        .into_iter()
                        .filter(|t| named || t.is_likely(lines))
                        .collect(),
                )
            })
            .or_else(|| {
                let columns = cells(header, ',');
                let alone = named || ["prompt", "text"].contains(&columns[0].as_str());
                let separator = ',';
                (alone && columns.len() == 1).then_some(Self { separator, columns })
            })
    }

    /// Whether the first line has names and the next ones as many cells: lines of prose have commas, too.
    fn is_likely(&self, lines: &[String]) -> bool {
        let name = |c: &String| {
            c.starts_with(|c: char| c.is_alphabetic() || c == '_')
                && c.split_whitespace().count() <= 2
                && !c.contains(['.', '!', '?', ':', '\'', '"'])
        };
        let as_many =
            |line: &String| cells(line.trim_end(), self.separator).len() == self.columns.len();
        self.columns.iter().all(name) && lines.len() > 1 && lines[1..].iter().all(as_many)
    }

    /// The command that makes rows of it.
    fn conversion(&self, encoding: &str) -> String {
        let field = |c: &String| c.trim().to_ascii_lowercase();
        let fields: Vec<String> = self.columns.iter().map(field).collect();
        let delimiter = match self.separator {
            ',' => "",
            ';' => ", delimiter=\";\"",
            '\t' => ", delimiter=\"\\t\"",
            _ => ", delimiter=\"|\"",
        };
        let mut rows = format!(
            "csv.DictReader(open(sys.argv[1], encoding=\"{encoding}\", newline=\"\"){delimiter})"
        );
        let mut note = "";
        let row = if super::row::is_layout(&fields) {
            if fields != self.columns {
                rows = format!("({{k.strip().lower(): v for k, v in r.items()}} for r in {rows})");
            }
            let parsed = fields.iter().filter_map(|name| match &name[..] {
                "weight" => Some(r#""weight": float(r["weight"])"#.to_owned()),
                "messages" | "conversations" | "conversation" => {
                    Some(format!("\"{name}\": json.loads(r[\"{name}\"])"))
                }
                _ => None,
            });
            let parsed: Vec<String> = parsed.collect();
            match parsed[..] {
                [] => "r".to_owned(),
                _ => format!("{{**r, {}}}", parsed.join(", ")),
            }
        } else {
            note = " (name the columns that you mean)";
            let number = ["", "id", "idx", "index", "unnamed: 0"];
            let column = |i: &usize| python(&self.columns[*i]);
            let texts: Vec<usize> = (0..fields.len())
                .filter(|&i| !number.contains(&fields[i].as_str()))
                .collect();
            match &texts[..] {
                [prompt, completion, ..] => format!(
                    "{{\"prompt\": r[{}], \"completion\": r[{}]}}",
                    column(prompt),
                    column(completion)
                ),
                one => format!("{{\"text\": r[{}]}}", column(one.first().unwrap_or(&0))),
            }
        };
        format!(
            "python3 -c 'import csv,json,sys; [print(json.dumps({row})) for r in {rows}]' IN.csv > OUT.jsonl converts it{note}"
        )
    }
}

fn is_field(column: &str) -> bool {
    super::row::FIELDS.contains(&column.trim().to_ascii_lowercase().as_str())
}

/// `text` as Python writes it, within single quotes of a shell.
fn python(text: &str) -> String {
    Json::from(text).to_string().replace('\'', "\\u0027")
}

/// The cells of a line, without the quotes around them.
fn cells(line: &str, separator: char) -> Vec<String> {
    let mut cells = vec![String::new()];
    let mut quoted = false;
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        let cell = cells.last_mut().expect("there is one from the start");
        match c {
            '"' if quoted && chars.next_if_eq(&'"').is_some() => cell.push('"'),
            '"' if quoted || cell.trim().is_empty() => quoted = !quoted,
            c if c == separator && !quoted => cells.push(String::new()),
            c => cell.push(c),
        }
    }
    cells
}
