//! Files in every encoding, and files that are no rows.

use super::*;

type Encode = fn(&str) -> Vec<u8>;

/// Encodings without byte order mark; U+FEFF in front of a text is one.
const ENCODINGS: [(&str, Encode); 5] = [
    ("UTF-8", |text| text.as_bytes().to_vec()),
    ("UTF-16LE", |text| {
        text.encode_utf16().flat_map(u16::to_le_bytes).collect()
    }),
    ("UTF-16BE", |text| {
        text.encode_utf16().flat_map(u16::to_be_bytes).collect()
    }),
    ("UTF-32LE", |text| {
        text.chars()
            .flat_map(|c| u32::from(c).to_le_bytes())
            .collect()
    }),
    ("UTF-32BE", |text| {
        text.chars()
            .flat_map(|c| u32::from(c).to_be_bytes())
            .collect()
    }),
];

fn texts(data: &Dataset) -> Vec<&str> {
    let text = |row: &'_ Row| match &row.content {
        Content::Text(_) => (),
        other => panic!("{other:?}"),
    };
    data.rows().iter().for_each(text);
    let rows = data.rows().iter();
    rows.filter_map(|row| match &row.content {
        Content::Text(text) => Some(text.as_str()),
        _ => None,
    })
    .collect()
}

fn named(bytes: &[u8], name: &str) -> Result<Dataset> {
    let slow = BufReader::with_capacity(3, bytes);
    let found = Dataset::from_reader(slow, name);
    let fast = Dataset::from_reader(bytes, name);
    match (&found, &fast) {
        (Ok(a), Ok(b)) => assert_eq!(a.rows().len(), b.rows().len()),
        (Err(a), Err(b)) => assert_eq!(a.to_string(), b.to_string()),
        _ => panic!("{name}: {found:?}, {fast:?}"),
    }
    found
}

#[test]
fn every_encoding_is_read_with_and_without_byte_order_mark() {
    let long = "The rain has not stopped, é🙂 said the guest.\n".repeat(300);
    let mut cases = 0;
    for (encoding, encode) in ENCODINGS {
        for mark in ["", "\u{feff}"] {
            let what = format!("{encoding} {mark:?}");
            for text in [
                "A cat.",
                "x\n",
                "é Ça va?\r\n",
                "日本語のテキスト a\n",
                "日本語の文章です。\n二行目。",
                "Привет, мир",
                "🙂 ok",
                "한국어 텍스트\n",
                &long,
            ] {
                // Letters beyond ASCII alone say nothing of how they are written.
                let bytes = encode(&format!("{mark}{text}"));
                let data = named(&bytes, "a.txt").unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(texts(&data), [text], "{what}");
                cases += 1;
            }
            let rows = "{\"text\": \"日本語の文章です\"}\n\n{\"text\": \"é🙂\"}\r\n";
            let array = "[{\"text\": \"日本語の文章です\"},\n {\"text\": \"é🙂\"}]";
            for file in [rows, array] {
                let bytes = encode(&format!("{mark}{file}"));
                let data = named(&bytes, "a.jsonl").unwrap_or_else(|e| panic!("{what}: {e}"));
                assert_eq!(texts(&data), ["日本語の文章です", "é🙂"], "{what}");
                cases += 1;
            }
            let many = format!("{{\"text\": \"{}\"}}\n", "日本é🙂".repeat(50)).repeat(100);
            let data = named(&encode(&format!("{mark}{many}")), "a.jsonl").unwrap();
            assert_eq!(data.rows().len(), 100);
            assert_eq!(data.rows()[99].place().number(), 100);
        }
    }
    assert_eq!(cases, 5 * 2 * 11);
}

#[test]
fn byte_order_marks_within_joined_files_are_left_out() {
    for (encoding, encode) in ENCODINGS {
        let rows = "\u{feff}{\"text\": \"a\"}\n\u{feff}{\"text\": \"b\"}\n\u{feff}\n{\"text\": \"\u{feff}c\"}";
        let data = named(&encode(rows), "a.jsonl").unwrap();
        assert_eq!(texts(&data), ["a", "b", "\u{feff}c"], "{encoding}");
        let text = named(&encode("\u{feff}One.\n\u{feff}Two.\n"), "a.txt").unwrap();
        assert_eq!(texts(&text), ["One.\nTwo.\n"], "{encoding}");
    }
}

