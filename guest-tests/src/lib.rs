//! Boots a guest under QEMU and reads what its checks printed.
