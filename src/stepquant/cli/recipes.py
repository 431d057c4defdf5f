"""`stepquant recipes list` and `stepquant recipes show`."""

from __future__ import annotations

from typing import Annotated

import typer

from stepquant.cli.options import Json, Quiet
from stepquant.cli.session import talk
from stepquant.support.errors import StepQuantError

recipes = typer.Typer(
    help="List and show the recipes of stepquant and installed plug-ins.", no_args_is_help=True
)


@recipes.command("list")
def list_recipes(context: typer.Context, json_file: Json = None, quiet: Quiet = False) -> None:
    """List the recipes of stepquant and of installed plug-ins."""
    with talk(context, quiet, json_file) as output:
        from stepquant import api  # not at the top: see demo.py

        rows = []
        for name in api.recipe_names():
            try:
                rows.append({"name": name, "description": api.load_recipe(name).description})
            except StepQuantError as error:  # a broken plug-in must not hide other recipes
                rows.append({"name": name, "description": str(error)})
        output.results = {"recipes": rows}
        output.table(rows)


@recipes.command("show")
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a recipe, or .yaml file.")],
    json_file: Json = None,
    quiet: Quiet = False,
) -> None:
    """Print a recipe with all defaults filled in, as YAML for quantize --recipe."""
    with talk(context, quiet, json_file) as output:
        from stepquant import api  # not at the top: see demo.py

        recipe = api.load_recipe(name)
        output.results = {"recipe": recipe.to_dict()}
        output.line(recipe.to_yaml().rstrip())
