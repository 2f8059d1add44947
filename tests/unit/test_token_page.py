"""Pages of coloured tokens: responses cannot break them."""

import json

from opd_lightning.terminal.token_page import TokenRow, token_page


def test_responses_are_text_and_never_markup() -> None:
    hostile = "</script><script>alert(1)</script>"
    row = TokenRow(hostile, hostile, [hostile, "b"], {"d": [0.123456789, float("nan")]})
    page = token_page("step 3", [row])
    assert hostile not in page
    assert page.count("<script") == 2  # the data and our own
    _, _, rest = page.partition('id="rows">')
    (shown,) = json.loads(rest.partition("</script>")[0])
    assert shown == {"tokens": [hostile, "b"], "figures": {"d": [0.12346, None]}}


def test_a_page_needs_nothing_else() -> None:
    page = token_page("t", [TokenRow("p", "c", ["a"], {"d": [1.0]})])
    assert "http" not in page
    assert "src=" not in page
