//! Runs that are killed, and what comes of their checkpoints.

use crate::{Place, assert_loads, failure, numbers, stderr};
use ggraft::file::types::GgmlType;
use ggraft_testkit::fixture::{FixtureSpec, Variant, write_fixture};
use std::fs;
use std::time::{Duration, Instant};

const SAVES: &str = "-o @out.gguf --log @log.jsonl --plot @loss.svg";

/// Removes what a run leaves.
fn clean(place: &Place) {
    for name in ["out.gguf", "out.gguf.ckpt", "log.jsonl", "loss.svg"] {
        let _ = fs::remove_file(place.path(name));
    }
}

/// Kills a run when it has taken `n` steps; false if it was faster.
fn kill_after(place: &Place, line: &str, n: usize) -> bool {
    clean(place);
    let mut child = place.spawn(line);
    let killed = place.wait_for_steps(&mut child.0, "log.jsonl", n) && child.0.kill().is_ok();
    let output = child.end();
    killed && !output.status.success()
}

#[test]
fn a_resumed_run_equals_the_uninterrupted_one() {
    let place = Place::random();
    for (method, data) in [
        // The best step is kept, which comes early.
        (
            "--method prefix --length 5 --lr 0.3 --eval-every 4",
            "--valid @valid.jsonl",
        ),
        ("--method prefix --length 5 --reparam mlp --hidden 16", ""),
        (
            "--method prompt --optimizer adafactor --schedule cosine",
            "--valid @valid.jsonl",
        ),
        ("--method prompt --optimizer sgd --accum 2", ""),
        (
            "--method p-tuning --hidden 16 --template {v:2}{prompt}{v:2}",
            "--valid @valid.jsonl",
        ),
        ("--method p-tuning --reparam lstm --hidden 8", ""),
        (
            "--method prefix --loss distill:@valid.jsonl --freeze-first 1",
            "",
        ),
    ] {
        let new = format!("{method} {data} --steps 60 --batch 2 {SAVES}");
        clean(&place);
        place.trained(&new);
        let (adapter, log) = (place.read("out.gguf"), place.log_without_times("log.jsonl"));

        let every = format!("{new} --checkpoint-every 7");
        while !kill_after(&place, &every, 17) {}
        assert_loads(&place.path("out.gguf"));
        assert_ne!(place.read("out.gguf"), adapter, "{method}");
        let resume = format!("{data} --resume @out.gguf.ckpt {SAVES}");
        let summary = place.trained(&resume);
        assert!(summary.starts_with("steps            60\n"), "{summary}");
        assert_eq!(place.log_without_times("log.jsonl"), log, "{method}");
        assert_eq!(place.read("out.gguf"), adapter, "{method}");
        // It has done its service.
        assert!(!place.exists("out.gguf.ckpt"));
    }
}

#[test]
fn a_checkpoint_of_another_file_is_kept() {
    let place = Place::random();
    let new = format!("--method prompt --steps 60 --batch 2 --checkpoint-every 5 {SAVES}");
    while !kill_after(&place, &new, 12) {}
    fs::rename(place.path("out.gguf.ckpt"), place.path("saved.ckpt")).unwrap();
    let saved = place.read("saved.ckpt");
    place.trained("--resume @saved.ckpt -o @a.gguf");
    // As often as one likes.
    place.trained("--resume @saved.ckpt -o @b.gguf");
    assert_eq!(place.read("saved.ckpt"), saved);
    assert!(!place.exists("a.gguf.ckpt"));

    // A run in place of the interrupted one says what it is about to replace.
    fs::rename(place.path("saved.ckpt"), place.path("out.gguf.ckpt")).unwrap();
    let output = place.train("--method prompt --steps 1 -o @out.gguf");
    assert!(
        stderr(&output).contains("--resume would continue"),
        "{output:?}"
    );
    assert_eq!(place.read("out.gguf.ckpt"), saved);
}

