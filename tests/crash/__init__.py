"""Kills the daemon again and again under load, and holds it to what it told its clients."""
