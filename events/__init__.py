"""The facts of messagesd: events, the state they fold into, and the logs that keep them.

Pure and synchronous but for :mod:`events.log`, which is the only I/O of this package. Nothing here
reads a clock: whoever records an event says when it happened.
"""
