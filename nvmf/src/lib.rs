//! NVMe over Fabrics, both ends, with no knowledge of virtio.
