"""Which version of vmbackup this is. Apart from the package itself: looking it up takes 7 MB."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("vmbackup")
except PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0.0.0"
