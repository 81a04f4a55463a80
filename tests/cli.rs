//! The `ggraft` command as its users meet it: what it prints, what it writes, how it fails.

use ggraft::{Kernels, Model, ModelOptions, Session, SessionOptions};
use ggraft_testkit::command::{stderr, stdout};
use ggraft_testkit::fixture::write_twins;
use ggraft_testkit::metrics::nmse;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const MODEL: &str = "models/tinylm-q8_0.gguf";
const PIRATE: &str = "models/peft/persona_pirate-prefix";
const BUTLER: &str = "models/peft/persona_butler-prefix_proj";
const SENTIMENT: &str = "models/peft/sentiment-prompt_text";
const PROMPT: &str = "An old teacher is waiting at the harbour.\n";
const PIRATE_SAYS: &str = "\"Arr, matey, tell the old teacher that this crew takes no prisoners. Mark me words, ye lubbers.\"";

fn command<S: AsRef<OsStr>>(args: &[S]) -> Command {
    let mut command = ggraft_testkit::command::command(env!("CARGO_BIN_EXE_ggraft"), args);
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

fn ggraft<S: AsRef<OsStr>>(args: &[S]) -> Output {
    command(args).output().unwrap()
}

fn with_stdin<S: AsRef<OsStr>>(args: &[S], input: &[u8]) -> Output {
    let mut child = command(args).stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // A command that fails early does not read it all.
    let _ = stdin.write_all(input);
    drop(stdin);
    child.wait_with_output().unwrap()
}

/// Arguments split at white space.
fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// What stdout says of a command that must succeed.
#[track_caller]
fn ok<S: AsRef<OsStr>>(args: &[S]) -> String {
    stdout(&ggraft(args))
}

/// Asserts a failure with status 1 and one line on stderr, and returns that line.
#[track_caller]
fn failure(output: &Output) -> String {
    let text = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(
        text.starts_with("error: ") && text.lines().count() == 1,
        "{text:?}"
    );
    text
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

fn run_args<'a>(adapter: Option<&'a str>, prompt: &'a str) -> Vec<&'a str> {
    let mut args = words("run -q -t 1 --temp 0 -m");
    args.extend([MODEL, "-p", prompt]);
    args.extend(adapter.map(|a| ["-a", a]).into_iter().flatten());
    args
}

/// Greedy text, as `run` prints it.
#[track_caller]
fn greedy(adapter: Option<&str>, prompt: &str) -> String {
    ok(&run_args(adapter, prompt))
}

// ---- run

#[test]
fn run_prints_the_text_and_one_line_of_timings() {
    let args = run_args(Some(PIRATE), PROMPT);
    let quiet = ggraft(&args);
    assert_eq!(stdout(&quiet), PIRATE_SAYS);
    assert_eq!(stderr(&quiet), "");

    let args: Vec<_> = args.into_iter().filter(|a| *a != "-q").collect();
    let timed = ggraft(&args);
    assert_eq!(timed.stdout, quiet.stdout);
    let timings = stderr(&timed);
    for part in [
        "load ",
        "adapter ",
        "prefill 11 tokens at ",
        "decode 28 tokens at ",
    ] {
        assert!(timings.contains(part), "{timings:?}");
    }
    assert_eq!(timings.lines().count(), 1);
}

#[test]
fn run_takes_the_prompt_from_everywhere() {
    let expected = greedy(None, "Linhaven lies in");
    let base = ["run", "-q", "-t", "1", "--temp", "0", "-m", MODEL];
    fn join<'a>(base: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
        [base, more].concat()
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    fs::write(&file, "Linhaven lies in").unwrap();

    let input = b"Linhaven lies in";
    assert_eq!(stdout(&with_stdin(&join(&base, &["-"]), input)), expected);
    assert_eq!(stdout(&with_stdin(&join(&base, &[]), input)), expected);
    assert_eq!(
        stdout(&with_stdin(&join(&base, &["-f", "-"]), input)),
        expected
    );
    assert_eq!(ok(&join(&base, &["-f", file.to_str().unwrap()])), expected);

    let escaped = PROMPT.replace('\n', "\\n");
    let args = join(&base, &["-a", PIRATE, "-e", "-p", &escaped]);
    assert_eq!(ok(&args), PIRATE_SAYS);
}

#[test]
fn run_json_tells_what_plain_text_shows() {
    let mut args = run_args(Some(PIRATE), PROMPT);
    args.push("--json");
    let object = json(&ok(&args));
    assert_eq!(object["text"], PIRATE_SAYS);
    assert_eq!(object["stop_reason"], "end_of_text");
    assert_eq!(object["tokens"].as_array().unwrap().len(), 29);
    assert_eq!(object["timings"]["prefill_tokens"], 11);
    assert_eq!(object["timings"]["decode_tokens"], 28);
    for key in [
        "load_ms",
        "attach_ms",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    ] {
        assert!(object["timings"][key].as_f64().unwrap() > 0.0, "{key}");
    }

    let limited = json(&ok(&[&args[..], &["-n", "3"]].concat()));
    assert_eq!(limited["stop_reason"], "max_tokens");
    assert_eq!(
        limited["tokens"],
        json!(&object["tokens"].as_array().unwrap()[..3])
    );

    let stopped = json(&ok(
        &[&args[..], &["--stop", "xyz", "--stop", ", tell"]].concat()
    ));
    assert_eq!(stopped["stop_reason"], "stop_string");
    assert_eq!(stopped["text"], "\"Arr, matey");
}

#[test]
fn equal_seeds_give_equal_text() {
    let with_seed = |seed: Option<&str>| {
        let mut args = words("run -q -t 1 -p The --temp 2 --json -n 24 -m");
        args.push(MODEL);
        args.extend(seed.map(|s| ["--seed", s]).into_iter().flatten());
        json(&ok(&args))
    };
    let first = with_seed(None);
    let again = with_seed(Some(&first["seed"].to_string()));
    assert_eq!(first["text"], again["text"]);
    let other = with_seed(Some("1"));
    assert_ne!(first["tokens"], other["tokens"], "the seed has no effect");
}

#[test]
fn computing_options_change_nothing_visible() {
    let expected = greedy(Some(PIRATE), PROMPT);
    for options in [
        "--repack",
        "--repack on",
        "--repack=off",
        "--kv-type f32",
        "--flash-attn off",
        "-t 2 -c 200",
    ] {
        let args: Vec<_> = run_args(Some(PIRATE), PROMPT)
            .into_iter()
            .filter(|a| !["-t", "1"].contains(a))
            .chain(words(options))
            .collect();
        assert_eq!(ok(&args), expected, "{options}");
    }
}

#[test]
fn running_out_of_context_shows_the_text_and_fails() {
    let full = greedy(None, "Linhaven lies in");
    let args = [
        &run_args(None, "Linhaven lies in")[..],
        &["-n", "-1", "-c", "9"],
    ]
    .concat();
    let output = ggraft(&args);
    assert!(
        failure(&output)
            .contains("context is full: 10 positions needed, 9 available (a longer one: --ctx)"),
        "{output:?}"
    );
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(shown.len() > 4 && full.starts_with(&shown), "{shown:?}");

    let output = ggraft(&[&args[..], &["--json"]].concat());
    failure(&output);
    let object = json(std::str::from_utf8(&output.stdout).unwrap());
    assert_eq!(object["stop_reason"], "context_full");
    assert_eq!(object["text"], shown);
}

/// The model with a token, the third that it writes behind "The\n", that ends with the first byte of a character of three.
fn model_that_splits_characters(folder: &Path) -> PathBuf {
    let mut bytes = fs::read(MODEL).unwrap();
    // Strings of the vocabulary follow their length; what stands for a space and for the byte has two bytes.
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let (old, new) = (string("ĠOrrin"), string("Orrinâ"));
    let places: Vec<_> = (0..bytes.len() - old.len())
        .filter(|&at| bytes[at..].starts_with(&old))
        .collect();
    let &[at] = &places[..] else {
        panic!("{places:?}")
    };
    bytes[at..][..new.len()].copy_from_slice(&new);
    let path = folder.join("split.gguf");
    fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn text_that_ends_in_mid_character_ends_before_it() {
    let folder = tempfile::tempdir().unwrap();
    let model = model_that_splits_characters(folder.path());
    let model = model.to_str().unwrap();
    let run = |more: &[&str]| {
        let line = format!("run -q -t 1 --temp 0 -e -p The\\n -m {model}");
        ggraft(&[&words(&line)[..], more].concat())
    };
    let text = "River:Orrin";
    assert_eq!(stdout(&run(&["-n", "3"])), text);
    let object = json(&stdout(&run(&["-n", "3", "--json"])));
    assert_eq!(object["text"], text);
    assert_eq!(object["tokens"].as_array().unwrap().len(), 3);
    // What may be the beginning of a stop string is text in the end, the piece of a character is not.
    let held = run(&["-n", "3", "--stop", "Orrin!", "--stop", "xyz"]);
    assert_eq!(stdout(&held), text);
    let stopped = run(&["-n", "9", "--stop", "Orrin"]);
    assert_eq!(stdout(&stopped), "River:");
    // The context ends there: BOS, two tokens of the prompt, three of the text.
    let full = run(&["-n", "-1", "-c", "5"]);
    assert!(failure(&full).contains("context is full"), "{full:?}");
    assert_eq!(std::str::from_utf8(&full.stdout).unwrap(), text);

    let line = format!("chat -t 1 --temp 0 -n 3 -m {model}");
    assert_eq!(
        stdout(&with_stdin(&words(&line), b"The\n")).trim_end(),
        text
    );

    let data = write_rows(folder.path(), &[json!({"prompt": "The\n"})]);
    let out = folder.path().join("out.jsonl");
    let out = out.to_str().unwrap();
    ok(&words(&format!(
        "predict -t 1 -n 3 -m {model} --data {data} -o {out}"
    )));
    let row = json(&fs::read_to_string(out).unwrap());
    assert_eq!(row["prediction"], text);
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut args = run_args(Some(PIRATE), PROMPT);
    args.retain(|a| *a != "-q");
    for args in [
        args,
        words("run --help"),
        words("inspect models/tinylm-q8_0.gguf"),
    ] {
        let mut child = command(&args).spawn().unwrap();
        let mut byte = [0];
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut byte)
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert!(!stderr(&output).contains("error"), "{output:?}");
    }
}

#[cfg(unix)]
#[test]
fn a_reader_that_never_came_is_no_failure() {
    for args in [
        run_args(Some(PIRATE), PROMPT),
        words("inspect models/tinylm-q8_0.gguf --json"),
    ] {
        let mut command = command(&args);
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = command.stdout(writer).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(stderr(&output), "");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_a_failure() {
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = command(&run_args(None, "The"))
        .stdout(full)
        .output()
        .unwrap();
    assert!(failure(&output).starts_with("error: standard output: "));
}

#[cfg(unix)]
#[test]
fn paths_need_not_be_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(OsStr::from_bytes(b"mod\xffel.gguf"));
    std::os::unix::fs::symlink(fs::canonicalize(MODEL).unwrap(), &path).unwrap();
    let mut args: Vec<&OsStr> = words("run -q -t 1 --temp 0 -n 4 -p The -m")
        .into_iter()
        .map(OsStr::new)
        .collect();
    args.push(path.as_os_str());
    ok(&args);
    let missing = folder.path().join(OsStr::from_bytes(b"none\xff"));
    *args.last_mut().unwrap() = missing.as_os_str();
    failure(&ggraft(&args));
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_in_order() {
    let mut args = words("bench -v -t 1 -p 1000 -n 0 -r 100 -m");
    args.push(MODEL);
    let mut child = command(&args).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("measuring pp") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "it ended by itself");
    }
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &id])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "error: cancelled\n");
}

