//! What the log says at SIGUSR1 of the paths of a disk.

use super::Paths;
use super::path::Path;

impl Paths {
    /// Logs how each path is, and what holds requests up.
    pub(super) fn log_status(&self) {
        for path in &self.paths {
            path.log_status();
        }
        let now = self.now();
        let fences = self.fences.iter().filter(|fence| fence.deadline > now);
        let connected = self.paths.iter().filter(|path| path.association.is_some());
        tracing::info!(
            disk = self.name,
            paths = self.paths.len(),
            connected = connected.count(),
            lanes = self.usable,
            fences = fences.count(),
            "status: paths"
        );
    }
}

impl Path {
    fn log_status(&self) {
        let controller = self.association.as_ref().map(|it| it.controller());
        let target = self.way_back.as_ref().map(|way| way.target.to_string());
        tracing::info!(
            disk = self.disk,
            target,
            controller = controller.map(|controller| controller.address.to_string()),
            cntlid = controller.map(|controller| controller.cntlid),
            state = %self.state,
            access = controller.map(|_| self.access.to_string()),
            io_queues = controller.map(|_| self.pairs),
            "status: path"
        );
    }
}
