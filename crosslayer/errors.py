"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in what the user gave: a plan, a config, a file, an argument.

    Its message is one line that says what was wrong, where, and what would be right. The command line prints it
    without a traceback and exits with status 2.
    """
