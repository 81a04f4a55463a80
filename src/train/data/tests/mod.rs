use super::*;
use std::io;

mod files;
mod layouts;
mod weights;

fn read(text: &[u8]) -> Result<Dataset> {
    Dataset::from_reader(text, "rows")
}

fn completion(prompt: &str) -> Row {
    Row::new(Content::Completion {
        prompt: prompt.to_owned(),
        completion: Some("b".to_owned()),
    })
}

#[test]
fn lines_are_counted_and_empty_ones_skipped() {
    let data = read(b"{\"text\": \"a\"}\r\n\n  \n{\"prompt\": \"b\", \"weight\": 0.5}").unwrap();
    let places: Vec<_> = data.rows().iter().map(|r| r.place().to_string()).collect();
    assert_eq!(places, ["rows:1", "rows:4"]);
    assert_eq!(data.rows()[1].weight, 0.5);
}

#[test]
fn every_fault_of_a_line_names_it() {
    for (line, expected) in [
        (
            &b"{\"text\": "[..],
            "rows:1: EOF while parsing a value (column 8)",
        ),
        (
            b"{\"text\": \"\xff\"}",
            "rows:1: not UTF-8 text (byte 11 of the line is 0xFF): the file seems to be Latin-1 (Windows-1252), iconv -f WINDOWS-1252 \
             -t UTF-8 IN > OUT converts it",
        ),
        (
            b"{}",
            "rows:1: no field 'prompt', 'messages', 'text', 'conversations', 'instruction', 'question' or 'query', nor 'input' and \
             'output', 'user' and 'assistant' or 'source' and 'target' (there are no fields)",
        ),
        (
            b"{\"question\": \"a\", \"answer\": 1}",
            "rows:1: the field 'answer' is 1, it must be a text",
        ),
        (
            b"{\"prompt\": \"a\", \"completion\": \"b\", \"weight\": NaN}",
            "rows:1: expected value: JSON has no such number, write one or leave the field out (column 46)",
        ),
        (
            b"{\"text\": \"a \\ud83d b\"}",
            "rows:1: unexpected end of hex escape: half of a character, which no text can hold; complete or remove it (column 19)",
        ),
        (
            b"{\n\"text\": \"a\"}",
            "rows:1: EOF while parsing an object: an object must end in its own line, unless the file is one array (column 1)",
        ),
        (
            b"{\"conversations\": [{\"from\": \"narrator\", \"value\": \"a\"}]}",
            "rows:1: messages from 'narrator' are not known (system, human or user, gpt or assistant, tool)",
        ),
        (
            b"{\"messages\": [{\"content\": \"a\"}]}",
            "rows:1: a message must have a role that is a text",
        ),
        (
            b"{\"messages\": \"a\"}",
            "rows:1: the field 'messages' is a text, it must be a list of messages",
        ),
        (
            b"[\"a\", \"b\", null, null, null]",
            "rows, row 1: a text is no row: each is an object such as {\"prompt\": \"...\", \"completion\": \"...\"}",
        ),
        (
            b"\n[{\"text\": \"a\"},\n {\"text\": }]",
            "rows:3: expected value (column 11)",
        ),
        (
            b"[{\"text\": \"a\"}]\n[{\"text\": \"b\"}]",
            "rows:2: trailing characters (column 1)",
        ),
        (
            b"prompt,completion\na,b\n",
            "rows: this looks like a table (CSV), not rows: python3 -c 'import csv,json,sys; [print(json.dumps(r)) for r in \
             csv.DictReader(open(sys.argv[1], encoding=\"utf-8-sig\", newline=\"\"))]' IN.csv > OUT.jsonl converts it",
        ),
        (
            b"Once upon a time,\nthe end.",
            "rows: this is plain text, not rows: write each text as {\"text\": \"...\"} in a line, or name the file .txt to take it as \
             one text",
        ),
        (
            b"\x1f\x8b\x08\x00",
            "rows: this is a gzip archive, not rows: unpack it first (gunzip)",
        ),
        (
            b"\xff\xfe{\x00\x00\xd8}\x00",
            "rows: this looks like UTF-16, but is not valid (byte 5), not rows: save it as UTF-8",
        ),
        (
            b"{\"text\": \"a\", \"weight\": 1e39}",
            "rows:1: the weight is 1000000000000000000000000000000000000000, it must not be negative or beyond single precision",
        ),
        (b"\n \n", "rows: there are no rows"),
    ] {
        assert_eq!(read(line).unwrap_err().to_string(), expected);
    }
    // An endless line ends the reading, not the memory.
    let endless = BufReader::new(io::repeat(b' '));
    let error = Dataset::from_reader(endless, "rows").unwrap_err();
    assert!(
        error.to_string().starts_with("rows:1: longer than "),
        "{error}"
    );
}

