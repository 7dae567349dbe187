"""Checks of what users pass, and of what their engines, retrievers and embedders return."""