#[test]
fn what_is_no_checkpoint_of_this_run_is_refused() {
    let place = Place::random();
    let new = format!(
        "--method prefix --length 5 --valid @valid.jsonl --steps 60 --batch 2 --checkpoint-every 5 {SAVES}"
    );
    while !kill_after(&place, &new, 12) {}
    let good = place.read("out.gguf.ckpt");
    place.write("out.gguf", "precious");
    let log = place.read("log.jsonl");
    let refused = |line: &str| {
        let valid = if line.contains("--valid") {
            ""
        } else {
            "--valid @valid.jsonl"
        };
        let text = place.refused(&format!("{valid} {SAVES} {line}"));
        assert_eq!(place.read("out.gguf"), b"precious", "{line}");
        assert_eq!(place.read("log.jsonl"), log, "{line}");
        text
    };

    let damaged = |bytes: &[u8]| {
        place.write("bad.ckpt", bytes);
        let text = refused("--resume @bad.ckpt");
        assert!(
            text.contains("bad.ckpt: not a usable checkpoint: "),
            "{text}"
        );
        assert_eq!(place.read("bad.ckpt"), bytes);
        text
    };
    damaged(b"");
    damaged(&[0; 100]);
    damaged(&place.read("model.gguf"));
    for n in [1, 8, 9, 100, good.len() / 2, good.len() - 1] {
        damaged(&good[..n]);
    }
    damaged(&[&good[..], b"x"].concat());
    // A bit anywhere.
    let header = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let places = numbers(1)
        .take(20)
        .map(|x| (x * good.len() as f64) as usize);
    for at in places.chain([0, 7, 8, 30, header - 40, header, good.len() - 1]) {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 7);
        // Spaces fill the header up.
        if good[at] != b' ' || at > header {
            damaged(&bytes);
        }
    }

    // Another run's.
    place.take_rows("facts_county", "train", 6);
    let text = refused("--resume @out.gguf.ckpt");
    assert!(text.contains("made with other training data"), "{text}");
    place.take_rows("facts_trade", "train", 6);
    let text = refused("--resume @out.gguf.ckpt --valid @train.jsonl");
    assert!(
        text.contains("is read by this command") || text.contains("other validation data"),
        "{text}"
    );
    let line = format!("--resume @out.gguf.ckpt {SAVES}");
    let text = place.refused(&line);
    assert!(text.contains("other validation data"), "{text}");
    let other = Place::new();
    let args = other.args("train -m @@");
    let mut command = crate::command(&args);
    command.args(
        place.args("--data @train.jsonl --valid @valid.jsonl --resume @out.gguf.ckpt -o @out.gguf"),
    );
    let text = failure(&command.output().unwrap());
    assert!(text.contains("made with another base model"), "{text}");
    assert!(
        refused("--resume @missing.ckpt").contains("missing.ckpt: there is no such checkpoint")
    );

    // It was not touched, and still good.
    assert_eq!(place.read("out.gguf.ckpt"), good);
    place.trained(&format!(
        "--valid @valid.jsonl {SAVES} --resume @out.gguf.ckpt"
    ));
}

#[test]
fn a_checkpoint_that_is_missing_is_reported_as_missing() {
    let place = Place::random();
    let text = place.refused("--resume @out.gguf.ckpt -o @out.gguf");
    assert!(
        text.contains("out.gguf.ckpt: there is no such checkpoint"),
        "{text}"
    );
}

#[test]
fn weights_of_another_type_do_not_go_on() {
    let mut place = Place::random();
    place.trained("--method prompt --steps 2 --batch 1 -o @out.gguf --keep-checkpoint");
    let resume = "--steps 4 --resume @out.gguf.ckpt -o @new.gguf";
    place.model = place.path("other.gguf");
    let spec = FixtureSpec::new(Variant::Llama, GgmlType::Q8_0);
    write_fixture(&place.model, &spec).unwrap();
    let text = place.refused(resume);
    assert!(
        text.contains("whose weights are rounded differently"),
        "{text}"
    );
    place.model = place.path("model.gguf");
    place.trained(resume);
}

