"""From a signature to a prompt, and from a completion back to typed values.

`Signature` says what an LM call takes and gives, and `Template` renders prompts and parses completions. The other
modules read values, choices, numbers and thoughts in text. Nothing here asks an LM.
"""
