"""Heads that are tied to the table of a packed model: the head is the packed table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import nn

from isqtorch import IsqConfig, QuantEmbedding, QuantLinear, quantize_

transformers = pytest.importorskip("transformers")
IDS = torch.arange(3, 12)[None]
TEXT = {"input_ids": IDS}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS}


class Family(NamedTuple):
    config: Callable[[], Any]
    trunk: str
    whole: str
    classifier: str | None
    call: dict[str, torch.Tensor]
    same: bool = True  # the head has no layers besides those of the trunk and the table


def whisper() -> Any:
    return transformers.WhisperConfig(
        vocab_size=480,
        d_model=128,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        num_mel_bins=16,
        max_source_positions=32,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        tie_word_embeddings=True,
    )


FAMILIES = {
    "llama": Family(
        lambda: transformers.LlamaConfig(
            vocab_size=480,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            tie_word_embeddings=True,
        ),
        "LlamaModel",
        "LlamaForCausalLM",
        "LlamaForSequenceClassification",
        TEXT,
    ),
    "gpt2": Family(
        lambda: transformers.GPT2Config(
            vocab_size=480, n_embd=256, n_layer=1, n_head=4, n_positions=64, pad_token_id=0
        ),
        "GPT2Model",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        TEXT,
    ),
    "bert": Family(
        lambda: transformers.BertConfig(
            vocab_size=480, hidden_size=256, num_hidden_layers=1, num_attention_heads=4, intermediate_size=512
        ),
        "BertModel",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        TEXT,
        same=False,
    ),
    "bart": Family(
        lambda: transformers.BartConfig(
            vocab_size=480,
            d_model=128,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=256,
            decoder_ffn_dim=256,
            max_position_embeddings=64,
        ),
        "BartModel",
        "BartForConditionalGeneration",
        "BartForSequenceClassification",
        BOTH,
    ),
    "t5": Family(
        lambda: transformers.T5Config(
            vocab_size=480, d_model=128, d_kv=32, d_ff=256, num_layers=1, num_heads=4, decoder_start_token_id=0
        ),
        "T5Model",
        "T5ForConditionalGeneration",
        None,
        BOTH,
    ),
    "whisper": Family(
        whisper,
        "WhisperModel",
        "WhisperForConditionalGeneration",
        None,
        {"input_features": torch.linspace(-1, 1, 16 * 64).view(1, 16, 64), "decoder_input_ids": IDS},
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def built(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def loaded(name: str, folder: Path, **options: Any) -> Any:
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


def output(model: Any, call: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**call)[0]
    return result


def check_tied(model: Any, call: dict[str, torch.Tensor]) -> None:
    """The head is packed, shares the table's parameter, and computes."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, QuantLinear) and isinstance(table, QuantEmbedding)
    assert head.weight is table.weight and head.format == table.format and head.dtype == table.dtype
    logits = output(model, call)
    assert logits.shape[-1] == table.num_embeddings and logits.isfinite().all()


def check_round_trip(model: Any, folder: Path, call: dict[str, torch.Tensor]) -> None:
    """Saving and loading keeps the tie, all bytes and the outputs, and stores the table once."""
    model.save_pretrained(folder)
    with safe_open(folder / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]
    assert shapes.count([*model.get_input_embeddings().weight.shape]) == 1
    again = loaded(type(model).__name__, folder)
    check_tied(again, call)
    assert torch.equal(output(again, call), output(model, call))
    mine, its = model.state_dict(), again.state_dict()
    assert mine.keys() == its.keys() and all(torch.equal(mine[key], its[key]) for key in mine)
    assert again.config.quantization_config.layers == model.config.quantization_config.layers


@every_family
@pytest.mark.parametrize("when", ["while loading", "afterwards"])
def test_a_head_on_a_packed_trunk(family: Family, when: str, tmp_path: Path) -> None:
    whole = built(family.whole, family.config())
    whole.save_pretrained(tmp_path / "float")
    if when == "afterwards":
        trunk = loaded(family.trunk, tmp_path / "float")
        quantize_(trunk, "q8_0", progress=False)
    else:
        trunk = loaded(family.trunk, tmp_path / "float", quantization_config=IsqConfig("q8_0"))
    trunk.save_pretrained(tmp_path / "trunk")
    model = loaded(family.whole, tmp_path / "trunk")
    check_tied(model, family.call)
    if family.same:
        quantize_(whole, "q8_0", progress=False)
        assert torch.equal(output(model, family.call), output(whole, family.call))
    assert {"table", "head"} <= {kind_of(model, layer.name) for layer in model.isq_report.layers if layer.stored}
    check_round_trip(model, tmp_path / "whole", family.call)


def kind_of(model: Any, name: str) -> str:
    module = model.get_submodule(name)
    if module is model.get_output_embeddings():
        return "head"
    return "table" if module is model.get_input_embeddings() else "other"


