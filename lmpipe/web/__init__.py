"""HTTP services that lmpipe asks: LMs and retrievers on other machines. Needs httpx2."""
