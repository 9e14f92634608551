"""What a model writes, as HTML: Markdown without raw HTML and without anything that the page would fetch."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from markdown_it import MarkdownIt

_LINE = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
"""A line as Markdown counts them: `str.splitlines` knows more ends of lines."""
_LONG = 2000
"""Characters from which on a list that goes on is taken as ended before its last item."""
_SCHEMES = ("http://", "https://", "mailto:")


@cache
def _parser() -> MarkdownIt:
    # CommonMark with GitHub's tables. Raw HTML is shown as it is written, and so is a picture: to load one would tell
    # its server what the model was made to write into the address.
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).disable(["image"])
    parser.validateLink = lambda address: address.lower().startswith(_SCHEMES)  # pyright: ignore
    parser.add_render_rule("link_open", _link)
    return parser


def _link(self: Any, tokens: Any, index: int, options: Any, env: Any) -> str:
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer")
    return self.renderToken(tokens, index, options, env)


def render(text: str) -> str:
    """Markdown as HTML that is safe to put into a page."""
    return _parser().render(text)


class Growing:
    """A text that grows at its end, rendered block by block: what is behind the last block is not rendered again."""

    def __init__(self) -> None:
        self._from = 0

    def update(self, text: str) -> tuple[str, str]:
        """The HTML of the blocks that have ended since the last call, and of the one that may go on.

        A later line may still change how an ended block would look, as a link's address given at the end does; so the
        text as a whole is to be rendered once more when it is there.
        """
        fresh = text[self._from :]
        parser, env = _parser(), {}
        tokens = parser.parse(fresh, env)
        blocks = [token for token in tokens if token.level == 0 and token.nesting >= 0 and token.map]
        if not blocks:
            return "", ""
        last = blocks[-1]
        line = _first(last)
        lines = _LINE.findall(fresh)
        if last.type.endswith("_list_open") and sum(map(len, lines[line:])) > _LONG:
            line = max(_first(item) for item in tokens if item.type == "list_item_open" and item.level == 1)
        done, going = "".join(lines[:line]), "".join(lines[line:])
        self._from += len(done)
        return render(done), render(going)


def _first(token: Any) -> int:
    return token.map[0]
