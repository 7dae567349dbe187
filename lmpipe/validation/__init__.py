"""Checks of the arguments that users pass, and of the answers that their engines, retrievers and embedders return."""
