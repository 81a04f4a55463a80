//! libllama's log lines as events. A binary of its own: where threads without a subscriber use the same events at the same
//! time, `tracing` may switch them off for all.

use ggraft::file::gguf::Gguf;
use ggraft::model::vocab::Vocab;

const TINY: &[u8] = include_bytes!("data/bad/control.gguf");

/// Counts the events of libllama.
#[derive(Default)]
struct Events(std::sync::Mutex<Vec<tracing::Level>>);

impl tracing::Subscriber for &'static Events {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "ggml"
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        self.0.lock().unwrap().push(*event.metadata().level());
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn log_lines_of_libllama_become_events() {
    let events: &'static Events = Box::leak(Box::default());
    tracing::subscriber::with_default(events, || {
        // EOS is not called like any token that ends generation: libllama warns of it.
        let gguf = Gguf::parse(TINY).unwrap();
        Vocab::load(&gguf, TINY).unwrap();
    });
    let levels = events.0.lock().unwrap();
    assert!(
        levels.contains(&tracing::Level::INFO) && levels.contains(&tracing::Level::WARN),
        "{levels:?}"
    );
}
