//! The disks of a test, and where their storage is: behind `export`, each brought by an `attach`, or behind a `serve` each.

use std::path::PathBuf;

use anyhow::Result;
use guest_tests::{Attach, AttachOptions, Disk, DiskCounters, Export, NamespaceCounters};
use tempfile::TempDir;

use crate::cases::Configured;

/// Where storage is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Behind an NVMe/TCP controller.
    Remote,
    /// In the process that serves the disk.
    Local,
}

impl Storage {
    /// `,direct` where it belongs to the test: direct I/O meets the guest's own pages only without a network in between.
    pub(crate) fn direct(self) -> &'static str {
        match self {
            Self::Remote => "",
            Self::Local => ",direct",
        }
    }
}

/// A disk to be made.
pub(crate) struct Wanted {
    /// What it is made of, as `export` and `serve` understand it.
    pub(crate) spec: String,
    /// What the guest has to see.
    pub(crate) seen: Configured,
    pub(crate) read_only: bool,
}

/// Disks, in the order in which they were wanted.
pub(crate) struct Disks {
    export: Option<Export>,
    attached: Vec<Attach>,
    queues: Vec<u16>,
    /// Holds the sockets.
    _directory: TempDir,
}

impl Disks {
    pub(crate) fn start(storage: Storage, wanted: &[Wanted]) -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let export = match storage {
            Storage::Remote => {
                let specs: Vec<&str> = wanted.iter().map(|it| it.spec.as_str()).collect();
                Some(Export::start(&specs)?)
            }
            Storage::Local => None,
        };
        let mut attached = Vec::new();
        for (
            index,
            Wanted {
                spec,
                seen,
                read_only,
            },
        ) in wanted.iter().enumerate()
        {
            let socket = directory.path().join(format!("{}.sock", seen.serial));
            let options = AttachOptions {
                num_queues: Some(seen.queues),
                serial: Some(seen.serial.to_owned()),
                read_only: *read_only,
                ..AttachOptions::default()
            };
            attached.push(match &export {
                Some(export) => Attach::start(&socket, &export.uris[index], &options)?,
                None => Attach::serve(&socket, spec, &options)?,
            });
        }
        Ok(Self {
            export,
            attached,
            queues: wanted.iter().map(|it| it.seen.queues).collect(),
            _directory: directory,
        })
    }

    /// For [`guest_tests::GuestOptions`].
    pub(crate) fn to_boot_with(&self) -> Vec<Disk> {
        let sockets = self.attached.iter().map(|it| it.socket.clone());
        let disks = sockets.zip(&self.queues);
        disks
            .map(|(socket, &queues): (PathBuf, _)| Disk { socket, queues })
            .collect()
    }

    /// The process that serves a disk.
    pub(crate) fn process(&mut self, index: usize) -> &mut Attach {
        &mut self.attached[index]
    }

    /// Ends all processes, each of which has to end cleanly and in time.
    pub(crate) fn stop(&mut self) -> Result<String> {
        for attach in &mut self.attached {
            attach.stop()?;
        }
        if let Some(export) = &mut self.export {
            export.stop()?;
        }
        let processes = self.attached.len() + usize::from(self.export.is_some());
        Ok(format!("{processes} processes"))
    }

    /// What was counted for a disk, after [`Disks::stop`].
    pub(crate) fn counters(&self, index: usize) -> Result<DiskCounters> {
        self.attached[index].counters()
    }

    /// What was counted for a disk's storage, after [`Disks::stop`].
    pub(crate) fn storage_counters(&self, index: usize) -> Result<NamespaceCounters> {
        match &self.export {
            Some(export) => export.counters(u32::try_from(index)? + 1),
            None => self.attached[index].storage_counters(),
        }
    }
}
