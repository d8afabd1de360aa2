//! The Unix socket that a VMM connects to: made where nobody else listens, removed at the end.

use std::fs::Permissions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::limits::{SOCKET_BACKLOG, SOCKET_PATH_MAX};

/// Who may connect to a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Access {
    /// Permission bits; `None` leaves them to the process's mask.
    pub(crate) mode: Option<u32>,
    /// Number of the user that it belongs to, if not to that of the process.
    pub(crate) owner: Option<u32>,
    /// The same of a group.
    pub(crate) group: Option<u32>,
}

/// A path that is ours as long as this value lives: it is unlinked on drop, unless another process
/// has put its own socket there since.
#[derive(Debug)]
pub(crate) struct SocketPath {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// It is another process's.
    left: bool,
}

/// Why there can be no socket at a path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketError {
    /// Longer than an address can be.
    #[error(
        "socket path '{}' has {len} bytes, and at most {SOCKET_PATH_MAX} are possible; choose a \
         shorter one, such as /run/disk.sock", .path.display()
    )]
    TooLong {
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// Its directory does not exist.
    #[error("socket path '{}': the directory '{}' does not exist; create it", .path.display(), .directory.display())]
    NoDirectory {
        /// The path.
        path: PathBuf,
        /// The directory.
        directory: PathBuf,
    },
    /// Something that is not a socket is there.
    #[error("socket path '{}' exists and is not a socket; choose another path, or remove it", .0.display())]
    NotASocket(PathBuf),
    /// Another process has it.
    #[error("socket path '{}' is in use by another process; choose another path, or end that process", .0.display())]
    InUse(PathBuf),
    /// It cannot be given to whom it is to belong to.
    #[error(
        "cannot give the socket '{}' to user and group {owner}:{group}: {source}; start as root, or choose a group \
         that this user is in", .path.display()
    )]
    Owner {
        /// The path.
        path: PathBuf,
        /// The user, or nothing.
        owner: String,
        /// The group, or nothing.
        group: String,
        /// What the system said.
        source: io::Error,
    },
    /// The system said no.
    #[error("cannot make the socket '{}'", .path.display())]
    Io {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Listens at `path`. A socket that a dead process left there is replaced.
///
/// # Errors
/// [`SocketError`]; nothing was changed then.
pub(crate) fn listen(
    path: &Path,
    access: &Access,
) -> Result<(UnixListener, SocketPath), SocketError> {
    let (socket, path) = listen_for(SocketType::STREAM, path, access)?;
    Ok((socket.into(), path))
}

/// The same, for connections of another kind.
///
/// # Errors
/// [`SocketError`]; nothing was changed then.
pub(crate) fn listen_for(
    kind: SocketType,
    path: &Path,
    access: &Access,
) -> Result<(OwnedFd, SocketPath), SocketError> {
    check_form(path)?;
    let io = |source: io::Error| SocketError::Io {
        path: path.to_owned(),
        source,
    };
    let path = &std::path::absolute(path).map_err(io)?;
    let socket = match bind(kind, path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            bind(kind, path)
        }
        other => other,
    };
    let socket = match socket {
        Ok(socket) => socket,
        // Another process was quicker.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            return Err(SocketError::InUse(path.to_owned()));
        }
        Err(error) => return Err(io(error)),
    };
    let guard = SocketPath::of(path).map_err(io)?;
    // Nobody can connect before it listens, so nobody does who may not.
    give(path, access)?;
    rustix::net::listen(&socket, SOCKET_BACKLOG).map_err(|error| io(error.into()))?;
    Ok((socket, guard))
}

