"""Upstreams that speak OpenAI's Chat Completions, translated from and to the Messages API.

Pure functions under thin I/O: :mod:`.mapping` (what is mapped, dropped, refused), :mod:`.dialect` (how the
providers differ), :mod:`.content` and :mod:`.request` (there), :mod:`.response`, :mod:`.stream` and
:mod:`.errors` (back), :mod:`.tokens` and :mod:`.counter` (counting), :mod:`.provider` (the calls).
"""
