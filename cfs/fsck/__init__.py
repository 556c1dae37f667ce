"""The checker of the file system: `fsck.cfs`."""
