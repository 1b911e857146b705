"""The custom resources as typed, frozen objects."""
