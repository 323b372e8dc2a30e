"""The errors of this library.

Each message names the layer, what was expected, what was found and what to do next. No call that
raises one has changed the model it was given.
"""


class SpreError(Exception):
    """Base class of every error this library raises on purpose."""


class PatternError(SpreError, ValueError):
    """An N:M pattern that is not one, or a tensor that cannot hold it."""


class OptionError(SpreError, ValueError):
    """An option with a value that makes no sense, such as a glob that matches no layer."""


class ModelError(SpreError, ValueError):
    """A model that cannot be taken as it is: quantised, on the meta device, prepared twice, ..."""


class FileError(SpreError, ValueError):
    """A file that cannot be loaded: truncated, damaged, of another kind or of a newer version."""


class TraceError(ModelError):
    """A module whose forward `torch.fx` cannot follow.

    Attributes:
        module: Its name, "" for the model itself.
        cause: What it does that cannot be followed, with the line where there is one.
    """

    def __init__(self, message: str, module: str = "", cause: str | None = None) -> None:
        super().__init__(message)
        self.module = module
        self.cause = message if cause is None else cause


class InvariantError(SpreError, RuntimeError):
    """A pass found, or left, a graph that breaks a rule. A bug of ours or of a custom pass."""


class VerificationError(SpreError, RuntimeError):
    """A folded layer that breaks its N:M pattern or differs from the branches it was made of."""
