"""The one exception a user can act on."""


class EaftflowError(Exception):
    """Something the user gave or owns is wrong.

    The message says what is wrong with which value, what was found, and what to do. The command
    line prints it and exits with code 2; every other exception is a bug and keeps its traceback.
    """
