//! What a run that ends well prints and leaves.

use crate::{Place, in_shell, json, ok, stderr, stdout};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

/// What the `name` row of its summary says.
#[track_caller]
fn row<'a>(summary: &'a str, name: &str) -> &'a str {
    let line = summary.lines().find(|l| l.starts_with(name));
    let line = line.unwrap_or_else(|| panic!("no '{name}' in {summary}"));
    line[name.len()..].trim()
}

#[test]
fn every_method_trains_and_its_file_runs() {
    let place = Place::new();
    for (method, more, kind, length, trained) in [
        ("prefix", "", "prefix", 20, 20 * 8 * 2 * 128),
        ("prompt", "--length 3", "prompt", 3, 3 * 256),
        (
            "p-tuning",
            "--template {v:2}{prompt}{v:3} --hidden 16 --reparam mlp",
            "p_tuning",
            5,
            5 * 256 + (256 * 16 + 16) + (16 * 16 + 16) + (16 * 256 + 256),
        ),
    ] {
        let line = format!(
            "--method {method} {more} --valid @valid.jsonl --steps 6 --eval-every 2 --batch 3 -o @{method}.gguf \
             --log @log.jsonl --plot @loss.svg"
        );
        let output = place.train(&line);
        let summary = stdout(&output);

        // A line for each evaluation where there is no terminal.
        let err = stderr(&output);
        let lines: Vec<_> = err.lines().collect();
        assert_eq!(lines.len(), 4, "{err}");
        let alone = "validation loss of the model alone: ";
        assert!(lines[0].starts_with(alone), "{err}");
        for (line, step) in lines[1..].iter().zip([2, 4, 6]) {
            assert!(line.starts_with(&format!("step {step}/6: loss ")), "{err}");
            for part in [", validation ", "best", " tok/s, ", " left"] {
                assert!(line.contains(part), "{part}: {err}");
            }
        }

        // The log holds every step.
        let log = place.log("log.jsonl");
        assert_eq!(log.len(), 6);
        let mut best = f64::INFINITY;
        for (i, row) in log.iter().enumerate() {
            let number = |key: &str| row[key].as_f64().unwrap_or_else(|| panic!("{key}: {row}"));
            let keys: Vec<_> = row.as_object().unwrap().keys().collect();
            let expected = [
                "step",
                "steps",
                "epoch",
                "loss",
                "valid_loss",
                "best",
                "lr",
                "grad_norm",
                "tokens",
                "targets",
                "seconds",
            ];
            assert_eq!(keys, expected);
            assert_eq!(
                (row["step"].as_u64(), &row["steps"]),
                (Some(i as u64 + 1), &6.into())
            );
            assert!((number("epoch") - (i + 1) as f64 * 3.0 / 6.0).abs() < 1e-12);
            assert!(number("loss") > 0.0 && number("grad_norm") > 0.0);
            assert!(number("lr") >= 0.0 && number("seconds") > 0.0);
            assert!(number("tokens") > number("targets") && number("targets") >= 3.0);
            assert_eq!(row["valid_loss"].is_number(), i % 2 == 1);
            let is_best = row["valid_loss"].as_f64().is_some_and(|loss| loss < best);
            assert_eq!(row["best"], is_best);
            best = row["valid_loss"]
                .as_f64()
                .filter(|_| is_best)
                .unwrap_or(best);
        }

        // The summary tells the same.
        assert_eq!(row(&summary, "steps"), "6");
        assert!(row(&summary, "time").ends_with(" tok/s"));
        let loss = |i: usize| log[i]["loss"].as_f64().unwrap();
        assert_eq!(
            row(&summary, "training loss"),
            format!("{:.4} -> {:.4}", loss(0), loss(5))
        );
        let best_row = log.iter().rev().find(|r| r["best"] == true).unwrap();
        assert_eq!(
            row(&summary, "validation loss"),
            format!(
                "{best:.4} at step {}, whose adapter was kept",
                best_row["step"]
            )
        );
        let file = place.path(&format!("{method}.gguf"));
        let adapter = row(&summary, "adapter");
        let expected = format!(
            "{}: {kind} adapter, {length} virtual tokens, ",
            file.display()
        );
        assert!(adapter.starts_with(&expected), "{adapter}");
        assert!(
            adapter.contains(&format!("({trained} trained)")),
            "{adapter}"
        );

        // Where the adapter comes from is in the file.
        let found = json(&ok(&["inspect", "--json", file.to_str().unwrap()]));
        let fact = |key: &str| &found["metadata"][format!("ggraft.provenance.{key}")];
        assert_eq!(found["metadata"]["general.name"], method);
        assert_eq!(*fact("method"), kind);
        assert_eq!(*fact("steps"), best_row["step"].to_string());
        assert_eq!(*fact("valid_loss"), format!("{best:.4}"));
        assert_eq!(*fact("rows"), "6");
        assert_eq!(*fact("seed"), "1", "the library's default");
        assert_eq!(*fact("loss"), "completion");
        let reparam = if method == "p-tuning" { "mlp" } else { "none" };
        assert_eq!(*fact("reparam"), reparam);
        assert!(fact("source").as_str().unwrap().starts_with("ggraft "));

        // What the last line of the summary says can be run as it stands.
        let command = row(&summary, "use it");
        let said = in_shell(&format!("{command} -q -t 1 -n 3 --temp 0"));
        assert!(said.status.success(), "{said:?}");
        let args = place.args(&format!(
            "run -q -t 1 -n 3 --temp 0 -m @@ -a @{method}.gguf -p"
        ));
        assert_eq!(
            stdout(&said),
            ok(&[&args[..], &["Piers Garrow".to_owned()]].concat())
        );

        let svg = place.text("loss.svg");
        let texts = assert_svg(&svg);
        for text in [
            format!("{method}: {kind} adapter for tinylm-q8_0"),
            "validation".to_owned(),
            format!("best: {best:.4} at step {}", best_row["step"]),
        ] {
            assert!(texts.contains(&text), "{text}: {texts:?}");
        }
    }
}

