"""Perplexity and KL divergence against closed forms and independent float64 computations."""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isqtorch.evaluation import Perplexity, kl_divergence, perplexity, reference_logits
from isqtorch.running import bos_token

VOCAB = 11


class Bigram(nn.Module):
    """logits[t] depend on ids[t] alone, so every likelihood is one entry of a table."""

    def __init__(
        self, seed: int = 0, vocab: int = VOCAB, dtype: torch.dtype = torch.float32, wrap: str = "tensor"
    ) -> None:
        super().__init__()
        table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(table.to(dtype))
        self.dropout = nn.Dropout(0.9)
        self.wrap = wrap
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> Any:
        self.shapes.append(tuple(ids.shape))
        logits = self.dropout(self.table[ids])
        return {"tensor": logits, "tuple": (logits, None), "object": SimpleNamespace(logits=logits)}[self.wrap]


class Tokenizer:
    """One token per letter, like transformers' tokenizers: BOS (10) in front if asked."""

    bos_token_id = 10

    def __init__(self, adds_bos: bool) -> None:
        self.adds_bos = adds_bos

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        assert not verbose, "a long text would warn"
        return {"input_ids": [10] * self.adds_bos + [ord(letter) - ord("a") for letter in text]}


def text(length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 10, (length,), generator=torch.Generator().manual_seed(seed))


def log_probs(model: Bigram) -> Tensor:
    return torch.log_softmax(model.table.detach().double(), dim=-1)


def nll_by_hand(
    model: Bigram, ids: Tensor, context: int, first: int = 0, whole: bool = False, bos: int | None = None
) -> Tensor:
    """One value per scored token, by loops over windows and positions."""
    log_p, values = log_probs(model), []
    for start in range(0, len(ids), context):
        window = ids[start : start + context].tolist()
        if whole and len(window) < context:
            break
        targets = list(window)
        if bos is not None:
            window[0] = bos
        values += [-log_p[window[i], targets[i + 1]] for i in range(first, len(window) - 1)]
    return torch.stack(values)


def kl_by_hand(reference: Bigram, model: Bigram, ids: Tensor, context: int) -> Tensor:
    log_p, log_q = log_probs(reference), log_probs(model)
    scored = [int(token) for i, token in enumerate(ids) if (i + 1) % context and i + 1 < len(ids)]
    return torch.stack([(log_p[t].exp() * (log_p[t] - log_q[t])).sum() for t in scored])


# ---- perplexity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [2, 15, 16, 17, 18, 47, 48, 64])
@pytest.mark.parametrize("batch", [1, 3])
def test_global(length: int, batch: int) -> None:
    model, ids = Bigram(), text(length)
    want = nll_by_hand(model, ids, 16)
    got = perplexity(model, ids, context=16, batch=batch)
    assert got.tokens == len(want)
    assert got == pytest.approx(math.exp(want.mean()), rel=1e-6)
    assert got.nll == pytest.approx(want.mean().item(), rel=1e-6)
    if len(want) > 1:
        assert got.stderr == pytest.approx(got * want.std().item() / math.sqrt(len(want)), rel=1e-5)


