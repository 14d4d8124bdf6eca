"""Real Python statements of the standard library, and one-token corruptions of them that do not parse."""

import ast
import hashlib
import io
import tokenize
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from pretrain.data.stdlib import StdlibDocument, split_of

CORRUPTIONS = ("delete", "duplicate", "swap")
_MIN_CHARS, _MAX_CHARS, _MAX_LINES = 20, 220, 6
_LEFT_OUT = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_LAYOUT_TOKENS = frozenset(
    (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.COMMENT)
)
_MAX_TRIES = 20


@dataclass(frozen=True)
class Statement:
    """One statement as it stands in a file, moved to the left margin."""

    text: str
    file: str
    line: int


@dataclass(frozen=True)
class Corruption:
    """A statement with one token deleted, duplicated or swapped with the next; ast.parse rejects `text`."""

    text: str
    kind: str


@dataclass(frozen=True)
class StatementPool:
    """Statements of the training files, and those of the test files that occur in no training file."""

    train: tuple[Statement, ...]
    held_out: tuple[Statement, ...]


class Draws:
    """Pseudo-random numbers of a seed and a text: the same on every machine and in every version of Python."""

    def __init__(self, *, key: str) -> None:
        self._key, self._count = key, 0

    def below(self, limit: int) -> int:
        """The next number in range(limit)."""
        digest = hashlib.blake2b(f"{self._key}/{self._count}".encode(), digest_size=8).digest()
        self._count += 1
        return int.from_bytes(digest, "big") % limit


def statements(documents: Iterable[StdlibDocument]) -> list[Statement]:
    """Every statement of 20 to 220 characters on at most 6 lines, each text once (where it occurs first).

    No def, class or import, also not inside, and no string that stands alone.
    """
    found: dict[str, Statement] = {}
    for document in documents:
        for statement in _of_document(document):
            found.setdefault(statement.text, statement)
    return list(found.values())


def statement_pool(documents: Sequence[StdlibDocument]) -> StatementPool:
    """The statements of the corpus, divided by file; parses every file once (5 s for the whole library)."""
    code = [document for document in documents if document.is_code]
    train = statements(document for document in code if split_of(document.name) == "train")
    known = {statement.text for statement in train}
    test = statements(document for document in code if split_of(document.name) == "test")
    return StatementPool(tuple(train), tuple(statement for statement in test if statement.text not in known))


def ranked(found: Iterable[Statement], *, seed: int) -> list[Statement]:
    """The statements in a pseudo-random order of the seed and their text."""
    return sorted(
        found, key=lambda statement: hashlib.blake2b(f"seed {seed}/{statement.text}".encode(), digest_size=8).digest()
    )


def corrupt(text: str, *, key: str) -> Corruption | None:
    """A corruption of a statement, chosen by `key`; None when a number of tries all still parse."""
    spans = _token_spans(text)
    if len(spans) < 2:
        return None
    draws = Draws(key=key)
    for _ in range(_MAX_TRIES):
        kind = CORRUPTIONS[draws.below(len(CORRUPTIONS))]
        changed = _edited(text, spans, draws.below(len(spans) - (kind == "swap")), kind)
        if changed != text and not parses(changed):
            return Corruption(changed, kind)
    return None


def parses(text: str) -> bool:
    """Whether ast.parse accepts the text."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes and the like are warnings of valid code
            ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _of_document(document: StdlibDocument) -> Iterator[Statement]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    # Not splitlines: a form feed is no line end to the parser.
    lines = [line.encode() for line in document.text.split("\n")]
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and node.end_lineno is not None and node.end_lineno - node.lineno < _MAX_LINES:
            text = _text_of(node, lines)
            if text is not None and _MIN_CHARS <= len(text) <= _MAX_CHARS and _is_wanted(node) and parses(text):
                yield Statement(text, document.name, node.lineno)


def _is_wanted(node: ast.stmt) -> bool:
    for inner in ast.walk(node):
        if isinstance(inner, _LEFT_OUT):
            return False
        if isinstance(inner, ast.Expr) and isinstance(inner.value, ast.Constant) and isinstance(inner.value.value, str):
            return False
    return True


def _text_of(node: ast.stmt, lines: list[bytes]) -> str | None:
    """The source of a statement with its indentation taken off; None if it shares its first line with another."""
    assert node.end_lineno is not None
    first = lines[node.lineno - 1]
    margin = first[: node.col_offset]
    if margin.strip():
        return None
    block = [first[node.col_offset :], *lines[node.lineno : node.end_lineno]]
    block[-1] = lines[node.end_lineno - 1][: node.end_col_offset]
    if len(block) == 1:
        block[0] = block[0][node.col_offset :]
    body = [line.removeprefix(margin) for line in block[1:]]
    return b"\n".join([block[0], *body]).decode()


def _token_spans(text: str) -> list[tuple[int, int]]:
    """(begin, end) of each token that is not layout; an f-string is one token, as it was before Python 3.12."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    spans: list[tuple[int, int]] = []
    depth, begin = 0, 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            name = tokenize.tok_name[token.type]
            low, high = starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
            if name == "FSTRING_START":
                begin = begin if depth else low
                depth += 1
            elif name == "FSTRING_END":
                depth -= 1
                if not depth:
                    spans.append((begin, high))
            elif not depth and token.type not in _LAYOUT_TOKENS:
                spans.append((low, high))
    except (tokenize.TokenError, SyntaxError):
        return []
    return spans


def _edited(text: str, spans: list[tuple[int, int]], number: int, kind: str) -> str:
    low, high = spans[number]
    token = text[low:high]
    if kind == "delete":
        # With the blank before it, or the one behind it where it stands first on its line.
        before = text[:low].endswith(" ") and bool(text[:low].split("\n")[-1].strip())
        behind = not before and text[high:].startswith(" ")
        return text[: low - before] + text[high + behind :]
    if kind == "duplicate":
        return f"{text[:high]} {token}{text[high:]}" if _is_word(token) else text[:high] + token + text[high:]
    next_low, next_high = spans[number + 1]
    following, gap = text[next_low:next_high], text[high:next_low]
    glued = _is_word(following) and low > 0 and _is_word(text[low - 1])
    return text[:low] + (" " if glued else "") + following + gap + token + text[next_high:]


def _is_word(token: str) -> bool:
    return token[-1:].isalnum() or token[-1:] in "_\"'"
