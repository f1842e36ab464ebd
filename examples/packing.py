"""A question packed with several answers into one sequence, and the answers' log-likelihoods: the question is read once."""
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from commonsense import Question
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Packed:
    """A question followed by some of its answers, each of which sees the question and itself alone.

    Attributes:
        tokens: The question's, then those of each answer.
        parts: For each token 0 if it is the question's, k if the k-th answer's.
        positions: Of the tokens: every answer begins where the question ends.
    """

    tokens: list[int]
    parts: list[int]
    positions: list[int]


def pack(tokenizer: Any, item: Question, choices: Iterable[int], max_length: int, end: bool = False) -> Packed:
    """A question with the answers of these indices, and the end token if asked for.

    The question and any one answer have at most max_length tokens together; a longer question loses its start.
    """
    answers = []
    for choice in choices:
        answer = tokenizer(" " + item.choices[choice], add_special_tokens=False)["input_ids"]
        answers.append((answer + [tokenizer.eos_token_id] * end)[: max_length - 1])
    prompt = tokenizer(item.prompt)["input_ids"][-(max_length - max(map(len, answers))):]
    tokens, parts, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    for part, answer in enumerate(answers, 1):
        tokens += answer
        parts += [part] * len(answer)
        positions += range(len(prompt), len(prompt) + len(answer))
    return Packed(tokens, parts, positions)


def answer_losses(model: nn.Module, batch: list[Packed]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods of the answers' tokens, summed for each answer, and the numbers of tokens: [answers] each.

    The output head sees the positions in front of an answer's token, and no others.
    """
    device, width = model.device, max(len(packed.tokens) for packed in batch)
    tokens, parts, positions = (
        torch.tensor([row + [fill] * (width - len(row)) for row in rows], device=device)
        for rows, fill in (([packed.tokens for packed in batch], 0), ([packed.parts for packed in batch], -1),
                           ([packed.positions for packed in batch], 0)))
    sees = (parts[:, :, None] == parts[:, None]) | (parts[:, None] == 0)
    sees &= torch.ones(width, width, dtype=torch.bool, device=device).tril()
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    mask = torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, torch.finfo(dtype).min)[:, None]
    rows, columns = (parts > 0).nonzero(as_tuple=True)
    answers = parts[rows, columns]
    lengths = (parts == 0).sum(1)[rows]  # of the questions
    before = torch.where(answers == parts[rows, columns - 1], columns, lengths) - 1
    hidden = model.get_decoder()(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[rows, before])
    losses = cross_entropy(logits.float(), tokens[rows, columns], reduction="none")
    numbers = parts.amax(1).cumsum(0)  # of answers up to each row
    index = (numbers[rows] - parts.amax(1)[rows]) + answers - 1
    sums = losses.new_zeros(int(numbers[-1])).index_add(0, index, losses)
    return sums, index.bincount(minlength=len(sums))


def losses_by_question(model: nn.Module, packs: list[Packed], batch: int = 16) -> Iterator[tuple[int, list[float], list[int]]]:
    """Each question's index, the losses of its answers and their numbers of tokens; questions of similar length are read together."""
    order = sorted(range(len(packs)), key=lambda k: len(packs[k].tokens))
    for start in range(0, len(order), batch):
        chosen = order[start: start + batch]
        sums, counts = (tensor.split([packs[k].parts[-1] for k in chosen])
                        for tensor in answer_losses(model, [packs[k] for k in chosen]))
        for k, losses, tokens in zip(chosen, sums, counts, strict=True):
            yield k, losses.tolist(), tokens.tolist()


def prefers_right_answer(item: Question, losses: list[float]) -> dict[str, bool]:
    """Whether the right answer is the likeliest of all: "acc" as a sum over its tokens, "acc_norm" divided by its bytes."""
    by_byte = [loss / len(text.encode()) for loss, text in zip(losses, item.choices, strict=True)]
    return {"acc": losses.index(min(losses)) == item.answer, "acc_norm": by_byte.index(min(by_byte)) == item.answer}