@pytest.mark.parametrize(("length", "context"), [(16, 16), (40, 16), (48, 16), (20, 7), (3, 3)])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_llamacpp(length: int, context: int, adds_bos: bool) -> None:
    """Whole windows; positions context // 2 .. context - 2 predict the tokens after them."""
    model, ids = Bigram(), text(length)
    bos = 10 if adds_bos else None
    want = nll_by_hand(model, ids, context, first=context // 2, whole=True, bos=bos)
    got = perplexity(model, ids, Tokenizer(adds_bos), context=context, mode="llamacpp", batch=2)
    assert got.tokens == len(want) == length // context * (context - 1 - context // 2)
    assert got == pytest.approx(math.exp(want.mean()), rel=1e-6)


def repeating(ids: Tensor) -> Tensor:
    """A model that repeats the first token of the window for ever, so it shows what that token is."""
    return 20.0 * nn.functional.one_hot(ids[:, :1].expand_as(ids), VOCAB).float()


@pytest.mark.parametrize("mode", ["llamacpp", "global"])
def test_windows_begin_with_bos(mode: Any) -> None:
    ids = torch.full((16,), 3)
    assert perplexity(repeating, ids, Tokenizer(adds_bos=False), context=8, mode=mode) == pytest.approx(1, abs=1e-6)
    assert perplexity(repeating, ids, Tokenizer(adds_bos=True), context=8, mode=mode) > 1e8
    assert perplexity(repeating, ids, context=8, mode=mode) == pytest.approx(1, abs=1e-6)  # ids do not show it


def with_bos_by_hand(ids: Tensor, context: int) -> list[Tensor]:
    """BOS and context - 1 tokens of the text in each window."""
    step = context - 1
    return [torch.cat([torch.tensor([10]), ids[start : start + step]]) for start in range(0, len(ids), step)]


@pytest.mark.parametrize("length", [1, 2, 14, 15, 16, 30, 31, 47])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("in_front", [False, True])
def test_global_with_bos_scores_every_token_of_the_text(length: int, batch: int, in_front: bool) -> None:
    model, ids = Bigram(), text(length)
    windows = with_bos_by_hand(ids, 16)
    want = torch.cat([nll_by_hand(model, window, 16) for window in windows])
    given = torch.cat([torch.tensor([10]), ids]) if in_front else ids  # as the tokenizer gives them, or only the text
    got = perplexity(model, given, Tokenizer(adds_bos=True), context=16, batch=batch)
    assert got.tokens == len(want) == length
    assert got == pytest.approx(math.exp(want.mean()), rel=1e-6)
    assert all(shape[1] <= 16 for shape in model.shapes), "no window is longer than the context"


def test_one_window_with_bos_is_as_without() -> None:
    ids = torch.cat([torch.tensor([10]), text(15)])
    want = perplexity(Bigram(), ids, context=16)
    assert perplexity(Bigram(), ids, Tokenizer(adds_bos=True), context=16) == want


@pytest.mark.parametrize("measure", [perplexity, reference_logits])
def test_a_tokenizer_without_bos_changes_nothing(measure: Any) -> None:
    got = measure(Bigram(), text(50), Tokenizer(adds_bos=False), context=16)
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(measure(Bigram(), text(50), context=16)))


BOS_TOKENIZERS = {
    "transformers": Tokenizer(adds_bos=True),
    "tokenizers": SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[10, 0], special_tokens_mask=[1, 0])),
    "sentencepiece": SimpleNamespace(bos_id=lambda: 10, encode=lambda text: [10, 0]),
}


@pytest.mark.parametrize("tokenizer", BOS_TOKENIZERS.values(), ids=BOS_TOKENIZERS)
def test_each_kind_of_tokenizer_tells_its_bos(tokenizer: Any) -> None:
    assert bos_token(tokenizer) == 10
    assert perplexity(repeating, torch.full((16,), 3), tokenizer, context=8) > 1e8


def test_no_bos_where_the_tokenizer_adds_none() -> None:
    assert bos_token(None) is None
    assert bos_token(Tokenizer(adds_bos=False)) is None
    assert bos_token(SimpleNamespace(encode=lambda text: SimpleNamespace(ids=[0], special_tokens_mask=[0]))) is None
    assert bos_token(SimpleNamespace(bos_id=lambda: 10, encode=lambda text: [0])) is None


