"""The package's exception for bad input."""


class StepQuantError(ValueError):
    """Bad input, described in one sentence: the thing, what was found, what was expected, a remedy.

    The command line prints this sentence and exits with code 2.
    """
