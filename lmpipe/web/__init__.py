"""HTTP clients for LM and retrieval servers on other machines. Requires httpx2."""