#[test]
fn rows_in_memory_are_numbered() {
    let from_file = read(b"\n\n{\"text\": \"a\"}").unwrap().rows()[0].clone();
    let data = Dataset::from_rows(vec![completion("a"), from_file, completion("c")]).unwrap();
    let places: Vec<_> = data.rows().iter().map(|r| r.place().to_string()).collect();
    assert_eq!(places, ["row 1", "rows:3", "row 3"]);

    let error = Dataset::from_rows(vec![completion("a"), completion("b").weight(f32::NAN)]);
    assert!(
        error
            .unwrap_err()
            .to_string()
            .starts_with("row 2: the weight is NaN")
    );
    let error = Dataset::from_rows(Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "data set: there are no rows");
}

/// Rows as they come from editors, spreadsheets and other systems.
#[test]
fn files_of_every_make_are_read() {
    let lines = ["{\"text\": \"a é🙂\"}", "{\"text\": \"b\"}"];
    let texts = |data: &Dataset| -> Vec<String> {
        let text = |row: &Row| match &row.content {
            Content::Text(text) => text.clone(),
            other => panic!("{other:?}"),
        };
        data.rows().iter().map(text).collect()
    };
    let lf = lines.join("\n");
    let utf16 = |bytes: fn(u16) -> [u8; 2], text: &str| -> Vec<u8> {
        text.encode_utf16().flat_map(bytes).collect()
    };
    let array = format!("[{},\n  {}]", lines[0], lines[1]);
    let mut forms = 0;
    for file in [
        lf.clone().into_bytes(),
        lines.join("\r\n").into_bytes(),
        lines.join("\r").into_bytes(),
        lines.join(",\n").into_bytes(),
        format!("\u{feff}{lf}").into_bytes(),
        format!("\u{feff}\n\n{array}\n").into_bytes(),
        format!("[\n{}\n]", array[1..array.len() - 1].replace(", ", ",\n")).into_bytes(),
        utf16(u16::to_le_bytes, &format!("\u{feff}{lf}")),
        utf16(u16::to_be_bytes, &format!("\u{feff}{lf}")),
        utf16(u16::to_le_bytes, &lf),
        utf16(u16::to_be_bytes, &array),
    ] {
        let data =
            read(&file).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&file)));
        assert_eq!(texts(&data), ["a é🙂", "b"]);
        // However the bytes come.
        let slow = BufReader::with_capacity(1, &file[..]);
        assert_eq!(
            texts(&Dataset::from_reader(slow, "rows").unwrap()),
            ["a é🙂", "b"]
        );
        forms += 1;
    }
    assert_eq!(forms, 11);
    let places = |bytes: &[u8]| -> Vec<String> {
        let data = read(bytes).unwrap();
        data.rows().iter().map(|r| r.place().to_string()).collect()
    };
    assert_eq!(
        places(lines.join("\r\n\r\n").as_bytes()),
        ["rows:1", "rows:3"]
    );
    assert_eq!(places(lines.join("\r\r").as_bytes()), ["rows:1", "rows:3"]);
    assert_eq!(places(array.as_bytes()), ["rows, row 1", "rows, row 2"]);

    let text = "Once upon a time.\nThe end.\n";
    let data = Dataset::from_reader(text.as_bytes(), "story.TXT").unwrap();
    assert_eq!(texts(&data), [text]);
    let error = Dataset::from_reader(&b" \n"[..], "story.txt").unwrap_err();
    assert_eq!(error.to_string(), "story.txt: there are no rows");
}

#[test]
fn long_texts_are_cut_between_characters_and_end_once() {
    let model = tinylm();
    let eos = model.vocab().eos().unwrap();
    let text = "The rain has not stopped, 🙂é日本 said the guest. ".repeat(20);
    let row = Row::new(Content::Text(text.clone())).weight(2.0);
    let short = Row::new(Content::Text("Short.".to_owned()));
    let whole = row.example(&model).unwrap();
    for n in [1, 2, 7, 50, 10_000] {
        let data = Dataset::from_rows(vec![row.clone(), short.clone(), completion("a")]).unwrap();
        let data = data.split_texts(&model, n).unwrap();
        let parts: Vec<_> = data
            .rows()
            .iter()
            .filter(|r| r.place().number() == 1)
            .collect();
        let mut joined = String::new();
        for (i, part) in parts.iter().enumerate() {
            let Content::Text(text) = &part.content else {
                panic!()
            };
            joined += text;
            assert_eq!(part.weight, 2.0);
            let ids: Vec<_> = part.example(&model).unwrap().ids().collect();
            let last = i + 1 == parts.len();
            assert_eq!(ids.last() == Some(&eos), last, "{n}: {text:?}");
            assert!(!ids[..ids.len() - 1].contains(&eos));
        }
        assert_eq!(joined, text, "{n}");
        for part in &parts {
            // With BOS or EOS, and a character that has more tokens.
            let ids = part.example(&model).unwrap().ids().count();
            assert!(ids <= n.max(4) + 1, "{n}: {ids}");
        }
        let least = (whole.ids().count() - 1).div_ceil(n);
        assert!(
            n < 7 || parts.len() >= least && parts.len() <= least + least / 10 + 1,
            "{n}: {}",
            parts.len()
        );
        assert!(data.rows().len() >= parts.len() + 2);
    }
}

