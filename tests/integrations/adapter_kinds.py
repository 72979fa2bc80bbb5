"""Every kind of adapter that PEFT has, and what it can do on packed layers: the table in docs/guide.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import peft
import torch

TARGETS = ["q_proj", "up_proj"]
IDS = torch.arange(24).view(2, 12) % 60
_TASK = {"task_type": "CAUSAL_LM"}
_PROMPT = {**_TASK, "num_virtual_tokens": 3}


@dataclass(frozen=True)
class Kind:
    """One kind.

    Attributes:
        config: name of PEFT's class, and its arguments besides the targets.
        trains: "yes"; "decoding": yes, and each forward decodes the weight, because PEFT computes with it; "no".
        reads: whether PEFT reads the weight when the adapter is made.
        merges: "yes"; "no": also not into float layers; "": there is nothing to merge.
        batch: further arguments of the forward.
    """

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    trains: str = "yes"
    merges: str = "yes"
    reads: bool = False
    batch: dict[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        made = getattr(peft, self.config)
        targets: dict[str, Any] = {} if self.options.get("task_type") else {"target_modules": TARGETS}
        return made(**{**targets, **self.options})


def _lora(**options: Any) -> Kind:
    return Kind("LoraConfig", {"r": 4, **options})


_TASKS = {"task_ids": torch.tensor([0, 1])}
KINDS: dict[str, Kind] = {
    "LoRA": _lora(),
    "rsLoRA": _lora(use_rslora=True),
    "DoRA": Kind("LoraConfig", {"r": 4, "use_dora": True}, "decoding"),
    "AdaLoRA": Kind("AdaLoraConfig", {"total_step": 10, "tinit": 1, "tfinal": 1, "init_r": 4, "target_r": 2}),
    "Adaption prompt": Kind("AdaptionPromptConfig", {**_TASK, "adapter_len": 3, "adapter_layers": 1}, merges=""),
    "BEFT": Kind("BeftConfig"),
    "BOFT": Kind("BOFTConfig", {"boft_block_size": 8}),
    "C3A": Kind("C3AConfig", {"block_size": 32}),
    "Cartridge": Kind("CartridgeConfig", {**_PROMPT, "num_frozen_tokens": 1}, merges=""),
    "DEFT": Kind("DeftConfig", reads=True),
    "DeLoRA": Kind("DeloraConfig", {"r": 4}, reads=True),
    "FourierFT": Kind("FourierFTConfig", {"n_frequency": 50}),
    "FRoD": Kind("FrodConfig", {}, "no"),
    "GLoRA": Kind("GloraConfig", {"r": 4}, "no"),
    "GraLoRA": Kind("GraloraConfig", {"r": 4}),
    "HiRA": Kind("HiraConfig", {"r": 4}, "decoding"),
    "HRA": Kind("HRAConfig", {"r": 4}, "decoding"),
    "IA3": Kind("IA3Config", {"feedforward_modules": ["up_proj"]}),
    "Lily": Kind("LilyConfig", merges="no"),
    "LN tuning": Kind("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "LoHa": Kind("LoHaConfig", {"r": 4}, "decoding"),
    "LoKr": Kind("LoKrConfig", {"r": 4}, "decoding"),
    "MiSS": Kind("MissConfig", {"r": 8}),
    "MiSS (bat)": Kind("MissConfig", {"r": 8, "init_weights": "bat"}, "decoding"),
    "Multitask prompt tuning": Kind(
        "MultitaskPromptTuningConfig", {**_PROMPT, "num_tasks": 2, "token_dim": 256}, merges="", batch=_TASKS
    ),
    "OFT": Kind("OFTConfig", {"oft_block_size": 8}),
    "OSF": Kind("OSFConfig", reads=True),
    "P-tuning": Kind("PromptEncoderConfig", {**_PROMPT, "encoder_hidden_size": 16}, merges=""),
    "PEANuT": Kind("PeanutConfig", {}, "decoding"),
    "Poly": Kind(
        "PolyConfig",
        {**_TASK, "target_modules": TARGETS, "r": 4, "n_tasks": 2, "n_skills": 2},
        merges="no",
        batch=_TASKS,
    ),
    "Prefix tuning": Kind("PrefixTuningConfig", _PROMPT, merges=""),
    "Prompt tuning": Kind("PromptTuningConfig", _PROMPT, merges=""),
    "PSOFT": Kind("PsoftConfig", {"r": 4}, reads=True),
    "PVeRA": Kind("PveraConfig", {"r": 4}),
    "RandLoRA": Kind("RandLoraConfig", {"r": 4}),
    "RoAd": Kind("RoadConfig"),
    "SHiRA": Kind("ShiraConfig", {"r": 4}, "decoding"),
    "SuperTuning": Kind("SupertuningConfig", {}, "decoding"),
    "TinyLoRA": Kind("TinyLoraConfig", reads=True),
    "Trainable tokens": Kind(
        "TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [1, 2]}, "decoding"
    ),
    "UniLoRA": Kind("UniLoraConfig", {"r": 4}, reads=True),
    "VBLoRA": Kind("VBLoRAConfig", {"r": 4, "vector_length": 64, "num_vectors": 16, "topk": 2}),
    "VeRA": Kind("VeraConfig", {"r": 4, "target_modules": ["q_proj"]}),
    "WaveFT": Kind("WaveFTConfig", {"n_frequency": 50}),
}
NOT_TRIED = {"ADAMSS", "CPT", "SHADOW", "XLORA"}
"""PEFT's names of the kinds without an entry: they need more than a configuration."""


def table() -> str:
    """The table of docs/guide.md."""
    rows = ["| adapter | trains | merges |", "| --- | --- | --- |"]
    said = {"yes": "yes", "no": "refused", "decoding": "yes, decoding"}
    for name, kind in sorted(KINDS.items(), key=lambda item: item[0].lower()):
        merges = {"yes": "yes", "no": "no, also not in float", "": "nothing to merge"}[kind.merges]
        rows.append(f"| {name} | {said[kind.trains]} | {merges if kind.trains != 'no' else 'refused'} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
