//! Moves rings from lanes that have no queue pair to lanes that have one, and back.
//!
//! A controller may grant fewer queue pairs than a disk has lanes. The first lanes have one each then; the rings of the
//! others would wait for ever, if no other path has more.

use std::sync::Arc;

use super::path::Path;
use super::{News, Paths};

impl Paths {
    /// Has rings run where there are queue pairs, if there are any. What takes its time runs beside.
    pub(super) fn spread(&mut self) {
        let of_use = |path: &&Path| path.association.is_some() && path.access.is_usable();
        let Some(pairs) = self
            .paths
            .iter()
            .filter(of_use)
            .map(|path| path.pairs)
            .max()
        else {
            // Wherever they are, they wait.
            return;
        };
        let usable = pairs.min(self.lanes.len());
        if usable == self.usable || usable == 0 || self.moving {
            return;
        }
        self.usable = usable;
        self.moving = true;
        tracing::info!(
            disk = self.name,
            lanes = usable,
            of = self.lanes.len(),
            "rings are spread over the lanes that have a queue pair"
        );
        let placement = Arc::clone(&self.placement);
        self.tasks.spawn(async move {
            // It blocks.
            let moved = tokio::task::spawn_blocking(move || placement.spread(usable));
            News::Moved(moved.await.unwrap_or(0))
        });
    }

    /// They run there.
    pub(super) fn moved(&mut self, moved: usize) {
        tracing::debug!(disk = self.name, rings = moved, "rings were moved");
        self.moving = false;
        // Things may have changed meanwhile.
        self.spread();
    }
}
