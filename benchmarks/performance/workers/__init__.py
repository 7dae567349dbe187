"""Measurements of lmpipe that run in a process of their own; each prints one JSON object as its last line."""
