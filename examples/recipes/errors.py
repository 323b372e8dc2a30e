"""What a user can put right: an option, a folder, a checkpoint."""

from __future__ import annotations


class RecipeError(Exception):
    """Names what was expected, what was found and what to do; shown without a traceback."""
