//! `ggraft predict` and `ggraft eval` when not all rows can be computed.

use crate::{Place, command, error_line, json, stderr, stdout};
use serde_json::Value;
use std::time::Duration;

/// Of three rows the second one is too long.
fn with_a_long_row() -> Place {
    let place = Place::random();
    let long = "word ".repeat(200);
    let row = |prompt: &str| format!("{{\"prompt\": \"{prompt}\", \"completion\": \"x\"}}\n");
    place.write("rows.jsonl", row("a") + &row(&long) + &row("b"));
    place.write("long.jsonl", row(&long));
    place
}

#[test]
fn rows_that_are_too_long_are_named_and_left_out() {
    let place = with_a_long_row();
    let run = |line: &str| command(&place.args(line)).output().unwrap();
    let output = run("predict -t 1 -n 2 -c 64 -m @@ --data @rows.jsonl -o @out.jsonl");
    assert!(output.status.success(), "{output:?}");
    let text = stderr(&output);
    assert!(
        text.contains("left out: 1 row does not fit into the context (a longer one: --ctx): "),
        "{text}"
    );
    assert!(
        text.contains("rows.jsonl:2") && !text.contains("reset"),
        "{text}"
    );
    let found: Vec<Value> = place.log("out.jsonl");
    let predicted: Vec<bool> = found
        .iter()
        .map(|row| row["prediction"].is_string())
        .collect();
    assert_eq!(predicted, [true, false, true]);
    assert!(found[1]["prediction"].is_null());

    let output = run("eval -t 1 -c 64 -m @@ --data @rows.jsonl --json");
    assert!(output.status.success(), "{output:?}");
    assert!(stderr(&output).contains("rows.jsonl:2"), "{output:?}");
    let figures = json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!(figures["rows"], 2);

    for line in ["eval", "predict -o @none.jsonl"] {
        let output = run(&format!("{line} -t 1 -c 64 -m @@ --data @long.jsonl"));
        assert_eq!(output.status.code(), Some(1));
        let text = error_line(&output);
        assert!(text.contains("no row fits into the context"), "{text}");
    }
    assert!(!place.exists("none.jsonl"));
}

