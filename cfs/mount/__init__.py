"""The mount process: `mount.cfs`, `umount.fuse.cfs`."""
