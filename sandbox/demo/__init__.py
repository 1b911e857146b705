"""The demo: a live guest, an API server and our agent, and a backup of the one declared in the other.

python -m sandbox.demo up       # starts what does not run yet, takes a backup, proves it, leaves everything up
python -m sandbox.demo down     # ends and removes what `up` started
"""
