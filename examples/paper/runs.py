"""What training and evaluation share: options, base model, tokenizer, and the record by which a run is continued."""
import argparse
import json
from pathlib import Path
from typing import Any

import torch
from recipes import RECIPES
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from abba_ext.checkpoint import replace_file


def option_parser(description: str) -> argparse.ArgumentParser:
    """With the options that both scripts have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--model", required=True, help="hub name or folder of the base model; the paper's are "
                        + "; ".join(f"{name}: {', '.join(recipe.models)}" for name, recipe in RECIPES.items()))
    parser.add_argument("--output", type=Path, required=True, help="folder; an interrupted run there is continued")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="CUDA_VISIBLE_DEVICES chooses a GPU among several (default: %(default)s)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True,
                        help="the base model in bfloat16, otherwise in float32 (default: %(default)s)")
    return parser


def positive(text: str) -> int:
    """An option's value that is at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def load_base(name: str, device: torch.device | str, bf16: bool) -> nn.Module:
    """The base model, in bfloat16 or float32."""
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16 if bf16 else torch.float32).to(device)


def load_tokenizer(name: str, padding_side: str) -> Any:
    """The model's tokenizer, with some token to pad with (masked, so any will do)."""
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side=padding_side)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def write_json(path: Path, content: Any) -> None:
    """Replaces a file atomically; its folder is created if need be."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(str(path), lambda part: Path(part).write_text(text, encoding="utf-8"))


def record_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes the settings of a new run; of one that is continued, checks that they are still the same.

    Raises:
        ValueError: They are not.
    """
    if not path.exists():
        write_json(path, settings)
        return
    known, given = json.loads(path.read_text(encoding="utf-8")), json.loads(json.dumps(settings))
    changed = [f"{key} {known.get(key)!r}, got {given.get(key)!r}" for key in known | given if known.get(key) != given.get(key)]
    if changed:
        raise ValueError(f"{path.parent} holds a run with {'; '.join(changed)}: choose another --output or remove it")
