"""The soak: ``python -m tests.soak`` does at length what the tests do briefly, and prints what came of it."""
