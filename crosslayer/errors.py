"""The exceptions that are no bugs: "the user can fix this", and "asked to stop"."""


class UserError(ValueError):
    """A mistake in what the user gave: a plan, a config, a file, an argument.

    Its message is one line that says what was wrong, where, and what would be right. The command line prints it
    without a traceback and exits with status 2.
    """


class Diverged(UserError):
    """The loss or gradients of a training run are no longer numbers: other settings may help, another try does not."""


class Stopped(KeyboardInterrupt):
    """SIGTERM has come, and what was being done has been left so that it can go on.

    The message says where it goes on; it is empty in all processes but one. The command line exits with status 143.
    """
