"""A run of `vmbackup run`: its input, the backup with its signals, the screen, and how it ends."""
