"""Argument parser of the commands without a trainer: errors in one line, options in full."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from opd_lightning.commands import checked_yaml  # noqa: F401, for all parsers
from opd_lightning.commands.config_files import check_configs
from opd_lightning.commands.flags import with_values
from opd_lightning.commands.parser_messages import hint, one_line
from opd_lightning.errors import report


class OneLineParser(ArgumentParser):
    """jsonargparse's parser, which accepts no abbreviated options and ends as `opd fit` does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_args(self, args: Any = None, *rest: Any, **more: Any) -> Any:
        check_configs(args or [])
        return super().parse_args(args and with_values(args), *rest, **more)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Report a mistake in one line and exit with code 2."""
        if not self.exit_on_error:  # parses a nested class; the outer parser adds its place
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        report(f"{one_line(message)}; {hint(parser.prog)}")
        sys.exit(2)
