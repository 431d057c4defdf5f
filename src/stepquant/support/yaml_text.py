"""YAML from files that anybody may have written: bounded before it is expanded."""

from __future__ import annotations

from typing import Any

import yaml

from stepquant.support.errors import StepQuantError

LARGEST = 1 << 20  # characters
MOST_NODES = 100_000  # after aliases are filled in; long texts count several times
DEEPEST = 64


def parse_yaml(text: str, where: str) -> Any:
    """Return the value of the YAML `text`; errors name `where` it comes from.

    Raises:
        StepQuantError: the text is not YAML, is too long or nested too deeply, or its aliases stand
            for too many values or for themselves.
    """
    if len(text) > LARGEST:
        raise StepQuantError(
            f"{where} has {len(text)} characters: expected at most {LARGEST} of YAML"
        )
    try:
        _check_size(yaml.compose(text, Loader=yaml.SafeLoader), where)
        return yaml.safe_load(text)
    except RecursionError as error:
        raise StepQuantError(
            f"{where} is nested too deeply: expected at most {DEEPEST} levels of YAML"
        ) from error
    # PyYAML passes on what int() and datetime() say of a value.
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        if isinstance(error, StepQuantError):
            raise
        raise StepQuantError(f"{where} is not YAML: {' '.join(str(error).split())}") from error


def _check_size(root: yaml.Node | None, where: str) -> None:
    """Check depth and number of values, an alias counted with all that it stands for."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node, depth: int) -> int:
        if id(node) in open_nodes:
            raise StepQuantError(f"{where} has an alias inside what it stands for: expected values")
        if depth > DEEPEST:
            raise StepQuantError(
                f"{where} is nested more than {DEEPEST} levels deep: expected YAML with fewer"
            )
        if id(node) not in sizes:
            open_nodes.add(id(node))
            parts: list[Any] = []
            own = 1 + len(node.value) // 32 if isinstance(node, yaml.ScalarNode) else 1
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                parts = node.value
            sizes[id(node)] = own + sum(size(part, depth + 1) for part in parts)
            open_nodes.remove(id(node))
        if sizes[id(node)] > MOST_NODES:
            raise StepQuantError(
                f"{where} stands for more than {MOST_NODES} values once its aliases are filled "
                "in: expected a few; write them out"
            )
        return sizes[id(node)]

    if root is not None:
        size(root, 0)
