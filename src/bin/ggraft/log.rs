//! Log events of the library as single lines on stderr: `warning: ...`.

use crate::io;
use std::fmt;
use std::str::FromStr;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Shows warnings, more with each `-v`, or what RUST_LOG says.
pub(crate) fn init(verbose: u8) {
    let default = match verbose {
        // libllama warns of things that concern its own loader.
        0 => "warn,ggml=error",
        1 => "info,ggml=warn",
        _ => "debug",
    };
    let asked = std::env::var("RUST_LOG").ok().filter(|s| !s.is_empty());
    let (filter, complaint) = match asked.as_deref().map(Targets::from_str) {
        Some(Ok(filter)) => (filter, None),
        Some(Err(e)) => (targets(default), Some(e)),
        None => (targets(default), None),
    };
    tracing_subscriber::registry()
        .with(
            tracing_subscriber::fmt::layer()
                .event_format(Line)
                .with_writer(|| io::Stderr),
        )
        .with(filter)
        .init();
    if let Some(e) = complaint {
        tracing::warn!("RUST_LOG is ignored: {e}");
    }
}

fn targets(filter: &str) -> Targets {
    filter.parse().expect("a constant of this file")
}

/// Level and message, nothing else.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        // Names in files may contain anything.
        let mut text = String::new();
        context.format_fields(Writer::new(&mut text), event)?;
        writeln!(writer, "{level}: {}", io::printable(&text))
    }
}
