"""The version of vmbackup. Not in the package itself, because the lookup takes 7 MB of memory."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vmbackup")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"