/// A terminal that nobody looks at: where a program writes, and where that can be read.
#[cfg(target_os = "linux")]
fn terminal() -> (fs::File, fs::File) {
    use std::os::fd::AsRawFd;
    let open = |path: &str| {
        fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .unwrap()
    };
    let reader = open("/dev/ptmx");
    let mut name = [0; 64];
    // SAFETY: an open descriptor, and room for the name.
    let ready = unsafe {
        libc::unlockpt(reader.as_raw_fd()) == 0
            && libc::ptsname_r(reader.as_raw_fd(), name.as_mut_ptr(), name.len()) == 0
    };
    assert!(ready, "{}", std::io::Error::last_os_error());
    // SAFETY: it was filled with a string that ends with NUL.
    let name = unsafe { std::ffi::CStr::from_ptr(name.as_ptr()) };
    (open(name.to_str().unwrap()), reader)
}

/// The line ends on a screen; a file gets the text and nothing else.
#[cfg(target_os = "linux")]
#[test]
fn a_line_feed_follows_the_text_only_at_a_terminal() {
    let args = run_args(Some(PIRATE), PROMPT);
    assert_eq!(ok(&args), PIRATE_SAYS);
    let (screen, mut reader) = terminal();
    let status = command(&args).stdout(screen).status().unwrap();
    assert!(status.success());
    let mut shown = [0; 1024];
    let n = reader.read(&mut shown).unwrap();
    assert_eq!(shown[..n], *format!("{PIRATE_SAYS}\r\n").as_bytes());
}

/// A bar that is gone when the file is read.
#[cfg(target_os = "linux")]
#[test]
fn reading_a_large_file_shows_its_progress_at_a_terminal() {
    let folder = tempfile::tempdir().unwrap();
    let row = format!(
        "{{\"prompt\": \"{}\", \"completion\": \"b\"}}\n",
        "a word and ".repeat(90)
    );
    let shown = |rows: usize| {
        let data = folder.path().join("rows.jsonl");
        fs::write(&data, row.repeat(rows)).unwrap();
        let (screen, mut reader) = terminal();
        let line = format!("train -m {MODEL} --method prompt --dry-run");
        let (data, out) = (data.to_str().unwrap(), folder.path().join("a.gguf"));
        let files = vec!["--data", data, "-o", out.to_str().unwrap()];
        let args = [words(&line), files].concat();
        let mut command = command(&args);
        command
            .env("TERM", "xterm")
            .stdout(Stdio::null())
            .stderr(screen);
        let mut child = command.spawn().unwrap();
        // Nobody else has the terminal open: it ends with the process.
        drop(command);
        let mut shown = Vec::new();
        // The end of a terminal is an error.
        let _ = reader.read_to_end(&mut shown);
        assert!(child.wait().unwrap().success());
        String::from_utf8(shown).unwrap()
    };
    let text = shown(4000);
    assert!(
        text.contains("rows.jsonl ") && text.contains(" MiB, ") && text.contains("s left"),
        "{text:?}"
    );
    // Small ones are read at once.
    let text = shown(10);
    assert!(!text.contains(" left"), "{text:?}");
}

/// SIGTERM and SIGHUP are as polite as Ctrl-C: what was written is delivered whole, and the status says what happened.
#[cfg(unix)]
#[test]
fn a_stopped_run_delivers_what_it_has() {
    // At this temperature every token is as likely as any other, the end of text among them. Which seed's text goes on for long enough depends
    // on the CPU.
    let line = (1..20)
        .map(|seed| {
            format!(
                "run -t 1 -p The -n -1 -c 100000 --temp 20 --top-k 0 --top-p 1 --min-p 0 --seed {seed} -m {MODEL}"
            )
        })
        .find(|line| {
            let line = line.replace("-n -1", "-n 3000 --json");
            json(&ok(&words(&line)))["stop_reason"] == "max_tokens"
        })
        .expect("one of them goes on");
    let whole = ok(&words(&line.replace("-n -1", "-n 400")));
    for (signal, json_too) in [
        ("-TERM", false),
        ("-HUP", false),
        ("-INT", true),
        ("-TERM", true),
    ] {
        let mut args = words(&line);
        args.extend(json_too.then_some("--json"));
        let mut child = command(&args).spawn().unwrap();
        let mut out = child.stdout.take().unwrap();
        let mut shown = vec![0; 40];
        if json_too {
            // Nothing is shown before the end.
            shown.clear();
            std::thread::sleep(std::time::Duration::from_millis(700));
        } else {
            out.read_exact(&mut shown).unwrap();
        }
        let id = child.id().to_string();
        let sent = Command::new("kill").args([signal, &id]).status().unwrap();
        assert!(sent.success());
        out.read_to_end(&mut shown).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        assert!(
            stderr(&output).ends_with("error: cancelled\n"),
            "{output:?}"
        );
        let mut shown = String::from_utf8(shown).unwrap();
        if json_too {
            let object = json(&shown);
            assert_eq!(object["stop_reason"], "cancelled");
            let tokens = object["tokens"].as_array().unwrap();
            assert!(tokens.len() > 1, "{object}");
            shown = object["text"].as_str().unwrap().to_owned();
        }
        let n = shown.len().min(whole.len());
        assert!(n >= 1 && shown[..n] == whole[..n], "{shown:?}");
    }
}

// ---- errors

#[test]
fn wrong_usage_ends_with_status_2() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = import(folder.path(), PIRATE);
    let adapter = adapter.to_str().unwrap();
    let lines = [
        "".to_owned(),
        "frobnicate".to_owned(),
        "run".to_owned(),
        format!("run -m {MODEL} -p a -f b"),
        format!("run -m {MODEL} -p a -"),
        format!("run -m {MODEL} -p a extra"),
        format!("run -m {MODEL} -p a -n -2"),
        format!("run -m {MODEL} -p a -n many"),
        format!("run -m {MODEL} -p a --temp warm"),
        format!("run -m {MODEL} -p a --kv-type q9"),
        format!("run -m {MODEL} -p a --seed 4294967295"),
        format!("run -m {MODEL} -p a --task 1"),
        format!("run -m {MODEL} -p a -a {adapter} --task 1"),
        format!("run -m {MODEL} -p a --system b"),
        format!("chat -m {MODEL} -a {adapter} -a {adapter}"),
        format!("chat -m {MODEL} -a none={adapter}"),
        format!("logits -m {MODEL} -o x"),
        format!("logits -m {MODEL} -o x --ids 1,a"),
        format!("logits -m {MODEL} -o x --ids 1 -p a"),
        format!("eval -m {MODEL}"),
        format!("import {PIRATE} -m {MODEL}"),
        format!("import {PIRATE} -m {MODEL} -o x --f16 --f32"),
        format!("concat {adapter} -o x"),
        format!("bench -m {MODEL} -r 0"),
    ];
    for line in lines {
        wrong_usage(&line);
    }
}

/// What stderr says of a line that ends with status 2 and without output.
#[track_caller]
fn wrong_usage(line: &str) -> String {
    let output = ggraft(&words(line));
    assert_eq!(output.status.code(), Some(2), "{line}: {output:?}");
    assert_eq!(output.stdout, b"", "{line}");
    let text = stderr(&output);
    assert!(text.starts_with("error: "), "{line}: {text}");
    text
}

/// Whether clap knows it, the library, or the model.
#[test]
fn values_out_of_range_are_wrong_usage_in_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write_rows(folder.path(), &[json!({"prompt": "a", "completion": "b"})]);
    let at = folder.path().display();
    let gpt2 = "tests/conformance/gpt2/model-f32.gguf";
    let commands = [
        format!("run -m {MODEL} -p a"),
        format!("chat -m {MODEL}"),
        format!("logits -m {MODEL} -p a -o {at}/x"),
        format!("eval -m {MODEL} --data {rows}"),
        format!("predict -m {MODEL} --data {rows} -o {at}/x"),
        format!("bench -m {MODEL}"),
    ];
    let mut cases: Vec<(String, &str)> = Vec::new();
    for command in &commands {
        for (option, expected) in [
            ("-t 0", "at least 1"),
            ("-t 513", "threads is 513"),
            ("-t -1", "at least 1"),
            ("-t 99999999999999999999", "more than is supported"),
            ("-c 0", "at least 1"),
            ("-c 2147483648", "context length is 2147483648"),
            ("--kv-type q8_0 --flash-attn off", "flash attention"),
            ("--repack maybe", "maybe"),
        ] {
            cases.push((format!("{command} {option}"), expected));
        }
    }
    for command in &commands[..2] {
        for (option, expected) in [
            ("--temp -1", "temperature is -1"),
            ("--temp nan", "temperature is NaN"),
            ("--top-p 2", "top_p is 2"),
            ("--min-p -0.1", "min_p is -0.1"),
            ("--repeat-penalty 0", "repeat_penalty is 0"),
            ("--repeat-last-n 2000000", "repeat_last_n is 2000000"),
            ("--top-k -2", "at least 0, or -1"),
            ("--seed 4294967295", "from 0 to 4294967294, or -1"),
            ("--seed -2", "from 0 to 4294967294, or -1"),
            ("--repeat-last-n -2", "at least 0, or -1"),
            ("-n -2", "-1 for no limit"),
        ] {
            cases.push((format!("{command} {option}"), expected));
        }
    }
    cases.extend([
        (format!("{} --stop=", commands[0]), "--stop"),
        (format!("{} --stop a --stop=", commands[0]), "--stop"),
        (format!("{} -n -2", commands[4]), "-1 for no limit"),
        (
            format!("{} -a {PIRATE} --task 1", commands[0]),
            "PREFIX_TUNING",
        ),
        (format!("logits -m {MODEL} --ids 1,3072 -o {at}/x"), "3072"),
        (
            format!("logits -m {MODEL} --ids -1,2 -o {at}/x"),
            "token id -1 is outside",
        ),
        (
            format!("logits -m {gpt2} --ids 1 -c 100000 -o {at}/x"),
            "for this model",
        ),
        (format!("bench -m {MODEL} -r 10001"), "10001"),
        (format!("bench -m {MODEL} -p -1"), "at least 0"),
        (
            format!("train -m {MODEL} --data {rows} --method prefix --seed -1 -o {at}/x"),
            "at least 0",
        ),
        (format!("run -m {MODEL} -p a --parse-special"), "add --chat"),
        (
            format!("import {PIRATE} -m {MODEL} --row-factor 2 -o {at}/x"),
            "PREFIX_TUNING",
        ),
        (
            format!("import {SENTIMENT} -m {MODEL} --row-factor 0 -o {at}/x"),
            "row factor 0",
        ),
        (
            format!("import {SENTIMENT} -m {MODEL} --row-factor inf -o {at}/x"),
            "row factor inf",
        ),
        (
            format!("import {SENTIMENT} -m {MODEL} --task 0 -o {at}/x"),
            "has no tasks",
        ),
        (format!("inspect {MODEL} --jsonl"), "--jsonl"),
        (
            format!("train -m {MODEL} --data {rows} --method prefix -t 513 -o {at}/x"),
            "threads is 513",
        ),
        (
            format!("train -m {MODEL} --data {rows} --method prefix --length 60000 -o {at}/x"),
            "length is 60000",
        ),
        (
            format!("train -m {MODEL} --data {rows} --method prompt --freeze-first 1 -o {at}/x"),
            "cannot be used with",
        ),
    ]);
    for (line, expected) in cases {
        let text = wrong_usage(&line);
        assert!(text.contains(expected), "{line}: {text}");
    }
    assert!(!folder.path().join("x").exists());
}

