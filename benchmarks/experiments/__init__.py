"""Experiments: every strategy is run on every seed of a task, and the scores are compared and reported.

Knows nothing about any particular task.
"""
