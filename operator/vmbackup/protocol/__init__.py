"""What to do next with one domain's chain: pure decisions, no I/O, no clock."""
