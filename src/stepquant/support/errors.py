"""The one exception that bad input raises."""


class StepQuantError(ValueError):
    """Bad input, told in one sentence: the thing, what was found, what was expected, what to do.

    The command line prints the same sentence and exits with code 2.
    """
