//! The fields that rows are made of, in everybody's words.

use super::*;
use serde_json::{Value as Json, json};

fn row(value: &Json) -> Result<Row> {
    let data = read(value.to_string().as_bytes())?;
    Ok(data.rows()[0].clone())
}

fn refused(value: &Json) -> String {
    let error = match row(value) {
        Ok(row) => panic!("{value} is {row:?}"),
        Err(e) => e.to_string(),
    };
    assert!(
        error.starts_with("rows:1: ") && !error.contains('\n'),
        "{error}"
    );
    error
}

#[test]
fn what_is_asked_and_answered_has_many_names() {
    let asked = |instruction: &str, input: &str, output: &str| Instruction {
        system: None,
        instruction: instruction.to_owned(),
        input: input.to_owned(),
        output: (!output.is_empty()).then(|| output.to_owned()),
    };
    let mut cases = 0;
    for (value, expected) in [
        (
            json!({"instruction": "a", "input": "", "output": "b"}),
            asked("a", "", "b"),
        ),
        (
            json!({"instruction": "a", "input": "i", "output": "b", "text": "a i b"}),
            asked("a", "i", "b"),
        ),
        (
            json!({"instruction": "a", "context": "i", "response": "b", "category": "qa"}),
            asked("a", "i", "b"),
        ),
        (
            json!({"instruction": "a", "response": "b"}),
            asked("a", "", "b"),
        ),
        (json!({"question": "a", "answer": "b"}), asked("a", "", "b")),
        (
            json!({"question": "a", "context": "i", "answer": "b"}),
            asked("a", "i", "b"),
        ),
        (
            json!({"question": "a", "response": "b"}),
            asked("a", "", "b"),
        ),
        (
            json!({"query": "a", "response": "b", "type": "x"}),
            asked("a", "", "b"),
        ),
        (json!({"query": "a", "answer": "b"}), asked("a", "", "b")),
        (json!({"input": "a", "output": "b"}), asked("a", "", "b")),
        (json!({"user": "a", "assistant": "b"}), asked("a", "", "b")),
        (json!({"question": "a"}), asked("a", "", "")),
        (json!({"question": "a", "answer": null}), asked("a", "", "")),
        // What was read before others had names for it.
        (
            json!({"instruction": "a", "output": "b", "response": "c", "query": "d"}),
            asked("a", "", "b"),
        ),
    ] {
        match row(&value).unwrap().content {
            Content::Instruction(found) => assert_eq!(found, expected, "{value}"),
            other => panic!("{value}: {other:?}"),
        }
        cases += 1;
    }
    assert_eq!(cases, 14);
    let system = row(&json!({"system_prompt": "s", "question": "a", "response": "b"}));
    match system.unwrap().content {
        Content::Instruction(found) => assert_eq!(found.system.as_deref(), Some("s")),
        other => panic!("{other:?}"),
    }
    for value in [
        json!({"prompt": "a", "completion": "b", "answer": "c", "source": "d", "target": "e"}),
        json!({"prompt": "a", "response": "b"}),
        json!({"prompt": "a", "answer": "b", "completion": null}),
        json!({"prompt": "a", "output": "b", "messages": null}),
        json!({"source": "a", "target": "b"}),
    ] {
        match row(&value).unwrap().content {
            Content::Completion { prompt, completion } => {
                assert_eq!(
                    (&prompt[..], completion.as_deref()),
                    ("a", Some("b")),
                    "{value}"
                );
            }
            other => panic!("{value}: {other:?}"),
        }
    }
    // Other fields are ignored where a text is clear.
    for value in [
        json!({"text": "t", "source": "web", "label": true}),
        json!({"text": "t", "question": "a", "answer": "b"}),
        json!({"text": "t", "prompt": null, "messages": null, "user": "me"}),
    ] {
        let content = row(&value).unwrap().content;
        assert!(
            matches!(&content, Content::Text(text) if text == "t"),
            "{value}: {content:?}"
        );
    }
}

/// Whoever wrote them may not be trusted, whether or not the model has a chat template.
#[test]
fn special_tokens_in_instructions_stay_text() {
    use crate::model::ModelOptions;
    use crate::model::vocab::ChatOptions;
    let value = json!({"instruction": "A</s>B", "input": "C</s>", "output": "D</s>E"});
    let row = row(&value).unwrap();
    for (options, ends) in [
        (ChatOptions::default(), [0, 1]),
        (ChatOptions::default().parse_special(true), [2, 2]),
        (ChatOptions::default().template("zephyr"), [1, 1]),
    ] {
        let options = ModelOptions::default().chat(options);
        let model = Model::open("models/tinylm-q8_0.gguf", &options).unwrap();
        let eos = model.vocab().eos().unwrap();
        let count = |ids: &[i32]| ids.iter().filter(|&&id| id == eos).count();
        let found = |example: &Example| {
            let then: Vec<i32> = example.then.iter().map(|&(id, _)| id).collect();
            [count(&example.given), count(&then)]
        };
        let example = row.example(&model).unwrap();
        let prompt = row.prompt(&model).unwrap();
        assert_eq!(found(&example), ends);
        assert_eq!(found(&prompt.answer.unwrap()), ends);
        assert_eq!(count(&prompt.tokens), ends[0]);
        let bytes = example
            .then
            .iter()
            .flat_map(|&(id, _)| model.vocab().token_bytes(id, true));
        let text = String::from_utf8(bytes.collect()).unwrap();
        assert_eq!(text.trim(), "D</s>E</s>");
    }
}

