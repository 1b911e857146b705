"""The agent of a hypervisor: what it does with all the VMBackups of its node."""
