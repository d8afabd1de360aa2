//! What a guest boots from: kernel, root disk and initramfs out of `qemu-scripts/`, and the agent, built static and put into
//! the initramfs. Made once for each test process, and reused from `build/` when up to date.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};

use crate::cpio::Archive;
use crate::qemu::qemu_program;

/// Where everything is.
#[derive(Clone, Debug)]
pub(crate) struct Artifacts {
    pub(crate) kernel: PathBuf,
    pub(crate) root: PathBuf,
    /// The initramfs with the agent behind it.
    pub(crate) initramfs: Vec<u8>,
    /// QEMU's arguments for the accelerator and the processor.
    pub(crate) accelerator: Vec<String>,
}

/// Makes what is missing.
pub(crate) fn artifacts() -> Result<&'static Artifacts> {
    static ARTIFACTS: OnceLock<Result<Artifacts, String>> = OnceLock::new();
    ARTIFACTS
        .get_or_init(|| make().map_err(|error| format!("{error:#}")))
        .as_ref()
        .map_err(|error| anyhow!("preparing the guest: {error}"))
}

/// The workspace's directory.
pub(crate) fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// The daemon: `VHOST_NVMF_BIN`, or the workspace's release build, which is made when it is missing.
pub(crate) fn daemon_binary() -> Result<PathBuf> {
    static BUILT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    if let Some(binary) = std::env::var_os("VHOST_NVMF_BIN") {
        return Ok(binary.into());
    }
    BUILT
        .get_or_init(|| {
            let target = std::env::var_os("CARGO_TARGET_DIR")
                .map_or(workspace().join("target"), PathBuf::from);
            let binary = target.join("release/vhost-nvmf");
            if !binary.exists() {
                cargo(&["build", "--release", "-p", "vhost-nvmf"], &[])
                    .map_err(|error| format!("{error:#}"))?;
            }
            Ok(binary)
        })
        .clone()
        .map_err(|error| anyhow!("building vhost-nvmf: {error}"))
}

fn make() -> Result<Artifacts> {
    let scripts = workspace().join("qemu-scripts");
    let qemu = qemu_program();
    for tool in [&*qemu, "setpriv".as_ref(), "mke2fs".as_ref()] {
        let found = Command::new("sh")
            .args([
                "-c",
                "PATH=$PATH:/usr/sbin:/sbin command -v \"$0\" >/dev/null",
            ])
            .arg(tool)
            .status()?;
        if !found.success() {
            let tool = tool.display();
            bail!("{tool} is missing; 'make guest-test' installs what the guests need");
        }
    }
    run(&mut Command::new(scripts.join("prepare-guest")))?;
    let accelerator = run(&mut Command::new(scripts.join("accelerator")))?;

    let guest = workspace().join("build/guest");
    let agent = build_agent()?;
    let mut archive = Archive::new();
    archive.directory("run-files");
    for name in ["guest-agent", "seeded-data"] {
        let program = agent.join(name);
        let content = fs::read(&program).with_context(|| program.display().to_string())?;
        archive.program(&format!("run-files/{name}"), &content);
    }
    let mut initramfs = fs::read(guest.join("initramfs.cpio.gz"))?;
    // An uncompressed archive behind a compressed one starts at a multiple of four.
    initramfs.resize(initramfs.len().next_multiple_of(4), 0);
    initramfs.extend(archive.finish());
    Ok(Artifacts {
        kernel: guest.join("kernel"),
        root: guest.join("root.ext4"),
        initramfs,
        accelerator: accelerator.split_whitespace().map(str::to_owned).collect(),
    })
}

/// Builds the guest's programs static, so that they need nothing of the guest's userland.
fn build_agent() -> Result<PathBuf> {
    let target = workspace().join("build/agent");
    let triple = "x86_64-unknown-linux-gnu";
    let target_argument = target.display().to_string();
    cargo(
        &[
            "build",
            "--release",
            "-p",
            "guest-tests",
            "--bins",
            "--target",
            triple,
            "--target-dir",
            &target_argument,
        ],
        &[("RUSTFLAGS", "-C target-feature=+crt-static")],
    )?;
    Ok(target.join(triple).join("release"))
}

fn cargo(arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let program = std::env::var_os("CARGO").unwrap_or("cargo".into());
    let mut command = Command::new(program);
    command
        .current_dir(workspace())
        .arg("--quiet")
        .args(arguments);
    // Of the cargo that runs the tests.
    for name in ["RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS", "LLVM_PROFILE_FILE"] {
        command.env_remove(name);
    }
    command.envs(environment.iter().copied());
    run(&mut command).map(drop)
}

/// Runs a command to its end and returns its standard output.
fn run(command: &mut Command) -> Result<String> {
    let what = command.get_program().display().to_string();
    let output = command.output().with_context(|| what.clone())?;
    if !output.status.success() {
        bail!(
            "{what}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
