"""The wire of messagesd: HTTP in, HTTP and server-sent events out. Knows Quart; holds no job logic."""
