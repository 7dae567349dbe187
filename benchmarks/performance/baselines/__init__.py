"""Measurements of other libraries, each a script for an environment of its own that never imports lmpipe.

A script reads its workload from a file and prints one JSON object as its last line.
"""
