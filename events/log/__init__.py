"""The event log: one port (:mod:`events.log.base`), one adapter a file."""