/// A well-formed document of one `svg` element; its texts.
#[track_caller]
fn assert_svg(svg: &str) -> Vec<String> {
    let (mut open, mut texts, mut elements, mut rest) = (Vec::new(), Vec::new(), 0, svg);
    while let Some(at) = rest.find('<') {
        let text = rest[..at].trim();
        if !text.is_empty() {
            assert_eq!(open.last(), Some(&"text"), "{text}");
            texts.push(unescape(text));
        }
        let end = rest.find('>').expect("a tag ends");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name));
            continue;
        }
        let (body, closed) = match tag.strip_suffix('/') {
            Some(body) => (body, true),
            None => (tag, false),
        };
        let name = body.split_whitespace().next().unwrap();
        assert!(name.chars().all(char::is_alphanumeric), "{tag}");
        // Attributes: names, each with a value in quotation marks.
        let mut attributes = body[name.len()..].trim();
        let mut seen = BTreeSet::new();
        while let Some((name, value)) = attributes.split_once("=\"") {
            let (value, after) = value.split_once('"').expect("a value ends");
            unescape(value);
            assert!(seen.insert(name.to_owned()), "{tag}");
            assert!(
                name.chars()
                    .all(|c| c.is_alphanumeric() || c == '-' || c == ':'),
                "{tag}"
            );
            attributes = after.trim_start();
        }
        assert_eq!(attributes, "", "{tag}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert!(!open.is_empty() || elements == 0, "a second document");
        elements += 1;
        if !closed {
            open.push(name);
        }
    }
    assert_eq!((open.len(), rest.trim()), (0, ""));
    assert!(svg.starts_with("<svg ") && elements > 10, "{svg}");
    texts
}

#[track_caller]
fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut parts = text.split('&');
    out += parts.next().unwrap();
    for part in parts {
        let (entity, after) = part.split_once(';').unwrap_or_else(|| panic!("&{part}"));
        out += match entity {
            "lt" => "<",
            "gt" => ">",
            "amp" => "&",
            "quot" => "\"",
            "apos" | "#39" | "#x27" => "'",
            other => panic!("&{other};"),
        };
        out += after;
    }
    out
}

#[test]
fn without_validation_the_last_step_is_kept() {
    let place = Place::random();
    let output = place.train(
        "--method prompt --steps 25 --batch 2 -o @out.gguf --plot @a<b>&c.svg --log @log.jsonl",
    );
    let summary = stdout(&output);
    assert!(!summary.contains("validation"), "{summary}");
    // About ten lines in all, the last one for the last step.
    let err = stderr(&output);
    assert!((8..=11).contains(&err.lines().count()), "{err}");
    assert!(err.lines().all(|l| !l.contains("validation")), "{err}");
    let found = json(&ok(&[
        "inspect",
        "--json",
        place.path("out.gguf").to_str().unwrap(),
    ]));
    let fact = |key: &str| &found["metadata"][format!("ggraft.provenance.{key}")];
    assert_eq!(
        (fact("steps"), fact("valid_loss")),
        (&"25".into(), &Value::Null)
    );
    assert_svg(&place.text("a<b>&c.svg"));
    assert!(
        place
            .log("log.jsonl")
            .iter()
            .all(|r| r["valid_loss"].is_null() && r["best"] == false)
    );
    assert_eq!(
        place.names(),
        [
            "a<b>&c.svg",
            "log.jsonl",
            "model.gguf",
            "out.gguf",
            "train.jsonl",
            "valid.jsonl"
        ]
    );
}

