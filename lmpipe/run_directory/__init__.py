"""Run directories as values: the results of benchmarks and of scripts, also of those that are still running."""

from lmpipe.run_directory.reader import find_runs as find_runs
from lmpipe.run_directory.reader import open_run as open_run
