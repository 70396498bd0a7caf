"""PyTorch's side of `benchmark.py` and `inference_speed.py`: a worker that does what it is asked.

    python experiments/torch_baseline.py INPUTS.npz THREADS

Requests come in as lines of JSON, {"op": ..., ...}; for each a line goes out, mostly the seconds it
took. Between requests the worker waits for its input and uses no processor. It runs in an
environment of its own, with torch and numpy and without jax.
"""

import json
import sys
import time
import warnings
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn.utils import prune  # pyright: ignore[reportMissingImports]


class Baseline:
    """The network, its data in memory, and what is timed."""

    def __init__(self, inputs: Any):
        kernels = [inputs[f"kernel_{i}"] for i in range(1 + inputs["weight_counts"].shape[1])]
        # A layer of torch is (outputs, inputs), so a unit is an index of its first axis.
        self.weights = [torch.from_numpy(np.ascontiguousarray(kernel.T)) for kernel in kernels]
        self.x = torch.from_numpy(inputs["x"])
        self.y = torch.from_numpy(inputs["y"].astype(np.int64))
        self.weight_counts = inputs["weight_counts"].tolist()  # (levels, prunable layers)
        self.unit_counts = inputs["unit_counts"].tolist()
        self.batch_size = int(inputs["batch_size"])
        modules = [module for layer in self.layers() for module in (layer, nn.ReLU())]
        self.model = nn.Sequential(*modules[:-1])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)
        self.loss = nn.CrossEntropyLoss()

    def layers(self) -> list[Any]:
        """Return new layers with the given weights."""
        layers = []
        for weight in self.weights:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            with torch.no_grad():
                layer.weight.copy_(weight)
            layers.append(layer)
        return layers

    def mean_loss(self, examples: int) -> dict[str, float]:
        """Return the loss of the first examples, which tells that both sides have one network."""
        with torch.no_grad():
            return {"loss": self.loss(self.model(self.x[:examples]), self.y[:examples]).item()}

    def masks(self) -> dict[str, float]:
        """Time the masks of all levels, by weight and by unit."""
        networks = [(self.layers(), self.layers()) for _ in self.weight_counts]
        started = time.perf_counter()
        for level, (by_weight, by_unit) in enumerate(networks):
            # The logits, the last layer, have no count and are not pruned.
            for layer, count in zip(by_weight, self.weight_counts[level], strict=False):
                prune.l1_unstructured(layer, "weight", amount=count)
            for layer, count in zip(by_unit, self.unit_counts[level], strict=False):
                prune.ln_structured(layer, "weight", amount=count, n=2, dim=0)
        return {"seconds": time.perf_counter() - started}

    def train(self, steps: int) -> dict[str, float]:
        """Time the first steps of an epoch."""
        started = time.perf_counter()
        order = torch.randperm(len(self.y))
        for batch in order[: steps * self.batch_size].split(self.batch_size):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.model(self.x[batch]), self.y[batch]).backward()
            self.optimizer.step()
        return {"seconds": time.perf_counter() - started}


def infer(path: str, csr: bool, calls: int, limit: float) -> dict[str, Any]:
    """Time a ReLU network of kernels (inputs, outputs), dense or in CSR, and return an output."""
    with np.load(path) as arrays:
        # Columns of examples, for which CSR has its product.
        x = torch.from_numpy(np.ascontiguousarray(arrays["x"].T if csr else arrays["x"]))
        kernels = [arrays[f"kernel_{i}"] for i in range(len(arrays) - 1)]
    weights = [torch.from_numpy(np.ascontiguousarray(kernel.T)) for kernel in kernels]
    weights = [weight.to_sparse_csr() for weight in weights] if csr else weights

    def network() -> Any:
        y = x
        for i, weight in enumerate(weights):
            y = weight @ y if csr else nn.functional.linear(y, weight)
            y = torch.relu(y) if i + 1 < len(weights) else y
        return y

    with torch.inference_mode():
        first, seconds = network(), []
        while len(seconds) < 5 or (len(seconds) < calls and sum(seconds) < limit):
            started = time.perf_counter()
            network()
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "first": (first[:, 0] if csr else first[0]).tolist()}


def main() -> None:
    """Answer requests until there are no more."""
    path, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
    operations = {"version": lambda: {"torch": torch.__version__}, "infer": infer}
    with np.load(path) as inputs:
        if inputs:
            baseline = Baseline(inputs)
            found = {"loss": baseline.mean_loss, "masks": baseline.masks, "train": baseline.train}
            operations |= found
    for line in sys.stdin:
        request = json.loads(line)
        answer = operations[request.pop("op")](**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
