"""What a lost backup left: overlays, guests suspended or frozen, and the record that brings them home."""
