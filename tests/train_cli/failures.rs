//! Runs that cannot begin or end well: one line, and nothing that was there is lost.

use crate::{Place, assert_loads, command, failure, stderr, stdout};
use ggraft_testkit::skipped;
use std::fs;

#[test]
fn data_that_cannot_be_used_is_named() {
    let place = Place::new();
    let row = "{\"prompt\": \"a\", \"completion\": \"b\"}\n";
    place.write(
        "truncated.jsonl",
        format!("{row}\n{row}{{\"prompt\": \"a\n"),
    );
    place.write("array.jsonl", format!("{row}[1]\n"));
    place.write(
        "incomplete.jsonl",
        format!("{row}{row}{{\"prompt\": \"a\"}}\n"),
    );
    place.write("weight.jsonl", "{\"text\": \"a\", \"weight\": -1}\n");
    place.write("latin1.jsonl", b"{\"text\": \"\xe9\"}\n");
    place.write("chat.jsonl", format!("{row}{}\n", r#"{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}"#));
    place.write("empty.jsonl", "\n\n");
    place.write("out.gguf", "precious");
    fs::create_dir(place.path("folder")).unwrap();
    for (line, expected) in [
        ("--data @truncated.jsonl", "truncated.jsonl:4: "),
        ("--data @array.jsonl", "array.jsonl:2: "),
        ("--data @incomplete.jsonl", "incomplete.jsonl:3: "),
        ("--data @weight.jsonl", "weight.jsonl:1: "),
        ("--data @latin1.jsonl", "latin1.jsonl:1: "),
        ("--data @chat.jsonl", "chat.jsonl:2: "),
        ("--data @chat.jsonl", "has no chat template"),
        ("--data @empty.jsonl", "no rows"),
        ("--data @folder", "folder: "),
        ("--data @missing.jsonl", "missing.jsonl: "),
        ("--valid @array.jsonl", "array.jsonl:2: "),
        ("--valid @chat.jsonl", "chat.jsonl:2: "),
    ] {
        let text = place.refused(&format!("--method prefix --steps 1 -o @out.gguf {line}"));
        assert!(text.contains(expected), "{line}: {text}");
    }
    assert_eq!(place.read("out.gguf"), b"precious");
    assert!(!place.exists("out.gguf.ckpt"));
}

/// By its file, whatever the library calls it.
#[test]
fn data_that_teaches_nothing_is_named() {
    let place = Place::new();
    let row = |weight: f64| {
        format!("{{\"prompt\": \"a\", \"completion\": \"b\", \"weight\": {weight}}}\n")
    };
    place.write("light.jsonl", row(0.0) + &row(0.0));
    place.write("good.jsonl", row(1.0));
    let line = "--method prefix --length 4 --steps 1 -o @out.gguf";
    for (more, file, expected) in [
        (
            "--data @light.jsonl",
            "light.jsonl",
            "all rows have the weight 0",
        ),
        (
            "--data @good.jsonl --valid @light.jsonl",
            "light.jsonl",
            "all rows have the weight 0",
        ),
        (
            "--data @good.jsonl --max-len 6",
            "good.jsonl",
            "no row has a token to predict",
        ),
    ] {
        let text = place.refused(&format!("{line} {more}"));
        assert!(text.contains(file) && text.contains(expected), "{text}");
    }
    let text = place.misused(&format!("{line} --data @good.jsonl --max-len 4"));
    assert!(text.contains("leaves no room for text"), "{text}");
    let text = place.misused("--method prefix --data - --valid - -o @out.gguf");
    assert!(text.contains("cannot both be standard input"), "{text}");
    assert!(!place.exists("out.gguf"));
}

#[cfg(unix)]
#[test]
fn what_may_not_be_read_or_written_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    fs::create_dir(place.path("closed")).unwrap();
    place.write("secret.jsonl", "{}");
    let set = |name: &str, mode| {
        fs::set_permissions(place.path(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    set("closed", 0o500);
    set("secret.jsonl", 0);
    // For root nothing is closed.
    if fs::write(place.path("closed/probe"), "").is_err() {
        for (line, expected) in [
            ("-o @closed/out.gguf", "closed/out.gguf: "),
            ("-o @out.gguf --plot @closed/loss.svg", "closed/loss.svg: "),
            ("-o @out.gguf --log @closed/log.jsonl", "closed/log.jsonl: "),
            ("-o @out.gguf --data @secret.jsonl", "secret.jsonl: "),
        ] {
            let text = place.refused(&format!("--method prefix --steps 1 {line}"));
            assert!(
                text.contains(expected) && text.contains("denied") && !text.contains(".tmp"),
                "{line}: {text}"
            );
        }
    } else {
        skipped("train where nothing may be written (root may write everywhere)");
    }
    set("closed", 0o700);
}

#[test]
fn outputs_that_are_folders_are_refused() {
    let place = Place::new();
    for name in ["folder", "out.gguf.ckpt", "x.svg"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    for (line, expected) in [
        ("-o @folder", "folder: is a directory"),
        // Where a checkpoint would be written.
        ("-o @out.gguf", "out.gguf.ckpt: is a directory"),
        ("-o @other.gguf --plot @x.svg", "x.svg: is a directory"),
        ("-o @other.gguf --log @folder", "folder: "),
    ] {
        let text = place.refused(&format!("--method prefix --steps 1 {line}"));
        assert!(text.contains(expected), "{line}: {text}");
    }
}

#[test]
fn an_adapter_is_no_model_and_no_checkpoint() {
    let place = Place::new();
    place.trained("--method prompt --length 2 --steps 1 --batch 1 -o @a.gguf");
    let args = place.args("train --method prompt -m @a.gguf --data @train.jsonl -o @b.gguf");
    let text = failure(&command(&args).output().unwrap());
    assert!(
        text.contains("a.gguf: ") && text.contains("'adapter', not a model"),
        "{text}"
    );
    let text = place.refused("--resume @a.gguf -o @b.gguf");
    assert!(text.contains("a.gguf: not a usable checkpoint"), "{text}");
    // An endless device would be read until memory ends.
    #[cfg(unix)]
    assert!(
        place
            .refused("--resume /dev/zero -o @b.gguf")
            .contains("/dev/zero: not a regular file")
    );
    assert!(!place.exists("b.gguf"));
}

#[test]
fn a_run_that_diverges_leaves_the_last_good_adapter() {
    let place = Place::new();
    for method in ["prefix", "prompt"] {
        let text = place.refused(&format!("--method {method} --length 4 --batch 2 --steps 5 --warmup 0 --lr 1e39 -o @{method}.gguf"));
        assert!(text.contains("step 2: the loss is "), "{text}");
        assert!(text.contains("lower learning rate"), "{text}");
        assert!(
            text.ends_with(&format!("{method}.gguf has the last good adapter")),
            "{text}"
        );
        assert_loads(&place.path(&format!("{method}.gguf")));
    }
    // Values beyond half precision are kept in single precision.
    place.trained("--method prefix --length 4 --batch 2 --steps 2 --warmup 0 --clip 0 --schedule constant --lr 1e6 -o @big.gguf");
    assert_loads(&place.path("big.gguf"));
}

#[cfg(target_os = "linux")]
#[test]
fn a_log_that_finds_no_room_does_not_end_the_run() {
    let place = Place::new();
    let line = "--method prompt --length 2 --steps 3 --batch 1 -o @out.gguf";
    let output = place.train(&format!("{line} --log /dev/full"));
    assert!(output.status.success(), "{output:?}");
    let text = stderr(&output);
    // Said once, not in every step.
    assert_eq!(
        text.matches("/dev/full: No space left").count(),
        1,
        "{text}"
    );
    assert_loads(&place.path("out.gguf"));
}

/// The folder of a run disappears under it, as a network drive may.
#[cfg(unix)]
#[test]
fn an_adapter_without_its_folder_is_saved_elsewhere() {
    let place = Place::random();
    for name in ["gone", "spare", "here"] {
        fs::create_dir(place.path(name)).unwrap();
    }
    place.write("here/out.gguf", "precious");
    let line = "--method prompt --length 2 --steps 500 --batch 1 -o @gone/out.gguf --plot @gone/x.svg --log @log.jsonl";
    let mut command = command(&place.train_args(line));
    command
        .env("TMPDIR", place.path("spare"))
        .current_dir(place.path("here"));
    let mut child = crate::Running(command.spawn().unwrap());
    assert!(place.wait_for_steps(&mut child.0, "log.jsonl", 5));
    fs::remove_dir_all(place.path("gone")).unwrap();
    let output = child.end();
    let text = failure(&output);
    assert!(text.contains("gone/out.gguf: No such file"), "{text}");
    assert!(
        text.contains("the adapter is in ") && text.contains("here/2-out.gguf"),
        "{text}"
    );
    assert_loads(&place.path("here/2-out.gguf"));
    assert_eq!(place.read("here/out.gguf"), b"precious");
    assert!(
        stderr(&output).contains("the plot is not there"),
        "{output:?}"
    );
}

#[test]
fn an_adapter_of_another_run_is_kept() {
    let place = Place::random();
    let line = "--method prompt --length 2 --steps 2 --batch 1 -o @out.gguf";
    place.trained(line);
    let first = place.read("out.gguf");
    let text = place.trained(&format!("{line} --seed 7 --checkpoint-every 1"));
    let second = place.read("out.gguf");
    assert_ne!(first, second);
    assert_eq!(place.read("out.gguf.old"), first);
    assert!(text.contains("out.gguf.old: what was there"), "{text}");
    place.trained(&format!("{line} --seed 8"));
    assert_eq!(place.read("out.gguf.old"), first);
    assert_eq!(place.read("out.gguf.old2"), second);
    place.trained(&format!("{line} --seed 9 --overwrite"));
    assert!(!place.exists("out.gguf.old3"));
}

#[test]
fn a_run_that_helps_nothing_says_so() {
    let place = Place::new();
    place.write(
        "text.jsonl",
        r#"{"text": "A cat sat by the door.\nThe dog was happy."}"#,
    );
    let bad =
        "--method prefix --init random --length 4 --batch 1 --warmup 0 --schedule constant --lr 30";
    let output = place.train(&format!("{bad} --steps 4 --valid @text.jsonl -o @a.gguf"));
    let text = stderr(&output);
    assert!(
        text.contains("validation loss of the model alone: "),
        "{text}"
    );
    assert!(text.contains("no better than the model alone ("), "{text}");
    assert!(stdout(&output).contains("model alone  "), "{output:?}");
    // And a run that is of use does not.
    let good = "--method prompt --length 4 --batch 2 --steps 45";
    for valid in ["--valid @train.jsonl.copy", ""] {
        fs::copy(place.path("train.jsonl"), place.path("train.jsonl.copy")).unwrap();
        let text = stderr(&place.train(&format!("{good} {valid} -o @c.gguf --overwrite")));
        assert!(
            !text.contains("no better") && !text.contains(WORSE),
            "{text}"
        );
    }
    // What was learned is lost again.
    let worse = "--method prompt --init adapter:@c.gguf --batch 1 --warmup 0 --clip 0 --optimizer sgd --lr 1000";
    let output = place.train(&format!(
        "{worse} --schedule constant --steps 45 -o @d.gguf"
    ));
    assert!(stderr(&output).contains(WORSE), "{output:?}");
}

/// Of a run without validation rows.
const WORSE: &str = "predicts the rows of the first step worse than the start of this run did (";

#[test]
fn a_run_that_diverges_says_so_however_short_it_is() {
    let place = Place::new();
    place.take_rows("persona_pirate", "train", 20);
    let line = "--method prefix --length 4 --batch 2 --lr 30 --warmup 0 -o @a.gguf --overwrite";
    for steps in [1, 10, 24, 40] {
        let output = place.train(&format!("{line} --steps {steps} --keep-checkpoint"));
        assert!(output.status.success(), "{output:?}");
        assert!(stderr(&output).contains(WORSE), "{steps}: {output:?}");
    }
    // Its first part has left no log.
    let output = place.train("--resume @a.gguf.ckpt --steps 42 -o @a.gguf");
    assert!(stderr(&output).contains(WORSE), "{output:?}");
}

/// Rows differ more than a few steps change.
#[test]
fn a_short_run_over_rows_that_differ_is_no_bad_one() {
    let place = Place::new();
    let mut risen = 0;
    for task in ["persona_pirate", "sentiment"] {
        place.take_rows(task, "train", 20);
        for (steps, batch, seed) in [(5, 1, 1), (5, 2, 1), (12, 1, 1), (8, 1, 3), (30, 1, 2)] {
            let output = place.train(&format!(
                "--method prompt --steps {steps} --batch {batch} --seed {seed} -o @a.gguf --overwrite"
            ));
            let summary = stdout(&output);
            let (_, losses) = summary.split_once("training loss    ").unwrap();
            let (losses, _) = losses.split_once('\n').unwrap();
            let (first, last) = losses.split_once(" -> ").unwrap();
            risen += i32::from(last.parse::<f64>().unwrap() > first.parse().unwrap());
            assert!(!stderr(&output).contains(WORSE), "{steps}: {output:?}");
        }
    }
    assert!(risen > 0, "there was nothing to be mistaken about");
}

/// A step of many batches takes long enough for the folder to disappear within the second one, which fails.
#[cfg(unix)]
#[test]
fn the_last_good_adapter_is_saved_elsewhere_or_said_to_be_lost() {
    let place = Place::random();
    let line = "--method prompt --length 2 --steps 5 --batch 1 --accum 1000 --warmup 0 --lr 1e39 -o @gone/out.gguf --log @log.jsonl";
    for (kept, fate) in [
        (true, "here/out.gguf instead"),
        (false, "the last good adapter could not be saved elsewhere"),
    ] {
        for name in ["gone", "here"] {
            fs::create_dir_all(place.path(name)).unwrap();
        }
        let mut command = command(&place.train_args(line));
        command
            .env("TMPDIR", place.path("nowhere"))
            .current_dir(place.path("here"));
        let mut child = crate::Running(command.spawn().unwrap());
        assert!(place.wait_for_steps(&mut child.0, "log.jsonl", 1));
        fs::remove_dir_all(place.path("gone")).unwrap();
        if !kept {
            fs::remove_dir_all(place.path("here")).unwrap();
        }
        let text = failure(&child.end());
        assert!(text.contains("step 2: the loss is "), "{text}");
        assert!(text.contains("gone/out.gguf: No such file"), "{text}");
        assert!(text.ends_with(fate), "{text}");
        // The temporary file is nobody's concern.
        assert!(!text.contains(".tmp"), "{text}");
        if kept {
            assert!(text.contains("the last good adapter is in "), "{text}");
            assert_loads(&place.path("here/out.gguf"));
            fs::remove_dir_all(place.path("here")).unwrap();
        }
        fs::remove_file(place.path("log.jsonl")).unwrap();
    }
}

/// There is room for the adapter, but not for the checkpoint.
#[cfg(unix)]
#[test]
fn a_checkpoint_of_the_end_that_does_not_fit_hides_nothing() {
    let place = Place::random();
    let mut shell = std::process::Command::new("sh");
    let script = "ulimit -f 200; exec \"$0\" \"$@\"";
    let line = "--method p-tuning --length 2 --hidden 400 --steps 2 --batch 1 -o @out.gguf --keep-checkpoint";
    shell.args(["-c", script, env!("CARGO_BIN_EXE_ggraft")]);
    shell.args(place.train_args(line)).env_remove("RUST_LOG");
    let output = shell.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = stderr(&output);
    let last = text.lines().last().unwrap();
    assert!(
        last.starts_with("error: ") && last.contains("out.gguf.ckpt: File too large"),
        "{text}"
    );
    assert!(last.ends_with("out.gguf has the adapter"), "{text}");
    let summary = String::from_utf8(output.stdout).unwrap();
    assert!(summary.contains("\nuse it "), "{summary}");
    assert_loads(&place.path("out.gguf"));
    assert!(!place.exists("out.gguf.ckpt"));
}

/// Files cannot grow beyond a limit, as on a full disk.
#[cfg(unix)]
#[test]
fn an_adapter_that_does_not_fit_leaves_the_old_one() {
    let place = Place::new();
    let limited = |line: &str| {
        let mut shell = std::process::Command::new("sh");
        // A prefix of 20 virtual tokens has 80 KiB, its checkpoint four times as much; blocks have 512 or 1024 bytes.
        let script = "ulimit -f 40; exec \"$0\" \"$@\"";
        shell.args(["-c", script, env!("CARGO_BIN_EXE_ggraft")]);
        shell.args(place.train_args(line)).env_remove("RUST_LOG");
        failure(&shell.output().unwrap())
    };
    place.write("out.gguf", "precious");
    let line = "--method prefix --batch 1 --steps 3 -o @out.gguf";
    let before = place.names();
    let text = limited(line);
    assert!(
        text.contains("out.gguf: ") && text.contains("too large"),
        "{text}"
    );
    // It is known before the first step.
    let text = limited(&format!("{line} --log @log.jsonl"));
    assert!(text.contains("out.gguf: "), "{text}");
    assert_eq!(place.lines("log.jsonl"), 0);
    let _ = fs::remove_file(place.path("log.jsonl"));
    assert_eq!(place.read("out.gguf"), b"precious");
    assert_eq!(place.names(), before);
}
