"""Make the base model ``builtin:tiny-code-lm``: tokenizer, weights and the figures of its training.

    python simulations/pretrain/tiny_code_lm.py [--out FOLDER] [--steps N]

Trains a byte-level BPE vocabulary and a Llama of about one million parameters on the single-file modules of the
Python standard library of this machine (the public part of ``builtin:stdlib``). No package family, hence no client's
text, is read. One thread, a fixed seed, every batch chosen by a PRF: the same machine, Python and torch give the same
bytes again; elsewhere sums may round differently.

The training is stopped early on purpose, while the learning rate is still high: a base that has been taught everything
that library code has in common leaves nothing for clients to learn *together*. ``docs/workloads.md`` has the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedpeft.prf import prf_int, prf_uniform, torch_generator
from fedpeft_simulations.stdlib import public_sections

SEED = 1
VOCABULARY = 1024
POSITIONS = 256
EOS, PAD = "<eos>", "<pad>"
LOSS_EVERY = 50
ASSETS = Path(__file__).resolve().parents[1] / "fedpeft_simulations" / "assets" / "tiny-code-lm"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text without an unknown token, and decodes it back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model, initialised from :data:`SEED`."""
    torch.manual_seed(prf_int(SEED, "pretrain-init"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=320,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All ``texts`` as one sequence of token ids, each ended by EOS."""
    ids: list[int] = []
    for tokens in tokenizer(texts)["input_ids"]:
        ids += [*tokens, tokenizer.eos_token_id]
    return torch.tensor(ids)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, ids_n: torch.Tensor) -> float:
    """Cross-entropy in nats per token over consecutive windows of the model's length."""
    model.eval()
    windows = ids_n[: len(ids_n) // POSITIONS * POSITIONS].view(-1, POSITIONS)
    losses = [float(model(input_ids=w, labels=w).loss) * len(w) for w in windows.split(32)]
    model.train()
    return sum(losses) / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--planned-steps", type=int, default=1600, help="steps for which the rate's decay is planned")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    begin = time.monotonic()

    pieces = list(public_sections())
    # 3 % of the public modules are kept for watching the loss.
    watched = {name for name, _ in pieces if prf_uniform(SEED, "pretrain-heldout", name) < 0.03}
    train_texts = [text for name, text in pieces if name not in watched]
    tokenizer = train_tokenizer(train_texts)
    train_ids = stream(tokenizer, train_texts)
    watched_ids = stream(tokenizer, [text for name, text in pieces if name in watched])
    model = make_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(train_ids)} training tokens, {len(watched_ids)} watched, {parameters} parameters", flush=True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, args.planned_steps // 20)
    curve: list[dict[str, float]] = []
    model.train()
    for step in range(args.steps):
        rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / args.planned_steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate
        starts = torch.randint(
            len(train_ids) - POSITIONS, (args.batch_size,), generator=torch_generator(SEED, "pretrain-batch", step)
        )
        batch = torch.stack([train_ids[s : s + POSITIONS] for s in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % LOSS_EVERY == 0:
            curve.append({"step": step + 1, "train_loss": round(loss.item(), 4)})
            print(f"step {step + 1} loss {loss.item():.3f} {time.monotonic() - begin:.0f} s", flush=True)
    watched_loss = mean_loss(model, watched_ids)
    save(model, tokenizer, args.out)
    figures = {
        "corpus": {
            "what": "single-file modules at the top level of the Python standard library",
            "python": platform.python_version(),
            "sha256": hashlib.sha256("".join(f"{n}\0{t}\0" for n, t in pieces).encode()).hexdigest(),
            "train_bytes": sum(len(t.encode()) for t in train_texts),
            "train_tokens": len(train_ids),
            "watched_tokens": len(watched_ids),
        },
        "model": {"parameters": parameters, "vocabulary": len(tokenizer), "positions": POSITIONS},
        "training": {
            "seed": SEED,
            "steps": args.steps,
            "planned_steps": args.planned_steps,
            "batch_size": args.batch_size,
            "tokens_seen": args.steps * args.batch_size * POSITIONS,
            "learning_rate": args.learning_rate,
            "seconds_on_one_thread": round(time.monotonic() - begin),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "watched_loss_nats_per_token": round(watched_loss, 4),
        "uniform_loss_nats_per_token": round(math.log(len(tokenizer)), 4),
        "curve": curve,
    }
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"watched loss {watched_loss:.3f}", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 (half the bytes; it is widened exactly on loading) with its tokenizer."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    copy = LlamaForCausalLM(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # transformers 5 writes the name of a class that transformers 4 does not have.
    settings = folder / "tokenizer_config.json"
    facts = {**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    facts.pop("backend", None)
    settings.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
