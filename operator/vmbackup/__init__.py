"""Live backup of libvirt/QEMU virtual machines, declared as Kubernetes resources."""