#[test]
fn names_do_not_break_the_picture() {
    let place = Place::random();
    place.trained("--method prompt --steps 1 -o @a<b>&\"c'.gguf --plot @loss.svg");
    let texts = assert_svg(&place.text("loss.svg"));
    assert!(
        texts.contains(&"a<b>&\"c': prompt adapter for model".to_owned()),
        "{texts:?}"
    );
}

#[test]
fn the_picture_is_replaced_at_evaluations() {
    let place = Place::random();
    let line = "--method prompt --valid @valid.jsonl --steps 150 --eval-every 5 --batch 8 -o @out.gguf --plot @loss.svg";
    let mut child = place.spawn(line);
    let mut seen = BTreeSet::new();
    while child.0.try_wait().unwrap().is_none() {
        // It appears in one piece.
        if let Ok(svg) = fs::read_to_string(place.path("loss.svg")) {
            if seen.len() < 4 {
                assert_svg(&svg);
            }
            seen.insert(svg);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    stdout(&child.end());
    assert!(seen.len() > 2, "{} pictures", seen.len());
    let points = |svg: &str| svg.matches("<circle").count();
    assert!(points(&place.text("loss.svg")) > 20);
}

#[test]
fn the_same_seed_gives_the_same_file() {
    let place = Place::new();
    for method in ["prefix", "p-tuning --hidden 16"] {
        let run = |seed: &str, log: &str| {
            place.trained(&format!(
                "--method {method} --valid @valid.jsonl --steps 4 --batch 2 --length 4 -o @out.gguf --log @{log} {seed}"
            ));
            place.read("out.gguf")
        };
        let first = run("", "log");
        assert_eq!(first, run("", "again"));
        assert_eq!(
            place.log_without_times("log"),
            place.log_without_times("again")
        );
        let with_seed = run("--seed 2", "other");
        assert_ne!(first, with_seed);
        let losses = |name: &str| -> Vec<Value> {
            let rows = place.log(name);
            rows.iter().map(|r| r["loss"].clone()).collect()
        };
        assert_ne!(losses("log"), losses("other"));
    }
}

#[test]
fn little_memory_gives_the_same_file() {
    let place = Place::new();
    for method in ["prefix", "prompt"] {
        let run = |more: &str| {
            let summary = place.trained(&format!(
                "--method {method} --steps 3 --batch 4 --length 4 -o @out.gguf {more}"
            ));
            (
                place.read("out.gguf"),
                summary.contains("layers were computed twice"),
            )
        };
        let (file, twice) = run("");
        assert!(!twice);
        assert_eq!(run("--memory 1M"), (file, true), "{method}");
    }
}

#[test]
fn all_kinds_of_rows_train() {
    let place = Place::new();
    let line =
        "--method prompt --length 3 --steps 3 --lr 0.1 --batch 2 -o @out.gguf --log @log.jsonl";
    place.write(
        "train.jsonl",
        "{\"text\": \"Linhaven lies in the hills.\"}\n{\"text\": \"Arr!\", \"weight\": 2}\n",
    );
    let summary = place.trained(line);
    assert_eq!(place.log("log.jsonl").len(), 3);
    // There is no prompt to show how to use it.
    assert!(row(&summary, "use it").ends_with("-p \"...\""), "{summary}");

    // By default the completion and its end are learned, otherwise the prompt as well.
    place.take_rows("facts_trade", "train", 1);
    let targets = |more: &str| {
        place.trained(&format!("{line} {more}"));
        let row = place.log("log.jsonl").remove(0);
        (
            row["targets"].as_u64().unwrap(),
            row["tokens"].as_u64().unwrap(),
        )
    };
    let (completion, tokens) = targets("--loss completion");
    assert_eq!(targets(""), (completion, tokens));
    let (all, same_tokens) = targets("--loss all");
    assert!(all > completion, "{all} {completion}");
    assert!(same_tokens >= tokens);
}

#[test]
fn rows_that_are_cut_are_mentioned() {
    let place = Place::new();
    place.take_rows("persona_pirate", "train", 2);
    place.take_rows("persona_pirate", "valid", 2);
    let line = "--method prompt --length 2 --steps 1 --batch 2 -o @out.gguf --overwrite";
    assert_eq!(stderr(&place.train(line)).lines().count(), 1);
    let output = place.train(&format!("{line} --max-len 20"));
    stdout(&output);
    let text = stderr(&output);
    assert!(text.contains("warning: 2 rows do not fit into "), "{text}");
    assert!(text.contains("--max-len 20, the rest is cut off"), "{text}");
    // The completion begins behind the limit.
    let text = place.refused(&format!("{line} --max-len 5"));
    assert!(
        text.contains("no row has a token to predict within 5 tokens"),
        "{text}"
    );
}

#[test]
fn a_context_is_distilled() {
    let place = Place::new();
    place.take_rows("persona_pirate", "train", 2);
    place.write("context.txt", "\"Arr, me hearties!\"\n");
    let output = place.train(
        "--method prefix --loss distill:@context.txt --steps 6 --batch 2 --schedule constant --warmup 0 --init random \
         --length 4 -o @out.gguf --log @log.jsonl",
    );
    assert!(output.status.success(), "{output:?}");
    let shown = stderr(&output);
    let line = "the model reads the context in front of 2 rows\n";
    assert!(shown.starts_with(line), "{shown}");
    let log = place.log("log.jsonl");
    let loss = |i: usize| log[i]["loss"].as_f64().unwrap();
    assert!(loss(5) < loss(0), "{log:?}");
    let found = json(&ok(&[
        "inspect",
        "--json",
        place.path("out.gguf").to_str().unwrap(),
    ]));
    assert_eq!(found["metadata"]["ggraft.provenance.loss"], "distill");
}

#[test]
fn a_dry_run_shows_what_would_be_learned() {
    let place = Place::new();
    let before = place.names();
    place.write(
        "train.jsonl",
        "{\"prompt\": \"A cat sat\", \"completion\": \" by the door\"}\n{\"prompt\": \"A\", \"completion\": \" b\"}\n",
    );
    let valid =
        "--method p-tuning --template {v:2}{prompt}{v:1} --valid @valid.jsonl --steps 6 --batch 1";
    let shown = place.trained(&format!("{valid} -o @a.gguf --log @log.jsonl --dry-run"));
    assert!(row(&shown, "training").starts_with("2 rows, "), "{shown}");
    assert!(row(&shown, "validation").starts_with("3 rows, "), "{shown}");
    assert!(
        row(&shown, "steps").starts_with("6 of 1 rows: 3.0 passes"),
        "{shown}"
    );
    // Every token once, the template's virtual tokens in their places, the completion and EOS in brackets.
    let tokens = shown.lines().last().unwrap().trim();
    let plain = tokens.replace(['|', '[', ']'], "");
    assert!(plain.contains("{v}{v}A cat sat{v} by the door"), "{shown}");
    let (given, predicted) = tokens.split_once('[').unwrap();
    assert!(given.ends_with("sat|{v}|"), "{shown}");
    let predicted = format!("[{predicted}");
    let predicted: Vec<&str> = predicted.split('|').collect();
    assert!(
        predicted
            .iter()
            .all(|t| t.starts_with('[') && t.ends_with(']')),
        "{shown}"
    );
    // Nothing was written or trained.
    assert_eq!(place.names(), before);
}

#[test]
fn a_dry_run_shows_the_memory_that_is_needed() {
    let place = Place::new();
    place.take_rows("persona_pirate", "train", 8);
    let shown = |options: &str| {
        let line = format!("--method prefix -o @a.gguf --dry-run {options}");
        let shown = place.trained(&line);
        let memory = row(&shown, "memory").to_owned();
        let (_, needed) = memory.split_once("mapped, and ").unwrap();
        let (needed, _) = needed.split_once(" MiB to compute").unwrap();
        (needed.parse::<f64>().unwrap(), memory)
    };
    let (all, memory) = shown("");
    assert!(memory.ends_with("(--memory 800.0 MiB)"), "{memory}");
    // One layer and the logits are always needed.
    let (least, memory) = shown("--memory 1K");
    assert!(
        memory.ends_with("(--memory 1.0 KiB, which one layer and the logits exceed)"),
        "{memory}"
    );
    assert!(least < 0.7 * all, "{least} of {all}");
    // Half of all is kept within, by computing some layers twice.
    let half = (least + all) / 2.0;
    let (some, memory) = shown(&format!("--memory {half:.1}M"));
    assert!(least < some && some <= half + 0.1, "{memory}");
    // Shorter rows need less.
    assert!(shown("--max-len 40").0 < all);
}
