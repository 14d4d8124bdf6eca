"""The tag {% generation %} of chat templates, which says what the model is to learn; imported with Jinja alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

# Noncharacters, which Unicode keeps for use inside a program: no text holds them.
BEGIN: Final = "\ufdd0"
END: Final = "\ufdd1"


class GenerationTag(Extension):
    """Puts BEGIN and END around what a template renders inside the tag, a scope of its own as in transformers."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"
