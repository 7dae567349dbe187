"""The paper's benchmarks, and measurements of lmpipe's time and memory. They stay in the checkout and are not packaged.

`python -m benchmarks.iris`, `gsm8k` and `hotpotqa` run a benchmark, and `python -m benchmarks.cost_estimate` estimates
the cost of all runs in the paper. `tasks` holds the data, program and metric of each benchmark, `experiments` runs and
reports any of them, and `performance` measures speed and memory.
"""
