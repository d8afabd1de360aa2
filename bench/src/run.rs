//! A run: set up, the rounds, the counting, and what came of them.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::calibration::calibrate;
use crate::contender::{self, Backing, Contender, CpuSeconds, Kind, Running, Setup};
use crate::counting::{self, Counts};
use crate::kernel;
use crate::link::SECTOR;
use crate::load::{self, Load, Until};
use crate::options::Options;
use crate::placement::Processors;
use crate::progress;
use crate::results::{Cell, Machine, Measurement, Results, Skipped};
use crate::rows::{self, Row};

/// Before each measurement.
const WARM: Duration = Duration::from_millis(100);

/// A contender that takes part, with a cell for each row.
struct Entrant {
    contender: Contender,
    running: Option<Running>,
    cells: Vec<Cell>,
}

/// Measures what the options ask for.
///
/// # Errors
/// Nothing can be measured, or the user wants an end. A contender that fails alone is left out, and said to be.
pub(crate) fn run(options: &Options) -> Result<Results> {
    let machine = machine()?;
    for wanted in &options.rows {
        let known = rows::all()
            .iter()
            .any(|row| row.name().contains(wanted.as_str()));
        ensure!(known, "no row is called '{wanted}'; see --list");
    }
    let rows = choose(rows::all(), Row::name, &options.rows);
    let contenders = contenders(options)?;
    ensure!(
        !contenders.is_empty(),
        "no contender is called that; see --list"
    );
    let directory = tempfile::Builder::new()
        .prefix("vhost-nvmf-bench-")
        .tempdir_in(&options.directory)
        .with_context(|| format!("{}", options.directory.display()))?;
    let setup = setup(options, directory.path())?;
    let mut skipped = Vec::new();
    let processors = Processors::new(options.placement)?;
    processors.start_back_ends()?;
    let mut entrants = enter(contenders, &setup, &rows, &mut skipped)?;
    ensure!(!entrants.is_empty(), "no contender can be measured");

    let each = options.seconds + WARM.as_secs_f64();
    let time = each * f64::from(options.rounds) * (entrants.len() * rows.len()) as f64;
    progress(&format!("measuring for about {:.0} s", time));
    let mut calibration = Vec::new();
    for round in 0..options.rounds {
        processors.use_all()?;
        calibration.push(calibrate()?);
        processors.drive()?;
        for (index, row) in rows.iter().enumerate() {
            progress(&format!(
                "round {} of {}: {}",
                round + 1,
                options.rounds,
                row.name()
            ));
            // Another begins each time, since the first may find the machine in another state.
            let first = round as usize % entrants.len();
            for turn in 0..entrants.len() {
                let at = (first + turn) % entrants.len();
                let entrant = &mut entrants[at];
                measure(
                    entrant,
                    index,
                    *row,
                    options,
                    u64::from(round),
                    &mut skipped,
                )?;
            }
        }
    }
    processors.use_all()?;
    count(&mut entrants, &setup, &rows)?;
    let mut cells = Vec::new();
    let mut columns: Vec<_> = entrants.into_iter().map(|e| e.cells.into_iter()).collect();
    for _ in &rows {
        cells.extend(columns.iter_mut().filter_map(Iterator::next));
    }
    cells.retain(|cell| !cell.rounds.is_empty());
    Ok(Results {
        machine,
        placement: options.placement,
        rounds: options.rounds,
        seconds: options.seconds,
        disk_bytes: setup.size,
        calibration,
        cells,
        skipped,
    })
}

