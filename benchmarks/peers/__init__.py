"""Peers that figures are measured against: scripts for environments of their own, which never import lmpipe.

Each reads a workload from a file and prints one JSON object as its last line.
"""