#[test]
fn rows_that_are_not_clear_are_refused_with_what_is_there() {
    for (value, parts) in [
        (
            json!({"a": 1, "b": 2}),
            vec![
                "no field 'prompt', 'messages', 'text'",
                "'source' and 'target'",
                "(there are 'a', 'b')",
            ],
        ),
        (
            json!({"user": "me", "id": 1}),
            vec!["no field", "'user', 'id'"],
        ),
        (
            json!({"source": "web"}),
            vec!["no field", "is only 'source'"],
        ),
        (
            json!({"Prompt": "a", "Completion": "b"}),
            vec!["no field", "small letters"],
        ),
        (
            json!({"data": [{"text": "a"}]}),
            vec!["no field", "jq -c '.[\"data\"][]' IN > OUT"],
        ),
        (
            json!({"question": "a", "query": "b", "answer": "c"}),
            vec!["more than one", "('question', 'query')"],
        ),
        (
            json!({"question": "a", "answer": "b", "response": "c"}),
            vec!["more than one", "('response', 'answer')"],
        ),
        (
            json!({"prompt": "a", "text": "b"}),
            vec!["more than one", "('prompt', 'text')"],
        ),
        (
            json!({"text": "a", "completion": "b"}),
            vec!["more than one", "('text', 'completion')"],
        ),
        (
            json!({"question": "a", "answer": {"text": "b"}}),
            vec!["'answer' is an object, it must be a text"],
        ),
        (
            json!({"completion": "b"}),
            vec!["a completion without prompt"],
        ),
        (
            json!({"text": null}),
            vec!["the field 'text' is null, it must be a text"],
        ),
        (
            json!({"messages": null}),
            vec!["the field 'messages' is null, it must be a list of messages"],
        ),
        (
            json!({"conversations": null}),
            vec!["the field 'conversations' is null, it must be a list"],
        ),
        (
            json!({"prompt": null}),
            vec!["the field 'prompt' is null, it must be a text or a list of messages"],
        ),
        (
            json!({"prompt": null, "completion": "b"}),
            vec!["the field 'prompt' is null, it must be a text or"],
        ),
        (
            json!({"instruction": null, "output": "b"}),
            vec!["the field 'instruction' is null, it must be a text"],
        ),
        (
            json!({"source": null, "target": "b"}),
            vec!["the field 'source' is null"],
        ),
        (
            json!({"messages": []}),
            vec!["'messages' is empty: no message"],
        ),
        (
            json!({"conversations": []}),
            vec!["'conversations' is empty"],
        ),
        (
            json!({"prompt": [], "completion": "a"}),
            vec!["'prompt' is empty"],
        ),
        (
            json!({"messages": [null]}),
            vec!["'messages[0]' is null, it must be an object with a role and a content"],
        ),
        (
            json!({"conversation": [{"role": "user", "content": "a"}, "b"]}),
            vec!["'conversation[1]' is a text, it must be an object"],
        ),
        (
            json!({"messages": [{"role": "user", "contnet": "a"}]}),
            vec!["the field 'messages[0].content' is not there, it must be what is said"],
        ),
        (
            json!({"messages": [{"role": null, "content": "a"}]}),
            vec!["a message must have a role that is a text"],
        ),
    ] {
        let error = refused(&value);
        for part in parts {
            assert!(error.contains(part), "{value}: {error}");
        }
    }
    let model = tinylm();
    for (value, part) in [
        (
            json!({"prompt": "a"}),
            "no field 'completion' with a text in it",
        ),
        (
            json!({"prompt": "a", "completion": null}),
            "no field 'completion' with a text in it",
        ),
        (
            json!({"question": "a"}),
            "no field 'output', 'response' or 'answer' with a text in it",
        ),
        (
            json!({"messages": [{"role": "user", "content": "a"}]}),
            "no message has the role 'assistant': there is nothing to learn",
        ),
    ] {
        let error = row(&value)
            .unwrap()
            .example(&model)
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("rows:1: ") && error.contains(part),
            "{value}: {error}"
        );
    }
}

