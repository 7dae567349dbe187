"""Prompts and completions: a signature is rendered as a prompt, and a completion is parsed into typed values.

A `Signature` declares the inputs and outputs of an LM call; a `Template` renders prompts and parses completions. The
other modules parse values, choices, numbers and thoughts in text. Nothing here calls an LM.
"""
