"""Errors: one base class for all, and the built-in kind a caller would expect of each."""

import pytest

import spre_fx
from spre_fx import errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.PatternError, ValueError),
        (errors.OptionError, ValueError),
        (errors.ModelError, ValueError),
        (errors.FileError, ValueError),
        (errors.TraceError, errors.ModelError),
        (errors.InvariantError, RuntimeError),
        (errors.VerificationError, RuntimeError),
    ],
)
def test_each_error_is_a_spre_error_of_its_kind_and_public(
    error: type[Exception], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match="why"):
        raise error("why")
    assert issubclass(error, spre_fx.SpreError)
    assert error.__name__ in spre_fx.__all__
    assert getattr(spre_fx, error.__name__) is error