/// Starts and prepares every contender that can take part.
fn enter(
    contenders: Vec<Contender>,
    setup: &Setup,
    rows: &[Row],
    skipped: &mut Vec<Skipped>,
) -> Result<Vec<Entrant>> {
    let has_file = |contender: &Contender| {
        matches!(
            contender.kind,
            Kind::Serve(Backing::File) | Kind::Qsd(Backing::File, _)
        )
    };
    if contenders.iter().any(has_file) {
        progress(&format!("writing {}", setup.file.display()));
        write_file(&setup.file, setup.size)?;
    }
    let mut entrants = Vec::new();
    for contender in contenders {
        ensure!(!kernel::interrupted(), "interrupted");
        if let Some(why) = contender.missing(setup) {
            skip(&contender.name, why, skipped);
            continue;
        }
        progress(&format!("starting {}", contender.name));
        let started = contender.start(setup, "timed").and_then(|mut running| {
            let sectors = setup.size / SECTOR;
            load::prepare(&mut *running.link, sectors, contender.keeps_data())
                .with_context(|| running.processes.last_words())?;
            Ok(running)
        });
        match started {
            Ok(running) => entrants.push(Entrant {
                running: Some(running),
                cells: rows.iter().map(|row| cell(row, &contender)).collect(),
                contender,
            }),
            Err(error) => skip(&contender.name, format!("{error:#}"), skipped),
        }
    }
    // What the preparation wrote goes to the disk now and not while something is measured.
    rustix::fs::sync();
    Ok(entrants)
}

fn cell(row: &Row, contender: &Contender) -> Cell {
    Cell {
        row: row.name(),
        contender: contender.name.clone(),
        rounds: Vec::new(),
        counts: Counts::default(),
    }
}

fn skip(contender: &str, why: String, skipped: &mut Vec<Skipped>) {
    progress(&format!("SKIPPED {contender}: {why}"));
    skipped.push(Skipped {
        contender: contender.to_owned(),
        why,
    });
}

/// Measures one row of one contender once; one that fails takes no further part.
fn measure(
    entrant: &mut Entrant,
    index: usize,
    row: Row,
    options: &Options,
    seed: u64,
    skipped: &mut Vec<Skipped>,
) -> Result<()> {
    let Some(running) = &mut entrant.running else {
        return Ok(());
    };
    let time = Duration::from_secs_f64(options.seconds);
    match timed(running, row, options.size << 20, time, seed) {
        Ok(measurement) => entrant.cells[index].rounds.push(measurement),
        Err(_) if kernel::interrupted() => bail!("interrupted"),
        Err(error) => {
            let why = format!(
                "{}: {error:#}: {}",
                row.name(),
                running.processes.last_words()
            );
            skip(&entrant.contender.name, why, skipped);
            entrant.running = None;
        }
    }
    Ok(())
}

fn timed(
    running: &mut Running,
    row: Row,
    bytes: u64,
    time: Duration,
    seed: u64,
) -> Result<Measurement> {
    let Running { link, processes } = running;
    let mut load = Load::new(&mut **link, row, bytes / SECTOR, seed);
    load.run(Until::Elapsed(WARM))?;
    let cpu = processes.cpu_seconds()?;
    let start = Instant::now();
    let times = load.run(Until::Elapsed(time))?;
    let seconds = start.elapsed().as_secs_f64();
    let cpu_after = processes.cpu_seconds()?;
    load.drain()?;
    let count = times.count() as f64;
    let each = |of: fn(CpuSeconds) -> f64| {
        let (before, after) = cpu.zip(cpu_after)?;
        Some((of(after) - of(before)) / count * 1e6)
    };
    Ok(Measurement {
        iops: count / seconds,
        mb_per_second: count * row.len as f64 / seconds / 1e6,
        p50_us: times.quantile(0.5) / 1e3,
        p99_us: times.quantile(0.99) / 1e3,
        cpu_us: each(|cpu| cpu.all),
        device_cpu_us: each(|cpu| cpu.device),
    })
}

fn count(entrants: &mut [Entrant], setup: &Setup, rows: &[Row]) -> Result<()> {
    progress("counting system calls and copied bytes");
    for (at, entrant) in entrants.iter_mut().enumerate() {
        // One after the other: a socket takes one front-end at a time.
        if entrant.running.take().is_none() {
            continue;
        }
        for (row, cell) in rows.iter().zip(&mut entrant.cells) {
            ensure!(!kernel::interrupted(), "interrupted");
            match counting::count(
                &entrant.contender,
                setup,
                *row,
                &format!("{at}-{}", row.name()),
            ) {
                Ok(counts) => cell.counts = counts,
                Err(_) if kernel::interrupted() => bail!("interrupted"),
                Err(error) => progress(&format!(
                    "NOT COUNTED {} {}: {error:#}",
                    entrant.contender.name, cell.row
                )),
            }
        }
    }
    Ok(())
}

