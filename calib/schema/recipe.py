# SPDX-License-Identifier: Apache-2.0
"""A recipe: the options of one or more commands in a YAML file, with a title and a reason."""

from __future__ import annotations

from pydantic import Field

from calib.schema.provenance import Strict

__all__ = ["Recipe", "RecipeMetadata"]

Value = bool | int | float | str | None
Section = dict[str, Value | list[Value]]


class RecipeMetadata(Strict):
    """What a reader of the file should know before using it."""

    title: str = Field(min_length=1)
    description: str = Field(min_length=1, description="When to use this recipe and why its values are what they are")


class Recipe(Strict):
    """The whole of a recipe. A section's keys are the command's long options without the dashes."""

    metadata: RecipeMetadata
    measure: Section = Field(default_factory=dict)
    quantize: Section = Field(default_factory=dict)
    export: Section = Field(default_factory=dict)
    evaluate: Section = Field(default_factory=dict)