#[test]
fn a_run_that_is_over_is_given_more_steps() {
    let place = Place::random();
    let new = "--method prefix --length 5 --batch 2 --schedule constant --warmup 0 --weight-decay 0 --init random";
    place.trained(&format!(
        "{new} --steps 30 -o @whole.gguf --log @whole.jsonl"
    ));
    place.trained(&format!(
        "{new} --steps 10 -o @out.gguf --log @log.jsonl --keep-checkpoint"
    ));
    assert!(place.exists("out.gguf.ckpt"));
    // Without more steps it is over.
    let resume = "-o @out.gguf --log @log.jsonl --resume @out.gguf.ckpt";
    let checkpoint = place.read("out.gguf.ckpt");
    let text = place.misused(resume);
    assert!(
        text.contains("finished after 10 steps: --steps N"),
        "{text}"
    );
    assert_eq!(place.read("out.gguf.ckpt"), checkpoint);
    let text = place.misused(&format!("{resume} --steps 10"));
    assert!(
        text.contains("steps is 10: the run has taken as many"),
        "{text}"
    );
    place.trained(&format!("{resume} --steps 30"));
    // The same run: the optimizer knew its gradients, the order of the rows went on.
    assert_eq!(
        place.log_without_times("log.jsonl")[10..],
        place.log_without_times("whole.jsonl")[10..]
    );
    let values = |name: &str| {
        crate::ok(&place.args(&format!("inspect @{name} --json")));
        ggraft::Adapter::load(&place.path(name))
            .unwrap()
            .payload()
            .clone()
    };
    assert_eq!(values("out.gguf"), values("whole.gguf"));
}

#[test]
fn checkpoints_are_saved_by_the_clock() {
    let place = Place::random();
    let line = format!("--method prompt --steps 1000000 --batch 1 --checkpoint-every 1s {SAVES}");
    let mut child = place.spawn(&line);
    let begin = Instant::now();
    while !place.exists("out.gguf.ckpt") {
        assert!(child.0.try_wait().unwrap().is_none());
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(begin.elapsed() >= Duration::from_secs(1));
    assert_loads(&place.path("out.gguf"));
}

#[test]
fn a_run_that_is_killed_at_any_moment_goes_on() {
    const KILLS: usize = 20;
    let place = Place::random();
    let data = "--valid @valid.jsonl";
    let new = format!(
        "--method p-tuning --hidden 32 {data} --steps 150 --eval-every 10 --batch 2 {SAVES}"
    );
    let start = Instant::now();
    place.trained(&new);
    let whole = start.elapsed();
    let (adapter, log) = (place.read("out.gguf"), place.log_without_times("log.jsonl"));
    clean(&place);

    let mut delays = numbers(7);
    let (mut kills, mut resumed, mut lives) = (0, 0, 0);
    loop {
        lives += 1;
        let goes_on = place.exists("out.gguf.ckpt");
        let options = match goes_on {
            true => format!("{data} {SAVES} --resume @out.gguf.ckpt"),
            false => new.clone(),
        };
        let child = &mut place.spawn(&format!("{options} --checkpoint-every 1")).0;
        if kills < KILLS {
            // Some die while they begin, most while they compute and save.
            let share = delays.next().unwrap();
            std::thread::sleep(Duration::from_secs_f64(share * whole.as_secs_f64() / 4.0));
            child.kill().unwrap();
        }
        let status = child.wait().unwrap();
        for name in ["out.gguf"].into_iter().filter(|name| place.exists(name)) {
            assert_loads(&place.path(name));
        }
        if status.code().is_none() {
            kills += 1;
            resumed += usize::from(goes_on);
            continue;
        }
        assert!(status.success(), "life {lives}: {status}");
        assert_eq!(place.read("out.gguf"), adapter);
        assert_eq!(place.log_without_times("log.jsonl"), log);
        if kills == KILLS {
            break;
        }
        clean(&place);
    }
    assert!(resumed > 5, "{resumed} of {lives} lives had a checkpoint");
    // A file that was being written stays behind when its writer is killed: the next one of the same name takes it away.
    let stale: Vec<_> = place
        .names()
        .into_iter()
        .filter(|n| n.ends_with(".tmp"))
        .collect();
    assert!(stale.len() <= 3, "{stale:?}");
}