#[test]
fn failures_are_one_line_and_status_1() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = import(folder.path(), PIRATE);
    let (adapter, folder) = (adapter.display(), folder.path().display());
    let run = format!("run -m {MODEL} -p a");
    let cases = [
        ("run -m /no/such/file -p a".to_owned(), "/no/such/file"),
        ("run -m models -p a".to_owned(), "directory"),
        ("run -m Cargo.toml -p a".to_owned(), "Cargo.toml"),
        (format!("run -m {adapter} -p a"), "not a model"),
        (format!("run -m {MODEL} -f {MODEL}"), "not UTF-8"),
        (format!("run -m {MODEL} -f models"), "models"),
        (format!("{run} -a {MODEL}"), "not an adapter"),
        (format!("{run} -a /no/such/file"), "/no/such/file"),
        (format!("{run} -a Cargo.toml"), "Cargo.toml"),
        (
            format!("{run} -a tests/data/peft_bad/peft_lora"),
            "peft_bad/peft_lora: PEFT type LORA",
        ),
        (format!("{run} -a tests/data/peft/llama/prefix"), "layers"),
        (format!("{run} --chat"), "no chat template"),
        (format!("{run} -c 10 -a {adapter}"), "context is full"),
        (format!("chat -m {MODEL} --system a"), "no chat template"),
        (
            format!("logits -m {MODEL} --ids 1 -o {folder}/no/x"),
            "no/x",
        ),
        (
            format!("logits -m {MODEL} --ids 1 -o {folder}"),
            "directory",
        ),
        (format!("eval -m {MODEL} --data {MODEL}"), MODEL),
        (format!("eval -m {MODEL} --data /dev/null"), "no rows"),
        (format!("import models -m {MODEL} -o {folder}/x"), "models"),
        (
            format!("export {adapter} -m {adapter} -o {folder}/x"),
            "not a model",
        ),
        (
            format!("concat {adapter} {MODEL} -o {folder}/x"),
            "not an adapter",
        ),
        ("inspect models/peft".to_owned(), "use one of "),
        ("inspect models".to_owned(), "is it a PEFT folder?"),
    ];
    for (line, expected) in cases {
        let text = failure(&ggraft(&words(&line)));
        assert!(text.contains(expected), "{line}: {text}");
    }
    assert!(!Path::new(&format!("{folder}/x")).exists());
}

/// Of an empty prompt, and of an adapter that nothing can make fit.
#[test]
fn messages_say_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path().display();
    // A model without BOS.
    let bare = "tests/conformance/qwen2/model-f32.gguf";
    fs::write(folder.path().join("empty.txt"), "").unwrap();
    for command in [
        format!("run -m {bare} -f {at}/empty.txt"),
        format!("logits -m {bare} -p= -o {at}/x"),
        format!("logits -m {bare} -p= -o {at}/x -a tests/data/peft/llama/prompt"),
    ] {
        let text = failure(&ggraft(&words(&command)));
        let fits = !command.contains("-a");
        assert_eq!(
            text.contains("the prompt is empty"),
            fits,
            "{command}: {text}"
        );
    }
    // This one has it: the model begins a text by itself.
    ok(&words(&format!(
        "run -t 1 -n 1 -m {MODEL} -f {at}/empty.txt"
    )));

    let prefix = "tests/data/peft/llama/prefix";
    let rows = write_rows(folder.path(), &[json!({"prompt": "a"})]);
    let model = Model::open(
        "tests/conformance/llama/model-f32.gguf",
        &ModelOptions::default(),
    );
    let model = model.unwrap();
    let other = ggraft::adapter::import_peft(
        prefix.as_ref(),
        model.shape(),
        None,
        &ggraft::adapter::ImportOptions::default(),
    );
    let file = folder.path().join("other.gguf");
    other
        .unwrap()
        .save(&file, ggraft::adapter::Precision::F16)
        .unwrap();
    let file = file.display().to_string();
    let no_force = "no adapter of another shape";
    for adapter in [prefix, file.as_str()] {
        for command in [
            format!("run -m {MODEL} -p a -a {adapter}"),
            format!("logits -m {MODEL} -p a -o {at}/x -a {adapter}"),
            format!("eval -m {MODEL} --data {rows} -a {adapter}"),
            format!("predict -m {MODEL} --data {rows} -o {at}/x -a {adapter}"),
            format!("bench -m {MODEL} -a {adapter} -p 8 -n 0 -r 1"),
            format!("chat -m {MODEL} -a {adapter}"),
            format!("export {adapter} -m {MODEL} -o {at}/x"),
        ] {
            let plain = failure(&ggraft(&words(&command)));
            assert!(
                plain.contains("layers") && !plain.contains(no_force),
                "{plain}"
            );
            let forced = failure(&ggraft(&words(&format!("{command} --force"))));
            assert!(
                forced.contains("layers") && forced.contains(no_force),
                "{forced}"
            );
        }
    }
    // In mid-conversation, too.
    let output = chat(
        &[
            "--force",
            "-a",
            &format!("p={PIRATE}"),
            "-a",
            &format!("o={file}"),
        ],
        "/adapter o\n",
    );
    assert!(failure(&output).contains(no_force), "{output:?}");
}

#[test]
fn damaged_files_end_in_one_line() {
    let mut refused = 0;
    for entry in fs::read_dir("tests/data/bad").unwrap() {
        let path = entry.unwrap().path();
        let path = path.to_str().unwrap();
        let output = ggraft(&[
            "logits",
            "-t",
            "1",
            "-m",
            path,
            "--ids",
            "1,2",
            "-o",
            "/dev/null",
        ]);
        if path.ends_with("control.gguf") {
            // The undamaged one.
            assert!(output.status.success(), "{output:?}");
        } else {
            failure(&output);
            refused += 1;
        }
        let output = ggraft(&["inspect", path]);
        assert!(
            matches!(output.status.code(), Some(0 | 1)),
            "{path}: {output:?}"
        );
    }
    assert!(refused > 20);
}

#[test]
fn options_without_effect_are_mentioned() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write_rows(folder.path(), &[json!({"prompt": "a", "completion": "b"})]);
    let at = folder.path().display();
    let train = format!(
        "train -t 1 --method prompt --length 2 --steps 1 --batch 1 -m {MODEL} --data {rows} -o {at}/x"
    );
    let run = format!("run -q -t 1 -n 1 -p a -m {MODEL}");
    for (line, expected) in [
        (
            format!("{run} --temp 0 --top-k 5 --min-p 0.5"),
            "--top-k, --min-p",
        ),
        (
            format!("{run} --temp 1 --repeat-last-n 5"),
            "--repeat-penalty",
        ),
        (
            format!("{train} --warmup 1"),
            "the rate rises for 1 steps (--warmup) of 1",
        ),
        (format!("{train} --optimizer sgd --beta1 0.5"), "--beta1"),
        (
            format!("{train} --valid {rows}"),
            "--valid is the file of --data",
        ),
    ] {
        let output = ggraft(&words(&line));
        assert!(output.status.success(), "{output:?}");
        let text = stderr(&output);
        let warned = |l: &str| l.starts_with("warning: ") && l.contains(expected);
        assert_eq!(text.lines().filter(|l| warned(l)).count(), 1, "{text}");
    }
    for line in [
        format!("{run} --temp 0 --seed 1"),
        format!("{run} --repeat-last-n -1 --repeat-penalty 1.1 --top-k -1 --seed -1"),
    ] {
        assert_eq!(stderr(&ggraft(&words(&line))), "", "{line}");
    }
}

/// A context whose memory the system does not grant.
/// Keys and values take memory as the context fills.
#[test]
fn a_long_context_costs_nothing_before_it_is_used() {
    ok(&words(&format!(
        "run -t 1 -n 1 -p a -m {MODEL} -c 2147483647"
    )));
}

#[test]
fn a_byte_order_mark_is_no_text() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("prompt.txt");
    fs::write(&file, "\u{feff}Linhaven lies in").unwrap();
    let base = ["run", "-q", "-t", "1", "--temp", "0", "-m", MODEL];
    let expected = greedy(None, "Linhaven lies in");
    let with_file = [&base[..], &["-f", file.to_str().unwrap()]].concat();
    assert_eq!(ok(&with_file), expected);
    let input = fs::read(&file).unwrap();
    assert_eq!(stdout(&with_stdin(&base, &input)), expected);
    // Of the first line only: later ones have none.
    let said = |input: &str| stdout(&chat(&[], input));
    assert_eq!(said("\u{feff}The\n"), said("The\n"));
    assert_eq!(said("\u{feff}/adapters\n"), "* none\n");
}

