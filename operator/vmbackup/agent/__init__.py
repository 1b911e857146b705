"""The agent of a hypervisor: runs the VMBackups of its node."""
