"""The runner, one file a role, in the order of a job's life.

``stream`` wakes, ``backlog`` keeps what may be claimed, ``claim`` claims, ``execute`` calls the handler,
``finish`` records. Around them ``lease`` holds what was claimed, ``takeback`` frees what others lost, ``held``
is a job in hand, ``store`` asks the collection, and ``runner`` puts them together.
"""

from streamjobs.runner.runner import Runner

__all__ = ["Runner"]
