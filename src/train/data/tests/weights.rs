//! What is not learned: messages that say so, and rows of weight 0.

use super::*;
use crate::model::ModelOptions;
use crate::model::vocab::ChatOptions;
use serde_json::{Value as Json, json};

fn chat_model() -> Model {
    let options = ModelOptions::default().chat(ChatOptions::default().template("zephyr"));
    Model::open("models/tinylm-q8_0.gguf", &options).unwrap()
}

/// A talk of three answers, whose messages have these marks.
fn talk(marks: [Json; 6]) -> Vec<Json> {
    let mut messages = Vec::new();
    for (i, mark) in marks.into_iter().enumerate() {
        let role = ["user", "assistant"][i % 2];
        let mut message = json!({"role": role, "content": format!("m{i}")});
        let fields = message.as_object_mut().unwrap();
        fields.extend(mark.as_object().unwrap().clone());
        messages.push(message);
    }
    messages
}

/// The text of what is learned, turn by turn.
fn learned(row: &Row, model: &Model) -> Vec<String> {
    let example = row.example(model).unwrap();
    let mut turns: Vec<Vec<u8>> = Vec::new();
    let mut before = false;
    for &(id, counts) in &example.then {
        if counts && !before {
            turns.push(Vec::new());
        }
        if counts {
            turns
                .last_mut()
                .unwrap()
                .extend(&*model.vocab().token_bytes(id, true));
        }
        before = counts;
    }
    let text = |turn: Vec<u8>| String::from_utf8(turn).unwrap().trim().to_owned();
    turns.into_iter().map(text).collect()
}

#[test]
fn messages_that_say_so_are_not_learned() {
    let model = chat_model();
    let none = || json!({});
    let (w0, w1) = (|| json!({"weight": 0}), || json!({"weight": 1}));
    let (off, on) = (|| json!({"train": false}), || json!({"train": true}));
    let all = ["m1</s>", "m3</s>", "m5</s>"];
    let mut cases = 0;
    for (marks, expected) in [
        (
            [none(), none(), none(), none(), none(), none()],
            vec![0, 1, 2],
        ),
        ([none(), w0(), none(), none(), none(), w1()], vec![1, 2]),
        ([none(), w0(), none(), w0(), none(), w1()], vec![2]),
        ([none(), w1(), none(), w0(), none(), w0()], vec![0]),
        (
            [
                none(),
                json!({"weight": 0.0}),
                none(),
                json!({"weight": 1.0}),
                none(),
                json!({"weight": null}),
            ],
            vec![1, 2],
        ),
        (
            [w0(), w1(), w1(), w1(), json!({"weight": null}), w0()],
            vec![0, 1],
        ),
        ([off(), off(), off(), on(), none(), off()], vec![1]),
        (
            [
                none(),
                json!({"train": false, "weight": 0}),
                none(),
                json!({"train": true, "weight": 1}),
                none(),
                json!({"train": null}),
            ],
            vec![1, 2],
        ),
    ] {
        let expected: Vec<&str> = expected.into_iter().map(|i| all[i]).collect();
        let messages = talk(marks);
        let turns: Vec<Json> = messages
            .iter()
            .map(|m| {
                let mut turn = m.clone();
                let fields = turn.as_object_mut().unwrap();
                let role = fields.remove("role").unwrap();
                let content = fields.remove("content").unwrap();
                let from = if role == "user" { "human" } else { "gpt" };
                fields.insert("from".into(), from.into());
                fields.insert("value".into(), content);
                turn
            })
            .collect();
        let whole = talk([none(), none(), none(), none(), none(), none()]);
        let whole = Row::new(Content::Messages {
            conversation: serde_conversation(&whole),
            given: 0,
            skipped: Vec::new(),
        });
        let ids: Vec<i32> = whole.example(&model).unwrap().ids().collect();
        for value in [
            json!({"messages": messages}),
            json!({"conversations": turns}),
            json!({"conversations": turns, "system": ""}),
            json!({"messages": messages, "weight": 2.5}),
        ] {
            let data = read(value.to_string().as_bytes()).unwrap();
            let row = &data.rows()[0];
            assert_eq!(learned(row, &model), expected, "{value}");
            // The tokens are those of the whole conversation: templates see no marks.
            let example = row.example(&model).unwrap();
            assert!(
                ids.starts_with(&example.ids().collect::<Vec<_>>()),
                "{value}"
            );
            assert_eq!(row.weight, value["weight"].as_f64().unwrap_or(1.0) as f32);
        }
        cases += 1;
    }
    assert_eq!(cases, 8);
    // Those of a completion, behind a system message that comes first, too.
    let messages = talk([none(), none(), none(), w0(), none(), none()]);
    let value = json!({"prompt": messages[..2], "completion": messages[2..]});
    let data = read(value.to_string().as_bytes()).unwrap();
    assert_eq!(learned(&data.rows()[0], &model), ["m5</s>"]);
    let value = json!({"conversations": messages, "system": "s"});
    let data = read(value.to_string().as_bytes()).unwrap();
    assert_eq!(learned(&data.rows()[0], &model), ["m1</s>", "m5</s>"]);
}

