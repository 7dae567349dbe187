"""Finished runs: their results, their traces on disk, and the export of a tuned program."""
