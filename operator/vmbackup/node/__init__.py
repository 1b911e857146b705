"""One hypervisor's agent without any Kubernetes framework: queue, each VMBackup's life, sweep, watchdog."""