fn serde_conversation(messages: &[Json]) -> Conversation {
    let message = |m: &Json| crate::model::chat::ChatMessage::from_json(m.clone()).unwrap();
    Conversation::new(messages.iter().map(message).collect())
}

#[test]
fn marks_that_are_none_are_refused() {
    for (mark, speaker, expected) in [
        (
            json!({"weight": 0.5}),
            "assistant",
            "the field 'messages[1].weight' is 0.5, it must be 0 or 1",
        ),
        (
            json!({"weight": 2}),
            "assistant",
            "the field 'messages[1].weight' is 2, it must be 0 or 1",
        ),
        (
            json!({"weight": -1}),
            "user",
            "the field 'messages[1].weight' is -1, it must be 0 or 1",
        ),
        (
            json!({"weight": "0"}),
            "assistant",
            "the field 'messages[1].weight' is a text, it must be 0 or 1",
        ),
        (
            json!({"weight": true}),
            "assistant",
            "the field 'messages[1].weight' is true, it must be 0 or 1",
        ),
        (
            json!({"train": 0}),
            "assistant",
            "the field 'messages[1].train' is 0, it must be true or false",
        ),
        (
            json!({"train": "no"}),
            "assistant",
            "the field 'messages[1].train' is a text, it must be true or false",
        ),
        (
            json!({"train": true}),
            "user",
            "the field 'messages[1].train' is true, it must be false: only what the assistant says is learned",
        ),
        (
            json!({"train": true, "weight": 0}),
            "assistant",
            "the field 'messages[1].train' is true, it must be false, as the weight is 0",
        ),
        (
            json!({"train": false, "weight": 1}),
            "assistant",
            "the field 'messages[1].train' is false, it must be true, as the weight is 1",
        ),
    ] {
        let mut message = json!({"role": speaker, "content": "b"});
        message
            .as_object_mut()
            .unwrap()
            .extend(mark.as_object().unwrap().clone());
        let value = json!({"messages": [{"role": "user", "content": "a"}, message]});
        let error = read(format!("\n{value}\n").as_bytes()).unwrap_err();
        assert_eq!(error.to_string(), format!("rows:2: {expected}"));
    }
}

#[test]
fn rows_of_weight_0_are_left_out_where_rows_count() {
    let model = chat_model();
    let idle = json!({"messages": talk([(); 6].map(|()| json!({"weight": 0})))});
    let file = format!(
        "{{\"text\": \"a\", \"weight\": 0}}\n{{\"text\": \"b\"}}\n{idle}\n{{\"prompt\": \"c\", \"weight\": 0.0}}\n{{\"text\": \"d\", \"weight\": 2}}\n"
    );
    let places = |rows: &[Row]| -> Vec<usize> { rows.iter().map(|r| r.place().number()).collect() };
    let data = read(file.as_bytes()).unwrap();
    assert_eq!(places(data.rows()), [1, 2, 3, 4, 5]);
    assert_eq!(places(data.clone().counted().unwrap().rows()), [2, 5]);
    let kept = Examples::from_reader(file.as_bytes(), "rows", &model).unwrap();
    assert_eq!(kept.len(), 2);
    assert_eq!(kept.place(1).to_string(), "rows:5");
    assert_eq!(kept.file(), Some(Path::new("rows")));
    // Whose answers have all the weight 0, and that was made by hand.
    let error = data.rows()[2].example(&model).unwrap_err().to_string();
    assert_eq!(error, "rows:3: the row has no tokens to predict");

    let none = "all rows have the weight 0, so that nothing counts";
    for file in [
        "{\"text\": \"a\", \"weight\": 0}\n".repeat(2),
        format!("{idle}\n"),
    ] {
        let error = Examples::from_reader(file.as_bytes(), "idle.jsonl", &model).unwrap_err();
        assert_eq!(error.to_string(), format!("idle.jsonl: {none}"));
        let error = Dataset::from_reader(file.as_bytes(), "idle.jsonl")
            .unwrap()
            .counted();
        assert_eq!(
            error.unwrap_err().to_string(),
            format!("idle.jsonl: {none}")
        );
    }
    let data = Dataset::from_rows(vec![completion("a").weight(0.0)]).unwrap();
    assert_eq!(
        data.counted().unwrap_err().to_string(),
        format!("data set: {none}")
    );
}
