"""What a user can mend: the command says it in one line, without a traceback."""


class UserError(Exception):
    """Something outside the program is not as it has to be. The message says what to do."""