fn tinylm() -> Model {
    Model::open(
        "models/tinylm-q8_0.gguf",
        &crate::model::ModelOptions::default(),
    )
    .unwrap()
}

/// Enough rows for several threads, and several times.
#[test]
fn rows_that_are_tokenized_as_they_come_are_the_same_rows() {
    let model = tinylm();
    let line = |i: usize| match i % 3 {
        0 => format!(
            "{{\"prompt\": \"Room {i}\", \"completion\": \" is taken.\", \"weight\": {i}}}\n\n"
        ),
        1 => format!(
            "{{\"text\": \"{}\"}}\n",
            format!("Guest {i}. ").repeat(i % 100)
        ),
        _ => format!("{{\"instruction\": \"Greet {i}\", \"output\": \"Good day!\"}}\n"),
    };
    let file: String = (1..2000).map(line).collect();
    let data = read(file.as_bytes()).unwrap();
    let wanted = data.examples(&model).unwrap();
    let kept = Examples::from_reader(file.as_bytes(), "rows", &model).unwrap();
    assert_eq!(kept.len(), 1999);
    for (i, wanted) in wanted.iter().enumerate() {
        assert_eq!(kept.get(i), *wanted);
        assert_eq!(kept.place(i), *data.rows()[i].place());
        assert_eq!(kept.weight(i), data.rows()[i].weight);
    }
    assert!(kept.iter().eq(wanted.iter().cloned()));
    let ids: Vec<i32> = wanted.iter().flat_map(Example::ids).collect();
    assert_eq!(kept.ids(), ids);

    let split = data.clone().split_texts(&model, 20).unwrap();
    let mut builder = ExamplesBuilder::new(&model).split_texts(20);
    for row in data.rows() {
        builder.push(row.clone()).unwrap();
    }
    let kept = builder.finish().unwrap();
    assert!(kept.len() > 1999);
    assert!(kept.iter().eq(split.examples(&model).unwrap()));

    // The first row that fails is the one that is named, whichever thread meets it.
    let mut lines: Vec<_> = (1..2000).map(line).collect();
    for i in [1700, 900, 1200] {
        lines[i] = "{\"prompt\": \"What now?\"}\n".to_owned();
    }
    let error = Examples::from_reader(lines.concat().as_bytes(), "rows", &model).unwrap_err();
    let number = 1 + lines[..900].concat().matches('\n').count();
    assert!(
        error
            .to_string()
            .starts_with(&format!("rows:{number}: no field 'completion'")),
        "{error}"
    );
}

#[test]
fn examples_know_where_they_come_from() {
    let example = |weight| Example {
        given: vec![1],
        then: vec![(2, true)],
        weight,
        bos: false,
    };
    let examples = Examples::from(vec![example(1.0), example(0.0)]);
    assert_eq!(examples.place(1).to_string(), "row 2");
    let model = tinylm();
    let in_file = read(b"{\"text\": \"a\"}\n\n{\"text\": \"b\"}").unwrap();
    let in_array = read(b"[{\"text\": \"c\"}]").unwrap();
    let mut builder = ExamplesBuilder::new(&model);
    for row in in_file
        .rows()
        .iter()
        .chain(in_array.rows())
        .chain(in_file.rows())
    {
        builder.push(row.clone()).unwrap();
    }
    let examples = builder.finish().unwrap();
    let places: Vec<_> = (0..examples.len())
        .map(|i| examples.place(i).to_string())
        .collect();
    assert_eq!(
        places,
        ["rows:1", "rows:3", "rows, row 1", "rows:1", "rows:3"]
    );
}

/// A line of an array's file holds many rows: what bounds lines does not bound it.
#[test]
fn an_array_in_one_line_may_be_of_any_size() {
    let row = format!("{{\"text\": \"{}\"}}", "a".repeat(4 << 20));
    let file = format!(" [{}]", [row.as_str(); 17].join(", "));
    assert!(file.len() > 64 << 20);
    let mut rows = 0;
    for_each_row(file.as_bytes(), "rows", |row| {
        rows += 1;
        assert_eq!(row.place().to_string(), format!("rows, row {rows}"));
        Ok(())
    })
    .unwrap();
    assert_eq!(rows, 17);
}
