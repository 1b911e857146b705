"""libvirt: the connection, the few calls that are needed, XML and errors."""
