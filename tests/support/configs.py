"""Configs of tiny runs."""

from distvgg.config import Config
from distvgg.recipe import load
from processes import TINY


def tiny(**changes: object) -> Config:
    pairs = zip(TINY[::2], TINY[1::2], strict=True)
    config = load("quickstart", {name.removeprefix("--"): value for name, value in pairs})
    return config.replace(**changes)
