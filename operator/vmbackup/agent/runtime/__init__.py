"""What the agent's modules stand on: the queue, threads, memory, files that are there."""
