//! Connections: as many as there may be, none for longer than it is of use.

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::sync::oneshot::Receiver;
use tokio_io_timeout::TimeoutStream;

/// A request's header is complete within this time; a connection that is idle for longer is closed.
const HEADER: Duration = Duration::from_secs(20);
/// Bytes of a header at most.
const HEADER_BYTES: usize = 64 << 10;
/// A client that reads nothing for so long is gone.
const UNREAD: Duration = Duration::from_secs(30);
/// What is being answered when the server ends has so long.
const END: Duration = Duration::from_secs(10);
/// Connections at most, where the system allows more files.
const MAX_CONNECTIONS: u64 = 4096;
/// Files that the server itself needs.
const OWN_FILES: u64 = 64;

/// Serves until it is told to stop, and then what is being answered.
pub(super) async fn serve(listener: TcpListener, router: Router, mut stop: Receiver<()>) {
    let most = open_files()
        .saturating_sub(OWN_FILES)
        .clamp(8, MAX_CONNECTIONS);
    let room = Arc::new(Semaphore::new(most as usize));
    let graceful = GracefulShutdown::new();
    loop {
        let place = room.clone().acquire_owned();
        // Whoever comes when all places are taken waits in the system's queue.
        let accepted = async { (place.await, listener.accept().await) };
        let (place, accepted) = tokio::select! {
            accepted = accepted => accepted,
            _ = &mut stop => break,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(e) => {
                // Out of files, or the client has gone: both pass.
                tracing::debug!("a connection failed: {e}");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let connection = graceful.watch(connection(stream, router.clone()));
        tokio::spawn(async move {
            let _place = place;
            // What goes wrong on a connection is its client's concern.
            if let Err(e) = connection.await {
                tracing::debug!("a connection ended: {e}");
            }
        });
    }
    drop(listener);
    tokio::select! {
        () = graceful.shutdown() => {}
        () = tokio::time::sleep(END) => tracing::warn!("some answers were cut off"),
    }
}

/// How many the system allows.
#[cfg(unix)]
fn open_files() -> u64 {
    use rustix::process::{Resource, getrlimit};
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

#[cfg(not(unix))]
fn open_files() -> u64 {
    u64::MAX
}

type Io = TokioIo<Pin<Box<TimeoutStream<TcpStream>>>>;

fn connection(
    stream: TcpStream,
    router: Router,
) -> http1::Connection<Io, TowerToHyperService<Router>> {
    // Pieces of text are short, and shall not wait for more.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(UNREAD));
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(
            TokioIo::new(Box::pin(stream)),
            TowerToHyperService::new(router),
        )
}