@pytest.mark.parametrize("stored", [True, False])
def test_divergence_with_bos(stored: bool) -> None:
    """The same windows as in `perplexity`, and logits made without the tokenizer are refused."""
    a, b, ids, tokenizer = Bigram(0), Bigram(1), text(47), Tokenizer(adds_bos=True)
    reference = reference_logits(b, ids, tokenizer, context=16) if stored else b
    got = kl_divergence(a, reference, ids, tokenizer, context=16)
    flat = torch.cat(with_bos_by_hand(ids, 16))
    assert got.tokens == 47 and got.mean == pytest.approx(kl_by_hand(b, a, flat, 16).mean().item(), rel=1e-6)
    if stored:
        with pytest.raises(
            ValueError, match="44 scored positions. Make it with .* the same ids, tokenizer and context"
        ):
            kl_divergence(a, reference, ids, context=16)


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    got = perplexity(lambda ids: torch.zeros(*ids.shape, 50), text(100), context=10)
    assert got == pytest.approx(50, rel=1e-6)
    assert got.stderr == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("wrap", ["tensor", "tuple", "object"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_outputs_and_dtypes(wrap: str, dtype: torch.dtype) -> None:
    """bf16 logits are summed up in f32: only the table itself is rounded."""
    model, ids = Bigram(dtype=dtype, wrap=wrap), text(50)
    want = nll_by_hand(model, ids, 16)
    assert perplexity(model, ids, context=16) == pytest.approx(math.exp(want.mean()), rel=1e-6)


def test_large_vocabulary_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, ids = Bigram(), Bigram(seed=5), text(50)
    whole = perplexity(model, ids, context=16), kl_divergence(model, other, ids, context=16)
    monkeypatch.setattr("isqtorch.evaluation._PIECE", 3 * VOCAB + 1)
    pieces = perplexity(model, ids, context=16), kl_divergence(model, other, ids, context=16)
    assert pieces[0].nll == pytest.approx(whole[0].nll, rel=1e-9)
    assert pieces[1].mean == pytest.approx(whole[1].mean, rel=1e-9)


def test_text_and_ids_agree() -> None:
    model, letters = Bigram(), "abcdefghij" * 5
    ids = torch.tensor([ord(letter) - ord("a") for letter in letters])
    want = perplexity(model, ids, context=16)
    assert perplexity(model, letters, Tokenizer(adds_bos=False), context=16) == want
    assert perplexity(model, ids.tolist(), context=16) == want
    assert perplexity(model, ids[None].to(torch.int32), context=16) == want
    encoding = SimpleNamespace(encode=lambda text: SimpleNamespace(ids=ids.tolist()))  # a tokenizers.Tokenizer
    assert perplexity(model, letters, encoding, context=16) == want


def test_long_text_does_not_warn(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel({letter: i for i, letter in enumerate("abcdefghij")}, "a"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=8)
    got = perplexity(Bigram(), "abcdefghij" * 10, tokenizer, context=16)
    assert got.tokens == 6 * 15 + 3
    assert "longer than" not in caplog.text + "".join(capfd.readouterr())


def test_modes_gradients_and_batches() -> None:
    model, ids = Bigram(), text(50)
    model.train()
    model.dropout.eval()  # kept frozen by its owner
    want = nll_by_hand(model, ids, 16)
    assert perplexity(model, ids, context=16, batch=2) == pytest.approx(math.exp(want.mean()), rel=1e-6)
    assert model.shapes == [(2, 16), (1, 16), (1, 2)]
    assert model.training and not model.dropout.training
    model.dropout.train()
    assert perplexity(model, ids, context=16) == pytest.approx(math.exp(want.mean()), rel=1e-6)  # dropout is off
    assert model.dropout.training
    model.wrap = "no such output"
    with pytest.raises(KeyError):
        perplexity(model, ids, context=16)
    assert model.training and model.dropout.training
    model.wrap = "tensor"
    assert model.table.grad is None and not reference_logits(model, ids, context=16).requires_grad


def test_cache_is_off_where_the_model_has_one() -> None:
    class Caching(Bigram):
        def forward(self, ids: Tensor, use_cache: bool = True) -> Any:
            assert not use_cache
            return super().forward(ids)

    assert perplexity(Caching(), text(20), context=16) == perplexity(Bigram(), text(20), context=16)


def test_perplexity_is_a_float() -> None:
    got = perplexity(Bigram(), text(40), context=16)
    assert isinstance(got, float) and f"{got:.3f}" == f"{float(got):.3f}"
    assert "+-" in str(got) and "37 tokens" in str(got)
    for twin in (copy.deepcopy(got), pickle.loads(pickle.dumps(got))):
        assert (twin, twin.nll, twin.tokens) == (got, got.nll, got.tokens)
        assert twin.stderr == pytest.approx(got.stderr)
    assert Perplexity(1000.0, 1.0, 2) == math.inf
    assert math.isnan(perplexity(lambda ids: torch.full((*ids.shape, 5), math.nan), text(40) % 5, context=16))


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    perplexity(Bigram(), text(40), context=16)
    assert not "".join(capfd.readouterr())
    perplexity(Bigram(), text(40), context=16, progress=True)
    assert "perplexity" in capfd.readouterr().err


# ---- misuse ----------------------------------------------------------------------------------------------------------


def configured(**config: Any) -> Bigram:
    model = Bigram()
    model.config = SimpleNamespace(**config)
    return model


@pytest.mark.parametrize(
    ("model", "ids", "arguments", "message"),
    [
        (Bigram(), text(50), {"mode": "hf"}, "mode must be 'global' or 'llamacpp', got 'hf'"),
        (Bigram(), text(50), {"context": 1}, "context must be an integer of 2 or more, got 1"),
        (Bigram(), text(50), {"context": 2, "mode": "llamacpp"}, "context must be an integer of 3 or more"),
        (Bigram(), text(50), {"context": 16.0}, "context must be an integer"),
        (Bigram(), text(50), {"batch": 0}, "batch must be a positive integer"),
        (Bigram(), text(1), {}, "1 tokens are too few, at least 2"),
        (Bigram(), [], {}, "0 tokens are too few"),
        (Bigram(), text(50), {"context": 51, "mode": "llamacpp"}, "50 tokens are too few, at least 51"),
        (Bigram(), "a text", {}, "a text needs tokenizer"),
        (Bigram(), "", {"tokenizer": Tokenizer(False)}, "0 tokens are too few"),
        (Bigram(), "", {"tokenizer": Tokenizer(True)}, "1 tokens are too few"),
        (configured(vocab_size=10), text(50), {"tokenizer": Tokenizer(True)}, "0 to 10, the model knows 0 to 9"),
        (Bigram(), text(50).view(2, 25), {}, r"shape \[T\] or \[1, T\], got \[2, 25\]"),
        (Bigram(), text(50).float(), {}, "must be integers, got torch.float32"),
        (
            Bigram(),
            None,
            {},
            "after the model comes a text or token ids, then the tokenizer; got a NoneType, which makes no ids: ",
        ),
        (Bigram(), Bigram(), {}, "then the tokenizer; got a Bigram, which"),
        (Bigram(), [[1, 2], [3]], {}, "got a list, which makes no ids: expected sequence of length 2"),
        (Bigram(), text(50) - 5, {}, "token ids run from -5"),
        (configured(vocab_size=9), text(50), {}, "token ids run from 0 to 9, the model knows 0 to 8"),
        (configured(max_position_embeddings=128), text(50), {}, "512, but the model has max_position_embeddings = 128"),
        (
            configured(text_config=SimpleNamespace(max_position_embeddings=128)),
            text(50),
            {"context": 129},
            "Use context=128 or less",
        ),
        (lambda ids: ids, text(50), {}, r"must return logits of shape \[1, 50, vocabulary\] .*got \[1, 50\]"),
        (lambda ids: {"hidden": 0}, text(50), {}, "got NoneType"),
        (lambda ids: torch.zeros(1, 3, 4), text(50), {}, r"got \[1, 3, 4\]"),
    ],
)
def test_misuse(model: Any, ids: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(model, ids, **arguments)
    if "mode" not in arguments:
        with pytest.raises(ValueError, match=message):
            kl_divergence(model, model, ids, **arguments)
        with pytest.raises(ValueError, match=message):
            reference_logits(model, ids, **arguments)


def test_wrong_reference() -> None:
    model, ids = Bigram(), text(50)
    logits = reference_logits(model, ids, context=16)
    with pytest.raises(ValueError, match=r"shape \[46, 11\], but these ids in windows of 25 have 48 scored positions"):
        kl_divergence(model, logits, ids, context=25)
    with pytest.raises(ValueError, match="reference has a vocabulary of 10, the model of 11"):
        kl_divergence(model, logits[:, :10], ids, context=16)
    with pytest.raises(ValueError, match="reference has a vocabulary of 12, the model of 11"):
        kl_divergence(model, Bigram(vocab=12), ids, context=16)
