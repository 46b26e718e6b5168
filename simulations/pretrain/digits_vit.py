"""Make the base model ``builtin:digits-vit``: weights and the figures of their training.

    python simulations/pretrain/digits_vit.py [--out FOLDER] [--steps N]

Trains a small vision transformer on the public half of scikit-learn's digits, with one thread, a fixed seed and batches
chosen by a PRF: the same machine and torch give the same bytes again. Takes a few seconds. It stops early on purpose,
so that an adapter has something to add.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import sklearn
import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

from fedpeft.data.encode import encode
from fedpeft.models import LoadedBase
from fedpeft.prf import prf_int, torch_generator
from fedpeft_simulations.digits import SOURCE, public_half

SEED = 1
ASSETS = Path(__file__).resolve().parents[1] / "fedpeft_simulations" / "assets" / "digits-vit"


def make_model() -> ViTForImageClassification:
    """The untrained model, initialised from :data:`SEED`."""
    torch.manual_seed(prf_int(SEED, "pretrain-init"))
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.1,
            num_labels=10,
        )
    )


@torch.no_grad()
def accuracy(model: ViTForImageClassification, tensors: dict[str, torch.Tensor]) -> float:
    """Share of right answers."""
    model.eval()
    right = model(pixel_values=tensors["pixel_values"]).logits.argmax(-1) == tensors["labels"]
    model.train()
    return right.float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    begin = time.monotonic()

    model = make_model()
    base = LoadedBase(model, None, "image-classification", image_size=8, channels=1)
    public = encode(public_half(), base.task, base, 0).tensors
    order = torch.randperm(len(public["labels"]), generator=torch_generator(SEED, "pretrain-watched"))
    train, watched = ({k: v[part] for k, v in public.items()} for part in (order[100:], order[:100]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01)
    model.train()
    for step in range(args.steps):
        picks = torch.randint(
            len(train["labels"]), (args.batch_size,), generator=torch_generator(SEED, "pretrain-batch", step)
        )
        loss = model(**{k: v[picks] for k, v in train.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    federated = encode(SOURCE.load()[0].heldout, base.task, base, 0).tensors
    figures = {
        "corpus": {"what": "public half of scikit-learn's digits", "images": len(train["labels"]), "watched": 100},
        "model": {"parameters": sum(p.numel() for p in model.parameters())},
        "training": {
            "seed": SEED,
            "steps": args.steps,
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "seconds_on_one_thread": round(time.monotonic() - begin, 1),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "last_train_loss": round(loss.item(), 4),
        "watched_accuracy": round(accuracy(model, watched), 4),
        "federated_heldout_accuracy": round(accuracy(model, federated), 4),
    }
    # bfloat16 halves the bytes and is widened exactly on loading.
    model.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
