"""Work on images that takes long: in threads, while the driver goes on observing."""
