"""Finished runs: their results, their traces on disk, and the folder in which a tuned program is given to others."""
