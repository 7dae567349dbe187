"""The paper's benchmarks, and measurements of what lmpipe costs. They stay in the checkout and are not packaged.

`python -m benchmarks.iris`, `gsm8k` and `hotpotqa` run a benchmark, and `python -m benchmarks.cost_estimate` says what
all of the paper's runs take. `tasks` holds the data, program and metric of each benchmark, `experiments` runs and
reports any of them, and `performance` measures speed and memory.
"""
