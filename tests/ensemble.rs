//! Adapters that speak as one, from the command line: what `--ensemble` says, how weights are fitted, how members are trained.

use ggraft::infer::engine::EngineOptions;
use ggraft::infer::{CancelToken, Combine, Ensemble, Sample};
use ggraft::{Adapter, Model, ModelOptions, SessionOptions};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::Output;

const MODEL: &str = "models/tinylm-q8_0.gguf";
const PIRATE: &str = "models/adapters/pirate.gguf";
const BUTLER: &str = "models/adapters/butler.gguf";
const METHODS: [&str; 4] = ["mean-prob", "mean-logit", "vote", "product"];

fn ggraft(line: &str) -> Output {
    let args: Vec<&str> = line.split_whitespace().collect();
    ggraft_testkit::command::command(env!("CARGO_BIN_EXE_ggraft"), &args)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap()
}

/// What stdout says of a command that must succeed.
#[track_caller]
fn ok(line: &str) -> String {
    let output = ggraft(line);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn json_of(line: &str) -> Value {
    serde_json::from_str(&ok(line)).unwrap()
}

/// The one line of stderr of a command that must fail with this status.
#[track_caller]
fn fails(line: &str, status: i32) -> String {
    let output = ggraft(line);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{line}: {text}");
    text
}

/// The first rows of both personas' tests.
fn rows(folder: &Path, n: usize) -> String {
    let mut text = String::new();
    for task in ["persona_pirate", "persona_butler"] {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path = root.join(format!("models/tasks/{task}/test.jsonl"));
        let all = fs::read_to_string(path).unwrap();
        text.extend(all.lines().take(n).map(|line| format!("{line}\n")));
    }
    assert_eq!(text.lines().count(), 2 * n);
    let path = folder.join("rows.jsonl");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn near(value: &Value, want: f64) {
    let got = value.as_f64().unwrap();
    assert!(
        (got - want).abs() < 1e-4 * want.abs().max(1.0),
        "{got}, not {want}"
    );
}

#[test]
fn whoever_has_all_the_weight_speaks() {
    let run = "run -q -t 1 --temp 0 -n 24 --kernels own -p Yesterday -m";
    let alone = [PIRATE, BUTLER].map(|a| ok(&format!("{run} {MODEL} -a {a}")));
    let base = ok(&format!("{run} {MODEL}"));
    assert!(alone[0] != alone[1] && base != alone[0] && base != alone[1]);
    for method in METHODS {
        let say = |weights: &str| {
            let both = format!("-a {PIRATE} -a {BUTLER} -a none --ensemble {method}");
            ok(&format!("{run} {MODEL} {both} {weights}"))
        };
        assert_eq!(say("--weights 2,0,0"), alone[0], "{method}");
        assert_eq!(say("--weights 0,0.5,0"), alone[1], "{method}");
        assert_eq!(say("--weights 0,0,1"), base, "{method}");
        // Of three that are worth the same nobody has it all.
        assert!(!say("").is_empty());
    }
    // A power of one's own probabilities does not change which is the largest.
    let sure = format!("-a {PIRATE} --ensemble product --weights 3");
    assert_eq!(ok(&format!("{run} {MODEL} {sure}")), alone[0]);
    let both = format!("-a {PIRATE} -a {BUTLER} --ensemble product");
    let object = json_of(&format!("{run} {MODEL} --json {both}"));
    assert_eq!(object["tokens"].as_array().unwrap().len(), 24);
    assert_eq!(object["stop_reason"], "max_tokens");
    let timings = &object["timings"];
    assert_eq!(timings["decode_tokens"], 23);
    // Each member reads the prompt.
    let prefill = timings["prefill_tokens"].as_u64().unwrap();
    assert!(prefill > 0 && prefill.is_multiple_of(2), "{timings}");
    // A full context is an error, with what was written until then.
    let endless = "run -q -t 1 --temp 0 -n -1 -c 32 --json -p Yesterday -a none -a none";
    let output = ggraft(&format!("{endless} --ensemble product -m {MODEL}"));
    assert_eq!(output.status.code(), Some(1));
    let object: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(object["stop_reason"], "context_full");
    assert!(object["tokens"].as_array().unwrap().len() > 20, "{object}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("the context is full"), "{text}");
}

#[test]
fn what_is_no_ensemble_is_refused() {
    let run = format!("run -q -m {MODEL} -p a -a {PIRATE}");
    for (more, status, expected) in [
        (format!("-a {BUTLER}"), 2, "--ensemble says how they speak"),
        (
            format!("-a {BUTLER} --ensemble mean"),
            2,
            "one of mean-prob, mean-logit, vote, product",
        ),
        (format!("-a {BUTLER} --weights 1,2"), 2, "--ensemble"),
        (
            format!("-a {BUTLER} --ensemble vote --weights 1"),
            2,
            "1 weights for 2 members",
        ),
        (
            format!("-a {BUTLER} --ensemble vote --weights 1,-2"),
            2,
            "member 2 is -2",
        ),
        (
            format!("-a {BUTLER} --ensemble vote --weights 0,0"),
            2,
            "all weights are 0",
        ),
        (
            format!("-a {BUTLER} --ensemble vote --weights 1,x"),
            2,
            "invalid value 'x'",
        ),
        ("-a /no/such --ensemble vote".to_owned(), 1, "/no/such"),
        (format!("-a {MODEL} --ensemble vote"), 1, MODEL),
    ] {
        let text = fails(&format!("{run} {more}"), status);
        assert!(text.contains(expected), "{more}: {text}");
    }
    let fit = format!("ensemble fit -m {MODEL} -a {PIRATE} -a {BUTLER} --data x.jsonl");
    assert!(fails(&fit, 2).contains("--ensemble says"));
}

#[test]
fn losses_of_members_are_theirs_alone() {
    let folder = tempfile::tempdir().unwrap();
    let data = rows(folder.path(), 6);
    let eval = format!("eval --json -t 1 -m {MODEL} --data {data}");
    let alone = [PIRATE, BUTLER].map(|a| json_of(&format!("{eval} -a {a}")));
    for method in METHODS {
        let both = format!("-a {PIRATE} -a {BUTLER} --ensemble {method}");
        let object = json_of(&format!("{eval} {both}"));
        for (loss, alone) in object["member_losses"]
            .as_array()
            .unwrap()
            .iter()
            .zip(&alone)
        {
            near(loss, alone["loss"].as_f64().unwrap());
        }
        assert_eq!(object["tokens"], alone[0]["tokens"]);
        match method {
            // Nobody votes for what is infinitely unlikely.
            "vote" => assert_eq!(object["loss"], Value::Null),
            "mean-prob" => {
                let mean = alone
                    .iter()
                    .map(|a| a["loss"].as_f64().unwrap())
                    .sum::<f64>()
                    / 2.0;
                assert!(object["loss"].as_f64().unwrap() < mean);
            }
            _ => assert!(object["loss"].is_number()),
        }
    }
    let text = ok(&format!(
        "eval -t 1 -m {MODEL} --data {data} -a {PIRATE} -a {BUTLER} --ensemble mean-prob"
    ));
    assert!(text.contains("\nmembers     "), "{text}");
}

#[test]
fn fitted_weights_predict_best() {
    let folder = tempfile::tempdir().unwrap();
    let data = rows(folder.path(), 6);
    let three = format!("-t 1 -m {MODEL} --data {data} --json -a {PIRATE} -a {BUTLER} -a none");
    for method in ["mean-prob", "mean-logit", "product"] {
        let fit = json_of(&format!("ensemble fit {three} --ensemble {method}"));
        let weights: Vec<f64> = (fit["weights"].as_array().unwrap().iter())
            .map(|w| w.as_f64().unwrap())
            .collect();
        let loss = fit["loss"].as_f64().unwrap();
        assert!(loss < fit["loss_before"].as_f64().unwrap(), "{fit}");
        if method != "product" {
            assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-4, "{fit}");
            // The best member is one of the ensembles that there could be.
            let members = fit["member_losses"].as_array().unwrap().iter();
            assert!(
                members.into_iter().all(|one| loss < one.as_f64().unwrap()),
                "{fit}"
            );
        }
        let eval = |weights: &[f64]| {
            let weights: Vec<_> = weights.iter().map(f64::to_string).collect();
            let weights = weights.join(",");
            let line = format!("eval {three} --ensemble {method} --weights {weights}");
            json_of(&line)["loss"].clone()
        };
        near(&eval(&weights), loss);
        // Nothing beside it is better, but for the prior.
        for i in 0..3 {
            let mut other = weights.clone();
            other[i] += 0.3;
            assert!(
                eval(&other).as_f64().unwrap() > loss - 2e-4,
                "{method} {i}: {fit}"
            );
        }
    }
    let text = fails(&format!("ensemble fit {three} --ensemble vote"), 2);
    assert!(text.contains("a vote has no probabilities"), "{text}");
    let shown = ok(&format!(
        "ensemble fit {} --ensemble mean-prob",
        three.replace("--json ", "")
    ));
    let weights = shown.split("--weights ").nth(1).unwrap().trim();
    assert_eq!(weights.split(',').count(), 3, "{shown}");
}

#[test]
fn nothing_is_fitted_by_nothing() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let model = Model::open(root.join(MODEL), &ModelOptions::default()).unwrap();
    let members = [PIRATE, BUTLER].map(|at| Some(Adapter::load(&root.join(at)).unwrap()));
    let options = EngineOptions::from(&SessionOptions::default().n_threads(1).n_ctx(64));
    let sample = |counts: bool, weight: f32, n: usize| Sample {
        prompt: vec![5; n],
        answer: vec![(7, counts), (8, counts)],
        weight,
    };
    let cancel = CancelToken::default();
    let text = |outcome: ggraft::Result<()>| outcome.unwrap_err().to_string();
    for (samples, expected) in [
        (vec![], "no sample has a token that counts"),
        (vec![sample(false, 1.0, 2)], "no sample has a token"),
        (vec![sample(true, 0.0, 2); 3], "no sample has a token"),
        (vec![sample(true, 1.0, 100)], "the context is full"),
        (
            vec![sample(true, 1.0, 2), sample(true, f32::INFINITY, 2)],
            "the loss of member 1",
        ),
    ] {
        for combine in Combine::ALL {
            let ensemble = Ensemble::new(members.clone(), combine).unwrap();
            let fit = ensemble.fit(&model, &options, &samples, &cancel);
            let why = text(fit.map(drop));
            if combine == Combine::Vote {
                assert!(why.contains("a vote has no probabilities"), "{why}");
            } else {
                assert!(why.contains(expected), "{combine:?}: {why}");
            }
            if samples.len() < 2 {
                let why = text(
                    ensemble
                        .measure(&model, &options, &samples, &cancel)
                        .map(drop),
                );
                assert!(why.contains(expected), "{combine:?}: {why}");
            }
        }
    }
    cancel.cancel();
    let ensemble = Ensemble::new(members, Combine::MeanProb).unwrap();
    let why = text(
        ensemble
            .fit(&model, &options, &[sample(true, 1.0, 2)], &cancel)
            .map(drop),
    );
    assert!(why.contains("cancelled"), "{why}");
}

#[test]
fn predictions_do_not_depend_on_how_many_rows_are_computed_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let data = rows(folder.path(), 5);
    let predict = |parallel: usize, more: &str| {
        let out = folder.path().join(format!("out-{parallel}.jsonl"));
        let at = out.display();
        ok(&format!(
            "predict -t 1 -n 12 -m {MODEL} --data {data} -o {at} --parallel {parallel} {more}"
        ));
        fs::read_to_string(out).unwrap()
    };
    for more in [
        String::new(),
        format!("-a {PIRATE} -a {BUTLER} --ensemble vote"),
    ] {
        let one = predict(1, &more);
        assert_eq!(one.lines().count(), 10);
        assert_eq!(predict(7, &more), one);
        let row: Value = serde_json::from_str(one.lines().next().unwrap()).unwrap();
        assert_eq!(
            row["nll"].is_null(),
            !more.is_empty(),
            "a vote has no loss: {row}"
        );
    }
}

