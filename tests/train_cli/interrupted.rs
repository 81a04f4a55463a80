//! Ctrl-C.

use crate::{Place, assert_loads, error_line, in_shell};
use std::process::{Child, Command, Output};
use std::time::Duration;

const SAVES: &str = "-o @out.gguf --log @log.jsonl --plot @loss.svg";

fn interrupt(child: &Child) {
    signal(child, "-INT");
}

fn signal(child: &Child, signal: &str) {
    let id = child.id().to_string();
    assert!(
        Command::new("kill")
            .args([signal, &id])
            .status()
            .unwrap()
            .success()
    );
}

/// The command of the message, as a shell runs it.
fn go_on(output: &Output) -> Output {
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let line = error_line(output);
    let (_, line) = line
        .split_once("go on with: ")
        .unwrap_or_else(|| panic!("{line}"));
    in_shell(line)
}

fn steps(output: &Output) -> usize {
    let line = error_line(output);
    let (_, rest) = line.split_once("interrupted after step ").unwrap();
    rest.split(';').next().unwrap().parse().unwrap()
}

#[test]
fn ctrl_c_saves_and_says_how_to_go_on() {
    let place = Place::random();
    for method in [
        "prefix --length 5 --valid @valid.jsonl --eval-every 9",
        "p-tuning --hidden 16",
    ] {
        let line = format!("--method {method} --steps 150 --batch 2 --checkpoint-every 40 {SAVES}");
        place.trained(&line);
        let (adapter, log) = (place.read("out.gguf"), place.log_without_times("log.jsonl"));
        loop {
            for name in ["out.gguf", "log.jsonl", "loss.svg"] {
                std::fs::remove_file(place.path(name)).unwrap();
            }
            let mut child = place.spawn(&line);
            place.wait_for_steps(&mut child.0, "log.jsonl", 10);
            interrupt(&child.0);
            let output = child.end();
            if output.status.success() {
                // It was faster.
                continue;
            }
            assert_eq!(output.status.code(), Some(130), "{output:?}");
            let done = steps(&output);
            assert!((10..150).contains(&done));
            assert!((done - 1..=done).contains(&place.lines("log.jsonl")));
            assert_loads(&place.path("out.gguf"));
            assert!(place.exists("out.gguf.ckpt") && place.exists("loss.svg"));
            let end = go_on(&output);
            assert!(end.status.success(), "{end:?}");
            break;
        }
        assert_eq!(place.read("out.gguf"), adapter);
        assert_eq!(place.log_without_times("log.jsonl"), log);
        assert!(!place.exists("out.gguf.ckpt"));
    }
}

#[test]
fn other_polite_signals_are_ctrl_c() {
    let place = Place::random();
    for name in ["-TERM", "-HUP", "-XCPU"] {
        let mut child = place.spawn(&format!(
            "--method prompt --steps 100000 --batch 1 --overwrite {SAVES}"
        ));
        assert!(place.wait_for_steps(&mut child.0, "log.jsonl", 5));
        signal(&child.0, name);
        let output = child.end();
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        assert!(steps(&output) >= 5);
        assert_loads(&place.path("out.gguf"));
        for name in ["out.gguf.ckpt", "log.jsonl"] {
            std::fs::remove_file(place.path(name)).unwrap();
        }
    }
}

#[test]
fn what_a_stopped_run_replaces_is_kept() {
    let place = Place::random();
    place.trained("--method prompt --length 2 --steps 2 --batch 1 -o @out.gguf");
    let first = place.read("out.gguf");
    let line = format!("--method prompt --length 2 --steps 100000 --batch 1 --seed 7 {SAVES}");
    let mut child = place.spawn(&line);
    assert!(place.wait_for_steps(&mut child.0, "log.jsonl", 5));
    assert!(!place.exists("out.gguf.old"), "before there is a new one");
    signal(&child.0, "-TERM");
    let output = child.end();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let text = crate::stderr(&output);
    assert!(text.contains("was there before and is now "), "{text}");
    assert_eq!(place.read("out.gguf.old"), first);
    assert_ne!(place.read("out.gguf"), first);
    assert_loads(&place.path("out.gguf"));
}

