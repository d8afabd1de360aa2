//! A vhost-user-blk device, with no knowledge of what stores its blocks.
