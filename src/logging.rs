//! The log: lines or JSON objects on standard error.

use clap::ValueEnum;
use tracing::level_filters::LevelFilter;

/// What is logged, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LogOptions {
    /// The least severe level that is shown.
    pub(crate) level: LevelFilter,
    /// How a line looks.
    pub(crate) format: LogFormat,
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum LogFormat {
    // No documentation comments here: they would make the help of every command three pages long.
    #[default]
    Text,
    Json,
}

/// Starts logging; once, at the start of the process. Standard output stays free for what a command
/// prints, and no escape codes are written, so that a log reads the same everywhere.
pub(crate) fn start(options: LogOptions) {
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(options.level)
        .with_target(options.level > LevelFilter::INFO)
        .with_ansi(false);
    match options.format {
        LogFormat::Text => subscriber.init(),
        LogFormat::Json => subscriber.json().init(),
    }
}
