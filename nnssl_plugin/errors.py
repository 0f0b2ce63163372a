"""Errors that a user meets: what happened, with which file or value, and the command that mends it."""

FAILED = 2
"""Exit code of a process that ends with such an error."""


class UserError(Exception):
    """A mistake or a missing piece that the user can mend.

    Args:
        problem: what happened, with the file or value (one or two lines).
        remedy: the command or change that mends it.
    """

    def __init__(self, problem: str, remedy: str = ""):
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}\n{remedy}" if remedy else problem)
