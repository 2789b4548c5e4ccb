"""Text from files, made harmless where it leaves: one function for each kind of place that it goes to.

Names of classes, tensors, files and boards come from whoever made a file. A terminal obeys escape sequences in them, the
log of a CI system commands at the start of a line, a Markdown page its own signs, a spreadsheet a cell that begins with
``=``. Every writer of such a place passes all text through its function here, so that no caller has to think of it.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_KEPT = "\n\t\u200c\u200d"
"""Line ends, and the two joiners that Persian, Indic scripts and emoji are written with."""

_NEVER_SHOWN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: control, format (bidirectional overrides, zero width, tags), surrogate, line and paragraph separator."""

_RAW = re.compile("\\A[^\ud800-\udc7f\udd00-\udfff]*\\Z")
"""Text whose lone surrogates are all bytes of a file's name."""

_PLAIN = re.compile(r"[\n\t\x20-\x7e\xa1-\xac\xae-\u02ff\u2500-\u257f]*")
"""Text that is surely as it should be, the lines of tables included; a fast answer for nearly all of it."""


def shown(text: str) -> str:
    r"""Return the text with every character that a terminal obeys, or that nobody sees, written out: ``\x1b``, ``\u202e``.

    A byte of a file name that is no UTF-8 (a lone low surrogate) is written as that byte: ``\xe4``.
    """
    if _PLAIN.fullmatch(text):
        return text
    return "".join(c if c in _KEPT or unicodedata.category(c) not in _NEVER_SHOWN else _code(c) for c in text)


def storable(value: Any) -> Any:
    r"""Return what may be written as UTF-8: in its texts, bytes of file names that are none stand as ``\xe4``."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # what the file system's own encoding could not read may be UTF-8 all the same
            raw = value.encode("utf-8", "surrogateescape") if _RAW.search(value) else value.encode("utf-8", "replace")
            return raw.decode("utf-8", "backslashreplace")
    elif isinstance(value, dict):
        return {storable(k): storable(v) for k, v in value.items()}
    elif isinstance(value, list | tuple):
        return [storable(v) for v in value]
    return value


def one_line(text: str) -> str:
    r"""Return the text as `shown`, line ends and tabs written out, too: ``\n``."""
    return shown(text).replace("\n", "\\n").replace("\t", "\\t")


def _code(c: str) -> str:
    number = ord(c)
    if 0xDC80 <= number <= 0xDCFF:
        return f"\\x{number - 0xDC00:02x}"
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


_COMMAND = re.compile(r"^(\s*:):", re.MULTILINE)


def log_line(text: str) -> str:
    r"""Return the text as `shown`, and without what a CI runner takes for a command of the step: ``::error::``, ``##[group]``.

    Runners look at the start of a line for the first and anywhere for the second, in whatever a step prints.
    """
    text = shown(text)
    if "::" in text:
        text = _COMMAND.sub(r"\1\\x3a", text)
    return text.replace("##[", r"##\x5b")


def json_text(text: str) -> str:
    """Return a JSON document, in ASCII already, without what a terminal or a CI runner obeys; it says the same."""
    return text.replace("\x7f", r"\u007f").replace("##[", r"#\u0023[")


def spreadsheet_cell(text: str) -> str:
    """Return text for a cell of a CSV file, on one line: no program takes it for a formula."""
    text = one_line(text)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") and text else text


_SIGNS = re.compile(r"([\\`*\[\]|$]|~~|(?<![^\W_])_|_(?![^\W_]))")
_LINKED = re.compile(r"(@|#(?=\d)|\bwww(?=\.)|:(?=//))")
_STARTS = re.compile(r"^(?=#{1,6}(?:\s|$)|[-+](?:\s|$)|-{3}|={1,}\s*$)")
_NUMBERED = re.compile(r"^(\d{1,9})(?=[.)](?:\s|$))")


def markdown(text: str) -> str:
    """Return text for Markdown, on one line: what is a sign there stays text, and nothing is a link or a mention.

    Tags become entities. An invisible character, which is written as one, parts what would link by itself: ``@name``, ``#12``,
    ``http://``.
    """
    text = shown(" ".join(text.splitlines()))
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = _LINKED.sub(r"\1&#8203;", _SIGNS.sub(r"\\\1", text))
    return _NUMBERED.sub(r"\1\\", _STARTS.sub(r"\\", text))


def code_span(text: str) -> str:
    """Return text as a code span of Markdown, which shows it as it is; backticks in it do not end the span."""
    text = log_line(" ".join(text.splitlines()))
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text}{pad}{fence}"


def xml_text(text: str) -> str:
    """Return text that XML can hold: as `log_line`, for logs show such files, without the two characters that are none."""
    return log_line(text).replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")
