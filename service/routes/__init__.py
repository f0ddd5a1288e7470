"""One thin file per resource: a handler reads the request, asks the supervisor, makes the reply."""
