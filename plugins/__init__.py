"""Packages the kubectl plugin for krew: an archive with a zipapp, and a manifest."""