#[test]
fn help_explains_every_command() {
    let overview = ok(&["--help"]);
    for name in words(
        "run chat train logits eval predict batch serve ensemble import export concat inspect bench",
    ) {
        assert!(overview.contains(&format!("\n  {name} ")), "{name}");
        let help = ok(&[name, "--help"]);
        assert!(
            help.contains("Example") && help.contains(&format!("ggraft {name} ")),
            "{name}"
        );
    }
    let version = format!("ggraft {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(ok(&["-V"]), version);
    assert!(ok(&["--version"]).starts_with(&(version + "CPU levels: baseline")));
}

/// Tables and examples fit into 100 columns, and of paragraphs only the terminal breaks the lines.
#[test]
fn help_fits_into_100_columns() {
    let help = |name: &str, columns: &str| {
        let mut command = command(&[name, "--help"]);
        stdout(&command.env("COLUMNS", columns).output().unwrap())
    };
    let mut checked = 0;
    for name in words(
        "run chat train logits eval predict batch serve ensemble import export concat inspect bench",
    ) {
        assert!(help(name, "100").lines().all(|l| l.chars().count() <= 100));
        let wide = help(name, "1000");
        let example = wide.rfind(&format!("  ggraft {name} ")).unwrap();
        let begin = wide[..example].rfind("\n\n").unwrap();
        let lines: Vec<_> = wide[begin..].lines().chain([""]).collect();
        for pair in lines.windows(2) {
            let is_prose = |line: &str| !line.is_empty() && !line.starts_with(' ');
            let long = pair[0].chars().count() > 100;
            let ends = is_prose(pair[0]) && !is_prose(pair[1]);
            assert!(!long || ends, "{name}: {}", pair[0]);
            checked += 1;
        }
    }
    assert!(checked > 100, "{checked}");
}

#[test]
fn log_filters_are_understood() {
    let run = |filter: &str| {
        let mut command = command(&run_args(None, "The"));
        stderr(&command.env("RUST_LOG", filter).output().unwrap())
    };
    assert!(run("ggml=info").lines().any(|l| l.starts_with("info: ")));
    assert_eq!(run("off"), "");
    assert!(run("a=b=c").starts_with("warning: RUST_LOG is ignored"));
}

// ---- chat

const CHAT: [&str; 7] = ["chat", "-t", "1", "--temp", "0", "-m", MODEL];

fn chat(args: &[&str], input: &str) -> Output {
    with_stdin(&[&CHAT[..], args].concat(), input.as_bytes())
}

#[test]
fn chat_swaps_to_exactly_what_each_adapter_says_alone() {
    let folder = tempfile::tempdir().unwrap();
    let pirate = import(folder.path(), PIRATE);
    let butler = format!("butler={BUTLER}");
    let line = PROMPT.trim_end();
    let input = format!(
        "{line}\n/reset\n/adapter butler\n{line}\n/reset\n/adapter none\n{line}\n/reset\n/adapter persona_pirate-prefix\n{line}\n/quit\nno more\n"
    );
    let output = chat(&["-a", pirate.to_str().unwrap(), "-a", &butler], &input);
    let expected = [Some(PIRATE), Some(BUTLER), None, Some(PIRATE)]
        .map(|adapter| greedy(adapter, PROMPT) + "\n")
        .concat();
    assert_eq!(stdout(&output), expected);
    assert_eq!(stderr(&output), "");
}

#[test]
fn chat_swaps_in_mid_conversation() {
    let second = "The pancakes tastes of smoke.\n";
    let input = format!("{PROMPT}/adapter b\n/adapters\n{second}");
    let output = chat(
        &["-a", &format!("a={PIRATE}"), "-a", &format!("b={BUTLER}")],
        &input,
    );
    // The same tokens with the second adapter from the start; `run` tokenizes in one piece what the chat did in two.
    let model = Model::open(MODEL, &ModelOptions::default()).unwrap();
    let vocab = model.vocab();
    let mut ids = vec![vocab.bos().unwrap()];
    for text in [PROMPT, PIRATE_SAYS, &format!("\n{second}")] {
        ids.extend(vocab.tokenize(text, false, true).unwrap());
    }
    let mut session = Session::new(&model, &SessionOptions::default().n_threads(1)).unwrap();
    let adapter = ggraft::adapter::import_peft(
        BUTLER.as_ref(),
        model.shape(),
        None,
        &ggraft::adapter::ImportOptions::default(),
    )
    .unwrap();
    session
        .attach(&adapter, ggraft::infer::ExistingText::Drop)
        .unwrap();
    session.feed(&ids).unwrap();
    let greedy = ggraft::infer::GenerateOptions::default()
        .sampler(ggraft::infer::sampler::SamplerParams::greedy());
    let expected = session
        .generate(&greedy, |_| std::ops::ControlFlow::Continue(()))
        .unwrap();
    assert_eq!(
        stdout(&output),
        format!(
            "{PIRATE_SAYS}\n  a: prefix, 20 virtual tokens\n* b: prefix, 20 virtual tokens\n  none\n{}\n",
            expected.text
        )
    );
}

#[test]
fn chat_in_a_pipe_ends_with_the_first_error() {
    for (input, expected) in [
        (
            "/adapter nobody\nThe\n",
            "no adapter is called 'nobody' (there are: p, none)",
        ),
        ("/frobnicate\nThe\n", "unknown command '/frobnicate'"),
        ("/adapter\n", "unknown command '/adapter'"),
        ("/undo\nThe\n", "there is nothing to take back"),
        ("/save\n", "unknown command '/save'"),
        ("/load\n", "unknown command '/load'"),
        ("/load absent.gguf\nThe\n", "absent.gguf"),
        ("/save /absent/text.gguf\nThe\n", "/absent/text.gguf"),
    ] {
        let output = chat(&["-a", &format!("p={PIRATE}")], input);
        assert!(failure(&output).contains(expected), "{output:?}");
        assert_eq!(output.stdout, b"");
    }
    let output = with_stdin(&CHAT, b"ok\xff\n");
    assert!(failure(&output).contains("not UTF-8"), "{output:?}");
    let output = chat(&["-c", "30", "-n", "-1"], "The\nThe\nThe\nThe\nThe\n");
    assert!(failure(&output).contains("context is full"), "{output:?}");
    assert_eq!(stdout(&chat(&[], "")), "");
}

/// The model with ChatML as its chat template.
fn chat_model(folder: &Path) -> PathBuf {
    let bytes = fs::read(MODEL).unwrap();
    let key = "tokenizer.chat_template";
    let value = ggraft::model::chat::built_in_template("chatml").unwrap();
    let fixed = 8 + key.len() + 4 + 8;
    // What is inserted has a multiple of the alignment, so that tensor data stays aligned.
    let value = format!(
        "{value:0$}",
        (fixed + value.len()).next_multiple_of(32) - fixed
    );
    let mut out = bytes[..16].to_vec();
    let keys = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    out.extend((keys + 1).to_le_bytes());
    out.extend((key.len() as u64).to_le_bytes());
    out.extend(key.as_bytes());
    out.extend(8u32.to_le_bytes());
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
    out.extend(&bytes[24..]);
    let path = folder.join("chat.gguf");
    fs::write(&path, out).unwrap();
    path
}

#[test]
fn chat_computes_only_what_is_new_in_each_turn() {
    let folder = tempfile::tempdir().unwrap();
    let model = chat_model(folder.path());
    let mut args = words("chat -v -t 1 --temp 0 -n 5 --system Talk. -m");
    args.push(model.to_str().unwrap());
    let output = with_stdin(&args, b"Hello\nHello\nHello\n/reset\nHello\n");
    let lines: Vec<_> = stderr(&output)
        .lines()
        .filter_map(|l| {
            l.strip_prefix("info: prefill of ")?
                .strip_suffix(" tokens")?
                .parse()
                .ok()
        })
        .collect();
    let &[first, second, third, fourth]: &[usize; 4] = lines[..].try_into().unwrap();
    assert_eq!(second, third, "the history is computed again");
    // The system message is not repeated.
    assert!(second < first, "{lines:?}");
    assert_eq!(first, fourth);
    let text = stdout(&output);
    let answers: Vec<_> = text.lines().collect();
    assert_eq!(answers.first(), answers.last());

    // The first turn is what `run --chat` says.
    let mut args = words("run -q -t 1 --temp 0 -n 5 --chat --system Talk. -p Hello -m");
    args.push(model.to_str().unwrap());
    assert!(text.starts_with(&ok(&args)));
}

/// What `chat` says with these arguments to each of these lines.
#[track_caller]
fn answers(args: &[&str], input: &str) -> Vec<String> {
    let output = with_stdin(args, input.as_bytes());
    stdout(&output).lines().map(str::to_owned).collect()
}

/// As text that is continued, under an adapter, and as messages.
fn conversations(folder: &Path) -> [Vec<String>; 2] {
    let model = chat_model(folder);
    let texts = format!("{} -n 6 -a p={PIRATE}", CHAT.join(" "));
    let messages = format!(
        "chat -t 1 --temp 0 -n 6 --system Talk. -m {}",
        model.display()
    );
    [texts, messages].map(|args| words(&args).into_iter().map(str::to_owned).collect())
}

#[test]
fn chat_takes_turns_back() {
    let folder = tempfile::tempdir().unwrap();
    for args in conversations(folder.path()) {
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let plain = answers(&args, "Hello.\nThe rain.\nThe town.\n");
        let [first, second, third] = &plain[..] else {
            panic!("{plain:?}")
        };
        let got = answers(
            &args,
            "A horse.\n/undo\nHello.\nA horse.\nThe sea.\n/undo\n/undo\nThe rain.\n/undo\nThe rain.\nThe town.\n",
        );
        assert_eq!(got.len(), 7);
        assert_eq!(
            [&got[1], &got[4], &got[5], &got[6]],
            [first, second, second, third]
        );
        // All of it, and no more.
        let output = with_stdin(&args, b"Hello.\n/undo\n/undo\n");
        assert!(failure(&output).contains("nothing to take back"));
    }
    // A swap computes the text again, and its turns are still there.
    let args = format!("{} -n 6 -a p={PIRATE} -a b={BUTLER}", CHAT.join(" "));
    let args = words(&args);
    let want = answers(&args, "Hello.\n/adapter b\nThe rain.\n");
    let got = answers(&args, "Hello.\nA horse.\n/adapter b\n/undo\nThe rain.\n");
    assert_eq!([&got[0], &got[2]], [&want[0], &want[1]]);
}

#[test]
fn chat_goes_on_in_another_process() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("a talk.gguf");
    let file = file.to_str().unwrap();
    for args in conversations(folder.path()) {
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        let plain = answers(&args, "Hello.\nThe rain.\nThe town.\n");
        let saved = answers(&args, &format!("Hello.\nThe rain.\n/save {file}\n"));
        assert_eq!(saved, plain[..2]);
        let verbose = [&args[..], &["-v"]].concat();
        let input = format!("/load {file}\nThe town.\n");
        let output = with_stdin(&verbose, input.as_bytes());
        assert_eq!(stdout(&output).trim_end(), plain[2]);
        // Only the last line was computed.
        let prefills = |output: &Output| -> Vec<String> {
            let text = stderr(output);
            let lines = text.lines().filter(|line| line.contains("prefill of"));
            lines.map(str::to_owned).collect()
        };
        let all = with_stdin(&verbose, b"Hello.\nThe rain.\nThe town.\n");
        assert_eq!(prefills(&output), prefills(&all)[2..]);
        // Turns come along, in place of what there was.
        let input = format!("A horse.\n/load {file}\n/undo\nThe rain.\n");
        assert_eq!(answers(&args, &input)[1], plain[1]);
        let input = format!("/load {file}\n/undo\n/undo\nHello.\n");
        assert_eq!(answers(&args, &input), plain[..1]);
    }
    let [texts, messages] = conversations(folder.path());
    let [texts, messages]: [Vec<&str>; 2] =
        [&texts, &messages].map(|args| args.iter().map(String::as_str).collect());
    // The last one that was saved has messages, of a model that is the same but for its chat template.
    let load = format!("/load {file}\n");
    let output = with_stdin(&CHAT, load.as_bytes());
    assert!(failure(&output).contains("chat template"), "{output:?}");
    assert!(ok(&["inspect", file]).contains("saved session, GGUF version 3"));
    ok_with(&texts, &format!("Hello.\n/save {file}\n"));
    let output = with_stdin(&messages, load.as_bytes());
    assert!(failure(&output).contains("attach what it was saved with"));
    ok_with(&CHAT, &format!("Hello.\n/save {file}\n"));
    let output = with_stdin(&messages, load.as_bytes());
    assert!(failure(&output).contains("saved without a chat template"));
    // What a program saved has no turns.
    let model = Model::open(MODEL, &ModelOptions::default()).unwrap();
    let mut session = Session::new(&model, &SessionOptions::default().n_threads(1)).unwrap();
    session.prompt("Hello.").unwrap();
    session.save(file.as_ref(), "").unwrap();
    let output = with_stdin(&CHAT, load.as_bytes());
    assert!(failure(&output).contains("not saved by"), "{output:?}");
}

#[track_caller]
fn ok_with(args: &[&str], input: &str) {
    let output = with_stdin(args, input.as_bytes());
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

// ---- logits, eval, predict

/// Logits of `ids`, one row per token, from the library.
fn logits(model: &Model, ids: &[i32], kv: ggraft::infer::KvType) -> Vec<Vec<f32>> {
    let options = SessionOptions::default().n_threads(1).kv_type(kv);
    let mut session = Session::new(model, &options).unwrap();
    let mut rows = Vec::new();
    session
        .feed_with_logits(ids, |_, row| rows.push(row.to_vec()))
        .unwrap();
    rows
}

fn nll(logits: &[f32], target: i32) -> f64 {
    let sum: f64 = logits.iter().map(|&x| f64::from(x).exp()).sum();
    sum.ln() - f64::from(logits[target as usize])
}

fn read_logits(path: &Path) -> (Vec<i64>, Vec<f32>, Vec<usize>) {
    let bytes = fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let (ids, values) = (
        file.tensor("input_ids").unwrap(),
        file.tensor("logits").unwrap(),
    );
    assert_eq!(ids.dtype(), safetensors::Dtype::I64);
    assert_eq!(values.dtype(), safetensors::Dtype::F32);
    let ids = ids
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&b| i64::from_le_bytes(b))
        .collect();
    let rows = values
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b))
        .collect();
    (ids, rows, values.shape().to_vec())
}

