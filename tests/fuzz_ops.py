"""Random calls of the operators, right and wrong ones: each result is judged by dense fp64, each refusal must be an exception.

    python tests/fuzz_ops.py --calls 100000 --seed 1
"""
import argparse
import collections
import json
import random

import torch
from oracle import dense_kr

import abba_ext
from abba_ext import ops

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
REFUSALS = (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError)
GUARD = 64  # elements on either side of every argument and in its gaps: reading them shows in the result, writing them in them
# What the guards hold. Not NaN in half precision: torch's own CPU matmul reads beyond rows of odd length and multiplies by zero.
GUARD_VALUE = {torch.float32: float("nan"), torch.float64: float("nan"), torch.bfloat16: 12288.0, torch.float16: 12288.0}


class Case:
    """One call: operator, arguments by name, and whether it is known to be right."""

    def __init__(self, rng: random.Random, guard: int = GUARD):
        self.rng, self.guard = rng, guard
        self.generator = torch.Generator().manual_seed(rng.getrandbits(31))
        self.buffers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.valid = True
        self.wrong = "nothing"
        tokens, d, m = (rng.choice((0, 1, 1, 2, 3, 7, 8, 16, 33, 65)) for _ in range(3))
        r1, r2 = (rng.choice((1, 1, 2, 3, 4, 5, 8, 16)) for _ in range(2))
        dtype = rng.choice(DTYPES)
        factor_dtype = dtype if rng.random() < 0.5 else rng.choice(DTYPES)
        self.op = rng.choice(("project", "expand_", "factor_grad", "abba_linear", "dense_backward"))
        rank = r1 * r2
        shapes = {"x": (tokens, d), "f1": (r1, d), "f2": (r2, d)}
        pairs = {"a1": (r1, d), "b1": (m, r1), "a2": (r2, d), "b2": (m, r2)}
        if self.op == "expand_":
            shapes = {"y": (tokens, d), "u": (tokens, rank), "f1": (r1, d), "f2": (r2, d)}
        elif self.op == "factor_grad":
            shapes = {"x": (tokens, d), "v": (tokens, rank), "f1": (r1, d), "f2": (r2, d)}
        elif self.op == "abba_linear":
            shapes = {"x": (tokens, d), "weight": (m, d), "bias": (m,), **pairs}
        elif self.op == "dense_backward":
            dtype = factor_dtype = rng.choice((torch.float32, torch.float64))
            self.needs = rng.choice(((True, True), (True, False), (False, True)))  # dx, the factors' gradients
            shapes = {"x": (tokens, d), "dy": (tokens, m), "weight": (m, d), **pairs}
        factors = {"f1", "f2", *pairs}
        self.arguments = {name: self.draw(shape, factor_dtype if name in factors else dtype, written=name == "y",
                                          contiguous=self.op == "dense_backward" and name in factors)
                          for name, shape in shapes.items()}
        if self.op != "project":
            self.arguments["s"] = rng.choice((1.0, -0.5, 0.0, 3.25, 2))
        if rng.random() < 0.5:
            self.break_something()

    def draw(self, shape, dtype, written=False, contiguous=False) -> torch.Tensor:
        """Random values behind random strides and offset, amid guards."""
        layout = "plain" if contiguous else self.rng.choice(("plain", "transposed", "row gaps", "column gaps", "plain"))
        wide = [*shape]
        if layout == "row gaps":
            wide[-1] += self.rng.randint(1, 5)
        elif layout == "column gaps":
            wide[-1] = wide[-1] * 2 + 1
        elif layout == "transposed":
            wide.reverse()
        numel = max(int(torch.Size(wide).numel()), 1)
        spare = self.rng.randint(0, 3) if self.guard else 0
        buffer = torch.full((numel + 2 * self.guard + spare,), GUARD_VALUE[dtype], dtype=dtype)
        view = buffer[self.guard + self.rng.randint(0, spare):][: torch.Size(wide).numel()].view(wide)
        if layout == "row gaps":
            view = view[..., : shape[-1]]
        elif layout == "column gaps":
            view = view[..., : 2 * shape[-1]: 2]
        elif layout == "transposed":
            view = view.permute(*reversed(range(len(shape))))
        view.copy_(torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype))
        self.buffers.append((buffer, view))
        if not written and not contiguous and len(shape) == 2 and shape[0] and self.rng.random() < 0.05:
            return view[:1].expand(shape)  # rows that share memory may be read
        return view

    def break_something(self):
        """Makes one argument unlike what the operator takes."""
        rng = self.rng
        name = rng.choice([key for key, value in self.arguments.items() if isinstance(value, torch.Tensor)])
        tensor = self.arguments[name]
        kind = self.wrong = rng.choice(("size", "dimensions", "dtype", "device", "not a tensor", "scale", "alias", "overlap",
                                        "grad", "layout", "negative view", "not finite"))
        self.valid = False
        if kind == "size":
            axis = rng.randrange(tensor.dim())
            shape = list(tensor.shape)
            shape[axis] = max(0, shape[axis] + rng.choice((-1, 1, 5)))
            self.arguments[name] = torch.randn(shape).to(tensor.dtype)
        elif kind == "dimensions":
            self.arguments[name] = rng.choice((tensor[None], tensor.reshape(-1), tensor.new_zeros(()), tensor[..., None]))
        elif kind == "dtype":
            self.arguments[name] = torch.zeros(tensor.shape, dtype=rng.choice((torch.int64, torch.bool, torch.complex64,
                                                                               torch.float8_e4m3fn, *DTYPES)))
        elif kind == "device":
            self.arguments[name] = tensor.to("meta")
        elif kind == "not a tensor":
            self.arguments[name] = rng.choice((None, 3, "x", [1.0], object()))
        elif kind == "scale":
            self.arguments["s"] = rng.choice((None, "1", 1j, float("nan"), float("inf"), torch.ones(2), [1.0]))
        elif kind == "alias":
            self.arguments[name] = rng.choice([value for value in self.arguments.values() if isinstance(value, torch.Tensor)])
        elif kind == "overlap":
            storage = torch.randn(tensor.numel() + 8).to(tensor.dtype)
            self.arguments[name] = storage.as_strided(tensor.shape, [1] * tensor.dim())
        elif kind == "grad":
            self.arguments[name] = tensor.detach().clone().requires_grad_()
        elif kind == "layout":
            self.arguments[name] = tensor.to_sparse() if tensor.dim() == 2 else tensor
        elif kind == "negative view":
            self.arguments[name] = torch._neg_view(tensor)
        elif kind == "not finite":
            spoilt = tensor.clone(memory_format=torch.contiguous_format)
            if spoilt.numel():
                spoilt.view(-1)[rng.randrange(spoilt.numel())] = rng.choice((float("nan"), float("inf"), -float("inf")))
            self.arguments[name] = spoilt

    def call(self):
        arguments = dict(self.arguments)
        if self.op == "expand_":
            ops.expand_(*arguments.values())
            return [arguments["y"]]
        if self.op == "abba_linear":
            return [abba_ext.abba_linear(*arguments.values())]
        if self.op == "dense_backward":
            return self.needed(list(ops.dense_backward(*arguments.values(), *self.needs)))
        result = getattr(ops, self.op)(*arguments.values())
        return list(result) if isinstance(result, tuple) else [result]

    def needed(self, gradients: list) -> list[torch.Tensor]:
        need_x, need_factors = self.needs
        return gradients[:1] * need_x + gradients[1:] * need_factors

    def truth(self, before: dict) -> list[torch.Tensor]:
        """What the operator is defined to give, dense and in fp64."""
        value = {name: v.detach().double() if isinstance(v, torch.Tensor) else v for name, v in before.items()}
        if self.op in ("abba_linear", "dense_backward"):
            m1, m2 = value["b1"] @ value["a1"], value["b2"] @ value["a2"]
            weight = value["weight"] + value["s"] * m1 * m2
            if self.op == "dense_backward":
                dm1, dm2 = (value["s"] * (value["dy"].t() @ value["x"]) * m for m in (m2, m1))
                return self.needed([value["dy"] @ weight, value["b1"].t() @ dm1, dm1 @ value["a1"].t(),
                                    value["b2"].t() @ dm2, dm2 @ value["a2"].t()])
            y = value["x"] @ weight.t()
            return [y if value["bias"] is None else y + value["bias"]]
        kr = dense_kr(value["f1"], value["f2"])
        if self.op == "project":
            return [value["x"] @ kr.t()]
        if self.op == "expand_":
            return [value["y"] + value["s"] * value["u"] @ kr]
        p = (value["v"].t() @ value["x"]).view(value["f1"].size(0), value["f2"].size(0), -1)
        return [value["s"] * (p * value["f2"][None]).sum(1), value["s"] * (p * value["f1"][:, None]).sum(0)]


