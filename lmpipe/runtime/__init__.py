"""The runtime of programs: the session, the context of one call, the batching of many calls, and traces."""