#[test]
fn logits_are_those_of_the_library() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("out.safetensors");
    let out_text = out.to_str().unwrap();
    let model = Model::open(MODEL, &ModelOptions::default()).unwrap();
    let base = ["logits", "-t", "1", "-m", MODEL, "-o", out_text];

    ok(&[&base[..], &["--ids", "5,0,77"]].concat());
    let (ids, values, shape) = read_logits(&out);
    assert_eq!((ids, shape), (vec![5, 0, 77], vec![3, 3072]));
    assert_eq!(
        values,
        logits(&model, &[5, 0, 77], ggraft::infer::KvType::F32).concat()
    );

    ok(&[&base[..], &["-p", "Linhaven lies in", "-a", SENTIMENT]].concat());
    let (ids, values, shape) = read_logits(&out);
    let expected = model
        .vocab()
        .tokenize("Linhaven lies in", true, true)
        .unwrap();
    assert_eq!(
        ids,
        expected.iter().map(|&id| id.into()).collect::<Vec<i64>>()
    );
    assert_eq!(shape, [expected.len(), 3072]);
    let plain = logits(&model, &expected, ggraft::infer::KvType::F32).concat();
    assert_ne!(values, plain, "the adapter has no effect");
}

#[test]
fn logits_of_templates_have_rows_for_real_tokens_only() {
    use ggraft::adapter::{Adapter, AdapterKind, Parts, Template, import_peft};
    let folder = tempfile::tempdir().unwrap();
    let model = Model::open(MODEL, &ModelOptions::default()).unwrap();
    let prompt = import_peft(
        SENTIMENT.as_ref(),
        model.shape(),
        Some(model.fingerprint()),
        &Default::default(),
    )
    .unwrap();
    // All virtual tokens in front of BOS and no text of its own: exactly what the prompt adapter is.
    let template = |text: &str| {
        let parts = Parts {
            kind: AdapterKind::PTuning,
            template: Some(Template::parse(text).unwrap()),
            ..prompt.parts().clone()
        };
        let path = folder.path().join("template.gguf");
        Adapter::new(parts)
            .unwrap()
            .save(&path, ggraft::adapter::Precision::F32)
            .unwrap();
        path
    };
    let out = folder.path().join("out.safetensors");
    let compute = |adapter: &str, ids: &str| {
        let out = out.to_str().unwrap();
        ok(&[
            "logits",
            "-t",
            "1",
            "-m",
            MODEL,
            // Keys in front of a text are summed apart from those in it, in another order: a rounding that 8 bits would make much of.
            "--kernels",
            "own",
            "-a",
            adapter,
            "--ids",
            ids,
            "-o",
            out,
        ]);
        read_logits(Path::new(out))
    };
    let (_, expected, _) = compute(SENTIMENT, "0,50,60");
    for given in ["0,50,60", "50,60"] {
        let (ids, values, _) = compute(template("{v:20} {bos} {prompt}").to_str().unwrap(), given);
        assert_eq!(ids, [0, 50, 60]);
        let error = nmse(&values, &expected);
        assert!(error < 1e-7, "{error:e}");
    }
    let text = model.vocab().tokenize("Review:", false, true).unwrap();
    let (ids, values, shape) = compute(
        template("Review:{v:20} {prompt}").to_str().unwrap(),
        "50,60",
    );
    let placed: Vec<i64> = [&[0], &text[..], &[50, 60]]
        .concat()
        .iter()
        .map(|&i| i.into())
        .collect();
    assert_eq!(ids, placed);
    assert_eq!(shape, [ids.len(), 3072]);
    assert!(values.iter().all(|v| v.is_finite()));
}

