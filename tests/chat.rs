//! Chat templates are rendered as Jinja renders them.

use ggraft::model::chat::{
    ChatError, ChatMessage, ChatTemplate, built_in_names, built_in_template,
};
use serde_json::{Map, Value};
use std::fs;

/// Renderings by Jinja 3.1.6 with Transformers' settings: conversations that real users have, times templates.
#[test]
fn renderings_are_those_of_jinja() {
    for file in ["expected.json", "more.json"] {
        let text = fs::read_to_string(format!("tests/data/chat/{file}")).unwrap();
        let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
        assert!(cases.len() > 20, "{file}");
        for case in &cases {
            let name = case["template"].as_str().unwrap();
            let source =
                fs::read_to_string(format!("tests/data/chat/templates/{name}.jinja")).unwrap();
            let template = ChatTemplate::new(&source).unwrap_or_else(|e| panic!("{name}: {e}"));
            let messages: Vec<_> = case["messages"]
                .as_array()
                .unwrap()
                .iter()
                .map(|m| ChatMessage::from_json(m.clone()).unwrap())
                .collect();
            let mut values = Map::new();
            for key in ["bos_token", "eos_token", "tools"] {
                if let Some(value) = case.get(key) {
                    values.insert(key.to_owned(), value.clone());
                }
            }
            let generate = case["add_generation_prompt"].as_bool().unwrap();
            let got = template.render(&messages, generate, &values);
            let what = format!("{name}, {}, {generate}", case["case"]);
            match (got, case["text"].as_str()) {
                (Ok(text), Some(expected)) => assert_eq!(text, expected, "{what}"),
                (Err(ChatError::Refused { reason }), None) => {
                    assert_eq!(reason, case["error"].as_str().unwrap(), "{what}");
                }
                // Python says it in its own words.
                (Err(ChatError::Failed { .. }), None) => {}
                (got, _) => panic!("{what}: {got:?}, expected {case}"),
            }
        }
    }
}

fn render(source: &str) -> Result<String, ChatError> {
    let messages = [
        ChatMessage::new("user", "añb"),
        ChatMessage::new("user", ""),
    ];
    ChatTemplate::new(source)?.render(&messages, true, &Map::new())
}

/// What Python gives, case by case: a template may slice whatever it is given.
#[test]
fn slices_and_text_methods_are_those_of_python() {
    for (expression, expected) in [
        ("'abcdef'[1:4]", "bcd"),
        ("'abcdef'[::-2]", "fdb"),
        ("'abcdef'[4:1:-1]", "edc"),
        ("'abcdef'[3:0:-1]", "dcb"),
        ("'abcdef'[1:4:-1]", ""),
        ("'abcdef'[-2:]", "ef"),
        ("'abcdef'[-99:99]", "abcdef"),
        ("'abcdef'[:-1:5]", "a"),
        ("messages[1].content[::-1]", ""),
        ("messages[1].content[:1]", ""),
        ("messages[0].content[1:]", "ñb"),
        ("[1, 2, 3][::-1]", "[3, 2, 1]"),
        ("[1, 2, 3][5:]", "[]"),
        ("[][::-1]", "[]"),
        (
            "[1, 2, 3][-9223372036854775807:9223372036854775807]",
            "[1, 2, 3]",
        ),
        ("[1, 2, 3][::9223372036854775807]", "[1]"),
        ("messages[0].content.find('b')", "2"),
        ("messages[0].content.rfind('x')", "-1"),
        ("messages[0].content.index('ñ')", "1"),
        ("'aaa'.count('')", "4"),
        ("'  a '.rstrip()", "  a"),
        ("'xay'.strip('xy')", "a"),
    ] {
        assert_eq!(
            render(&format!("{{{{ {expression} }}}}")).as_deref(),
            Ok(expected),
            "{expression}"
        );
    }
    for expression in [
        "messages[0][1:]",
        "none[1:]",
        "nothing[1:]",
        "'a'['b':]",
        "'a'[::0]",
        "'a'.index('b')",
    ] {
        let error = render(&format!("{{{{ {expression} }}}}")).unwrap_err();
        assert!(
            matches!(error, ChatError::Failed { .. }),
            "{expression}: {error:?}"
        );
    }
}

/// Templates come from strangers: none ends the process, and each fault is one line.
#[test]
fn hostile_templates_are_refused() {
    let doubled = "{% set x = namespace(t='0123456789abcdef') %}{% for i in range(20) %}{% set x.t = x.t ~ x.t %}{% endfor %}";
    let long = format!("{doubled}{{% for i in range(5) %}}{{{{ x.t }}}}{{% endfor %}}");
    assert_eq!(render(&long), Err(ChatError::TooLong));
    let many = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}";
    assert_eq!(render(many), Err(ChatError::Endless));
    for source in [
        "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% include 'chat template' %}",
        "{% include '/etc/passwd' %}",
        "{{ range(10 ** 18) | list }}",
        "{{ 'x' * 10 ** 18 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ 1 // 0 }}",
        "{{ strftime_now('%Q') }}",
        "{{ messages | nothing }}",
        "{{ messages.foo.bar }}",
        "{{ 'a' + none }}",
    ] {
        let error = render(source).unwrap_err();
        assert!(
            matches!(error, ChatError::Failed { .. }),
            "{source}: {error:?}"
        );
        let line = error.to_string();
        assert!(!line.contains('\n') && line.len() < 300, "{source}: {line}");
    }
    for source in [
        "{% if %}",
        "{{ ",
        "{% endfor %}",
        &format!("{{{{ {}", "(".repeat(200_000)),
        "{% raw %}",
    ] {
        let error = render(source).unwrap_err();
        assert!(matches!(error, ChatError::Syntax { .. }), "{error:?}");
    }
}

/// Those that `--chat-template NAME` takes.
#[test]
fn built_in_templates_format_a_conversation() {
    let messages = [
        ChatMessage::new("user", "hi"),
        ChatMessage::new("assistant", "ho"),
        ChatMessage::new("user", "again"),
    ];
    let mut values = Map::new();
    values.insert("bos_token".to_owned(), "<s>".into());
    values.insert("eos_token".to_owned(), "</s>".into());
    let mut names = 0;
    for name in built_in_names() {
        let template = ChatTemplate::new(built_in_template(name).unwrap()).unwrap();
        let given = template.render(&messages, false, &values).unwrap();
        let asked = template.render(&messages, true, &values).unwrap();
        assert!(asked.starts_with(&given), "{name}: {given:?}, {asked:?}");
        let at: Vec<_> = ["hi", "ho", "again"]
            .iter()
            .map(|said| given.find(said))
            .collect();
        assert!(at.is_sorted() && at[0].is_some(), "{name}: {given:?}");
        names += 1;
    }
    assert_eq!(names, 6);
    assert_eq!(built_in_template("alpaca"), None);
}