#[test]
fn rows_of_weight_0_are_not_scored() {
    let place = Place::random();
    let row =
        |weight| format!("{{\"prompt\": \"a\", \"completion\": \"b\", \"weight\": {weight}}}\n");
    place.write("rows.jsonl", row(0) + &row(1) + &row(0) + &row(2));
    place.write("idle.jsonl", row(0));
    let run = |line: &str| command(&place.args(line)).output().unwrap();
    let output = run("eval -t 1 -m @@ --data @rows.jsonl --json");
    assert!(output.status.success(), "{output:?}");
    let figures = json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!(figures["rows"], 2);
    let text = stderr(&output);
    assert!(
        text.contains("2 rows have the weight 0 and count for nothing: "),
        "{text}"
    );
    assert!(
        text.contains("rows.jsonl:1, ") && text.contains("rows.jsonl:3"),
        "{text}"
    );
    let text = error_line(&run("eval -t 1 -m @@ --data @idle.jsonl"));
    assert!(
        text.contains("idle.jsonl: all rows have the weight 0"),
        "{text}"
    );
    // To be completed they need no weight.
    let output = run("predict -t 1 -n 2 -m @@ --data @idle.jsonl -o @out.jsonl");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(place.lines("out.jsonl"), 1);
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_rows_that_are_done() {
    let place = Place::random();
    place.write(
        "rows.jsonl",
        "{\"prompt\": \"a\", \"completion\": \"b c d\"}\n".repeat(200_000),
    );
    for (line, signal) in [
        ("eval --json", "-INT"),
        ("eval --json", "-TERM"),
        ("predict -n 8 -o @out.jsonl", "-INT"),
        ("predict -n 8 -o @out.jsonl", "-TERM"),
    ] {
        // Later, until it is late enough: a handler is there, and a row is done.
        for delay in (50..).step_by(50) {
            let args = place.args(&format!("{line} -t 1 -m @@ --data @rows.jsonl"));
            let mut command = command(&args);
            heed_interrupts(&mut command);
            let child = crate::Running(command.spawn().unwrap());
            std::thread::sleep(Duration::from_millis(delay));
            let id = child.0.id().to_string();
            std::process::Command::new("kill")
                .args([signal, &id])
                .status()
                .unwrap();
            let output = child.end();
            if output.status.code().is_none() || stderr(&output).contains("after 0 of") {
                continue;
            }
            assert_eq!(output.status.code(), Some(130), "{output:?}");
            let text = stderr(&output);
            let (_, rest) = text.split_once("interrupted after ").unwrap();
            let (done, rest) = rest.split_once(' ').unwrap();
            assert!(rest.starts_with("of 200000 rows"), "{text}");
            let done: usize = done.parse().unwrap();
            if line.starts_with("eval") {
                let figures = json(std::str::from_utf8(&output.stdout).unwrap());
                assert_eq!(figures["rows"], done);
            } else {
                assert_eq!(place.lines("out.jsonl"), done);
            }
            break;
        }
    }
}

#[test]
fn odd_rows_and_options_are_named_before_the_first_step() {
    let place = Place::random();
    let row = |completion: &str, weight: f32| {
        format!(
            "{{\"prompt\": \"a b c d\", \"completion\": \"{completion}\", \"weight\": {weight}}}\n"
        )
    };
    let long = "x ".repeat(60);
    place.write(
        "odd.jsonl",
        row("x", 1.0) + &row(&long, 1.0) + &row("x", 0.0),
    );
    place.write("idle.jsonl", row("x", 0.0));
    let prompt = place
        .text("odd.jsonl")
        .replacen("a b c d", &"a b ".repeat(60), 1);
    let lost = prompt.split_once('\n').unwrap().0.to_owned() + "\n";
    place.write("lost_only.jsonl", lost);
    place.write("lost.jsonl", prompt);
    let warned = |line: &str| {
        let output = place.train(&format!(
            "--method prompt --length 2 --steps 1 -o @out.gguf --overwrite {line}"
        ));
        assert!(output.status.success(), "{output:?}");
        stderr(&output)
    };
    let text = warned("--data @odd.jsonl --valid @lost.jsonl --max-len 30 --batch 2 --accum 2");
    for expected in [
        "1 row does not fit into --max-len 30, the rest is cut off: ",
        "odd.jsonl:2\n",
        "2 rows do not fit into --max-len 30",
        "1 of them left out, as nothing remains that is to be predicted: ",
        "lost.jsonl:1\n",
        "1 row has the weight 0 and counts for nothing: ",
        "odd.jsonl:3\n",
        "a step takes 4 rows (--batch x --accum), the data has 2",
    ] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    // Processors that share a core are one.
    let threads = ggraft::default_threads() + 1;
    let line = format!(
        "train -t {threads} -m @@ --data @train.jsonl --method prompt --length 2 --steps 1 -o @t.gguf"
    );
    let text = stderr(&command(&place.args(&line)).output().unwrap());
    assert!(text.contains(&format!("{threads} threads on ")), "{text}");
    assert!(
        text.contains(&format!("use -t {} or fewer", threads - 1)),
        "{text}"
    );
    for (line, expected) in [
        (
            "--data @idle.jsonl",
            "idle.jsonl: all rows have the weight 0",
        ),
        (
            "--valid @idle.jsonl",
            "idle.jsonl: all rows have the weight 0",
        ),
        (
            "--data @lost_only.jsonl --max-len 30",
            "lost_only.jsonl (training set): no row has a token to predict within 30 tokens",
        ),
        (
            "--loss distill:@blank.txt",
            "blank.txt: there is no text to distill",
        ),
    ] {
        place.write("blank.txt", " \n");
        let text = place.refused(&format!("--method prompt --steps 1 -o @none.gguf {line}"));
        assert!(text.contains(expected), "{line}: {text}");
    }
    for (line, expected) in [
        (
            "--hidden 8",
            "an inner width cannot be used with no encoder",
        ),
        ("--length 60000", "leaves no room for text"),
    ] {
        let text = place.misused(&format!("--method prompt --steps 1 -o @none.gguf {line}"));
        assert!(text.contains(expected), "{line}: {text}");
    }
}

#[test]
fn long_texts_are_split_and_conversations_take_the_chosen_template() {
    let place = Place::new();
    place.write(
        "story.txt",
        "Once upon a time there was a town. ".repeat(30),
    );
    let plan = |options: &str| {
        let line = format!("--method prompt --data @story.txt -o @a.gguf --dry-run {options}");
        place.trained(&line)
    };
    assert!(plan("").starts_with("training         1 rows, "));
    let split = plan("--split-text 50");
    let rows = split.split_whitespace().nth(1).unwrap();
    assert!(rows.parse::<usize>().unwrap() > 4, "{split}");
    // 20 virtual tokens, BOS, 50 of the text, and EOS behind the last piece.
    assert!(split.contains("the longest row has 72\n"), "{split}");

    place.write(
        "talk.jsonl",
        "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n",
    );
    let learned = |template: &str| {
        let line = format!(
            "--method prefix --data @talk.jsonl -o @a.gguf --dry-run --chat-template {template}"
        );
        let output = place.train(&line);
        assert!(output.status.success(), "{output:?}");
        let row = stdout(&output).lines().last().unwrap().to_owned();
        (row, stderr(&output))
    };
    let (row, warnings) = learned("zephyr");
    assert!(row.ends_with("|[b]|[</s>]"), "{row}");
    assert!(!warnings.contains("end-of-generation"), "{warnings}");
    let endless = "{% for m in messages %}{{ m.content }};{% endfor %}";
    place.write("endless.jinja", endless);
    let (row, warnings) = learned("@endless.jinja");
    assert!(row.ends_with("|[b]|[;]"), "{row}");
    let said = warnings.matches("without an end-of-generation token");
    assert_eq!(said.count(), 1, "{warnings}");
}

#[test]
fn options_that_no_row_is_affected_by_are_named() {
    let place = Place::new();
    place.write("story.txt", "Once upon a time.");
    let instruction = "{\"instruction\": \"a\", \"output\": \"b\"}\n";
    place.write("asked.jsonl", instruction);
    let chat = "--chat-template zephyr --parse-special";
    let train = |options: &str| {
        let output = place.train(&format!(
            "--method prompt --batch 1 -o @a.gguf --dry-run {options}"
        ));
        assert!(output.status.success(), "{output:?}");
        stderr(&output)
    };
    let text = train(&format!("{chat} --split-text 9"));
    for option in ["--chat-template", "--parse-special", "--split-text"] {
        let said = format!("{option} has no effect: the data has no ");
        assert_eq!(text.matches(&said).count(), 1, "{text}");
    }
    for effective in [
        format!("--data @asked.jsonl {chat}"),
        format!("--valid @asked.jsonl {chat}"),
        "--data @story.txt --split-text 9".to_owned(),
    ] {
        assert_eq!(train(&effective), "", "{effective}");
    }
    for (data, n) in [("train", 1), ("asked", 0)] {
        for line in ["eval", "predict -n 1 -o @out.jsonl"] {
            let line = format!("{line} -t 1 -m @@ --data @{data}.jsonl --chat-template zephyr");
            let output = command(&place.args(&line)).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            let text = stderr(&output);
            let said = text.matches("--chat-template has no effect");
            assert_eq!(said.count(), n, "{line}: {text}");
        }
    }
}

#[test]
fn an_end_of_text_that_a_completion_brings_is_not_doubled() {
    let place = Place::new();
    let row = "{\"prompt\": \"a\", \"completion\": \" b</s>\"}\n";
    place.write("ends.jsonl", row.repeat(2));
    let line = "--method prompt --data @ends.jsonl -o @a.gguf --dry-run";
    let output = place.train(line);
    let row = stdout(&output).lines().last().unwrap().to_owned();
    assert_eq!(row.matches("</s>").count(), 1, "{row}");
    let text = stderr(&output);
    let said = "the text ends with EOS, which comes behind every row: it is not doubled";
    assert_eq!(text.matches(said).count(), 1, "{text}");
}

/// Drawing the numbers takes a minute, if there is room for them at all.
#[test]
fn a_network_of_billions_is_mentioned_before_it_is_made() {
    use std::io::{BufRead, BufReader};
    let place = Place::new();
    let mut child = place.spawn("--method p-tuning --hidden 65536 --steps 1 -o @a.gguf");
    let mut line = String::new();
    let from = child.0.stderr.take().unwrap();
    BufReader::new(from).read_line(&mut line).unwrap();
    assert!(
        line.contains("the network has 43") && line.contains(" take 64 GiB"),
        "{line}"
    );
}

/// What runs in the background of a shell without job control ignores Ctrl-C from the start, and so would what it starts.
fn heed_interrupts(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    let reset = || {
        // SAFETY: nothing but a system call, and no function of ours is called.
        match unsafe { libc::signal(libc::SIGINT, libc::SIG_DFL) } {
            libc::SIG_ERR => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: it may run between fork and exec, as it does nothing but a system call.
    unsafe { command.pre_exec(reset) };
}