#[test]
fn text_that_is_damaged_or_of_another_encoding_is_named_by_its_byte() {
    let latin1 = "the file seems to be Latin-1 (Windows-1252), iconv -f WINDOWS-1252 -t UTF-8 IN > OUT converts it";
    let other = "the file has another encoding, iconv -f ENCODING -t UTF-8 IN > OUT converts it";
    let good = "{\"text\": \"a\"}\n";
    let with = |line: &[u8]| [good.as_bytes(), good.as_bytes(), line, b"\n"].concat();
    let in_array = |row: &[u8]| [b"[\n", row, b"]"].concat();
    for (name, bytes, place, hint) in [
        (
            "a.jsonl",
            with(b"{\"text\": \"caf\xe9\"}"),
            "a.jsonl:3: not UTF-8 text (byte 14 of the line is 0xE9): ",
            latin1,
        ),
        (
            "a.jsonl",
            with(b"{\"text\": \"\x93na\xefve\x94 \x80 5\"}"),
            "a.jsonl:3: not UTF-8 text (byte 11 of the line is 0x93): ",
            latin1,
        ),
        (
            "a.json",
            in_array(b"{\"text\": \"caf\xe9\"}"),
            "a.json:2: not UTF-8 text (byte 14 of the line is 0xE9): ",
            latin1,
        ),
        (
            "a.txt",
            b"One\nTwo caf\xe9s\n".to_vec(),
            "a.txt:2: not UTF-8 text (byte 8 of the line is 0xE9): ",
            latin1,
        ),
        (
            "a.csv",
            b"id;pr\xe9nom\n".to_vec(),
            "a.csv:1: not UTF-8 text (byte 6 of the line is 0xE9): ",
            latin1,
        ),
        // Windows-1251, GBK, Shift JIS.
        (
            "a.jsonl",
            with(b"{\"text\": \"\xcf\xf0\xe8\xe2\xe5\xf2, \xec\xe8\xf0\"}"),
            "a.jsonl:3: not UTF-8 text (byte 11",
            other,
        ),
        (
            "a.txt",
            b"\xc4\xe3\xba\xc3\xca\xc0\xbd\xe7".to_vec(),
            "a.txt:1: not UTF-8 text (byte 1",
            other,
        ),
        (
            "a.txt",
            b"\x93\xfa\x96\x7b\x8c\xea\x82\xc5\x82\xb7".to_vec(),
            "a.txt:1: not UTF-8 text (byte 1",
            other,
        ),
        (
            "a.jsonl",
            with(
                "{\"text\": \"é日本\""
                    .as_bytes()
                    .split_last()
                    .unwrap()
                    .1
                    .split_last()
                    .unwrap()
                    .1,
            ),
            "a.jsonl:3: ",
            "a character is cut off",
        ),
        (
            "a.jsonl",
            with(
                "{\"text\": \"né né né \u{0}\"}"
                    .replace('\u{0}', "")
                    .as_bytes()
                    .split_last()
                    .unwrap()
                    .1,
            ),
            "a.jsonl:3: ",
            "EOF while parsing",
        ),
        (
            "a.jsonl",
            with(&[&b"{\"text\": \"\xe9 "[..], "éééé\"}".as_bytes()].concat()),
            "a.jsonl:3: ",
            "only a part of it",
        ),
        (
            "a.jsonl",
            with(b"{\"text\": \"a\0b\"}"),
            "a.jsonl:3: byte 12 of the line is NUL",
            "tr -d '\\000'",
        ),
        (
            "a.jsonl",
            with(&[0; 5000]),
            "a.jsonl:3: byte 1 of the line is NUL",
            "damaged",
        ),
        (
            "a.jsonl",
            b"\0{\"text\": \"a\"}\n{\"text\": \"and more of it\"}".to_vec(),
            "a.jsonl:1: byte 1 of the line is NUL",
            "damaged",
        ),
        (
            "a.json",
            in_array(b"{\"text\": \"a\0b\"}"),
            "a.json:2: byte 12 of the line is NUL",
            "damaged",
        ),
        (
            "a.txt",
            b"One\nTwo and three\0\nFour, five, six, seven".to_vec(),
            "a.txt:2: byte 14 of the line is NUL",
            "damaged",
        ),
        (
            "a.txt",
            b"\xff\xfea\0b\0\0".to_vec(),
            "a.txt: ",
            "this looks like UTF-16, but is not valid (byte 7)",
        ),
        (
            "a.txt",
            b"\xff\xfea\0\0\xd8b\0".to_vec(),
            "a.txt: ",
            "this looks like UTF-16, but is not valid (byte 5)",
        ),
        (
            "a.txt",
            b"\0\0\xfe\xff\0\0\0a\0\x11\0\0".to_vec(),
            "a.txt: ",
            "this looks like UTF-32, but is not valid (byte 9)",
        ),
    ] {
        let error = named(&bytes, name).unwrap_err().to_string();
        assert!(
            error.starts_with(place) && error.contains(hint) && !error.contains('\n'),
            "{error}; not {place}{hint}"
        );
    }
}