/// As `timeout` sends them: to the process, and to its group.
#[test]
fn signals_that_come_together_are_one() {
    let place = Place::random();
    let line = format!("--method prompt --steps 100000 --batch 1 {SAVES}");
    let mut child = place.spawn(&line);
    assert!(place.wait_for_steps(&mut child.0, "log.jsonl", 5));
    for _ in 0..3 {
        signal(&child.0, "-TERM");
    }
    let output = child.end();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    assert!(steps(&output) >= 5);
    assert_loads(&place.path("out.gguf"));
    assert!(place.exists("out.gguf.ckpt"));
}

/// As `nohup` and a shell's `&` have it.
#[test]
fn signals_that_were_ignored_stay_ignored() {
    let place = Place::random();
    let line = format!("--method prompt --steps 100000 --batch 1 {SAVES}");
    let script = "trap '' HUP INT; exec \"$0\" \"$@\"";
    let mut args = vec!["-c".to_owned(), script.to_owned()];
    args.push(env!("CARGO_BIN_EXE_ggraft").to_owned());
    args.extend(place.train_args(&line));
    let shell = ggraft_testkit::command::command("sh", &args).spawn();
    let mut child = crate::Running(shell.unwrap());
    assert!(place.wait_for_steps(&mut child.0, "log.jsonl", 5));
    for name in ["-HUP", "-INT"] {
        signal(&child.0, name);
        let done = place.lines("log.jsonl");
        assert!(
            place.wait_for_steps(&mut child.0, "log.jsonl", done + 20),
            "{name} ended it"
        );
    }
    signal(&child.0, "-TERM");
    assert_eq!(child.end().status.code(), Some(130));
    assert_loads(&place.path("out.gguf"));
}

/// There is room for the adapter, but not for the checkpoint.
#[test]
fn an_adapter_is_saved_without_room_for_its_checkpoint() {
    let place = Place::random();
    // The optimizer of 100 tokens fits into no 100 KiB (of 512 bytes or 1024), the adapter does.
    let script = "ulimit -f 200; exec \"$0\" \"$@\"";
    let line = "--method p-tuning --length 2 --hidden 400 --steps 100000 --batch 1 -o @out.gguf --plot @loss.svg";
    let mut args = vec!["-c".to_owned(), script.to_owned()];
    args.push(env!("CARGO_BIN_EXE_ggraft").to_owned());
    args.extend(place.train_args(line));
    let mut shell = ggraft_testkit::command::command("sh", &args);
    let child = crate::Running(shell.spawn().unwrap());
    std::thread::sleep(Duration::from_millis(1500));
    interrupt(&child.0);
    let output = child.end();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let text = crate::stderr(&output);
    assert!(text.contains("no room for a checkpoint"), "{text}");
    assert!(
        text.contains("out.gguf has the adapter; the run cannot go on"),
        "{text}"
    );
    assert_loads(&place.path("out.gguf"));
    assert!(!place.exists("out.gguf.ckpt"));
}

/// A run with evaluations that take far longer than its steps.
const SLOW: &str = "--method prefix --length 5 --valid @valid.jsonl --steps 4 --batch 1";

fn with_long_evaluations() -> Place {
    let place = Place::random();
    let words = "word ".repeat(40);
    let row = |i: i32| format!("{{\"prompt\": \"{i}\", \"completion\": \"{words}\"}}\n");
    place.write("valid.jsonl", (0..100).map(row).collect::<String>());
    place
}

