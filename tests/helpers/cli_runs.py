"""Commands run inside the test's process, and what they left behind."""

import json
import re

from typer.testing import CliRunner

from stepquant.cli import app

TINY = (
    "--steps=2",
    "--set=calibration.trajectories=2",
    "--set=block_distillation.iterations=2",
    "--set=block_distillation.samples=16",
    "--set=block_distillation.batch=4",
)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments):
    """The sentence on stderr of a command that must end with exit code 2 and print nothing else.

    Progress does not count: on a slow machine a command may run for some seconds before it stops.
    """
    result = run(*arguments)
    assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
    assert result.stdout == ""
    lines = without_progress(result.stderr).splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def without_progress(stderr):
    """The lines of `stderr` that are no progress."""
    lines = stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not re.search(r": .*\d:\d\d( elapsed|$)", line))


def record(path):
    def no_constant(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text(), parse_constant=no_constant)


def tree(folder):
    """The bytes of every file below `folder`, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
