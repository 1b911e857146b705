"""What the agent does for each action: actions.py lists them all, the other modules have one subject each."""
