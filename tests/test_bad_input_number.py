"""How many inputs the tables try, so that the number in the changelog is theirs."""

from __future__ import annotations

import re
from pathlib import Path

from tests import test_bad_input_calls as calls
from tests import test_bad_input_cli as cli
from tests import test_bad_input_documents as documents
from tests.bad_values import VALUES


def test_the_number_of_inputs_is_the_one_that_is_told(capsys):
    tried = {
        "arguments": len(calls.TABLE) * len(VALUES),
        "command line": (len(cli.PLACES) + len(cli.VARIABLES)) * len(cli.TEXTS),
        "documents": (len(documents.FIELDS) + 8) * len(documents.STORED),  # 8 fields of a runner's record
    }
    total = sum(tried.values())
    print(f"{total} bad inputs: {tried}")
    text = (Path(__file__).parent.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    (number,) = re.findall(r"([\d,]+) inputs", text)
    assert int(number.replace(",", "")) == total, tried
