"""The soak test: ``python -m tests.soak`` makes thousands of trials of what the tests do briefly."""
