"""Programs: modules, predictors and retrieval as their leaves, rollouts on many examples, and evaluation.

A `Module` holds only structure. `rollout` runs it under a state and returns traces; `evaluate` summarizes their scores.
"""
