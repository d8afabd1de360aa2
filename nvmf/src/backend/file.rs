//! A raw image file, or a block device, as a namespace.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::job::{Job, Target};
use super::{Backend, BackendIo, BackendOp, Counters, Geometry};

/// How long a file may be in use by a process that has ended.
const IN_USE: Duration = Duration::from_secs(1);

/// What a device may ask of direct I/O, in bytes: its logical blocks.
const ALIGNMENTS: [usize; 2] = [512, 4096];

/// A file whose bytes are the namespace's, from the first to the last.
#[derive(Debug)]
pub struct FileBackend {
    target: Arc<Target>,
    /// As it was opened.
    geometry: Geometry,
    /// Blocks now.
    block_count: AtomicU64,
}

/// Why a file cannot be a namespace. Each message is one line and says what to do.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum OpenError {
    #[error("{0}: no such file; create it first, for example: truncate -s 10G {0}")]
    NotFound(PathBuf),
    #[error("{path}: permission denied; {fix}")]
    Permission { path: PathBuf, fix: &'static str },
    #[error("{0}: is a directory; name an image file or a block device")]
    Directory(PathBuf),
    #[error("{0}: is neither a regular file nor a block device")]
    Kind(PathBuf),
    #[error("{0}: is empty; give it a size, for example: truncate -s 10G {0}")]
    Empty(PathBuf),
    #[error(
        "{path}: its size of {size} bytes is not a multiple of the block size {block_size}; \
         extend it with: truncate -s %{block_size} {path}"
    )]
    Size {
        path: PathBuf,
        size: u64,
        block_size: u32,
    },
    #[error("block size {0} is not supported; it is 512 or 4096")]
    BlockSize(u32),
    #[error("{path}: {what}; export it in one place only, or read-only (,ro) everywhere")]
    InUse { path: PathBuf, what: &'static str },
    #[error("{0}: is on a read-only file system; export it read-only (,ro)")]
    ReadOnlyFileSystem(PathBuf),
    #[error("{0}: its file system has no direct I/O; leave ',direct' out")]
    NoDirect(PathBuf),
    #[error(
        "{path}: direct I/O needs blocks of {needed} bytes there; use block-size={needed}, or leave \
         ',direct' out"
    )]
    DirectBlocks { path: PathBuf, needed: usize },
    #[error("{path}: {error}")]
    Io { path: PathBuf, error: io::Error },
}

impl FileBackend {
    /// Opens and locks a file: exclusively, or shared when `read_only`. The lock is advisory
    /// (`flock`) and goes with the backend.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path, block_size: u32, read_only: bool) -> Result<Self, OpenError> {
        Self::open_with(path, block_size, read_only, false, Locking::Now)
    }

    /// As [`Self::open`], past the page cache. Memory that the device does not take as it is goes
    /// through memory that it takes; [`super::Counts::copied_bytes`] tells how much.
    ///
    /// # Errors
    /// [`OpenError`], also when the device has larger blocks than `block_size`.
    pub fn open_direct(path: &Path, block_size: u32, read_only: bool) -> Result<Self, OpenError> {
        Self::open_with(path, block_size, read_only, true, Locking::Now)
    }

    /// As [`Self::open`] or, when `direct`, [`Self::open_direct`], while another process still has the file that hands
    /// it over to this one: it is locked as soon as that process lets go of it. A block device is not kept from being
    /// mounted meanwhile, nor later.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open_beside(
        path: &Path,
        block_size: u32,
        read_only: bool,
        direct: bool,
    ) -> Result<Self, OpenError> {
        Self::open_with(path, block_size, read_only, direct, Locking::Later)
    }

    fn open_with(
        path: &Path,
        block_size: u32,
        read_only: bool,
        direct: bool,
        locking: Locking,
    ) -> Result<Self, OpenError> {
        if !matches!(block_size, 512 | 4096) {
            return Err(OpenError::BlockSize(block_size));
        }
        let failed = |error| open_error(path, read_only, error);
        // Looked at before it is opened: opening a FIFO would wait for its other end.
        let kind = Kind::of(&std::fs::metadata(path).map_err(failed)?, path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only);
        // O_EXCL is refused by the kernel while the device is mounted or otherwise taken.
        let exclusive = kind == Kind::BlockDevice && !read_only && locking == Locking::Now;
        options.custom_flags(
            if exclusive { libc::O_EXCL } else { 0 } | if direct { libc::O_DIRECT } else { 0 },
        );
        let open = || match options.open(path) {
            Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
                Err(OpenError::NoDirect(path.to_owned()))
            }
            other => other.map_err(failed),
        };
        let mut file = match locking {
            Locking::Now => patiently(|| {
                let file = open()?;
                lock(&file, path, read_only)?;
                Ok(file)
            })?,
            Locking::Later => {
                let file = open()?;
                lock_later(&file, read_only).map_err(failed)?;
                file
            }
        };
        let size = file.seek(SeekFrom::End(0)).map_err(failed)?;
        if size == 0 {
            return Err(OpenError::Empty(path.to_owned()));
        }
        if !size.is_multiple_of(u64::from(block_size)) {
            return Err(OpenError::Size {
                path: path.to_owned(),
                size,
                block_size,
            });
        }
        let alignment = match direct {
            true => Some(alignment(&file, path, block_size)?),
            false => None,
        };
        Ok(Self {
            target: Arc::new(Target {
                file,
                alignment,
                counters: Counters::default(),
            }),
            block_count: AtomicU64::new(size / u64::from(block_size)),
            geometry: Geometry {
                block_size,
                block_count: size / u64::from(block_size),
                read_only,
                deallocate: !read_only,
                deallocated_reads_zeroes: true,
                volatile_cache: !read_only,
            },
        })
    }
}

