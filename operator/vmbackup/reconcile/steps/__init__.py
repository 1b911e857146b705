"""What each action does: one module a subject."""