/// A wrong byte within is met where it stands, whatever comes before it.
#[test]
fn damaged_files_are_still_of_their_encoding() {
    let rows = "{\"text\": \"The rain has not stopped.\"}\n".repeat(20);
    let mut cases = 0;
    for (encoding, encode) in &ENCODINGS[1..] {
        let unit = encode("a").len();
        for name in ["a.jsonl", "a.txt"] {
            let mut bytes = encode(&rows);
            bytes.truncate(bytes.len() - 1);
            let error = named(&bytes, name).unwrap_err().to_string();
            let expected = format!(
                "a{}: this looks like UTF-{}, but is not valid",
                &name[1..],
                unit * 8
            );
            assert!(error.starts_with(&expected), "{encoding}: {error}");
            let mut bytes = encode(&rows);
            bytes[40 * unit..][..unit].fill(0);
            let error = named(&bytes, name).unwrap_err().to_string();
            assert!(
                error.contains(":2: byte 3 of the line is NUL") && !error.contains("tr -d"),
                "{encoding}: {error}"
            );
            let mut bytes = encode(&rows);
            let half = bytes.len() * 3 / 4 / unit * unit;
            bytes.insert(half, b'x');
            let error = named(&bytes, name).map(|data| texts(&data).concat().len());
            assert!(
                !format!("{error:?}").contains("binary"),
                "{encoding}: {error:?}"
            );
            cases += 3;
        }
    }
    assert_eq!(cases, 24);
    // A file of another encoding behind one in UTF-8.
    for mark in ["", "\u{feff}"] {
        for (_, encode) in &ENCODINGS[1..] {
            let bytes = [
                format!("{mark}{rows}").into_bytes(),
                encode(&rows.repeat(3)),
            ]
            .concat();
            let error = named(&bytes, "a.jsonl").unwrap_err().to_string();
            assert!(error.starts_with("a.jsonl:21: byte "), "{error}");
        }
    }
}

#[test]
fn files_that_are_no_text_are_said_to_be_what_they_are() {
    let at = |offset: usize, text: &[u8]| [&vec![b'a'; offset][..], text].concat();
    let noise: Vec<u8> = (0..2000u32).map(|i| (i * i * 7 + i / 3) as u8).collect();
    for (begin, expected) in [
        (&b"%PDF-1.7\n"[..], "a PDF"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a picture (PNG)"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a picture (JPEG)"),
        (b"GIF89a", "a picture (GIF)"),
        (b"\x7fELF\x02\x01\x01", "a program (ELF)"),
        (b"SQLite format 3\0", "an SQLite database"),
        (b"\x1f\x8b\x08\0", "a gzip archive"),
        (b"BZh91AY&SY", "a bzip2 archive"),
        (b"\xfd7zXZ\0\0", "an xz archive"),
        (b"\x28\xb5\x2f\xfd\x04", "a zstd archive"),
        (b"PK\x03\x04\x14\0", "a zip archive"),
        (b"7z\xbc\xaf\x27\x1c\0", "a 7z archive"),
        (&at(257, b"ustar\0"), "a tar archive"),
        (b"PAR1\x15\x04", "a Parquet file"),
        (b"ARROW1\0\0", "an Arrow (Feather) file"),
        (b"FEA1\0", "a Feather file"),
        (b"\xff\xff\xff\xff\x78\x01\0\0", "an Arrow stream"),
        (b"\x80\x04\x95\x10\0", "a Python pickle"),
        (b"\x80\x02}q\0", "a Python pickle"),
        (b"(lp0\n(dp1\n", "a Python pickle"),
        (b"\x58\0\0\0\0\0\0\0{\"a\":", "a safetensors file"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"\x93NUMPY\x01", "a NumPy file"),
        (b"GGUF\x03\0\0\0", "a model or an adapter"),
        (b"{\\rtf1\\ansi", "a document (RTF)"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer",
        ),
        (&noise, "binary data"),
    ] {
        for name in ["a.jsonl", "a.txt", "a"] {
            let error = named(begin, name).unwrap_err().to_string();
            let start = format!("{name}: this is {expected}");
            assert!(error.starts_with(&start), "{error}; not {start}");
            assert!(
                !error.contains("plain text") && !error.contains('\n'),
                "{error}"
            );
            assert!(error.contains(", not rows: "), "{error}");
        }
    }
    // Texts of a few letters that begin as files do.
    for text in ["BZh", "PK", "7z", "%PDF", "ARROW", "RIFF and raff", "Obj"] {
        assert_eq!(texts(&named(text.as_bytes(), "a.txt").unwrap()), [text]);
    }
}

