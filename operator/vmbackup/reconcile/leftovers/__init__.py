"""Overlays and held guests that earlier or lost backups left: one reader, and one way to take them over."""
