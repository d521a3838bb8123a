"""Candidates side by side.

candidates.py   run folders, checkpoints and records in one form
query.py        which of them a command line means
lineup.py       the same suites on the same images, at the same step or number of images seen
claims.py       scores, differences and what supports them
"""
