"""Measurements of what lmpipe costs: time and memory, against goals and against other libraries.

Each script is run as ``python -m benchmarks.performance.NAME``. What is measured in a process of its own is in
`workers`, and the libraries that lmpipe is compared with are in `baselines`.
"""