#[test]
fn tables_are_told_with_the_line_that_converts_them() {
    let plain = "csv.DictReader(open(sys.argv[1], encoding=\"utf-8-sig\", newline=\"\")";
    let lower = "json.dumps(r)) for r in ({k.strip().lower(): v for k, v in r.items()} for r in csv.DictReader(";
    for (name, file, parts) in [
        (
            "a.csv",
            "prompt,completion\na,b\n",
            vec!["json.dumps(r)) for r in csv.", plain],
        ),
        (
            "a",
            "\"prompt\";\"completion\"\n\"a\";\"b\"\n",
            vec!["json.dumps(r)", ", delimiter=\";\")"],
        ),
        (
            "a.jsonl",
            "prompt\tcompletion\na\tb\n",
            vec!["json.dumps(r)", ", delimiter=\"\\t\")"],
        ),
        (
            "a.jsonl",
            "prompt|completion\na|b\n",
            vec!["json.dumps(r)", ", delimiter=\"|\")"],
        ),
        (
            "a",
            "id;text\n1;\"a, b, c\"\n",
            vec!["json.dumps(r)", ", delimiter=\";\")"],
        ),
        ("a", "Prompt, Completion\na,b\n", vec![lower]),
        (
            "a",
            "question,answer\na,b\n",
            vec!["json.dumps(r)) for r in csv."],
        ),
        (
            "a",
            "prompt,completion,weight\na,b,2\n",
            vec!["json.dumps({**r, \"weight\": float(r[\"weight\"])})"],
        ),
        (
            "a",
            "id,messages\n1,\"[]\"\n",
            vec!["json.dumps({**r, \"messages\": json.loads(r[\"messages\"])})"],
        ),
        (
            "a.jsonl",
            "english,french\ncat,chat\n",
            vec![
                "{\"prompt\": r[\"english\"], \"completion\": r[\"french\"]}",
                "name the columns",
            ],
        ),
        (
            "a.csv",
            "id,english,french\n1,cat,chat\n",
            vec!["{\"prompt\": r[\"english\"], \"completion\": r[\"french\"]}"],
        ),
        (
            "a.csv",
            "what it's like;how \"big\"\n1;2",
            vec!["r[\"what it\\u0027s like\"]", "delimiter=\";\""],
        ),
        (
            "a.csv",
            "text\nOnce upon a time\n",
            vec!["json.dumps(r)", plain],
        ),
        (
            "a.csv",
            "sentence\nOnce upon a time\n",
            vec!["{\"text\": r[\"sentence\"]}"],
        ),
        ("a", "text\nOnce upon a time\n", vec!["json.dumps(r)"]),
    ] {
        for (encoding, encode) in ENCODINGS {
            let found = named(&encode(file), name).unwrap_err().to_string();
            let start = format!("{name}: this looks like a table (CSV), not rows: python3 -c '");
            assert!(found.starts_with(&start), "{file:?}: {found}");
            for part in &parts {
                let python = format!("encoding=\"{}\"", encoding.to_lowercase());
                let python = python
                    .replace("f-8", "f-8-sig")
                    .replace("6le", "6-le")
                    .replace("6be", "6-be");
                let python = python.replace("2le", "2-le").replace("2be", "2-be");
                let part = part.replace("encoding=\"utf-8-sig\"", &python);
                assert!(found.contains(&part), "{file:?}: {found}; not {part}");
            }
            assert_eq!(found.matches('\'').count(), 2, "{found}");
        }
    }
    for (file, expected) in [
        (
            "Once upon a time, there was a cat.\nThe end, it slept.\n",
            "this is plain text",
        ),
        (
            "Roses are red, violets are blue\nSugar is sweet, and so are you\n",
            "this is plain text",
        ),
        ("\"Quoted\" from the start.\n", "this is plain text"),
        ("<!DOCTYPE html>\n<html>", "this is a web page (HTML)"),
        ("<HTML lang=\"en\">", "this is a web page (HTML)"),
        ("<?xml version=\"1.0\"?>", "this is XML"),
    ] {
        let found = named(file.as_bytes(), "a.jsonl").unwrap_err().to_string();
        assert!(found.contains(expected), "{file:?}: {found}");
    }
}

#[test]
fn lines_that_are_nearly_json_say_what_to_do() {
    for (line, expected) in [
        ("{'text': 'a'}", "between \", not '"),
        ("{\"text\": None}", "JSON writes null"),
        ("{\"text\": \"a\", \"b\": True}", "JSON writes null"),
        ("{\"text\": \"a\tb\"}", "written \\t or \\n"),
        (
            "{\"text\": \"a\"}\u{feff}{\"text\": \"b\"}",
            "byte order mark within the line",
        ),
    ] {
        let found = named(line.as_bytes(), "a").unwrap_err().to_string();
        assert!(
            found.starts_with("a:1: ") && found.contains(expected),
            "{line}: {found}"
        );
    }
    let found = named(b"[{\"text\": \"a\tb\"}]", "a")
        .unwrap_err()
        .to_string();
    assert!(found.contains("written \\t or \\n"), "{found}");
}