/// What direct I/O asks of offsets, lengths and addresses. Found out by trying: what kernels tell
/// differs by version and file system.
fn alignment(file: &File, path: &Path, block_size: u32) -> Result<usize, OpenError> {
    for alignment in ALIGNMENTS {
        let mut memory = vec![0; 2 * alignment];
        let start = memory.as_ptr().align_offset(alignment).min(alignment);
        match file.read_at(&mut memory[start..start + alignment], 0) {
            Ok(_) if alignment as u64 > u64::from(block_size) => {
                return Err(OpenError::DirectBlocks {
                    path: path.to_owned(),
                    needed: alignment,
                });
            }
            Ok(_) => return Ok(alignment),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
            Err(error) => return Err(open_error(path, true, error)),
        }
    }
    Err(OpenError::NoDirect(path.to_owned()))
}

/// When a file is locked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Locking {
    /// When it is opened, or it is an error.
    Now,
    /// When whoever has locked it lets go.
    Later,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Regular,
    BlockDevice,
}

impl Kind {
    fn of(metadata: &Metadata, path: &Path) -> Result<Self, OpenError> {
        let kind = metadata.file_type();
        if kind.is_dir() {
            Err(OpenError::Directory(path.to_owned()))
        } else if kind.is_file() {
            Ok(Self::Regular)
        } else if kind.is_block_device() {
            Ok(Self::BlockDevice)
        } else {
            Err(OpenError::Kind(path.to_owned()))
        }
    }
}

/// Attempts it again for a while where the file is in use: a process that was killed holds it, and its lock, until the
/// device has completed what it had begun. Whoever gets the lock knows that nothing of that comes any more.
fn patiently<T>(mut attempt: impl FnMut() -> Result<T, OpenError>) -> Result<T, OpenError> {
    let end = Instant::now() + IN_USE;
    loop {
        match attempt() {
            Err(OpenError::InUse { .. }) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(2));
            }
            other => return other,
        }
    }
}

/// Waits for the lock in a thread of its own; the lock is then that of `file`, whose description they share.
fn lock_later(file: &File, shared: bool) -> io::Result<()> {
    let file = file.try_clone()?;
    let thread = std::thread::Builder::new().name("lock".to_owned());
    thread.spawn(move || {
        let locked = if shared {
            file.lock_shared()
        } else {
            file.lock()
        };
        if let Err(error) = locked {
            tracing::warn!(%error, "a file that was taken over cannot be locked");
        }
    })?;
    Ok(())
}

fn lock(file: &File, path: &Path, shared: bool) -> Result<(), OpenError> {
    let locked = if shared {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    match locked {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(OpenError::InUse {
            path: path.to_owned(),
            what: if shared {
                "someone has it open for writing"
            } else {
                "someone else has it locked"
            },
        }),
        // Some network file systems have no locks. That is no reason to refuse the image.
        Err(TryLockError::Error(error)) => {
            tracing::warn!("{}: cannot be locked: {error}", path.display());
            Ok(())
        }
    }
}

fn open_error(path: &Path, read_only: bool, error: io::Error) -> OpenError {
    let path = path.to_owned();
    match error.raw_os_error() {
        Some(libc::ENOENT) => OpenError::NotFound(path),
        Some(libc::EACCES | libc::EPERM) => OpenError::Permission {
            path,
            fix: if read_only {
                "it must be readable for this user"
            } else {
                "make it writable for this user, or export it read-only (,ro)"
            },
        },
        Some(libc::EISDIR) => OpenError::Directory(path),
        Some(libc::EROFS) => OpenError::ReadOnlyFileSystem(path),
        Some(libc::EBUSY) => OpenError::InUse {
            path,
            what: "the device is mounted or otherwise in use",
        },
        _ => OpenError::Io { path, error },
    }
}

impl Backend for FileBackend {
    fn geometry(&self) -> Geometry {
        Geometry {
            block_count: self.block_count.load(Relaxed),
            ..self.geometry
        }
    }

    fn counters(&self) -> &Counters {
        &self.target.counters
    }

    fn submit(&self, io: &mut BackendIo, op: BackendOp, token: u32) {
        if let Err(status) = op.check(&self.geometry()) {
            self.target.counters.count_error();
            return io.finish(token, op.into_transfer(), Err(status));
        }
        io.push(Job::new(Arc::clone(&self.target), op, token));
    }

    fn grow(&self) -> io::Result<bool> {
        // All I/O says where: the position that this moves is nobody's.
        let size = (&self.target.file).seek(SeekFrom::End(0))?;
        let blocks = size / u64::from(self.geometry.block_size);
        Ok(self.block_count.fetch_max(blocks, Relaxed) < blocks)
    }

    fn sync(&self) -> io::Result<()> {
        if self.geometry.read_only {
            return Ok(());
        }
        self.target.file.sync_data()
    }
}
