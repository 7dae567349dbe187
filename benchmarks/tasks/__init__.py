"""The paper's tasks: the data, program, metric, measures and settings of each.

Knows nothing about performance measurements; `benchmarks.experiments` runs the tasks but does not depend on them.
"""
