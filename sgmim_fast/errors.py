"""The one exception that is meant for the person at the keyboard."""


class UserError(ValueError):
    """Bad input: one line that names the file, key or option and the remedy.

    Entry points print it as ``error: <message>`` and exit with status 2; a traceback would only
    hide the line. Programming mistakes stay ordinary exceptions.
    """
