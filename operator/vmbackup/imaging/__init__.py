"""One disk image to another: clone, sparse copy, digest, throttle, locks."""
