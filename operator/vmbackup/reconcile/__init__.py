"""The heart: one backup of one domain."""
