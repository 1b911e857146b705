"""Whether a domain can be backed up, and with how much space, before anything is touched."""
