//! All disks of a process: started at once, and each alone with what befalls it later.

use std::error::Error;
use std::io;

use tokio::sync::{mpsc, watch};
use tokio::task::{JoinSet, LocalSet};

/// What goes wrong, as one line.
pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// Comes when the process is to end.
#[derive(Debug, Clone)]
pub(crate) struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Waits until the process is to end.
    pub(crate) async fn wait(&mut self) {
        // That nobody can tell any more is the end, too.
        let _ = self.0.wait_for(|stop| *stop).await;
    }
}

/// Tells that a disk is ready.
#[derive(Debug)]
pub(crate) struct Ready {
    number: usize,
    tell: mpsc::UnboundedSender<(usize, String)>,
}

impl Ready {
    /// The disk is served; `hints` is for whoever starts its VMM.
    pub(crate) fn tell(self, hints: String) {
        // Nobody listens when the process ends.
        let _ = self.tell.send((self.number, hints));
    }
}

/// One disk that could not be started, among several.
#[derive(Debug, thiserror::Error)]
#[error("disk {number} ({name}): {error}")]
struct NotStarted {
    number: usize,
    name: String,
    error: Failure,
}

/// Serves all disks, each with its name and what it is started from, until `signal` comes, or each has ended by itself. No disk waits for another. Until all are
/// ready, the failure of one is the end of all; later it is its own. `print` is given the hints of all at once.
///
/// # Errors
/// The first failure, with the disk's number and name where there are several.
pub(crate) async fn serve_all<T, F>(
    disks: Vec<(String, T)>,
    signal: impl Future<Output = ()>,
    print: impl Fn(&str) -> io::Result<()>,
    start: impl Fn(usize, T, Stop, Ready) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>> + 'static,
{
    let local = LocalSet::new();
    let all = serve_all_here(disks, signal, print, start);
    local.run_until(all).await
}

async fn serve_all_here<T, F>(
    disks: Vec<(String, T)>,
    signal: impl Future<Output = ()>,
    print: impl Fn(&str) -> io::Result<()>,
    start: impl Fn(usize, T, Stop, Ready) -> F,
) -> Result<(), Failure>
where
    F: Future<Output = Result<(), Failure>> + 'static,
{
    let (end, stop) = watch::channel(false);
    let (tell, mut told) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    let mut names = Vec::with_capacity(disks.len());
    for (number, (name, disk)) in disks.into_iter().enumerate() {
        let tell = tell.clone();
        let disk = start(number, disk, Stop(stop.clone()), Ready { number, tell });
        tasks.spawn_local(async move { (number, disk.await) });
        names.push(name);
    }
    let mut hints = vec![None; names.len()];
    let (mut started, mut failure) = (false, None);
    tokio::pin!(signal);
    loop {
        tokio::select! {
            () = &mut signal, if !*end.borrow() => drop(end.send(true)),
            Some((number, text)) = told.recv() => {
                hints[number] = Some(text);
                if let Some(all) = hints.iter().cloned().collect::<Option<Vec<String>>>() {
                    started = true;
                    if let Err(error) = print(&all.concat()) {
                        failure.get_or_insert(error.into());
                        let _ = end.send(true);
                    }
                }
            }
            ended = tasks.join_next() => match ended {
                None => break,
                Some(Ok((_, Ok(())))) => {}
                Some(Ok((number, Err(error)))) => {
                    let error: Failure = match names[..] {
                        [_] => error,
                        _ => NotStarted { number: number + 1, name: names[number].clone(), error }.into(),
                    };
                    match started {
                        false => drop(end.send(true)),
                        true => tracing::error!("{error}; other disks go on"),
                    }
                    failure.get_or_insert(error);
                }
                Some(Err(error)) => {
                    tracing::error!(%error, "a disk was given up");
                    failure.get_or_insert(error.into());
                    if !started {
                        let _ = end.send(true);
                    }
                }
            },
        }
    }
    failure.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use tokio::time::sleep;

    use super::*;

    fn disks(count: usize) -> Vec<(String, ())> {
        (0..count)
            .map(|number| (format!("/s{number}"), ()))
            .collect()
    }

    #[tokio::test]
    async fn hints_are_printed_in_order_when_all_are_ready() {
        let printed = Mutex::new(String::new());
        let print = |text: &str| {
            printed.lock().unwrap().push_str(text);
            Ok(())
        };
        let signal = sleep(Duration::from_millis(200));
        let served = serve_all(
            disks(3),
            signal,
            print,
            |number, (), mut stop, ready| async move {
                sleep(Duration::from_millis(30 - 10 * number as u64)).await;
                ready.tell(number.to_string());
                stop.wait().await;
                Ok(())
            },
        );
        served.await.unwrap();
        assert_eq!(*printed.lock().unwrap(), "012");
    }

    #[tokio::test]
    async fn a_disk_that_fails_at_the_start_is_named_and_ends_all_in_good_order() {
        let ended = Arc::new(Mutex::new(Vec::new()));
        let signal = std::future::pending();
        let served = serve_all(
            disks(2),
            signal,
            |_| panic!("not started"),
            |number, (), mut stop, ready| {
                let ended = Arc::clone(&ended);
                async move {
                    if number == 1 {
                        return Err("no way".into());
                    }
                    ready.tell(String::new());
                    stop.wait().await;
                    ended.lock().unwrap().push(number);
                    Ok(())
                }
            },
        );
        let error = served.await.unwrap_err().to_string();
        assert_eq!(error, "disk 2 (/s1): no way");
        assert_eq!(*ended.lock().unwrap(), [0]);
    }

    #[tokio::test]
    async fn a_disk_that_fails_later_fails_alone() {
        let lasted = Arc::new(Mutex::new(false));
        let signal = sleep(Duration::from_millis(100));
        let served = serve_all(
            disks(2),
            signal,
            |_| Ok(()),
            |number, (), mut stop, ready| {
                let lasted = Arc::clone(&lasted);
                async move {
                    ready.tell(String::new());
                    if number == 0 {
                        sleep(Duration::from_millis(10)).await;
                        return Err("gone".into());
                    }
                    stop.wait().await;
                    *lasted.lock().unwrap() = true;
                    Ok(())
                }
            },
        );
        let started = tokio::time::Instant::now();
        let error = served.await.unwrap_err().to_string();
        assert!(error.contains("disk 1") && *lasted.lock().unwrap());
        assert!(started.elapsed() >= Duration::from_millis(100));
    }
}
