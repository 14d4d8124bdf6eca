"""The tokenizer: trained alike each time, and the same to Hugging Face's loaders as to us."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.bpe import save_tokenizer, train_tokenizer
from pretrain.data.documents import FileSource
from tests.pretrain.data.helpers import TEXT, small_tokenizer
from workbench.errors import DataError
from workbench.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return small_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_any_text_comes_back_from_its_ids(tokenizer: Tokenizer, text: str) -> None:
    plain = tokenizer.plain()
    ids = plain.encode(text)
    assert plain.decode(ids, skip_special_tokens=False) == text
    assert not {tokenizer.eos_id, tokenizer.pad_id} & set(ids)


def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        digests.add(small_tokenizer(tmp_path / name).sha256)
    assert len(digests) == 1


def test_the_vocabulary_has_the_size_asked_for_with_distinct_eos_and_pad(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (290, 0, 1, None)
    assert tokenizer.encode("a<|endoftext|>")[-1] == 0


def test_transformers_loads_the_folder_offline_and_agrees(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers")
    for loader in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = loader.from_pretrained(str(tokenizer.path))
        assert theirs(TEXT)["input_ids"] == tokenizer.encode(TEXT)
        assert theirs.decode(tokenizer.encode(TEXT)) == tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert (theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (0, 1, 290)


def test_a_tokenizer_loaded_by_its_file_is_the_same(tokenizer: Tokenizer) -> None:
    loaded = Tokenizer.load(tokenizer.path / "tokenizer.json")
    assert (loaded.sha256, loaded.encode(TEXT), loaded.eos_id) == (tokenizer.sha256, tokenizer.encode(TEXT), 0)


def test_a_vocabulary_that_cannot_be_filled_is_refused_with_both_sizes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("ab ab ab")
    with pytest.raises(DataError, match=r"yields \d+ tokens, not vocab_size=5000"):
        train_tokenizer(FileSource(tmp_path / "a.txt"), vocab_size=5000)
    with pytest.raises(DataError, match="vocab_size=100: the 256 bytes"):
        train_tokenizer(FileSource(tmp_path / "a.txt"), vocab_size=100)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="holds no text to train on"):
        train_tokenizer(FileSource(tmp_path / "empty.txt"), vocab_size=300)


def test_saving_over_something_else_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    backend = train_tokenizer(FileSource(tmp_path / "a.txt"), vocab_size=270)
    with pytest.raises(DataError, match="thesis: exists already"):
        save_tokenizer(backend, tmp_path / "thesis")
    with pytest.raises(DataError, match=r"thesis: holds chapter\.txt besides a tokenizer"):
        save_tokenizer(backend, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("content", "message"), [(None, "holds no tokenizer.json"), ("{}", "not a tokenizer"), ("oops", "not a tokenizer")]
)
def test_what_is_no_tokenizer_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=message):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="nowhere: no such tokenizer folder"):
        Tokenizer.load(tmp_path / "nowhere")
