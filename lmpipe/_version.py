"""The version of lmpipe, which setup.cfg and the identity of recorded work read here."""

__version__ = "0.5.1"
