//! `ggraft serve`: the OpenAI API over HTTP, with an adapter for each request.

mod answer;
mod app;
mod body;
mod catalog;
mod chat;
mod completions;
mod data;
mod error;
mod keys;
mod listen;
mod metrics;
mod models;
mod page;
mod sampling;
mod speaker;

use crate::args::{ChatArgs, ModelArgs, SessionArgs, count, stem, warn_of_threads};
use crate::failure::{Failure, Result};
use crate::train::Every;
use crate::{interrupt, io};
use app::{App, Limits};
use catalog::Catalog;
use clap::Args;
use data::Data;
use ggraft::infer::KvType;
use ggraft::infer::engine::{Engine, EngineOptions};
use keys::Keys;
use metrics::Metrics;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

const EXAMPLES: &str = "Examples:
  ggraft serve -m model.gguf --adapters adapters/
  ggraft serve -m model.gguf --adapters adapters/ --data-dir data/
  ggraft serve -m model.gguf --adapters adapters/ --keys keys.toml --host 0.0.0.0 --port 8000
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{\"model\": \"pirate\", \"messages\": [{\"role\": \"user\", \"content\": \"Hi!\"}]}'

A request's \"model\" is the name of an adapter, without .gguf, or base for none. A file that is put into the folder is found when it is asked for. \
Ctrl-C and SIGTERM end the server when what it answers is complete, after 10 seconds at the latest.";

/// Serve the OpenAI API over HTTP, each request with an adapter of its own
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Serve {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder of adapters, GGUF files and PEFT folders; their names are the models that clients choose from
    #[arg(long, value_name = "DIR")]
    adapters: Option<PathBuf>,
    /// Address to listen on; others than this machine's own need --keys
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    port: u16,
    /// File of the keys that clients need, with the users they belong to and their limits (TOML) [default: everybody on this machine may use everything]
    #[arg(long, value_name = "KEYS.toml")]
    keys: Option<PathBuf>,
    /// Folder for uploads, fine-tuning jobs and what comes of them; it is made if there is none [default: no uploads and jobs]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Save what a job goes on from after a crash every N steps or, as 30s or 10m, so often
    #[arg(long, value_name = "N|TIME", default_value = "30s")]
    checkpoint_every: Every,
    /// Texts that are computed at a time
    #[arg(long, value_name = "N", default_value = "16", value_parser = count::<usize>)]
    parallel: usize,
    /// Requests at most that wait; more are told to come again
    #[arg(long, value_name = "N", default_value = "256", value_parser = count::<usize>)]
    queue: usize,
    /// Megabytes of keys and values at most [default: as much as it takes]
    #[arg(long, value_name = "MB", value_parser = count::<usize>)]
    kv_memory: Option<usize>,
    /// Megabytes of a request at most, uploads excepted
    #[arg(long, value_name = "MB", default_value = "4", value_parser = count::<usize>)]
    max_body: usize,
    /// Megabytes of an upload at most
    #[arg(long, value_name = "MB", default_value = "512", value_parser = count::<usize>)]
    max_upload: usize,
    #[command(flatten)]
    chat_format: ChatArgs,
    #[command(flatten)]
    session: SessionArgs,
}

impl Serve {
    pub(crate) fn execute(self) -> Result<()> {
        let begun = Instant::now();
        let keys = self.keys.as_deref().map(Keys::read).transpose()?;
        let listener = self.listen(keys.is_some())?;
        let app = Arc::new(self.app(keys)?);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(64)
            .enable_all()
            .build()
            .map_err(|e| Failure::Unsuitable(format!("no threads for connections: {e}")))?;
        let (end, stop) = tokio::sync::oneshot::channel();
        let _guard = interrupt::Guard::calling(move || {
            // Who would hear of it has ended.
            let _ = end.send(());
        });
        runtime.block_on(async {
            let fail = |e| Failure::Unsuitable(format!("--port {}: {e}", self.port));
            let address = listener.local_addr().map_err(fail)?;
            let listener = tokio::net::TcpListener::from_std(listener).map_err(fail)?;
            io::print(&format!(
                "listening on http://{address}, ready after {:.2} s\n",
                begun.elapsed().as_secs_f64()
            ))?;
            // The first request need not wait for it.
            let vocabulary = app.clone();
            tokio::task::spawn_blocking(move || vocabulary.model.vocab().preload());
            listen::serve(listener, app::router(app.clone()), stop).await;
            if let Some(data) = &app.data {
                data.stop();
            }
            Ok(())
        })
    }

    /// A socket on an address that may be listened on.
    fn listen(&self, has_keys: bool) -> Result<TcpListener> {
        let fail =
            |e| Failure::Unsuitable(format!("--host {} --port {}: {e}", self.host, self.port));
        let addresses = (self.host.as_str(), self.port).to_socket_addrs();
        let addresses: Vec<SocketAddr> = addresses.map_err(fail)?.collect();
        if !has_keys && addresses.iter().any(|address| !address.ip().is_loopback()) {
            return Err(Failure::Usage(format!(
                "--host {}: other machines could reach the server, and without --keys it would be open to all of them",
                self.host
            )));
        }
        let listener = TcpListener::bind(addresses.as_slice()).map_err(fail)?;
        listener.set_nonblocking(true).map_err(fail)?;
        Ok(listener)
    }

    fn app(&self, keys: Option<Keys>) -> Result<App> {
        let model = self.model.open_with(&self.chat_format)?;
        let options = self.engine_options();
        let engine = Engine::new(&model, &options)?;
        warn_of_threads(options.n_threads);
        let folder = self.adapters.as_deref();
        let catalog = Catalog::open(&model, folder).map_err(|source| Failure::File {
            path: self.adapters.clone().unwrap_or_default(),
            source,
        })?;
        let every = self.checkpoint_every;
        let data = (self.data_dir.as_deref()).map(|dir| Data::open(dir, &model, every));
        Ok(App {
            data: data.transpose()?,
            threads: options.n_threads.unwrap_or_else(ggraft::default_threads),
            base_name: stem(&self.model.model),
            model,
            engine,
            catalog,
            keys,
            limits: Limits {
                json_bytes: self.max_body.saturating_mul(1_000_000),
                upload_bytes: self.max_upload.saturating_mul(1_000_000),
            },
            metrics: Metrics::new(),
            created: catalog::seconds(SystemTime::now()),
        })
    }

    fn engine_options(&self) -> EngineOptions {
        let mut options = EngineOptions::from(&self.session.options(KvType::F16));
        options.max_running = self.parallel;
        options.max_waiting = self.queue;
        options.kv_bytes = self.kv_memory.map(|mb| mb.saturating_mul(1_000_000));
        options
    }
}
