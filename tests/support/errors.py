"""How tests read the error of a refused call."""

from typing import Any

import pytest

from vico.data.readers.rows import RowError
from vico.errors import UserError


def refusal(*call: Any, **named: Any) -> str:
    """The one line with which `call[0](*call[1:], **named)` refuses."""
    function, *arguments = call
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 900
    return message


def outcome(function: Any, *arguments: Any) -> Any:
    """What it returns, or the words of the RowError."""
    try:
        return function(*arguments)
    except RowError as problem:
        return str(problem)
