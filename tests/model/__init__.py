"""A model world, and the real decide() in it, through every interleaving of steps, guest writes and faults."""
