//! Where training starts.

use crate::Place;

const LINE: &str = "--length 4 --batch 6 -o @out.gguf --log @log.jsonl";

fn losses(place: &Place) -> (f64, f64) {
    let log = place.log("log.jsonl");
    let loss = |row: &serde_json::Value| row["loss"].as_f64().unwrap();
    (loss(&log[0]), loss(log.last().unwrap()))
}

#[test]
fn every_start_is_a_different_one() {
    let place = Place::new();
    let prompt = ["text:Arr", "text:trade", "vocab", "zeros", "random"];
    let prefix = ["text:Arr", "text:trade", "zeros", "random", "mean"];
    for (method, inits) in [("prompt", &prompt[..]), ("prefix", &prefix)] {
        let mut first = Vec::new();
        for init in inits {
            place.trained(&format!("--method {method} --init {init} {LINE} --steps 1"));
            first.push(losses(&place).0);
        }
        place.trained(&format!("--method {method} {LINE} --steps 1"));
        first.push(losses(&place).0);
        for (i, a) in first.iter().enumerate() {
            assert!(
                a.is_finite() && !first[..i].contains(a),
                "{method}: {first:?}"
            );
        }
    }
}

#[test]
fn an_adapter_is_trained_further() {
    let place = Place::new();
    for method in ["prefix", "prompt", "p-tuning --reparam none"] {
        place.trained(&format!("--method {method} {LINE} --steps 8"));
        let (first, last) = losses(&place);
        // Its length is taken over, and the file may be the one that is written.
        let line = LINE.replace("--length 4 ", "");
        place.trained(&format!(
            "--method {method} {line} --steps 8 --init adapter:@out.gguf --lr 0.01"
        ));
        let (again, end) = losses(&place);
        // What the last step did to the loss is not in the log, but it was a small one.
        assert!(
            (again - last).abs() < 0.2 * (first - last),
            "{method}: {first} -> {last}, {again}"
        );
        assert!(end < again, "{method}: {again} -> {end}");
    }
}

#[test]
fn an_adapter_keeps_its_template() {
    let place = Place::new();
    let line = LINE.replace("--length 4 ", "");
    let method = "--method p-tuning --hidden 16";
    place.trained(&format!(
        "{method} {line} --steps 8 --template {{v:2}}{{prompt}}:{{v:2}}"
    ));
    let (first, last) = losses(&place);
    place.trained(&format!(
        "{method} {line} --init adapter:@out.gguf --lr 0.0001 --steps 1"
    ));
    let again = losses(&place).0;
    assert!(
        (again - last).abs() < 0.2 * (first - last),
        "{first} -> {last}, {again}"
    );
    let out = place.path("out.gguf");
    let found = crate::json(&crate::ok(&["inspect", "--json", out.to_str().unwrap()]));
    assert_eq!(found["metadata"]["ggraft.template"], "{v:2} {prompt}:{v:2}");
}

#[test]
fn another_kind_or_length_of_adapter_is_refused() {
    let place = Place::new();
    place.trained("--method prefix --length 4 --steps 1 --batch 1 -o @prefix.gguf");
    for (line, expected) in [
        ("--method prompt", "training asks for a prompt adapter of 4"),
        (
            "--method prefix --length 5",
            "training asks for a prefix adapter of 5",
        ),
    ] {
        let text = place.refused(&format!("{line} --init adapter:@prefix.gguf -o @out.gguf"));
        assert!(
            text.contains("it is a prefix adapter of 4 virtual tokens"),
            "{text}"
        );
        assert!(text.contains(expected), "{text}");
    }
    assert!(!place.exists("out.gguf"));
}

#[test]
fn frozen_rows_stay_as_they_were() {
    use ggraft::adapter::Payload;
    let place = Place::new();
    let rows = |name: &str| {
        let adapter = ggraft::Adapter::load(&place.path(name)).unwrap();
        let Payload::Prefix { layers } = adapter.payload() else {
            panic!("{name} is no prefix");
        };
        layers[0].k.to_f32()
    };
    let line = "--method prefix --init text:Arr --batch 2";
    place.trained(&format!(
        "{line} --length 2 --steps 1 --lr 1e-30 -o @start.gguf"
    ));
    place.trained(&format!(
        "{line} --length 2 --steps 3 --freeze-first 1 -o @end.gguf"
    ));
    let (start, end) = (rows("start.gguf"), rows("end.gguf"));
    assert_eq!(start[..128], end[..128]);
    assert_ne!(start[128..], end[128..]);
}
