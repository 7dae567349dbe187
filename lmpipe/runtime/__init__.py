"""What programs run in: the session, the context of one call, the batching of many calls, and the traces they leave."""
