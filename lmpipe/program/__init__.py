"""Programs: modules, the calls at their leaves, running them on many examples, and scoring what comes out.

A `Module` holds structure alone. `rollout` runs it under a state and returns traces; `evaluate` scores those.
"""