/// Interrupts a new run in the evaluation of step `n`, the first one that is evaluated.
fn interrupt_evaluation(place: &Place, line: &str, n: usize) -> Output {
    // Later, until it is late enough.
    for delay in (10..).step_by(20) {
        for name in ["out.gguf", "log.jsonl", "out.gguf.ckpt"] {
            let _ = std::fs::remove_file(place.path(name));
        }
        let mut child = place.spawn(line);
        while !place.exists("log.jsonl") || place.lines("log.jsonl") + 1 < n {
            assert!(child.0.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(delay));
        interrupt(&child.0);
        let output = child.end();
        let early = crate::stderr(&output).contains("before the first step");
        if !early && steps(&output) == n {
            assert_eq!(
                place.lines("log.jsonl"),
                n - 1,
                "the evaluation was not interrupted"
            );
            return output;
        }
    }
    unreachable!("it always gets there")
}

#[test]
fn ctrl_c_ends_an_evaluation() {
    let place = with_long_evaluations();
    let line = format!("{SLOW} --eval-every 2 {SAVES}");
    place.trained(&line);
    let (adapter, log) = (place.read("out.gguf"), place.log_without_times("log.jsonl"));
    let end = go_on(&interrupt_evaluation(&place, &line, 2));
    assert!(end.status.success(), "{end:?}");
    let progress = crate::stderr(&end);
    assert!(
        progress.starts_with("step 2/4: ") && !progress.contains(" h "),
        "{progress}"
    );
    assert_eq!(place.read("out.gguf"), adapter);
    assert_eq!(place.log_without_times("log.jsonl"), log);
}

#[test]
fn an_interrupted_run_is_interrupted_again() {
    let place = with_long_evaluations();
    let line = format!("{SLOW} --eval-every 1 {SAVES}");
    place.trained(&line);
    let (adapter, log) = (place.read("out.gguf"), place.log_without_times("log.jsonl"));
    let mut output = interrupt_evaluation(&place, &line, 1);
    // At whatever moment, and as often as it takes.
    for delay in [20, 50, 100, 200, 300] {
        assert_eq!(output.status.code(), Some(130), "{output:?}");
        let mut again = place.spawn(&format!(
            "--valid @valid.jsonl --resume @out.gguf.ckpt {SAVES}"
        ));
        std::thread::sleep(Duration::from_millis(delay));
        if again.0.try_wait().unwrap().is_some() {
            break;
        }
        interrupt(&again.0);
        let end = again.end();
        match end.status.code() {
            Some(130) => output = end,
            Some(0) => break,
            // There was no handler yet.
            None => {}
            Some(_) => panic!("{end:?}"),
        }
    }
    if place.exists("out.gguf.ckpt") {
        let end = go_on(&output);
        assert!(end.status.success(), "{end:?}");
    }
    assert_eq!(place.read("out.gguf"), adapter);
    assert_eq!(place.log_without_times("log.jsonl"), log);
}

/// Ticks of the processor that a process has used.
#[cfg(target_os = "linux")]
fn processor_time(id: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let (_, fields) = stat.rsplit_once(')').unwrap();
    let ticks = |i: usize| -> u64 { fields.split_whitespace().nth(i).unwrap().parse().unwrap() };
    // Fields 14 and 15, counted from 1; the first one here is the third.
    ticks(11) + ticks(12)
}

#[cfg(target_os = "linux")]
#[test]
fn a_second_ctrl_c_quits_at_once() {
    let place = Place::random();
    // Nobody reads the log: when the pipe is full, the run stands still within a step and cannot end in order.
    let mut child = place.spawn(
        "--method prompt --length 2 --steps 100000 --batch 1 -o @out.gguf --log /dev/stdout",
    );
    let (mut last, mut same) = (0, 0);
    while last == 0 || same < 10 {
        std::thread::sleep(Duration::from_millis(20));
        let now = processor_time(child.0.id());
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    interrupt(&child.0);
    // `timeout` sends the same wish twice.
    std::thread::sleep(Duration::from_millis(20));
    interrupt(&child.0);
    std::thread::sleep(Duration::from_millis(1200));
    assert!(
        child.0.try_wait().unwrap().is_none(),
        "the first one ended it, or the one that came with it"
    );
    interrupt(&child.0);
    assert_eq!(child.0.wait().unwrap().code(), Some(130));
    assert!(!place.exists("out.gguf") && !place.exists("out.gguf.ckpt"));
}
