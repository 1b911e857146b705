"""Live backup of libvirt/QEMU virtual machines, declared as Kubernetes resources."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vmbackup")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"
