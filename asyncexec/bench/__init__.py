"""`asyncexec bench`: what a step costs on each transport, beside what else one would use.

A *peer* is one way to run a step on some ranks: one file in `peers/`.  A *case* is one thing to measure of any peer:
one file in `cases/`.  `host` gives each peer a process of its own, `harness` lets them take turns, `results` keeps the
raw samples, and `ratios` and `tables` say what they show.
"""