fn write_rows(folder: &Path, rows: &[Value]) -> String {
    let path = folder.join("data.jsonl");
    let text: String = rows.iter().map(|row| format!("{row}\n\n")).collect();
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[track_caller]
fn near(got: &Value, expected: f64) {
    let got = got.as_f64().unwrap();
    assert!(
        (got - expected).abs() < 1e-3 * expected.abs().max(1.0),
        "{got} is not {expected}"
    );
}

#[test]
fn eval_is_the_mean_over_what_must_be_predicted() {
    let folder = tempfile::tempdir().unwrap();
    // Our own kernels round less than ggml's, but only with many rows: here all rows are the same to both sides.
    let options = ModelOptions::default().kernels(Kernels::Ggml);
    let model = Model::open(MODEL, &options).unwrap();
    let ids = |text: &str| model.vocab().tokenize(text, false, true).unwrap();
    let sum = |given: &[i32], then: &[i32]| -> f64 {
        let all = [&[0], given, then].concat();
        let rows = logits(&model, &all, ggraft::infer::KvType::F32);
        (0..then.len())
            .map(|i| nll(&rows[given.len() + i], then[i]))
            .sum()
    };
    let eval = |path: &str, model: &str| {
        json(&ok(&[
            "eval",
            "-t",
            "1",
            "--kernels",
            "ggml",
            "--kv-type",
            "f32",
            "-m",
            model,
            "--json",
            "--data",
            path,
        ]))
    };
    let (prompt, good, text) = ("Linhaven lies in", " Westmoor.", "The rain.");
    let completion = ok(&[&run_args(None, prompt)[..], &["--kernels", "ggml"]].concat());

    let rows = [
        json!({"prompt": prompt, "completion": completion, "note": 1}),
        json!({"prompt": prompt, "completion": good, "weight": 3}),
        json!({"text": text, "weight": 0.5}),
    ];
    let (a, b, c) = (
        [ids(&completion), vec![1]].concat(),
        [ids(good), vec![1]].concat(),
        [ids(text), vec![1]].concat(),
    );
    let given = ids(prompt);
    let total = sum(&given, &a) + 3.0 * sum(&given, &b) + 0.5 * sum(&[], &c);
    let weight = a.len() as f64 + 3.0 * b.len() as f64 + 0.5 * c.len() as f64;
    let data = write_rows(folder.path(), &rows);
    let result = eval(&data, MODEL);
    near(&result["loss"], total / weight);
    near(&result["perplexity"], (total / weight).exp());
    assert_eq!(result["exact_match"], 0.5);
    assert_eq!(result["rows"], 3);
    assert_eq!(result["tokens"], a.len() + b.len() + c.len());
    let args = ["eval", "-t", "1", "--kernels", "ggml", "-m", MODEL];
    let shown = ok(&[&args[..], &["--data", &data]].concat());
    assert!(shown.contains("exact match 50.0 % (1 of 2)"), "{shown}");

    // In a conversation the assistant's messages count, with the end of their turn.
    let chat = chat_model(folder.path());
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let rows = [json!({"messages": [
        message("user", "a"),
        message("assistant", "b"),
        message("user", "c"),
        message("assistant", "d"),
        message("user", "e"),
    ]})];
    let parts = [
        ids("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"),
        ids("b<|im_end|>\n"),
        ids("<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"),
        ids("d<|im_end|>\n"),
    ];
    let total = sum(&parts[0], &parts[1]) + sum(&parts[..3].concat(), &parts[3]);
    let result = eval(&write_rows(folder.path(), &rows), chat.to_str().unwrap());
    let tokens = parts[1].len() + parts[3].len();
    assert_eq!(result["tokens"], tokens);
    near(&result["loss"], total / tokens as f64);
    assert_eq!(result["exact_match"], Value::Null);
}

#[test]
fn wrong_rows_are_named_by_their_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    let data = path.to_str().unwrap();
    let good = r#"{"prompt": "a", "completion": "b"}"#;
    let out = folder.path().join("out.jsonl");
    for (row, expected) in [
        ("{\"prompt\": ", "column"),
        ("[1]", "a list is no row"),
        (r#"{"prompt": 3}"#, "must be a text or a list of messages"),
        (r#"{"completion": "b"}"#, "without prompt"),
        (r#"{"other": "b"}"#, "no field"),
        (r#"{"prompt": "a", "text": "b"}"#, "more than one"),
        (
            r#"{"prompt": "a", "completion": "b", "weight": -1}"#,
            "weight",
        ),
        (
            r#"{"messages": [{"role": "user", "content": "a"}]}"#,
            "no message has the role 'assistant'",
        ),
        (
            r#"{"messages": [{"role": "assistant", "content": "a"}]}"#,
            "no chat template",
        ),
        (r#"{"messages": []}"#, "no message"),
    ] {
        fs::write(&path, format!("{good}\n\n{row}\n{good}\n")).unwrap();
        let text = failure(&ggraft(&["eval", "-t", "1", "-m", MODEL, "--data", data]));
        let place = format!("{data}:3: ");
        assert!(
            text.contains(&place) && text.contains(expected),
            "{row}: {text}"
        );
    }
    fs::write(&path, r#"{"prompt": "a"}"#).unwrap();
    let text = failure(&ggraft(&["eval", "-t", "1", "-m", MODEL, "--data", data]));
    assert!(text.contains("no field 'completion'"), "{text}");
    fs::write(&path, format!("{good}\n{{\"text\": \"a\"}}\n")).unwrap();
    let predict = ["predict", "-t", "1", "-m", MODEL, "--data", data, "-o"];
    let text = failure(&ggraft(&[&predict[..], &[out.to_str().unwrap()]].concat()));
    assert!(
        text.contains(":2: ") && text.contains("no prompt"),
        "{text}"
    );
    let text = fs::read_to_string(&out).unwrap();
    assert_eq!(text.lines().count(), 1, "the row before it: {text}");
}

/// They count for nothing, and are not counted.
#[test]
fn rows_of_weight_0_are_left_out() {
    let folder = tempfile::tempdir().unwrap();
    let eval = |rows: &[Value]| {
        let data = write_rows(folder.path(), rows);
        ggraft(&["eval", "-t", "1", "--json", "-m", MODEL, "--data", &data])
    };
    let row =
        |prompt: &str, weight: u32| json!({"prompt": prompt, "completion": "c", "weight": weight});
    let whole = json(&stdout(&eval(&[row("a", 1), row("b", 2)])));
    let output = eval(&[row("x", 0), row("a", 1), row("y", 0), row("b", 2)]);
    assert_eq!(json(&stdout(&output)), whole);
    let text = stderr(&output);
    assert!(
        text.starts_with("warning: 2 rows have the weight 0") && text.contains("data.jsonl:1, "),
        "{text}"
    );
    let text = failure(&eval(&[row("x", 0)]));
    assert!(
        text.contains("data.jsonl: all rows have the weight 0"),
        "{text}"
    );
}

/// Greedy texts of PEFT adapters on the F16 model, against those that PEFT and Transformers wrote with the F32 model.
#[test]
fn predict_reproduces_the_texts_of_peft() {
    let folder = tempfile::tempdir().unwrap();
    let text = fs::read_to_string("models/peft/predictions.jsonl").unwrap();
    let rows: Vec<Value> = text.lines().map(json).collect();
    assert_eq!(rows.len(), 50);
    // What the reference was limited to.
    let limits = [
        ("persona_pirate-prefix", "48"),
        ("persona_butler-prefix_proj", "48"),
        ("table_to_text-prefix", "64"),
        ("sentiment-prompt_text", "3"),
        ("facts_county-p_tuning", "8"),
    ];
    let (mut total, mut different) = (0, Vec::new());
    for (adapter, limit) in limits {
        let rows: Vec<_> = rows
            .iter()
            .filter(|r| r["adapter"] == adapter)
            .cloned()
            .collect();
        let data = write_rows(folder.path(), &rows);
        let out = folder.path().join("out.jsonl");
        let path = format!("models/peft/{adapter}");
        let mut args = words("predict -t 1 -m models/tinylm-f16.gguf -a");
        args.extend([
            &path,
            "-n",
            limit,
            "--data",
            &data,
            "-o",
            out.to_str().unwrap(),
        ]);
        assert_eq!(stderr(&ggraft(&args)), "");
        let predictions = fs::read_to_string(&out).unwrap();
        assert_eq!(predictions.lines().count(), rows.len());
        for (row, line) in rows.iter().zip(predictions.lines()) {
            let prediction = json(line);
            assert_eq!(prediction["prompt"], row["prompt"]);
            total += 1;
            if prediction["prediction"] != row["greedy"] {
                different.push((prediction, row["greedy"].clone()));
            }
        }
    }
    assert_eq!(total, 50);
    assert!(different.len() <= 2, "{different:#?}");
}

#[test]
fn predict_scores_completions_as_eval_does() {
    let folder = tempfile::tempdir().unwrap();
    let completion = greedy(None, "Linhaven lies in");
    let completion = completion.trim_end_matches('\n');
    let rows = [json!({"prompt": "Linhaven lies in", "completion": completion})];
    let data = write_rows(folder.path(), &rows);
    let out = folder.path().join("out.jsonl");
    ok(&[
        "predict",
        "-t",
        "1",
        "-m",
        MODEL,
        "--data",
        &data,
        "-o",
        out.to_str().unwrap(),
    ]);
    let row = json(&fs::read_to_string(&out).unwrap());
    assert_eq!(row["prediction"], completion);
    let eval = json(&ok(&[
        "eval", "-t", "1", "-m", MODEL, "--json", "--data", &data,
    ]));
    assert_eq!(row["tokens"], eval["tokens"]);
    near(
        &row["nll"],
        eval["loss"].as_f64().unwrap() * eval["tokens"].as_f64().unwrap(),
    );

    let chat = chat_model(folder.path());
    let messages = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let data = write_rows(
        folder.path(),
        &[
            json!({"messages": messages}),
            json!({"messages": messages.as_array().unwrap()[..1]}),
        ],
    );
    let (chat, out_text) = (chat.to_str().unwrap(), out.to_str().unwrap());
    ok(&[
        "predict", "-t", "1", "-n", "4", "-m", chat, "--data", &data, "-o", out_text,
    ]);
    let rows: Vec<_> = fs::read_to_string(&out)
        .unwrap()
        .lines()
        .map(json)
        .collect();
    assert_eq!(
        rows[0]["prompt"],
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    );
    assert_eq!(rows[0]["prompt"], rows[1]["prompt"]);
    assert_eq!(rows[0]["prediction"], rows[1]["prediction"]);
    assert!(rows[0]["tokens"].is_number() && rows[1]["tokens"].is_null());
}

// ---- train

/// Every flag of `ggraft train`.
const TRAIN_FLAGS: &str = "--model --data --valid --max-len --method --length --init --reparam --hidden --template \
    --freeze-first --loss --label-smoothing --steps --epochs --batch --accum --lr --schedule --warmup --optimizer --beta1 --beta2 --weight-decay --dropout --clip --mezo --seed \
    --eval-every --patience --ensemble --output --checkpoint-every --resume --log --plot --threads --memory";

#[test]
fn train_help_lists_and_explains_every_flag() {
    let help = ok(&["train", "--help"]);
    for flag in words(TRAIN_FLAGS) {
        let takes_a_value = [" <", " [<"].map(|value| format!(" {flag}{value}"));
        assert!(
            takes_a_value.iter().any(|text| help.contains(text)),
            "{flag}"
        );
    }
    let required = ["--model", "--data", "--method", "--output"];
    // Whoever leaves these out does not ask what happens.
    let no_default = ["--epochs", "--ensemble", "--resume", "--log", "--plot"];
    let expected = words(TRAIN_FLAGS).len() - required.len() - no_default.len();
    assert_eq!(help.matches("[default:").count(), expected, "{help}");
    for heading in [
        "Data",
        "Adapter",
        "Objective",
        "Schedule",
        "Ensemble",
        "Saving",
        "Computation",
    ] {
        assert!(help.contains(&format!("\n{heading}:\n")), "{heading}");
    }
}

#[test]
fn train_refuses_arguments_that_make_no_sense() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write_rows(folder.path(), &[json!({"prompt": "a", "completion": "b"})]);
    let out = folder.path().join("out.gguf");
    let usage = |more: &[&str]| {
        let mut args = words("train -t 1 -m");
        args.extend([MODEL, "--data", &rows, "-o", out.to_str().unwrap()]);
        let output = ggraft(&[&args[..], more].concat());
        assert_eq!(output.status.code(), Some(2), "{more:?}: {output:?}");
        let text = stderr(&output);
        assert!(text.starts_with("error: "), "{more:?}: {text}");
        text
    };
    for (more, expected) in [
        ("", "--method"),
        ("--method lora", "'lora'"),
        (
            "--method prefix --init words",
            "random, zeros, vocab, prompts, mean, text:",
        ),
        ("--method prefix --init text:", "no text behind 'text:'"),
        (
            "--method prefix --init adapter:",
            "no file behind 'adapter:'",
        ),
        ("--method prefix --loss half", "completion, all or distill:"),
        (
            "--method prefix --loss distill:",
            "no file behind 'distill:'",
        ),
        ("--method prefix --reparam rnn", "'rnn'"),
        ("--method prefix --schedule step", "'step'"),
        ("--method prefix --optimizer adam", "'adam'"),
        ("--method prefix --length 0", "at least 1"),
        ("--method prefix --steps 0", "'0'"),
        (
            "--method prefix --steps 5 --epochs 1",
            "cannot be used with",
        ),
        ("--method prefix --epochs 0", "above 0"),
        ("--method prefix --lr 0", "above 0"),
        ("--method prefix --lr nan", "above 0"),
        ("--method prefix --weight-decay=-1", "0 or more"),
        ("--method prefix --clip inf", "0 or more"),
        ("--method prefix --dropout 1", "from 0 to below 1"),
        (
            "--method prefix --label-smoothing=-0.1",
            "from 0 to below 1",
        ),
        ("--method prefix --memory 12Q", "for example 256M"),
        ("--method prefix --memory 0", "at least one byte"),
        ("--method prefix --patience 3", "--valid"),
        ("--method prefix --eval-every 3", "--valid"),
        ("--method p-tuning --template {v:4}", "no {prompt}"),
        ("--resume a --method prefix", "--resume <FILE>"),
        ("--resume a --lr 1", "--resume <FILE>"),
        ("--resume a --batch 8", "--resume <FILE>"),
        ("--resume a --seed 0", "--resume <FILE>"),
        ("--resume a --memory 1G", "--resume <FILE>"),
    ] {
        let text = usage(&words(more));
        assert!(text.contains(expected), "{more}: {text}");
    }
    // What it reads is never what it writes.
    for flag in ["-o", "--plot", "--log"] {
        let mut args = words("train --method prefix -m");
        args.extend([MODEL, "--data", &rows]);
        if flag != "-o" {
            args.extend(["-o", out.to_str().unwrap()]);
        }
        args.extend([flag, rows.as_str()]);
        let output = ggraft(&args);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(stderr(&output).contains("is read by this command"));
    }
    assert!(fs::read_to_string(&rows).unwrap().contains("completion"));
    for more in ["--plot a --log a", "--log out.gguf.ckpt"] {
        let more = more.replace("out.gguf", out.to_str().unwrap());
        let text = usage(&[&words("--method prefix")[..], &words(&more)].concat());
        assert!(text.contains("written twice"), "{text}");
    }
    assert!(!out.exists());
}

#[test]
fn train_fails_before_it_computes() {
    let folder = tempfile::tempdir().unwrap();
    let rows = write_rows(folder.path(), &[json!({"prompt": "a", "completion": "b"})]);
    let folder = folder.path().display();
    let run = |more: &str| {
        let line = format!("train --method prefix -t 1 {more}");
        failure(&ggraft(&words(&line)))
    };
    for (more, expected) in [
        (
            format!("-m {MODEL} --data {rows} -o {folder}/no/out.gguf"),
            "there is no folder",
        ),
        (
            format!("-m {MODEL} --data {rows} -o {folder}"),
            "is a directory",
        ),
        (
            format!("-m {MODEL} --data {rows} -o /dev/null"),
            "not a regular file",
        ),
        (
            format!("-m {MODEL} --data {rows} -o {folder}/x --plot {folder}/no/x.svg"),
            "there is no folder",
        ),
        (
            format!("-m {MODEL} --data {rows} -o {folder}/x --log {folder}/no/x.jsonl"),
            "there is no folder",
        ),
        (
            format!("-m {MODEL} --data /no/such/file -o {folder}/x"),
            "/no/such/file: ",
        ),
        (
            format!("-m {MODEL} --data {rows} --valid /dev/null -o {folder}/x"),
            "no rows",
        ),
        (
            format!("-m {MODEL} --data Cargo.toml -o {folder}/x"),
            "Cargo.toml:1: ",
        ),
        (
            format!("-m Cargo.toml --data {rows} -o {folder}/x"),
            "Cargo.toml",
        ),
        (
            format!("-m {MODEL} --data {rows} -o {folder}/x --init adapter:/no/such/file"),
            "/no/such/file",
        ),
        (
            format!("-m {MODEL} --data {rows} -o {folder}/x --init adapter:{MODEL}"),
            "not an adapter",
        ),
        (
            format!("-m {MODEL} --data {rows} -o {folder}/x --loss distill:/no/such/file"),
            "/no/such/file",
        ),
    ] {
        let text = run(&more);
        assert!(text.contains(expected), "{more}: {text}");
    }
    assert!(!Path::new(&format!("{folder}/x")).exists());
}

// ---- adapters, files, speed

/// Imports a PEFT folder into an adapter file of the same name.
fn import(folder: &Path, peft: &str) -> PathBuf {
    let name = Path::new(peft).file_name().unwrap().to_str().unwrap();
    let out = folder.join(format!("{name}.gguf"));
    ok(&["import", peft, "-m", MODEL, "-o", out.to_str().unwrap()]);
    out
}

#[test]
fn adapters_go_in_and_out() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (half, full, back) = (import(folder.path(), PIRATE), at("full.gguf"), at("back"));
    ok(&[
        "import", PIRATE, "-m", MODEL, "--f32", "--name", "Pirate", "-o", &full,
    ]);
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    assert!(size(full.as_ref()) > size(&half) + 80_000);
    assert_eq!(greedy(Some(&full), PROMPT), PIRATE_SAYS);

    // In single precision nothing is lost on the way back.
    ok(&["export", &full, "-m", MODEL, "-o", &back]);
    let tensors = |dir: &str| {
        let bytes = fs::read(format!("{dir}/adapter_model.safetensors")).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        file.tensor("prompt_embeddings").unwrap().data().to_vec()
    };
    assert_eq!(tensors(&back), tensors(PIRATE));
    let config = json(&fs::read_to_string(format!("{back}/adapter_config.json")).unwrap());
    assert_eq!(config["peft_type"], "PREFIX_TUNING");
    assert_eq!(config["base_model_name_or_path"], "tinylm");

    let (butler, both) = (import(folder.path(), BUTLER), at("both.gguf"));
    ok(&[
        "concat",
        half.to_str().unwrap(),
        butler.to_str().unwrap(),
        "-o",
        &both,
    ]);
    let facts = json(&ok(&["inspect", &both, "--json"]));
    assert_eq!(facts["metadata"]["ggraft.length"], 40);
    greedy(Some(&both), PROMPT);
}

#[test]
fn an_adapter_of_another_base_needs_force() {
    use ggraft::adapter::{Adapter, Parts, Precision};
    let folder = tempfile::tempdir().unwrap();
    let adapter = Adapter::load(&import(folder.path(), PIRATE)).unwrap();
    let path = folder.path().join("other.gguf");
    let parts = Parts {
        fingerprint: Some("ab".repeat(32).parse().unwrap()),
        ..adapter.parts().clone()
    };
    Adapter::new(parts)
        .unwrap()
        .save(&path, Precision::F16)
        .unwrap();
    let path = path.to_str().unwrap();
    let mut args = run_args(Some(path), PROMPT);
    failure(&ggraft(&args));
    args.push("--force");
    assert_eq!(ok(&args), PIRATE_SAYS);

    let out = folder.path().join("peft");
    let mut args = vec!["export", path, "-m", MODEL, "-o", out.to_str().unwrap()];
    failure(&ggraft(&args));
    args.push("--force");
    ok(&args);
}

#[test]
fn inspect_tells_what_a_file_is() {
    let facts = json(&ok(&["inspect", MODEL, "--json"]));
    let model = Model::open(MODEL, &ModelOptions::default()).unwrap();
    assert_eq!(facts["kind"], "model");
    assert_eq!(facts["fingerprint"], model.fingerprint().to_string());
    assert_eq!(facts["elements"], 7_082_240);
    assert_eq!(facts["metadata"]["llama.block_count"], 8);
    assert_eq!(facts["metadata"]["tokenizer.ggml.tokens"]["length"], 3072);
    let tensors = facts["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), model.file().tensors().count());
    let embedding = tensors
        .iter()
        .find(|t| t["name"] == "token_embd.weight")
        .unwrap();
    assert_eq!(
        *embedding,
        json!({"name": "token_embd.weight", "type": "q8_0", "shape": [256, 3072], "bytes": 835_584})
    );
    let text = ok(&["inspect", MODEL]);
    for part in [
        "llama.block_count = 8",
        "token_embd.weight",
        "7082240 elements",
        "fingerprint ",
    ] {
        assert!(text.contains(part), "{part}");
    }

    let folder = tempfile::tempdir().unwrap();
    let adapter = import(folder.path(), PIRATE);
    let facts = json(&ok(&["inspect", adapter.to_str().unwrap(), "--json"]));
    assert_eq!(facts["kind"], "adapter");
    assert_eq!(facts["fingerprint"], model.fingerprint().to_string());
    assert_eq!(facts["tensors"].as_array().unwrap().len(), 16);
    assert_eq!(facts["problem"], Value::Null);

    // What PEFT saved tells as much, apart from the base.
    let facts = json(&ok(&["inspect", PIRATE, "--json"]));
    assert_eq!(facts["kind"], "peft");
    assert_eq!(facts["metadata"]["peft_type"], "PREFIX_TUNING");
    assert_eq!(facts["metadata"]["num_layers"], 8);
    assert_eq!(
        facts["tensors"],
        json!([{"name": "prompt_embeddings", "shape": [2048, 20]}])
    );
    assert_eq!(facts["elements"], 20 * 2048);
    let text = ok(&["inspect", PIRATE]);
    for part in [
        "peft_type = PREFIX_TUNING\n",
        "[2048, 20]\n",
        "fingerprint unknown; `ggraft import` makes",
    ] {
        assert!(text.contains(part), "{text}");
    }

    // What a terminal would obey is shown as what it is.
    let mut bytes = fs::read(MODEL).unwrap();
    let key = b"llama.block_count";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap();
    bytes[at..at + 5].copy_from_slice(b"\x1b[2J\x07");
    let path = folder.path().join("odd.gguf");
    fs::write(&path, bytes).unwrap();
    let text = ok(&["inspect", path.to_str().unwrap()]);
    assert!(
        text.contains("  \\u{1b}[2J\\u{7}.block_count = 8\n"),
        "{text}"
    );
    assert!(!text.contains('\u{1b}') && !text.contains('\u{7}'));

    // A model that others run.
    let facts = json(&ok(&["inspect", MODEL, "--json"]));
    assert_eq!(facts["engine"], "ggraft");
    let [_, path] = write_twins(folder.path()).unwrap();
    let facts = json(&ok(&["inspect", path.to_str().unwrap(), "--json"]));
    assert_eq!(facts["engine"], "llama.cpp");
    assert_eq!(facts["fingerprint"].as_str().unwrap().len(), 64);
    let text = ok(&["inspect", path.to_str().unwrap()]);
    assert!(
        text.contains("libllama computes it") && text.contains("unsupported architecture"),
        "{text}"
    );

    // A well-formed file of something that cannot be run.
    let mut bytes = fs::read(MODEL).unwrap();
    let key = b"general.architecture";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 12;
    bytes[at..at + 5].copy_from_slice(b"lamas");
    let path = folder.path().join("odd.gguf");
    fs::write(&path, bytes).unwrap();
    let text = ok(&["inspect", path.to_str().unwrap()]);
    assert!(text.contains("cannot be used: ") && text.contains("unsupported architecture 'lamas'"));
}

#[test]
fn bench_reports_mean_and_deviation() {
    let options =
        words("bench -t 1 -p 16 -n 4 -d 8 -r 2 --parallel 1,3 -m models/tinylm-q8_0.gguf");
    for (adapter, tests) in [
        (
            None,
            vec![
                "open",
                "pp16 @ d8",
                "tg4 @ d8",
                "tg4 x1 @ d8",
                "tg4 x3 @ d8",
            ],
        ),
        (
            Some(SENTIMENT),
            vec![
                "open",
                "load",
                "compile",
                "attach",
                "swap",
                "pp16 @ d8",
                "tg4 @ d8",
                "tg4 x1 @ d8",
                "tg4 x3 @ d8",
            ],
        ),
    ] {
        let mut args = options.clone();
        // Users take several in turn.
        args.extend(
            adapter
                .map(|a| ["-a", a, "-a", PIRATE])
                .into_iter()
                .flatten(),
        );
        let table = ok(&args);
        for test in &tests {
            let row = table.lines().find(|l| l.contains(&format!("| {test} |")));
            assert!(row.is_some_and(|r| r.contains(" ± ")), "{test}: {table}");
        }
        args.push("--json");
        let object = json(&ok(&args));
        let rows = object["tests"].as_array().unwrap();
        assert_eq!(
            rows.iter()
                .map(|r| r["test"].as_str().unwrap())
                .collect::<Vec<_>>(),
            tests
        );
        for row in rows {
            let samples: Vec<f64> = row["samples"]
                .as_array()
                .unwrap()
                .iter()
                .map(|s| s.as_f64().unwrap())
                .collect();
            assert_eq!(samples.len(), 2);
            if let Some((_, users)) = row["test"].as_str().unwrap().split_once(" x") {
                let users: f64 = users.split(' ').next().unwrap().parse().unwrap();
                near(&row["each"], row["mean"].as_f64().unwrap() / users);
                assert!(row["of_one"].as_f64().unwrap() > 0.0);
            }
            let mean = (samples[0] + samples[1]) / 2.0;
            near(&row["mean"], mean);
            near(
                &row["deviation"],
                (samples[0] - samples[1]).abs() / 2f64.sqrt(),
            );
        }
        if cfg!(target_os = "linux") {
            assert!(object["peak_rss_bytes"].as_u64() >= object["rss_anon_bytes"].as_u64());
            assert!(object["rss_anon_bytes"].as_u64().unwrap() > 0);
        }
    }
}

#[test]
fn bench_refuses_what_the_context_does_not_hold() {
    let template = "tests/conformance/llama/model-f32.gguf";
    for (line, expected) in [
        (
            "-p 999999",
            "need a context of 999999 tokens, the model was trained on 1024",
        ),
        (
            "-n 1025 -p 0",
            "need a context of 1025 tokens, the model was trained on 1024",
        ),
        ("-d 1000 -p 25", "need a context of 1025 tokens"),
        ("-d 1025", "need a context of 1025 tokens"),
        (
            "-p 18446744073709551615 -d 9",
            "the model was trained on 1024",
        ),
        (
            "-c 100 -p 101 -n 1",
            "need a context of 101 tokens, --ctx has 100",
        ),
    ] {
        let text = wrong_usage(&format!("bench -m {MODEL} {line}"));
        assert!(text.contains(expected), "{line}: {text}");
    }
    let text = wrong_usage(&format!("bench -m {MODEL} -a {PIRATE} -p 1010 -n 1"));
    assert!(text.contains("need a context of 1030 tokens"), "{text}");
    let text = wrong_usage(&format!("bench -m {MODEL} -a {PIRATE} -c 8"));
    assert!(
        text.contains("need a context of 20 tokens, --ctx has 8"),
        "{text}"
    );

    // What was not asked for fits by itself, and a context that was asked for is used.
    let tests = |line: &str| {
        let object = json(&ok(&words(&format!("bench -t 1 -r 1 --json {line}"))));
        let names = object["tests"].as_array().unwrap().iter();
        let names: Vec<_> = names
            .map(|t| t["test"].as_str().unwrap().to_owned())
            .collect();
        names[1..].to_vec()
    };
    let n = Model::open(template, &ModelOptions::default())
        .unwrap()
        .n_ctx_train();
    let generated = n.min(128);
    assert!(n < 512, "choose a model with less context");
    assert_eq!(
        tests(&format!("-m {template}")),
        [format!("pp{n}"), format!("tg{generated}")]
    );
    assert_eq!(tests(&format!("-m {MODEL} -c 40 -n 0")), ["pp40"]);
    assert_eq!(
        tests(&format!("-m {MODEL} -c 1100 -p 1100 -n 0")),
        ["pp1100"]
    );
}

#[test]
fn bench_says_how_far_a_long_test_is() {
    let line = format!("bench -t 1 -c 200000 -p 200000 -n 0 -m {MODEL}");
    let mut child = command(&words(&line)).spawn().unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    log.read_line(&mut said).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let rest = said.strip_prefix("pp200000: warm-up, ").unwrap();
    let (done, rest) = rest.split_once(' ').unwrap();
    let done: usize = done.parse().unwrap();
    assert!(
        (512..200_000).contains(&done) && done.is_multiple_of(512),
        "{said}"
    );
    assert_eq!(rest, "of 200000 tokens\n");
}

/// A process that may run on one processor computes with one thread.
#[cfg(target_os = "linux")]
#[test]
fn the_default_number_of_threads_respects_affinity() {
    let line = format!("bench -m {MODEL} -p 8 -n 0 -r 1 --json");
    let threads = |output: Output| json(&stdout(&output))["threads"].as_u64().unwrap();
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let list = status
        .lines()
        .find_map(|l| l.strip_prefix("Cpus_allowed_list:"));
    let first = list.unwrap().trim().split(['-', ',']).next().unwrap();
    let bound = Command::new("taskset")
        .args(["-c", first, env!("CARGO_BIN_EXE_ggraft")])
        .args(words(&line))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert_eq!(threads(bound), 1);
    let free = threads(ggraft(&words(&line)));
    assert_eq!(free, ggraft::default_threads() as u64);
}

#[test]
fn virtual_tokens_of_old_gemma_adapters_are_mentioned() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("a.gguf").display().to_string();
    let cases = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/conformance");
    let warned = |case: &str, adapter: &str, more: &[&str]| {
        let model = format!("{cases}/{case}/model-f32.gguf");
        let adapter = format!("{cases}/{case}/adapters/{adapter}");
        let mut args = vec!["import", &adapter, "-m", &model, "-o", &out];
        args.extend(more);
        let output = command(&args).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        stderr(&output).contains("before version 5 need a row factor of")
    };
    assert!(warned("gemma", "prompt", &[]));
    assert!(warned("gemma", "ptuning_mlp", &[]));
    assert!(!warned("gemma", "prompt", &["--row-factor", "1"]));
    assert!(!warned("gemma", "prefix", &[]));
    assert!(!warned("llama", "prompt", &[]));
}

// ---- chat templates

#[test]
fn conversations_take_the_chosen_template() {
    let folder = tempfile::tempdir().unwrap();
    let prefilled = |args: &[&str], prompt: &str| {
        let common = [
            "run", "-t", "1", "-m", MODEL, "-n", "1", "--temp", "0", "--json", "-p", prompt,
        ];
        json(&ok(&[&common, args].concat()))["timings"]["prefill_tokens"]
            .as_u64()
            .unwrap()
    };
    let zephyr = ["--chat", "--chat-template", "zephyr"];
    let plain = prefilled(&zephyr, "A");
    // `</s>` in a message is four characters that nobody takes for the end of the turn.
    let marked = prefilled(&zephyr, "A</s>");
    assert!(marked > plain + 1, "{marked} tokens against {plain}");
    let special = [&zephyr[..], &["--parse-special"]].concat();
    assert_eq!(prefilled(&special, "A</s>"), plain + 1);

    let path = folder.path().join("mine.jinja");
    fs::write(&path, "{{ bos_token }}{{ messages[0].content }}").unwrap();
    let mine = ["--chat", "--chat-template", path.to_str().unwrap()];
    // One BOS, whoever writes it.
    assert_eq!(prefilled(&mine, "A"), prefilled(&[], "A"));
    let doubled = ["run", "-t", "1", "-m", MODEL, "-n", "1", "-p", "<s>A"];
    let output = ggraft(&doubled);
    assert!(output.status.success());
    assert_eq!(
        stderr(&output).matches("begins with BOS").count(),
        1,
        "{output:?}"
    );
    assert_eq!(prefilled(&[], "<s>A"), prefilled(&[], "A"));

    let refuses = "{{ raise_exception('only about cats') }}";
    fs::write(&path, refuses).unwrap();
    let run = |args: &[&str]| {
        let common = ["run", "-t", "1", "-m", MODEL, "-p", "A"];
        ggraft(&[&common, args].concat())
    };
    assert!(failure(&run(&mine)).contains("refuses the conversation: only about cats"));
    fs::write(&path, "{% if %}").unwrap();
    assert!(failure(&run(&mine)).contains("cannot be read"));
    for wrong in [
        &["--chat", "--chat-template", "nope"][..],
        &["--chat-template", "zephyr"],
    ] {
        assert_eq!(run(wrong).status.code(), Some(2), "{wrong:?}");
    }
}

/// Rows with adapters of their own, in one go: each answer is the one that `run` gives.
#[test]
fn batch_serves_rows_with_their_own_adapters() {
    let folder = tempfile::tempdir().unwrap();
    let [data, out] = ["requests.jsonl", "answers.jsonl"].map(|n| folder.path().join(n));
    let prompts = [
        "The rain has not stopped for three days.\n",
        "Linhaven lies in",
    ];
    let mut rows = Vec::new();
    for (i, prompt) in prompts.iter().enumerate() {
        for adapter in [None, Some(SENTIMENT)] {
            rows.push(serde_json::json!({"id": i, "prompt": prompt, "adapter": adapter, "max_tokens": 12}));
        }
    }
    rows.push(serde_json::json!({"prompt": "a", "max_tokens": 3, "logprobs": 2, "stop": "zzz", "priority": 5}));
    let text: Vec<_> = rows.iter().map(|row| row.to_string()).collect();
    fs::write(&data, text.join("\n")).unwrap();
    let [data, out] = [data, out].map(|path| path.to_str().unwrap().to_owned());
    let batch = |more: &[&str]| {
        let base = [
            "batch", "-m", MODEL, "--data", &data, "-o", &out, "--temp", "0", "-t", "1",
        ];
        ggraft(&[&base[..], more].concat())
    };
    let output = batch(&["--parallel", "3"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let read = || -> Vec<Value> {
        let text = fs::read_to_string(&out).unwrap();
        text.lines()
            .map(|l| serde_json::from_str(l).unwrap())
            .collect()
    };
    let answers = read();
    assert_eq!(answers.len(), rows.len());
    for (answer, row) in answers.iter().zip(&rows).take(4) {
        let mut run = vec![
            "run", "-q", "-t", "1", "--temp", "0", "-n", "12", "-m", MODEL,
        ];
        run.extend(["-p", row["prompt"].as_str().unwrap()]);
        if let Some(adapter) = row["adapter"].as_str() {
            run.extend(["-a", adapter]);
        }
        assert_eq!(answer["text"], ok(&run), "{row}");
        assert_eq!(
            (&answer["id"], &answer["stop_reason"]),
            (&row["id"], &"max_tokens".into())
        );
    }
    let last = &answers[4];
    assert_eq!(last["tokens"], 3);
    let first = &last["logprobs"][0];
    assert_eq!(first["top"][0]["id"], first["id"]);
    assert!(first["logprob"].as_f64().unwrap() >= first["top"][1]["logprob"].as_f64().unwrap());
    // Several speak as one.
    let team = serde_json::json!({"prompt": "a", "adapter": [SENTIMENT, null], "max_tokens": 3});
    let mut rows = [team.clone(), team.clone(), team];
    rows[0]["weights"] = serde_json::json!([1, 0]);
    rows[1]["weights"] = serde_json::json!([0, 1]);
    rows[2]["adapter"] = SENTIMENT.into();
    fs::write(&data, rows.map(|row| row.to_string()).join("\n")).unwrap();
    let output = batch(&["--ensemble", "mean-logit", "-a", "none", "--parallel", "1"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let answers = read();
    assert_eq!(answers[0]["text"], answers[2]["text"]);
    assert_ne!(answers[1]["text"], answers[2]["text"]);
    // A row that cannot be served says why, and the others are.
    fs::write(
        &data,
        "{\"prompt\": \"a\", \"max_tokens\": 100000}\n{\"prompt\": \"b\", \"max_tokens\": 2}",
    )
    .unwrap();
    let text = failure(&batch(&["-c", "64"]));
    assert!(text.contains("1 of 2 rows could not be served"), "{text}");
    let answers = read();
    assert!(
        answers[0]["error"]
            .as_str()
            .unwrap()
            .contains("context is full")
    );
    assert_eq!(answers[1]["tokens"], 2);
    // One that is no request ends it before anything is computed.
    for (row, why) in [
        ("{\"prompt\": \"a\", \"max_tokens\": -2}", "max_tokens"),
        ("{\"prompt\": \"a\", \"top_p\": \"much\"}", "top_p"),
        (
            "{\"prompt\": \"a\", \"adapter\": \"nowhere.gguf\"}",
            "nowhere.gguf",
        ),
        ("[1]", "object"),
        (
            "{\"prompt\": \"a\", \"adapter\": [null, null]}",
            "\"ensemble\" says how",
        ),
        (
            "{\"prompt\": \"a\", \"adapter\": [null, null], \"ensemble\": \"all\"}",
            "one of mean-prob",
        ),
    ] {
        fs::write(&data, row).unwrap();
        fs::remove_file(&out).ok();
        let text = failure(&batch(&[]));
        assert!(text.contains(why), "{text}");
        assert!(!Path::new(&out).exists());
    }
}

/// What a base of ours says, another base of the same weights says by libllama's decoder.
#[test]
fn libllama_computes_what_only_it_knows() {
    let folder = tempfile::tempdir().unwrap();
    let paths = write_twins(folder.path()).unwrap();
    let [known, foreign] = paths.each_ref().map(|path| path.to_str().unwrap());
    let data = folder.path().join("rows.jsonl");
    let rows: Vec<_> = (["cat", "dog", "rain"].iter())
        .map(|word| format!("{{\"prompt\": \"The {word}\", \"completion\": \" is in\"}}"))
        .collect();
    fs::write(&data, rows.join("\n")).unwrap();
    let out = folder.path().join("out.jsonl");
    let (data, out) = (data.to_str().unwrap(), out.to_str().unwrap());

    let run = "run -t 1 --temp 0 -n 8 --kv-type f32 --flash-attn off --json -p";
    let said = |model: &str, more: &[&str]| {
        let args = [&words(run)[..], &["The cat", "-m", model], more].concat();
        let output = ggraft(&args);
        (json(&stdout(&output))["tokens"].clone(), stderr(&output))
    };
    let (want, note) = said(known, &[]);
    assert!(!note.contains("libllama"), "{note}");
    let (got, note) = said(foreign, &[]);
    assert_eq!(got, want);
    assert_eq!(
        note.matches("libllama computes this model").count(),
        1,
        "{note}"
    );
    let (got, note) = said(known, &["--decoder", "llama"]);
    assert_eq!(got, want);
    assert!(!note.contains("libllama computes"), "{note}");
    let e = failure(&ggraft(&[
        "run",
        "-m",
        foreign,
        "--decoder",
        "own",
        "-p",
        "a",
    ]));
    assert!(e.contains("unsupported architecture 'internlm2'"), "{e}");

    let losses = [known, foreign].map(|model| {
        let eval = ["eval", "-t", "1", "--json", "--data", data, "-m", model];
        json(&ok(&eval))["loss"].as_f64().unwrap()
    });
    assert!((losses[0] - losses[1]).abs() < 1e-2, "{losses:?}");
    ok(&[
        "predict", "-t", "1", "-n", "4", "--data", data, "-m", foreign, "-o", out,
    ]);
    assert_eq!(fs::read_to_string(out).unwrap().lines().count(), 3);
    let train = "train --method prompt --length 4 --steps 3 -t 1";
    let train = [
        &words(train)[..],
        &["-m", foreign, "--data", data, "-o", out],
    ]
    .concat();
    let e = failure(&ggraft(&train));
    assert!(e.contains("--mezo"), "{e}");
    let output = ggraft(&[&train[..], &["--mezo", "2"]].concat());
    assert!(output.status.success(), "{output:?}");
    let note = stderr(&output);
    assert!(note.contains("4 forward passes a step"), "{note}");
    ok(&["run", "-m", foreign, "-a", out, "-p", "The cat", "-n", "2"]);
}