fn bind(kind: SocketType, path: &Path) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// Sets who may connect.
fn give(path: &Path, access: &Access) -> Result<(), SocketError> {
    let Access { mode, owner, group } = *access;
    if owner.is_some() || group.is_some() {
        std::os::unix::fs::chown(path, owner, group).map_err(|source| SocketError::Owner {
            path: path.to_owned(),
            owner: owner.map(|id| id.to_string()).unwrap_or_default(),
            group: group.map(|id| id.to_string()).unwrap_or_default(),
            source,
        })?;
    }
    let mode = mode.map(Permissions::from_mode);
    let set = mode.map_or(Ok(()), |mode| std::fs::set_permissions(path, mode));
    set.map_err(|source| SocketError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Checks what can be known about the path of a socket without looking for the socket.
///
/// # Errors
/// [`SocketError`].
pub(crate) fn check_form(path: &Path) -> Result<(), SocketError> {
    let len = path.as_os_str().len();
    if len > SOCKET_PATH_MAX {
        let path = path.to_owned();
        return Err(SocketError::TooLong { path, len });
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if directory.is_dir() {
        return Ok(());
    }
    Err(SocketError::NoDirectory {
        path: path.to_owned(),
        directory: directory.to_owned(),
    })
}

/// Removes a socket that nobody holds any more.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let io = |source| SocketError::Io {
        path: path.to_owned(),
        source,
    };
    let before = match path.symlink_metadata() {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
    };
    if !before.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    // A datagram socket cannot connect to a listener, so a living one is told from a dead one
    // without disturbing it, and without waiting for it to accept.
    let probe = UnixDatagram::unbound().map_err(io)?;
    match probe.connect(path).map_err(|error| error.kind()) {
        Err(io::ErrorKind::ConnectionRefused) => {}
        Err(io::ErrorKind::NotFound) => return Ok(()),
        Err(io::ErrorKind::PermissionDenied) => {
            return Err(io(io::ErrorKind::PermissionDenied.into()));
        }
        Ok(()) | Err(_) => return Err(SocketError::InUse(path.to_owned())),
    }
    match path.symlink_metadata() {
        Ok(now) if (now.dev(), now.ino()) == (before.dev(), before.ino()) => {
            tracing::debug!(path = %path.display(), "replacing the socket of a dead process");
            std::fs::remove_file(path).map_err(io)
        }
        _ => Err(SocketError::InUse(path.to_owned())),
    }
}

impl SocketPath {
    /// The socket that is at `path`, which is absolute.
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = path.symlink_metadata()?;
        Ok(Self {
            path: path.to_owned(),
            device: metadata.dev(),
            inode: metadata.ino(),
            left: false,
        })
    }

    /// The same, where another process has made it, and leaves it to this one.
    ///
    /// # Errors
    /// [`SocketError::Io`]: it is not there.
    pub(crate) fn of_socket(path: &Path) -> Result<Self, SocketError> {
        Self::of(path).map_err(|source| SocketError::Io {
            path: path.to_owned(),
            source,
        })
    }

    /// Leaves it to another process.
    pub(crate) fn leave(&mut self) {
        self.left = true;
    }

    /// The path, absolute.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for SocketPath {
    fn drop(&mut self) {
        let ours = self
            .path
            .symlink_metadata()
            .is_ok_and(|now| (now.dev(), now.ino()) == (self.device, self.inode));
        if ours
            && !self.left
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(
                "cannot remove the socket '{}': {error}",
                self.path.display()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    const ANY: Access = Access {
        mode: None,
        owner: None,
        group: None,
    };

    #[test]
    fn a_socket_has_the_mode_and_the_group_that_it_is_to_have() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let group = rustix::process::getegid().as_raw();
        for mode in [0o600, 0o660, 0o666] {
            let access = Access {
                mode: Some(mode),
                owner: None,
                group: Some(group),
            };
            let (_listener, _guard) = listen(&path, &access).unwrap();
            let metadata = path.metadata().unwrap();
            assert_eq!(metadata.mode() & 0o7777, mode);
            assert_eq!(metadata.gid(), group);
        }
    }

    #[test]
    fn a_vmm_can_connect_until_the_path_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let (listener, guard) = listen(&path, &ANY).unwrap();
        let vmm = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        drop(vmm);
        assert_eq!(guard.path(), path);
        drop(guard);
        assert!(!path.exists());
    }

    #[test]
    fn a_living_listener_is_left_alone_and_sees_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let (listener, _guard) = listen(&path, &ANY).unwrap();
        assert!(matches!(listen(&path, &ANY), Err(SocketError::InUse(_))));
        listener.set_nonblocking(true).unwrap();
        let nobody = listener.accept().unwrap_err();
        assert_eq!(nobody.kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_dead_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        drop(UnixListener::bind(&path).unwrap());
        let (_listener, _guard) = listen(&path, &ANY).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_not_a_socket_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::write(&path, "data").unwrap();
        assert!(matches!(
            listen(&path, &ANY),
            Err(SocketError::NotASocket(_))
        ));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        assert!(matches!(
            listen(&link, &ANY),
            Err(SocketError::NotASocket(_))
        ));
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }

    #[test]
    fn a_path_that_cannot_be_bound_is_named_before_anything_happens() {
        let directory = tempfile::tempdir().unwrap();
        let missing = directory.path().join("missing/disk.sock");
        assert!(matches!(
            listen(&missing, &ANY),
            Err(SocketError::NoDirectory { .. })
        ));
        let long = Path::new("/").join("x".repeat(107));
        assert!(matches!(
            listen(&long, &ANY),
            Err(SocketError::TooLong { len: 108, .. })
        ));
    }

    #[test]
    fn the_socket_of_a_successor_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.sock");
        let (_old, guard) = listen(&path, &ANY).unwrap();
        let moved = directory.path().join("moved");
        std::fs::rename(&path, &moved).unwrap();
        let (_new, _kept) = listen(&path, &ANY).unwrap();
        drop(guard);
        assert!(path.exists() && moved.exists());
    }
}
