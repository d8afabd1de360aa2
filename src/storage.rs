//! Opens what stores a namespace's blocks, and says at the end what was done with it.

use std::sync::Arc;

use nvmf::backend::{
    Backend, Counts, FaultBackend, FileBackend, NullBackend, NullError, OpenError, PowerCutBackend,
    RamBackend, RamError,
};
use nvmf::controller::Subsystem;

use crate::config::{NamespaceConfig, PowerCut, Storage};

/// Why storage cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StorageError {
    /// A file cannot be used.
    #[error(transparent)]
    File(#[from] OpenError),
    /// Memory cannot be had.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Nothing of that size.
    #[error(transparent)]
    Null(#[from] NullError),
}

/// Opens the storage of a namespace.
///
/// # Errors
/// [`StorageError`] as one line.
pub(crate) fn open(namespace: &NamespaceConfig) -> Result<Arc<dyn Backend>, StorageError> {
    open_as(namespace, false)
}

/// The same, while another process has it that hands it over.
///
/// # Errors
/// [`StorageError`] as one line.
pub(crate) fn open_beside(namespace: &NamespaceConfig) -> Result<Arc<dyn Backend>, StorageError> {
    open_as(namespace, true)
}

fn open_as(namespace: &NamespaceConfig, beside: bool) -> Result<Arc<dyn Backend>, StorageError> {
    let block_size = namespace.block_size.bytes();
    let mut backend: Arc<dyn Backend> = match &namespace.storage {
        Storage::File {
            path,
            read_only,
            direct,
        } if beside => Arc::new(FileBackend::open_beside(
            path, block_size, *read_only, *direct,
        )?),
        Storage::File {
            path,
            read_only,
            direct: false,
        } => Arc::new(FileBackend::open(path, block_size, *read_only)?),
        Storage::File {
            path,
            read_only,
            direct: true,
        } => Arc::new(FileBackend::open_direct(path, block_size, *read_only)?),
        Storage::Ram { size } => Arc::new(RamBackend::new(size.bytes(), block_size)?),
        Storage::Null { size } => Arc::new(NullBackend::new(size.bytes(), block_size)?),
    };
    if let Some(PowerCut { size, seed }) = namespace.powercut {
        tracing::warn!(
            "{namespace} loses what was not flushed when this process is killed: it has powercut"
        );
        backend = Arc::new(PowerCutBackend::new(backend, size.bytes(), seed));
    }
    if !namespace.faults.is_empty() {
        tracing::warn!(
            rules = namespace.faults.len(),
            "{namespace} fails on purpose: it has fault="
        );
        backend = Arc::new(FaultBackend::new(backend, namespace.faults.iter().cloned()));
    }
    Ok(backend)
}

/// Logs the counters of every namespace.
pub(crate) fn log_counts(subsystem: &Subsystem) {
    for namespace in subsystem.namespaces() {
        log(namespace.nsid(), namespace.backend().counters().read());
    }
}

fn log(nsid: u32, counts: Counts) {
    let Counts {
        reads,
        writes,
        fua_writes,
        flushes,
        write_zeroes,
        deallocates,
        read_bytes,
        written_bytes,
        copied_bytes,
        errors,
    } = counts;
    tracing::info!(
        nsid,
        reads,
        writes,
        fua_writes,
        flushes,
        write_zeroes,
        deallocates,
        read_bytes,
        written_bytes,
        copied_bytes,
        errors,
        "namespace counters"
    );
}
