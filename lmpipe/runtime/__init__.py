"""What a program runs in: the session, the context of one call, batches of many calls, and the trace that is left."""