#[test]
fn members_are_trained_one_after_the_other() {
    let folder = tempfile::tempdir().unwrap();
    let row = |i: usize| json!({"prompt": format!("{i}\n"), "completion": format!(" {}", i * i)});
    let data = folder.path().join("train.jsonl");
    let lines: Vec<_> = (0..9).map(|i| row(i).to_string()).collect();
    fs::write(&data, lines.join("\n")).unwrap();
    let (data, at) = (data.display(), folder.path().display());
    let train = format!(
        "train -t 1 -m {MODEL} --method prompt --length 2 --steps 3 --batch 2 --data {data}"
    );
    let team = format!("{train} --valid {data} -o {at}/team.gguf --log {at}/team.jsonl --ensemble");
    let text = ok(&format!("{team} 2..3"));
    assert!(!folder.path().join("team-1.gguf").exists());
    assert!(
        text.contains("together") && text.contains("--ensemble mean-prob"),
        "{text}"
    );
    let text = ok(&format!("{team} 1"));
    assert!(text.contains("member"), "{text}");
    let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
    // A member is what its seed makes of it.
    for i in 1..=3 {
        assert!(folder.path().join(format!("team-{i}.jsonl")).exists());
        let name = format!("team-{i}.gguf");
        let alone = folder.path().join("alone");
        fs::create_dir_all(&alone).unwrap();
        let one = alone.join(&name);
        ok(&format!(
            "{train} --valid {data} --seed {i} -o {}",
            one.display()
        ));
        assert!(read(&name) == fs::read(one).unwrap(), "{name}");
    }
    assert!(read("team-1.gguf") != read("team-2.gguf"));

    // Bags differ, and a run goes on with its own.
    let bags = format!("{train} -o {at}/bag.gguf --keep-checkpoint");
    ok(&format!("{bags} --ensemble 2 --bagging"));
    assert!(read("bag-1.gguf") != read("team-1.gguf"));
    let resume = |more: &str| {
        format!(
            "train -m {MODEL} --data {data} -o {at}/bag-2.gguf --resume {at}/bag-2.gguf.ckpt --steps 5 {more}"
        )
    };
    let text = fails(&resume(""), 1);
    assert!(text.contains("data"), "{text}");
    ok(&resume("--bagging=2"));
    for (more, expected) in [
        ("--ensemble 0", "from 1 to 100"),
        ("--ensemble 3..2", "from 1 to 100"),
        ("--ensemble 101", "from 1 to 100"),
        ("--ensemble 2 --resume x", "cannot be used with"),
    ] {
        let text = fails(&format!("{train} -o {at}/x.gguf {more}"), 2);
        assert!(text.contains(expected), "{more}: {text}");
    }
}
