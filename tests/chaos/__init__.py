"""Chaos: runner processes, producers and an operator at work while things break by a seed; then the history is judged.

``python -m tests.chaos --seconds N --seed S`` is a run; the same seed gives the same schedule of faults and puts.
``schedule.py`` says what breaks when, ``faults.py`` breaks it, ``load.py`` puts, ``run.py`` puts it all together.
"""
