//! What only the kernel knows of other processes: their CPU time and how often they called it. And signals.

#![expect(unsafe_code, reason = "system calls that no safe wrapper has")]

use std::fs;
use std::io::{self, Read as _};
use std::os::fd::FromRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn interrupt(_: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT and SIGTERM end nothing by themselves: [`interrupted`] tells of them.
pub(crate) fn catch_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        // SAFETY: all zero is a valid `sigaction`, and the handler only stores to an atomic.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = interrupt as *const () as usize;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

/// True once the user wants an end.
pub(crate) fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Has the kernel end a child when the bench ends, however that comes.
pub(crate) fn end_with_parent(command: &mut Command) -> &mut Command {
    // SAFETY: between fork and exec, `prctl` touches nothing but the process itself.
    unsafe {
        command.pre_exec(|| {
            match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }
}

/// User and system time of a process: all its threads, those that have ended too.
///
/// # Errors
/// There is no such process.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let gone = || format!("no CPU time of process {pid}");
    let pid = libc::pid_t::try_from(pid)?;
    let mut clock = 0;
    // SAFETY: `clock` is written to for the call only.
    let error = unsafe { libc::clock_getcpuclockid(pid, &raw mut clock) };
    if error != 0 {
        return Err(io::Error::from_raw_os_error(error)).with_context(gone);
    }
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is written to for the call only.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(io::Error::last_os_error()).with_context(gone);
    }
    Ok(Duration::new(
        time.tv_sec.try_into()?,
        time.tv_nsec.try_into()?,
    ))
}

/// The first version of `struct perf_event_attr`.
#[repr(C)]
struct PerfEventAttr {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    bp_type: u32,
    config1: u64,
}

const PERF_TYPE_TRACEPOINT: u32 = 2;
/// Threads that are made later are counted too.
const PERF_INHERIT: u64 = 1 << 1;

/// Counts the system calls of some processes while it lives. They are slower meanwhile: not for timed runs.
#[derive(Debug)]
pub(crate) struct SyscallCounter {
    counters: Vec<fs::File>,
}

impl SyscallCounter {
    /// Begins to count.
    ///
    /// # Errors
    /// This user may not, or the kernel has no tracepoints.
    pub(crate) fn start(pids: &[u32]) -> Result<Self> {
        let id = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
            .into_iter()
            .find_map(|at| {
                fs::read_to_string(format!("{at}/events/raw_syscalls/sys_enter/id")).ok()
            })
            .context("the tracepoint raw_syscalls:sys_enter cannot be read")?;
        let attr = PerfEventAttr {
            kind: PERF_TYPE_TRACEPOINT,
            size: size_of::<PerfEventAttr>() as u32,
            config: id.trim().parse()?,
            sample_period: 0,
            sample_type: 0,
            read_format: 0,
            flags: PERF_INHERIT,
            wakeup_events: 0,
            bp_type: 0,
            config1: 0,
        };
        let mut counters = Vec::new();
        for pid in pids {
            for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
                let name = thread?.file_name();
                let tid: libc::pid_t = name.to_string_lossy().parse()?;
                // SAFETY: the attributes are read for the call only, and as long as they say.
                let fd = unsafe {
                    libc::syscall(
                        libc::SYS_perf_event_open,
                        &raw const attr,
                        tid,
                        -1 as libc::c_int,
                        -1 as libc::c_int,
                        libc::c_ulong::from(1_u8 << 3), // PERF_FLAG_FD_CLOEXEC
                    )
                };
                if fd < 0 {
                    return Err(io::Error::last_os_error()).context("perf_event_open");
                }
                // SAFETY: a new descriptor that nothing else owns.
                counters.push(unsafe { fs::File::from_raw_fd(fd as libc::c_int) });
            }
        }
        Ok(Self { counters })
    }

    /// Calls since the start.
    ///
    /// # Errors
    /// A counter cannot be read.
    pub(crate) fn count(&mut self) -> Result<u64> {
        let mut sum = 0;
        for counter in &mut self.counters {
            let mut value = [0; 8];
            counter.read_exact(&mut value)?;
            sum += u64::from_ne_bytes(value);
        }
        Ok(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_time_of_a_process_grows_with_its_work() {
        let before = cpu_time(std::process::id()).expect("this process");
        let mut x = 1_u64;
        while cpu_time(std::process::id()).expect("this process") == before {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(cpu_time(u32::MAX / 2 - 1).is_err());
    }

    #[test]
    fn system_calls_are_counted_where_that_is_allowed() {
        let Ok(mut counter) = SyscallCounter::start(&[std::process::id()]) else {
            return;
        };
        let before = counter.count().expect("counted");
        for _ in 0..100 {
            let _ = rustix::process::getppid();
        }
        let after = counter.count().expect("counted");
        assert!(after >= before + 100, "{before} {after}");
    }
}
