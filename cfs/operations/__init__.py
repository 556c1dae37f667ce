"""What the kernel asks a mount for, and the answers of the file system."""
