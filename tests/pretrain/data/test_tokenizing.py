"""From text to token files: nothing lost, documents marked, faults named by file and line."""

import errno
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain.data.documents as documents_module
from pretrain.data.documents import FileSource
from pretrain.data.indexed import IndexedTokens, IndexedWriter
from pretrain.data.manifest import read_manifest
from pretrain.data.tokenizing import build_data
from tests.pretrain.data.helpers import TEXT, small_tokenizer
from workbench.errors import DataError, ResourceError
from workbench.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts_of(prefix: Path, tokenizer: Tokenizer) -> list[str]:
    """The documents of a token file as text, each checked to end with the end-of-text token and no other."""
    tokens = IndexedTokens(prefix)
    texts = []
    for number in range(len(tokens)):
        ids = tokens.document(number).tolist()
        assert ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in ids[:-1]
        texts.append(tokenizer.decode(ids[:-1], skip_special_tokens=False))
    return texts


def build(source: FileSource, prefix: Path, tokenizer: Tokenizer, **options: object) -> Path:
    build_data(source, prefix, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
    return prefix


def test_a_text_file_is_one_document_and_a_separator_line_divides_it(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "one.txt").write_text(TEXT, encoding="utf-8")
    assert texts_of(build(FileSource(tmp_path / "one.txt"), tmp_path / "one", tokenizer), tokenizer) == [TEXT]
    (tmp_path / "two.txt").write_text("first\n<|endoftext|>\n\n  second\n<|endoftext|>\n<|endoftext|>\nthird")
    built = build(FileSource(tmp_path / "two.txt"), tmp_path / "two", tokenizer)
    assert texts_of(built, tokenizer) == ["first\n", "\n  second\n", "third"]


def test_json_lines_are_documents_and_a_special_token_in_a_text_stays_text(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    texts = ["plain", "with <|endoftext|> and <|pad|> inside", "zażółć\n🙂", ""]
    lines = "\n".join(json.dumps({"id": number, "body": text}) for number, text in enumerate(texts)) + "\n\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    built = build(FileSource(tmp_path / "a.jsonl.gz", field="body"), tmp_path / "a", tokenizer)
    assert texts_of(built, tokenizer) == texts[:3]  # the empty document is left out


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, text in (("b/x.txt", "third"), ("a.txt", "first"), ("b/.hidden", "no"), ("a/z.py", "second")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(text)
    built = build(FileSource(tmp_path / "in"), tmp_path / "out", tokenizer)
    assert texts_of(built, tokenizer) == ["second", "first", "third"]  # a/z.py, a.txt, b/x.txt
    only = build(FileSource(tmp_path / "in", pattern="**/*.py"), tmp_path / "py", tokenizer)
    assert texts_of(only, tokenizer) == ["second"]


def test_the_manifest_says_what_was_tokenized_with_what(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    manifest = read_manifest(build(FileSource(tmp_path / "a.txt"), tmp_path / "a", tokenizer))
    assert manifest is not None
    assert manifest.text_bytes == len(TEXT.encode()) and manifest.tokenizer_sha256 == tokenizer.sha256
    assert manifest.tokens == IndexedTokens(tmp_path / "a").num_tokens
    (file,) = manifest.files
    assert (file.name, file.documents, file.num_bytes) == ("a.txt", 1, len(TEXT.encode()))


def test_a_long_document_is_read_in_pieces_and_has_the_tokens_of_the_whole(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents_module, "_LINE_BYTES", 1001)  # cuts through characters
    text = TEXT * 100 + "snow 雪" * 40_000 + "\n" + TEXT * 100
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    built = build(FileSource(tmp_path / "long.txt"), tmp_path / "long", tokenizer)
    assert IndexedTokens(built).document(0).tolist() == [*tokenizer.encode(text), tokenizer.eos_id]
    assert texts_of(built, tokenizer) == [text]


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab1. \n\t'雪", max_size=200), chars=st.integers(1, 9))
def test_a_cut_changes_no_token(tokenizer: Tokenizer, text: str, chars: int) -> None:
    pieces = documents_module.cut(text, chars=chars)
    assert "".join(pieces) == text
    by_length = any(len(one) == 4 * chars for one in pieces[:-1])  # a stretch without a single blank
    if not by_length:
        assert [token for one in pieces for token in tokenizer.encode(one)] == tokenizer.encode(text)


def test_held_out_documents_are_chosen_by_name_so_new_documents_move_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "in").mkdir()
    for number in range(60):
        (tmp_path / "in" / f"{number:02d}.txt").write_text(f"document {number}")
    build(FileSource(tmp_path / "in"), tmp_path / "small", tokenizer, valid_share=0.3)
    held_out = set(texts_of(tmp_path / "small-valid", tokenizer))
    trained = set(texts_of(tmp_path / "small-train", tokenizer))
    assert len(held_out | trained) == 60 and not held_out & trained and 8 <= len(held_out) <= 28
    (tmp_path / "in" / "000.txt").write_text("one more")
    build(FileSource(tmp_path / "in"), tmp_path / "large", tokenizer, valid_share=0.3)
    assert set(texts_of(tmp_path / "large-valid", tokenizer)) - {"one more"} == held_out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbr\xffken\n", r"a\.txt:2: not UTF-8: byte 0xff at column 3"),
        ("a.txt", b"fine\ncut \xe9\x9b", r"a\.txt:2: not UTF-8: the last character is incomplete"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "id": 1}\n',
            r"a\.jsonl:2: no field 'text', but the keys 'body', 'id'",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl:1: field 'text' is int, not text"),
        ("a.jsonl", b'["text"]\n', r"a\.jsonl:1: no field 'text', but a list"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8: byte 0xff"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: field 'text' holds half of a surrogate pair"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"PAR1", r"a\.parquet: \.parquet files are not read"),
        ("a.txt", b"", "no text for"),
        ("a.jsonl", b'{"text": ""}\n', "no text for"),
    ],
)
def test_a_fault_in_the_text_is_named_and_leaves_nothing_behind(
    tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        build(FileSource(tmp_path / "in"), tmp_path / "out" / "data", tokenizer)
    assert list((tmp_path / "out").glob("*")) == []


def test_missing_and_empty_sources_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        build(FileSource(tmp_path / "nowhere"), tmp_path / "data", tokenizer)
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"no file matches '\*\*/\*'"):
        build(FileSource(tmp_path / "in"), tmp_path / "data", tokenizer)


def test_a_full_disk_and_an_impossible_destination_are_told_apart(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt/data: cannot be written: Not a directory|File exists"):
        build(FileSource(tmp_path / "a.txt"), tmp_path / "a.txt" / "data", tokenizer)

    def full(self: IndexedWriter, tokens: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(IndexedWriter, "add", full)
    with pytest.raises(ResourceError, match="data: no space left on its disk"):
        build(FileSource(tmp_path / "a.txt"), tmp_path / "data", tokenizer)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_tokenizing_needs_no_torch_and_memory_that_does_not_grow_with_the_text(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The peak of tokenizing 6 times as much text, in fresh processes, stays where it was."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from pretrain.data.documents import FileSource\n"
        "from pretrain.data.tokenizing import build_data\n"
        "from workbench.tokenizer import Tokenizer\n"
        "source, prefix, tokenizer = map(Path, sys.argv[1:])\n"
        "build_data(FileSource(source), prefix, tokenizer=Tokenizer.load(tokenizer))\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    peaks_kib = []
    for repeats in (1, 6):
        source = tmp_path / f"{repeats}.txt"
        source.write_text(TEXT * (1_500_000 * repeats // len(TEXT)), encoding="utf-8")
        command = [sys.executable, "-c", script, str(source), str(tmp_path / f"out-{repeats}"), str(tokenizer.path)]
        peaks_kib.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peaks_kib[1] - peaks_kib[0] < 48 * 1024
