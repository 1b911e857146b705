"""Random backups under random faults, on several guests at once: it finds what nobody has listed.

    python -m tests.chaos.soak --minutes 10 --seed 7
    python -m tests.chaos.soak --only chain-2:31          # with that seed: only this plan, again and again

choices.py plans, as a pure function of the seed; campaign.py carries the plans of one guest out, one after the other,
and plays the human who starts guests again and frees space; faults.py has what may happen; proof.py what must be true
after each backup; driving.py is the process that drives a backup, as an agent does.
"""
