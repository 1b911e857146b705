"""One backup of one domain, from any state to its end."""
