"""How errors reach the user."""

import pytest

from common.errors import user_errors


def test_nothing_in_an_error_reaches_the_terminal_as_a_command(capsys):
    with pytest.raises(SystemExit) as stop, user_errors(ValueError):
        raise ValueError("key 'd\x7f\x1b[31mé' is unknown")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: key 'd\\x7f\\x1b[31mé' is unknown\n"


def test_an_os_error_is_its_path_and_reason(capsys):
    with pytest.raises(SystemExit), user_errors(OSError):
        raise OSError(28, "No space left on device", "/full")
    assert capsys.readouterr().err == "error: /full: No space left on device\n"
