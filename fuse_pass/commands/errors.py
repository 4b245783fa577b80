"""What a command says when its input is wrong or something that it needs is missing."""


class CommandError(Exception):
    """A message for the person at the terminal: what was expected, what came, what to do."""
