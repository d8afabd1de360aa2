//! `make bench`: measures vhost-user-blk back-ends over their sockets, all of them in one run.

mod bell;
mod calibration;
mod child;
mod contender;
mod counting;
mod hop;
mod kernel;
mod link;
mod load;
mod memory;
mod options;
mod placement;
mod relay;
mod results;
mod rows;
mod run;
mod split_ring;
mod statistics;
mod table;
mod vhost_disk;

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser as _;

use options::{Options, Part};
use table::Style;

fn main() -> ExitCode {
    match start(Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            progress(&format!("bench: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn start(options: Options) -> Result<()> {
    match &options.part {
        Some(Part::Relay { memory, responder }) => return relay::relay(memory, *responder),
        Some(Part::Responder) => return relay::responder(),
        None => {}
    }
    if options.list {
        let contenders = contender::all();
        let contenders: Vec<&str> = contenders.iter().map(|c| c.name.as_str()).collect();
        let rows: Vec<String> = rows::all().iter().map(rows::Row::name).collect();
        let text = format!(
            "contenders: {}\nrows: {}\n",
            contenders.join(" "),
            rows.join(" ")
        );
        return Ok(io::stdout().write_all(text.as_bytes())?);
    }
    kernel::catch_signals();
    let results = run::run(&options)?;
    if let Some(path) = &options.json {
        let mut json = serde_json::to_value(&results)?;
        json["goals"] = serde_json::to_value(results.goals())?;
        let json = serde_json::to_string_pretty(&json)?;
        std::fs::write(path, json + "\n").with_context(|| format!("{}", path.display()))?;
    }
    let style = if options.markdown {
        Style::Markdown
    } else {
        Style::Aligned
    };
    let text = table::render(&results, style);
    Ok(io::stdout().write_all(text.as_bytes())?)
}

/// Says something to whoever watches the run.
fn progress(text: &str) {
    // Nobody has to watch.
    let _ = writeln!(io::stderr(), "{text}");
}