def magnitude(case: Case, before: dict) -> list[torch.Tensor]:
    """The truth of the arguments' absolute values: what rounding errors are relative to."""
    positive = {name: v.detach().abs() if isinstance(v, torch.Tensor) else v and abs(v) for name, v in before.items()}
    return case.truth(positive)


def unchanged(tensor: torch.Tensor, before: torch.Tensor) -> bool:
    now, then = (t.detach().to_dense() for t in (tensor, before))
    return torch.equal(*(torch.view_as_real(t) if t.is_complex() else t.double().nan_to_num(7.5) for t in (now, then)))


def check(case: Case) -> str:
    """Makes the call: "right", "refused" or "meta"; raises AssertionError where it is wrong."""
    described = f"{case.op}, wrong: {case.wrong}, " + ", ".join(
        f"{name}: {v.dtype} {list(v.shape)} {v.layout}" if isinstance(v, torch.Tensor) else f"{name}: {v!r}"
        for name, v in case.arguments.items())
    before = {name: v.detach().clone() if isinstance(v, torch.Tensor) and v.device.type == "cpu" else v
              for name, v in case.arguments.items()}
    try:
        results = case.call()
    except REFUSALS as error:
        assert not case.valid, f"a right call was refused: {error}; {described}"
        assert str(error), f"a refusal says nothing; {described}"
        for name, value in case.arguments.items():
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                assert unchanged(value, before[name]), f"a refused call wrote into {name}; {described}"
        return "refused"
    if any(result.device.type == "meta" for result in results):
        return "meta"
    for buffer, view in case.buffers:
        guard = torch.ones_like(buffer, dtype=torch.bool)
        guard.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
        expected = torch.full_like(buffer[guard], GUARD_VALUE[buffer.dtype])
        assert unchanged(buffer[guard], expected), f"memory beside an argument was written; {described}"
    for name, value in case.arguments.items():
        if isinstance(value, torch.Tensor) and name != "y":
            assert unchanged(value, before[name]), f"{name} was changed; {described}"
    values = [torch.as_tensor(v) for v in before.values() if v is not None]
    all_finite = all(torch.isfinite(v).all() for v in values)
    for result, truth, scale in zip(results, case.truth(before), magnitude(case, before), strict=True):
        assert result.shape == truth.shape, f"shape {list(result.shape)}; {described}"
        if not truth.numel():
            continue
        tolerance = max(TOLERANCE[t.dtype] for t in (*values, result) if t.dim())
        if all_finite and scale.max() < torch.finfo(result.dtype).max / 4:
            error = ((result.double() - truth).norm() / scale.norm().clamp_min(1e-300)).item()
            assert error <= tolerance, f"error {error:.2e} > {tolerance:.0e}; {described}"
        elif before.get("s") != 0 and before.get("x", truth).size(0):  # s = 0 and an empty sum give 0, as in torch.addmm
            # Where the truth is finite a result may not be: NaN spreads through the sums that it is part of.
            assert not torch.isfinite(result[~torch.isfinite(truth)]).any(), f"NaN or infinity was lost; {described}"
    return "right"


def fuzz(calls: int, seed: int, guard: int = GUARD) -> dict[str, int]:
    """Makes random calls and counts what became of them. Without guards every argument ends where its memory ends."""
    rng = random.Random(seed)
    counts: collections.Counter = collections.Counter()
    for number in range(calls):
        case = Case(random.Random(rng.getrandbits(64)), guard)
        try:
            outcome = check(case)
        except AssertionError as error:
            raise AssertionError(f"call {number} of seed {seed}: {error}") from None
        counts[outcome] += 1
        counts["known to be right"] += case.valid
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(fuzz(options.calls, options.seed)))
