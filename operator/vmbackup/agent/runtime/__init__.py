"""The base of the agent: queue, threads, memory, files, watchdog."""
