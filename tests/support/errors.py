"""How tests read the error of a refused call."""

from typing import Any

import pytest

from vico.errors import UserError


def refusal(*call: Any, **named: Any) -> str:
    """The one line with which `call[0](*call[1:], **named)` refuses."""
    function, *arguments = call
    with pytest.raises(UserError) as caught:
        function(*arguments, **named)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 900
    return message
