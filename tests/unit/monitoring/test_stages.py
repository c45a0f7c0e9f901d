from __future__ import annotations

import io

from rich.console import Console

from psgd.monitoring.stages import Stages


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_stages_are_shown_on_a_terminal() -> None:
    file = Terminal()
    Stages(Console(file=file, force_terminal=True, color_system=None, width=80)).show(
        "connecting to s3://me:secret@host\x1b[2J"
    )
    assert file.getvalue().startswith("connecting to s3://***@host")
    assert "\x1b" not in file.getvalue()


def test_other_output_is_left_to_programs() -> None:
    file = io.StringIO()
    Stages(Console(file=file)).show("starting Ray on this machine")
    assert file.getvalue() == ""
