"""A model's Markdown as HTML: what is let through, and that growing piece by piece comes to the same."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from irkit.widgets.markdown import Growing, render

TEXT = """# A title

Some *text* with `code`,
and a second line.

- one
- two

  still two

```python
print("<b>")

x = 1
```

| a | b |
| - | - |
| 1 | 2 |

1. first
2. second

The end"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<b>x</b><script>alert(1)</script>", "<p>&lt;b&gt;x&lt;/b&gt;&lt;script&gt;alert(1)&lt;/script&gt;</p>\n"),
        ("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>\n"),
        ("[a](JavaScript&#58;alert(1))", "<p>[a](JavaScript:alert(1))</p>\n"),
        ("[a](data:text/html;base64,xx)", "<p>[a](data:text/html;base64,xx)</p>\n"),
        ("[a](/files/secret)", "<p>[a](/files/secret)</p>\n"),
        (
            '[a](http://b.c/?d=1&e "f")',
            '<p><a href="http://b.c/?d=1&amp;e" title="f" target="_blank" rel="noopener noreferrer">a</a></p>\n',
        ),
        ('```"onload=x\ny\n```', '<pre><code class="language-&quot;onload=x">y\n</code></pre>\n'),
    ],
)
def test_nothing_of_the_models_own_html_goes_through(text: str, wanted: str) -> None:
    assert render(text) == wanted


def test_no_picture_is_fetched() -> None:
    for text in ("![x](http://example.com/a.png)", "![x][y]\n\n[y]: http://example.com/a.png", "<img src=x>"):
        assert "<img" not in render(text)


def test_tables_and_code() -> None:
    assert "<table>" in render(TEXT)
    assert "print(&quot;&lt;b&gt;&quot;)" in render(TEXT)


@given(st.lists(st.integers(1, 30), max_size=40))
def test_growing_comes_to_the_same(cuts: list[int]) -> None:
    growing, html, going, at = Growing(), "", "", 0
    for cut in [*cuts, len(TEXT)]:
        at += cut
        fresh, going = growing.update(TEXT[:at])
        html += fresh
    assert re.sub(r"\s+", " ", html + going) == re.sub(r"\s+", " ", render(TEXT))


def test_what_is_done_is_not_rendered_again() -> None:
    growing = Growing()
    assert growing.update("One.\n\nTwo") == ("<p>One.</p>\n", "<p>Two</p>\n")
    assert growing.update("One.\n\nTwo.\n\n# Three") == ("<p>Two.</p>\n", "<h1>Three</h1>\n")
    assert growing.update("One.\n\nTwo.\n\n# Three") == ("", "<h1>Three</h1>\n")


def test_lines_are_counted_as_markdown_counts_them() -> None:
    growing = Growing()
    assert growing.update("a\x0cb\u2028c\r\nd\n\nTwo") == ("<p>a\x0cb\u2028c\nd</p>\n", "<p>Two</p>\n")


@pytest.mark.parametrize("mark", ["- ", "{}. "])
def test_a_long_list_is_not_rendered_again_and_again(mark: str) -> None:
    growing, html, going, text = Growing(), "", "", "Before.\n\n"
    for number in range(1, 500):
        text += f"{mark.format(number)}item `{number}`\n"
        fresh, going = growing.update(text)
        html += fresh
        assert len(going) < 6000
    items = re.findall(r"<code>(\d+)</code>", html + going)
    assert items == [str(number) for number in range(1, 500)]
    assert "<ol start=" in html + going or mark == "- "
