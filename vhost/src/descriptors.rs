//! The descriptors of a chain that is known by its head alone, because the available ring shows it no
//! more.

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMap;

/// Bytes in a descriptor.
const DESCRIPTOR: u32 = 16;

/// Walks one chain, through an indirect table if it has one. Ends before the chain does where that
/// cannot be followed, as the walk of a chain from the available ring does.
#[derive(Debug)]
pub(crate) struct Descriptors<'a> {
    map: &'a GuestMap,
    /// Guest address of the table.
    table: u64,
    /// Descriptors in the table.
    size: u16,
    next: u16,
    /// Descriptors that may still follow.
    left: u16,
    indirect: bool,
    /// Bytes that those had that were walked over.
    bytes: u32,
}

impl<'a> Descriptors<'a> {
    /// The chain that begins with descriptor `head` of the table at `table`, which has `size` of them.
    pub(crate) fn new(map: &'a GuestMap, table: u64, size: u16, head: u16) -> Self {
        Self {
            map,
            table,
            size,
            next: head,
            left: size,
            indirect: false,
            bytes: 0,
        }
    }

    /// Goes on with the table that `descriptor` names. Only the ring's own may name one.
    fn enter(&mut self, descriptor: Descriptor) -> Option<()> {
        let whole = descriptor.len().is_multiple_of(DESCRIPTOR);
        if self.indirect || !whole {
            return None;
        }
        self.size = u16::try_from(descriptor.len() / DESCRIPTOR).ok()?;
        self.table = descriptor.addr().0;
        self.next = 0;
        self.left = self.size;
        self.indirect = true;
        Some(())
    }

    fn read(&self) -> Option<Descriptor> {
        if self.left == 0 || self.next >= self.size {
            return None;
        }
        let offset = u64::from(self.next) * u64::from(DESCRIPTOR);
        let addr = self.table.checked_add(offset)?;
        self.map.read_obj(GuestAddress(addr)).ok()
    }
}

impl Iterator for Descriptors<'_> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            self.enter(descriptor)?;
            descriptor = self.read()?;
            if descriptor.refers_to_indirect_table() {
                return None;
            }
        }
        self.bytes = self.bytes.checked_add(descriptor.len())?;
        if descriptor.has_next() {
            self.next = descriptor.next();
            self.left -= 1;
        } else {
            self.left = 0;
        }
        Some(descriptor)
    }
}
