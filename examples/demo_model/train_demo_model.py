"""Train the demo model: a 7.3 M parameter Llama on plain text.

    python train_demo_model.py --train train.txt --eval eval.txt --tokenizer model/tokenizer.json --out run

Writes OUT/model/ (config, bf16 safetensors, tokenizer) and OUT/checkpoint.pt; a second call with the same OUT resumes there.
On two CPU cores a step of 8 x 256 tokens takes about half a second; on a data-centre GPU use --batch 64 --steps 6000.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WARMUP_STEPS = 100
EVAL_WINDOWS, EVAL_CONTEXT = 40, 512
REPORT_EVERY, SAVE_EVERY = 20, 200


def load_ids(path: Path, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids of a text file, int64 `[tokens]`, framed by <s> and </s>.

    Tokenized in one piece, as users tokenize: cut at paragraphs, other tokens would stand for the same empty lines.
    """
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id])


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Hidden 256, 8 layers: every weight matrix has rows of 256 or 768, multiples of every format's block."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            rope_theta=10000.0,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def evaluate(model: nn.Module, ids: Tensor, device: str) -> float:
    """Mean negative log-likelihood per token over the first windows of the held-out text."""
    model.eval()
    windows = ids[: EVAL_WINDOWS * EVAL_CONTEXT].view(-1, EVAL_CONTEXT).to(device)
    with torch.autocast(device, torch.bfloat16):
        losses = [model(window[None], labels=window[None]).loss.item() for window in windows]
    model.train()
    return sum(losses) / len(losses)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * (0.05 + 0.95 * cosine)


def train(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(args.tokenizer), bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    train_ids, eval_ids = load_ids(args.train, tokenizer), load_ids(args.eval, tokenizer)
    print(f"{len(train_ids):,} training tokens, {len(eval_ids):,} held-out tokens, {device}", flush=True)

    torch.manual_seed(0)
    model = new_model(tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    checkpoint, start = args.out / "checkpoint.pt", 0
    args.out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]

    generator, began = np.random.default_rng(start), time.perf_counter()
    for step in range(start, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        offsets = generator.integers(0, len(train_ids) - args.context, args.batch)
        batch = torch.stack([train_ids[o : o + args.context] for o in offsets]).to(device)  # [batch, context]
        with torch.autocast(device, torch.bfloat16):
            loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % REPORT_EVERY == 0:
            print(f"step {step}  loss {loss.item():.3f}  {time.perf_counter() - began:.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
            print(f"step {step}  held-out NLL {evaluate(model, eval_ids, device):.4f}", flush=True)
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, checkpoint)
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training text, UTF-8")
    parser.add_argument("--eval", type=Path, required=True, help="held-out text, UTF-8")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json with <s>, </s> and <pad>")
    parser.add_argument("--out", type=Path, required=True, help="folder for model/ and checkpoint.pt")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--context", type=int, default=256, help="tokens per window")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
