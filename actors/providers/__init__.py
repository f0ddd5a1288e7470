"""Providers: who answers. One small port (:mod:`actors.providers.base`), thin adapters."""
