# SPDX-License-Identifier: Apache-2.0
"""`-c/--config` and `--print-config`: options of a command from a recipe. Flags on the command line beat the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from calib.errors import UsageError

__all__ = ["RecipeCommand"]

_OWN = {"config", "print_config", "help"}


class RecipeCommand(click.Command):
    """A command whose options may come from a recipe.

    ``--print-config`` prints the options in force, from defaults, file and flags, as a recipe, and runs nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(
                ["-c", "--config"],
                type=click.Path(path_type=Path),
                is_eager=True,
                expose_value=False,
                callback=_read,
                help="Recipe (YAML); flags beat it.",
            ),
            click.Option(
                ["--print-config"],
                is_flag=True,
                expose_value=False,
                help="Print the options in force as a recipe, and stop.",
            ),
        ]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads the command line; what is only printed may lack its required parts."""
        if "--print-config" not in args:
            return super().parse_args(ctx, args)
        required = [p for p in self.params if p.required]
        try:
            for parameter in required:
                parameter.required = False
            super().parse_args(ctx, args)
        finally:
            for parameter in required:
                parameter.required = True
        click.echo(_as_recipe(ctx), nl=False)
        raise click.exceptions.Exit(0)


def _read(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Makes the values of a recipe the defaults of this call."""
    if path is None:
        return
    command = str(context.command.name)
    options = {_key(option): option for option in _options(context.command)}
    defaults: dict[str, Any] = {}
    for key, value in _section(path, command).items():
        option = options.get(key)
        if option is None:
            raise UsageError(f"{path}: {command}.{key}: no such option; `calib {command} --help` lists them")
        if isinstance(value, list) and not option.multiple:
            raise UsageError(f"{path}: {command}.{key}: takes one value, not a list")
        defaults[str(option.name)] = [value] if option.multiple and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}


def _section(path: Path, command: str) -> dict[str, Any]:
    """The part of a recipe that is about one command.

    Raises:
        UsageError: the file is missing, is no YAML, or does not follow the schema.
    """
    import yaml
    from pydantic import ValidationError

    from calib.schema.recipe import Recipe

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); pass a recipe, see recipes/") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is no YAML ({' '.join(str(error).split())}); see recipes/ for examples") from error
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(f"{path}: {where}: {first['msg']}; see recipes/ for examples") from error
    section: dict[str, Any] = getattr(recipe, command)
    return section


def _options(command: click.Command) -> list[click.Option]:
    return [p for p in command.params if isinstance(p, click.Option) and p.name not in _OWN]


def _key(option: click.Option) -> str:
    """The first long name: ``--max-length`` is ``max-length``."""
    return next(name for name in option.opts if name.startswith("--")).removeprefix("--")


def _as_recipe(context: click.Context) -> str:
    import yaml

    values: dict[str, Any] = {}
    for option in _options(context.command):
        value = context.params.get(str(option.name))
        values[_key(option)] = (
            list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        )
    recipe = {
        "metadata": {"title": f"calib {context.command.name}", "description": "Printed by --print-config."},
        str(context.command.name): values,
    }
    return str(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True))
