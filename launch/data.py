"""`onecurve data pack | index | check | stats | order`: making shards, and finding out what is in them."""

from __future__ import annotations

import argparse

from launch import data_order, data_pack, data_tools


def add_commands(subparsers: argparse._SubParsersAction) -> None:
    """Registers `data` and its commands; each sets `func`: parsed arguments in, exit code out."""
    data = subparsers.add_parser("data", help="pack, index, check and measure tar shards", description=__doc__)
    commands = data.add_subparsers(metavar="COMMAND", required=True)
    for module in (data_pack, data_tools, data_order):
        module.add_command(commands)
