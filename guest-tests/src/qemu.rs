//! Which QEMU the guests run on, and what that one can do.

use std::ffi::OsString;
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

/// QEMU: `VHOST_NVMF_QEMU`, or this machine's.
pub fn qemu_program() -> OsString {
    std::env::var_os("VHOST_NVMF_QEMU").unwrap_or_else(|| "qemu-system-x86_64".into())
}

/// Its version, major and minor.
///
/// # Errors
/// When it does not run, or says something else.
pub fn qemu_version() -> Result<(u32, u32)> {
    static VERSION: OnceLock<Result<(u32, u32), String>> = OnceLock::new();
    VERSION
        .get_or_init(|| ask().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!("the version of {}: {error}", qemu_program().display()))
}

/// Has a `-chardev socket` look for its other end once a second when that is gone: the option's name depends on the version.
///
/// # Errors
/// As [`qemu_version`].
pub fn reconnect_each_second() -> Result<&'static str> {
    Ok(match qemu_version()? >= (9, 2) {
        true => "reconnect-ms=1000",
        false => "reconnect=1",
    })
}

fn ask() -> Result<(u32, u32)> {
    let said = Command::new(qemu_program()).arg("--version").output()?;
    ensure!(said.status.success(), "{}", said.status);
    let said = String::from_utf8_lossy(&said.stdout);
    parse(&said).with_context(|| format!("'{said}'"))
}

/// What `--version` prints, or nothing.
fn parse(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.strip_prefix("QEMU emulator version ")?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_what_qemu_prints() {
        let debian = "QEMU emulator version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)\nCopyright (c) 2003-2025\n";
        assert_eq!(parse(debian), Some((10, 0)));
        assert_eq!(parse("QEMU emulator version 7.2.22\n"), Some((7, 2)));
        assert_eq!(parse("QEMU emulator version 7\n"), None);
        assert_eq!(parse("command not found"), None);
    }
}
