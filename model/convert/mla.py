"""Plain grouped-query attention -> multi-head latent attention."""

import argparse

HELP = "grouped-query attention to latent attention"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `mla`."""


def convert(arguments: argparse.Namespace) -> None:
    """Converts a folder."""
    raise ValueError("mla comes with the next commit of this branch")