/// Those of which a name is given: the whole name, or, where none has it, a part.
fn choose<T>(all: Vec<T>, name: impl Fn(&T) -> String, wanted: &[String]) -> Vec<T> {
    let names: Vec<String> = all.iter().map(&name).collect();
    let matches = |name: &String| {
        wanted.is_empty()
            || wanted.iter().any(|wanted| {
                if names.contains(wanted) {
                    name == wanted
                } else {
                    name.contains(wanted.as_str())
                }
            })
    };
    all.into_iter()
        .filter(|item| matches(&name(item)))
        .collect()
}

fn contenders(options: &Options) -> Result<Vec<Contender>> {
    let mut all = contender::all();
    for (name, path) in &options.socket {
        ensure!(
            all.iter().all(|contender| contender.name != *name),
            "there are two contenders '{name}'"
        );
        let pids = options.pid.iter().filter(|(of, _)| of == name);
        all.push(Contender {
            name: name.clone(),
            kind: Kind::Socket(path.clone(), pids.map(|(_, pid)| *pid).collect()),
        });
    }
    for (name, _) in &options.pid {
        ensure!(
            options.socket.iter().any(|(socket, _)| socket == name),
            "--pid {name}=…: there is no --socket {name}=…"
        );
    }
    Ok(choose(
        all,
        |contender| contender.name.clone(),
        &options.only,
    ))
}

fn setup(options: &Options, directory: &Path) -> Result<Setup> {
    let vhost_nvmf = match (&options.vhost_nvmf, std::env::var_os("VHOST_NVMF_BIN")) {
        (Some(path), _) => path.clone(),
        (None, Some(path)) => PathBuf::from(path),
        (None, None) => std::env::current_exe()?.with_file_name("vhost-nvmf"),
    };
    Ok(Setup {
        vhost_nvmf,
        qsd: options.qemu_storage_daemon.clone(),
        directory: directory.to_owned(),
        file: directory.join("disk.img"),
        size: options.size << 20,
    })
}

/// Writes all of the file, so that it is allocated and in the page cache, and waits until it is on the disk.
fn write_file(path: &Path, size: u64) -> Result<()> {
    let mut file = File::create_new(path)?;
    let bytes = vec![0xa5; 1 << 20];
    for _ in 0..size >> 20 {
        file.write_all(&bytes).context("the file for the disks")?;
    }
    Ok(file.sync_all()?)
}

fn machine() -> Result<Machine> {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let processor = processor
        .lines()
        .find_map(|line| line.strip_prefix("model name"));
    let load = fs::read_to_string("/proc/loadavg")?;
    let memory = rustix::system::sysinfo();
    Ok(Machine {
        kernel: rustix::system::uname()
            .release()
            .to_string_lossy()
            .into_owned(),
        processor: processor
            .map_or("processors", |name| name.trim_matches([':', ' ', '\t']))
            .to_owned(),
        processors: std::thread::available_parallelism()?.get(),
        memory_mib: (memory.totalram as u64 * u64::from(memory.mem_unit)) >> 20,
        load_average: load.split(' ').next().unwrap_or_default().parse()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_name_is_preferred_to_parts_of_others() {
        let chosen = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|w| (*w).to_owned()).collect();
            let rows = choose(rows::all(), Row::name, &wanted);
            rows.iter().map(Row::name).collect::<Vec<_>>()
        };
        assert_eq!(chosen(&[]).len(), 10);
        assert_eq!(chosen(&["randread-4k-d1"]), ["randread-4k-d1"]);
        assert_eq!(chosen(&["randread-4k-d1", "128k"]).len(), 3);
        assert!(chosen(&["x"]).is_empty());
    }
}