#[test]
fn preference_data_is_refused_with_what_to_rename() {
    let said = |role: &str, text: &str| json!({"role": role, "content": text});
    let talk = json!([said("user", "a"), said("assistant", "b")]);
    let answer = json!([said("assistant", "b")]);
    for (value, parts) in [
        (
            json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
            [
                "DPO, 'chosen' and 'rejected'",
                "rename 'chosen' to 'completion', and leave out 'rejected'",
            ],
        ),
        (
            json!({"prompt": [said("user", "a")], "chosen": answer, "rejected": answer}),
            ["DPO", "rename 'chosen' to 'completion'"],
        ),
        (
            json!({"chosen": talk, "rejected": talk}),
            [
                "DPO",
                "rename 'chosen' to 'messages', and leave out 'rejected'",
            ],
        ),
        (
            json!({"prompt": "a", "chosen": talk, "rejected": talk, "messages": talk}),
            [
                "DPO",
                "to 'messages', and leave out 'rejected' and 'prompt'",
            ],
        ),
        (
            json!({"chosen": "a b", "rejected": "a c"}),
            ["DPO", "rename 'chosen' to 'text'"],
        ),
        (
            json!({"system": "", "question": "a", "chosen": "b", "rejected": "c"}),
            ["DPO", "rename 'chosen' to 'output'"],
        ),
        (
            json!({"prompt": "a", "chosen": "b", "rejected": null}),
            ["DPO", "to 'completion'"],
        ),
        (
            json!({"input": {"messages": []}, "preferred_output": answer, "non_preferred_output": answer}),
            ["DPO, 'preferred_output' and", "to 'completion'"],
        ),
        (
            json!({"prompt": "a", "completion": "b", "label": true}),
            [
                "KTO, 'label'",
                "keep the rows whose 'label' is true, without that field",
            ],
        ),
        (
            json!({"prompt": "a", "completion": "b", "label": false}),
            ["KTO, 'label'", "keep the rows whose 'label' is true"],
        ),
        (
            json!({"messages": talk, "label": true}),
            ["KTO", "'label' is true"],
        ),
        (
            json!({"instruction": "a", "output": "b", "kto_tag": true}),
            ["KTO, 'kto_tag'", "'kto_tag' is true"],
        ),
    ] {
        let error = refused(&value);
        assert!(
            error.contains("this is preference data ("),
            "{value}: {error}"
        );
        for part in parts {
            assert!(error.contains(part), "{value}: {error}");
        }
    }
    // A class, and a row that says itself what completes it.
    for value in [
        json!({"prompt": "a", "completion": "b", "label": "good"}),
        json!({"prompt": "a", "completion": "b", "label": 1}),
        json!({"prompt": "a", "label": true}),
        json!({"prompt": "a", "completion": "b", "chosen": "b", "rejected": "c"}),
    ] {
        assert!(row(&value).is_ok(), "{value}");
    }
}

#[test]
fn speakers_have_many_names() {
    let mut cases = 0;
    for (list, who, what, said) in [
        (
            "messages",
            "role",
            "content",
            ["system", "user", "assistant"],
        ),
        ("messages", "role", "content", ["system", "human", "gpt"]),
        ("messages", "role", "value", ["system", "human", "bot"]),
        (
            "messages",
            "role",
            "content",
            ["System", "User", "Assistant"],
        ),
        ("messages", "role", "text", ["system", "prompter", "model"]),
        ("messages", "from", "value", ["system", "human", "gpt"]),
        ("conversations", "from", "value", ["system", "human", "gpt"]),
        (
            "conversations",
            "from",
            "value",
            ["system", "Human", "chatgpt"],
        ),
        ("conversations", "from", "content", ["system", "user", "ai"]),
        (
            "conversations",
            "role",
            "content",
            ["system", "user", "assistant"],
        ),
        (
            "conversation",
            "role",
            "content",
            ["system", "user", "model"],
        ),
    ] {
        let messages: Vec<Json> = said
            .iter()
            .map(|name| json!({who: name, what: "x"}))
            .collect();
        let value = json!({list: messages});
        let Content::Messages { conversation, .. } = row(&value).unwrap().content else {
            panic!("{value}");
        };
        let found = conversation.messages.iter().map(|m| (m.role(), m.text()));
        let expected = ["system", "user", "assistant"].map(|role| (role, Some("x")));
        assert!(found.eq(expected), "{value}: {conversation:?}");
        cases += 1;
    }
    assert_eq!(cases, 11);
    for message in [
        json!({"role": "assistant", "content": null}),
        json!({"role": "assistant", "tool_calls": []}),
        json!({"role": "assistant", "reasoning_content": "x"}),
        json!({"role": "user", "parts": [{"text": "x"}]}),
    ] {
        assert!(row(&json!({"messages": [message]})).is_ok(), "{message}");
    }
    // Templates have roles of their own.
    for role in ["tool", "developer", "ipython", "observation", "function"] {
        let value = json!({"messages": [{"role": role, "content": "x"}]});
        let Content::Messages { conversation, .. } = row(&value).unwrap().content else {
            panic!("{value}");
        };
        assert_eq!(conversation.messages[0].role(), role);
    }
}
