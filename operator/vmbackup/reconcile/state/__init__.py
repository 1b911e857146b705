"""What outlives a process: journals, locks, and time that no clock jump disturbs."""
