"""The one exception that a command turns into a sentence for its user."""


class RemoeError(Exception):
    """An expected failure: bad input, a missing tool, a budget that cannot work.

    The message is one or more sentences for the user. It names the file, tensor, size or offset at fault and says
    what to do next. The command line prints it as ``Error: <message>`` on stderr and exits with status 1.
    """
