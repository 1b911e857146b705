"""Reports of a backup: status, events, log and metrics."""
