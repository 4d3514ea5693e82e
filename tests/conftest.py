"""Shared pieces of the tests: small models built in code, and the optional folder of real data."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
from fake_hub import FakeHub
from forked import run_forked
from jaxtyping import install_import_hook
from launching import capture
from small_multimodal import make_clip, make_joint

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("DQ_TEST_DATA", ROOT.parent / "shared" / "data"))

install_import_hook("dq_multimodal.core", "beartype.beartype")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Training takes all cores of a machine: two workers of xdist would wait for each other."""
    with pytest.MonkeyPatch.context() as patch:
        if "PYTEST_XDIST_WORKER" in os.environ:
            patch.setattr("torch.set_num_threads", lambda n_threads: None)
        yield


@pytest.fixture
def real_data() -> Path:
    """The folder of real data; tests that ask for it are skipped where it is missing."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA} (set DQ_TEST_DATA)")
    return DATA


@pytest.fixture(scope="session")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny untrained sentence encoder."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    tokenizer.train_from_iterator(["the quick brown fox jumps over a lazy dog 0123456789"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder / "bert")
    fast.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"))
    pooling = Pooling(transformer.get_embedding_dimension())
    SentenceTransformer(modules=[transformer, pooling], device="cpu").save(str(folder / "st"))
    return folder / "st"


@pytest.fixture(scope="session")
def small_classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained classifier of 3 classes for images of 16 px."""
    import torch

    from dq_multimodal.models.classifiers import Classifier, build_classifier, save_classifier

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    net = build_classifier("resnet10-narrow", 3, 16)
    labels = ("cat", "dog", "emu")
    colours = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    save_classifier(net, Classifier("resnet10-narrow", 16, 3, labels, **colours), folder)
    return folder


@pytest.fixture(scope="session")
def small_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny untrained CLIP."""
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def small_joint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny untrained encoder that reads images and text together."""
    return make_joint(tmp_path_factory.mktemp("joint"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub on loopback that the clients of this process see."""
    with FakeHub() as fake:
        fake.patch(monkeypatch, tmp_path)
        yield fake


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """A headless Chromium; tests that ask for it are skipped where there is none."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(names)} on PATH, and CHROMIUM is not set")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


Cli = Callable[..., subprocess.CompletedProcess[str]]


def run_here(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process, from a folder, as a process of its own would."""
    from dq_multimodal import cli

    return capture(partial(cli.main, words), words, folder)


@pytest.fixture(scope="session")
def command() -> Cli:
    """Run the command line in a folder: in this process, or with an `env` in one of its own."""

    def run(
        folder: Path, *arguments: object, code: int = 0, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        words = [*map(str, arguments)]
        done = run_here(folder, words) if env is None else run_forked(words, folder, env)
        assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture
def cli(command: Cli, tmp_path: Path) -> Cli:
    """Run the command line in tmp_path."""
    return partial(command, tmp_path)
