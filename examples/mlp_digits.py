"""Plain PyTorch: an MLP learns the digits 0 to 7, then ABBA teaches it 8 and 9 through 8,784 parameters (paper, Figure 1).

    pip install . scikit-learn
    python examples/mlp_digits.py
"""
import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import abba_ext


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=lr)
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()


def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> tuple[float, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="per phase")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    held_out = torch.arange(len(labels)) % 5 == 0
    new = labels >= 8
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    train(model, images[~held_out & ~new], labels[~held_out & ~new], args.steps, lr=1e-3)

    before = accuracy(model, images[held_out & new], labels[held_out & new])
    abba_ext.patch_model(model, abba_ext.AbbaConfig(r=8, alpha=4), verbose=True)
    train(model, images[~held_out & new], labels[~held_out & new], args.steps, lr=5e-3)
    after = accuracy(model, images[held_out & new], labels[held_out & new])
    print(f"accuracy on held-out 8s and 9s: {before:.1%} before, {after:.1%} after")
    abba_ext.merge_and_unload(model, safe=True)  # a plain MLP again
    return before, after


if __name__ == "__main__":
    main()