@every_family
def test_a_trunk_of_a_packed_head(family: Family, tmp_path: Path) -> None:
    whole = built(family.whole, family.config())
    quantize_(whole, "q8_0", progress=False)
    check_round_trip(whole, tmp_path / "whole", family.call)
    trunk = loaded(family.trunk, tmp_path / "whole")
    inner = getattr(whole, whole.base_model_prefix, None)
    if inner is not None:  # T5 has none
        assert torch.equal(output(trunk, family.call), output(inner, family.call))
    assert torch.equal(trunk.get_input_embeddings().weight, whole.get_input_embeddings().weight)
    trunk.save_pretrained(tmp_path / "trunk")
    again = loaded(family.whole, tmp_path / "trunk")
    check_tied(again, family.call)
    assert torch.equal(again.get_output_embeddings().weight, whole.get_output_embeddings().weight)


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.classifier])
def test_from_a_packed_classifier(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    classifier = built(str(family.classifier), family.config())
    quantize_(classifier, "q8_0", progress=False)
    classifier.save_pretrained(tmp_path / "classifier")
    model = loaded(family.whole, tmp_path / "classifier")
    check_tied(model, family.call)
    check_round_trip(model, tmp_path / "whole", family.call)


# ---- ties of a live model --------------------------------------------------------------------------------------------


def tied_llama() -> Any:
    return built("LlamaForCausalLM", FAMILIES["llama"].config())


def test_tying_after_the_trunk_was_packed(tmp_path: Path) -> None:
    model = tied_llama()
    quantize_(model.model, "q4k", progress=False)
    assert isinstance(model.lm_head, nn.Linear) and not isinstance(model.lm_head, QuantLinear)
    model.tie_weights()
    check_tied(model, TEXT)
    wanted = tied_llama()
    quantize_(wanted, "q4k", progress=False)
    assert torch.equal(output(model, TEXT), output(wanted, TEXT))
    assert "lm_head" in [layer.name for layer in model.isq_report.layers if layer.stored]
    check_round_trip(model, tmp_path, TEXT)


def test_a_packed_trunk_in_a_new_model(tmp_path: Path) -> None:
    trunk = built("LlamaModel", FAMILIES["llama"].config())
    quantize_(trunk, "q4k", progress=False)
    model = tied_llama().to(torch.bfloat16)
    model.model = trunk
    model.tie_weights()
    check_tied(model, TEXT)
    check_round_trip(model, tmp_path, TEXT)


def test_tying_again_changes_nothing() -> None:
    model = tied_llama()
    report = quantize_(model, "q4k", progress=False)
    head, wanted = model.lm_head, output(model, TEXT)
    model.tie_weights()
    assert model.lm_head is head and model.isq_report is report and torch.equal(output(model, TEXT), wanted)


def test_a_new_float_table_for_a_packed_model(tmp_path: Path) -> None:
    model = tied_llama()
    quantize_(model, "q4k", progress=False)
    table = nn.Embedding(480, 256)
    model.set_input_embeddings(table)
    model.tie_weights()
    assert type(model.lm_head) is nn.Linear and model.lm_head.weight is table.weight
    wanted = output(model, TEXT)
    assert wanted.isfinite().all()
    model.save_pretrained(tmp_path)
    again = loaded("LlamaForCausalLM", tmp_path)
    assert torch.equal(output(again, TEXT), wanted) and again.lm_head.weight is again.get_input_embeddings().weight


def test_a_table_of_another_format() -> None:
    model = tied_llama()
    quantize_(model, "q4k", progress=False)
    table = QuantEmbedding.from_float(nn.Embedding(480, 256), "afq4")
    model.set_input_embeddings(table)
    model.tie_weights()
    assert model.lm_head.format == "afq4"
    check_tied(model, TEXT)


def test_no_tie_without_the_setting() -> None:
    config = FAMILIES["llama"].config()
    config.tie_word_embeddings = False
    model = built("LlamaForCausalLM", config)
    quantize_(model.model, "q4k", progress=False)
    head = model.lm_head
    model.tie_weights()
    assert model.lm_head is head and head.weight.is_floating_point()


def test_a_checkpoint_with_both_weights_is_not_tied(tmp_path: Path) -> None:
    """config.json says tied, and the files have a float head of its own: it stays, as transformers does with floats."""
    model = tied_llama()
    model.lm_head.weight = nn.Parameter(torch.randn(480, 256))
    quantize_(model, "q8_0", exclude="lm_head", progress=False)
    wanted = output(model, TEXT)
    model.save_pretrained(tmp_path)
    again = loaded("LlamaForCausalLM", tmp_path)
    assert type(again.lm_head) is nn.Linear and torch.equal(output(again, TEXT), wanted)


def test_a_head_that_cannot_be_packed_is_named() -> None:
    class OwnHead(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).tanh()

    model = tied_llama()
    model.lm_head = OwnHead(256, 480, bias=False)
    quantize_(model.model, "q4k", progress=False)
    with pytest.raises(
        ValueError, match=r"lm_head \(OwnHead\) is tied to model.embed_tokens, which is packed as q6k: .*no packed"
    ):
        model.tie_weights()


def test_with_a_device_map(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    trunk = built("LlamaModel", FAMILIES["llama"].config())
    quantize_(trunk, "q4k", progress=False)
    trunk.save_pretrained(tmp_path)
    check_tied(loaded("LlamaForCausalLM", tmp_path, device_map="cpu"), TEXT)
    check_tied(loaded("LlamaForCausalLM", tmp_path, device_map="auto"), TEXT)


def test_a_damaged_list_of_layers_is_still_an_error(tmp_path: Path) -> None:
    """Only layers whose weights the checkpoint has may be missing in the model."""
    model = tied_llama()
    quantize_(model, "q4k", progress=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"model.layers.0.mlp.up_proj"', '"model.layers.7.mlp.up_proj"'))
    with pytest.raises(ValueError, match="'model.layers.7.mlp.up_proj', which LlamaForCausalLM does not have"):
        loaded("LlamaForCausalLM", tmp_path)
