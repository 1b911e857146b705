"""The API server: client, status, events. All that a controller without libvirt needs."""
