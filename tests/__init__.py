"""The tests: unit, model, hypervisor, cluster, node; each needs more of the world than the one before."""
