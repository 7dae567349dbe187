"""Measurements of lmpipe's time and memory, against goals and against other libraries.

Each script is run as ``python -m benchmarks.performance.NAME``. Measurements that run in a process of their own are
in `workers`, and the libraries that lmpipe is compared with are in `baselines`.
"""
