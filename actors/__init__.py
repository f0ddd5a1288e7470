"""The work of messagesd: one trio task per job, and the providers it calls.

Knows events and providers; knows nothing of HTTP servers. May import :mod:`events`, never
:mod:`service`.
"""
