"""A loss that two ranks compute, if the network between them is cut into stages: the first one and the last one.

    first stage    loss(module, inputs) up to its call of the module      -> what the network takes
    last stage     loss(module, inputs) with a module that returns what came out of the stages      -> the loss

So a user's loss runs on both, as it stands. What of it depends on more than the call of the module is found before the run
(runtime.divisible). The last stage has the batch from the first one, which reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from asgd_mpi.data.dataset import SampleBatch
from asgd_mpi.errors import ConfigError
from asgd_mpi.optim.objective import Objective

Share = tuple[Any, tuple[torch.Tensor, ...]]  # what JSON can hold, and tensors that it counts on
PLAIN = (str, int, float, bool, type(None))


class Caller:
    """What stands in a loss or a score for a network that is cut: it can be called with a tensor, and nothing else.

    who: what the user calls the task, at the beginning of a message. Raises ConfigError for anything else.
    """

    training = True

    def __init__(self, answer: Callable[[torch.Tensor], torch.Tensor], who: str):
        self._answer, self._who = answer, who

    def __call__(self, *arguments: Any, **named: Any) -> torch.Tensor:
        if named or len(arguments) != 1 or not isinstance(arguments[0], torch.Tensor):
            kinds = [
                *(type(one).__name__ for one in arguments),
                *(f"{name}={type(one).__name__}" for name, one in named.items()),
            ]
            raise ConfigError(
                f"{self._who} calls the module with ({', '.join(kinds)}), and what enters the first stage is one tensor. Put the "
                "tensors into one, which the module takes apart, or leave --stages out."
            )
        return self._answer(arguments[0])

    def __getattr__(self, name: str) -> Any:
        raise self._refusal(f"module.{name}")

    def __getitem__(self, place: Any) -> Any:
        raise self._refusal(f"module[{place!r}]")

    def __len__(self) -> int:
        raise self._refusal("len(module)")

    def __bool__(self) -> bool:
        return True

    def _refusal(self, what: str) -> ConfigError:
        return ConfigError(
            f"{self._who} uses {what}, and no rank has the whole module: it can be called with a tensor. Do what needs more of it "
            "within its forward, or leave --stages out."
        )


class Whole(Caller):
    """The same of all stages, whose mode can be set: what a validation gets."""

    def __init__(self, lead: Any, who: str):
        super().__init__(lead, who)
        self._lead = lead

    def train(self) -> None:
        self._lead.train()
        self.training = True

    def eval(self) -> None:
        self._lead.eval()
        self.training = False


class _Called(BaseException):
    """The module has been called, with this: the user's code, which may catch any Exception, ends here."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self.tensor = tensor


class Divided:
    """An objective whose loss is computed on two ranks. `who`: see Caller."""

    def __init__(self, objective: Objective, who: str):
        self.objective, self.who = objective, who

    def taken(self, inputs: Any) -> torch.Tensor:
        """Return what the loss calls the network with: the first stage."""

        def take(tensor: torch.Tensor) -> torch.Tensor:
            raise _Called(tensor)

        try:
            self.objective.loss(self._caller(take), inputs)
        except _Called as called:
            return called.tensor
        raise ConfigError(
            f"{self.who}: loss() does not call the module that it is given, which the stages compute. Call that one, or leave "
            "--stages out."
        )

    def loss(self, outputs: torch.Tensor, inputs: Any) -> torch.Tensor:
        """Return the loss, for what comes out of the network: the last stage."""
        left = [outputs]

        def give(tensor: torch.Tensor) -> torch.Tensor:
            if not left:
                raise ConfigError(
                    f"{self.who}: loss() calls the module more than once, and a batch goes through the stages once. Call it with all of it "
                    "in one tensor, or leave --stages out."
                )
            return left.pop()

        return self.objective.loss(self._caller(give), inputs)

    def share(self, batch: Any) -> Share:
        """Return what the last stage has to know of a batch. Raises ConfigError for what cannot travel."""
        tensors: list[torch.Tensor] = []
        return self._words(batch.data, tensors), tuple(tensors)

    def prepare(self, share: Share, size: int, epoch: int, start: int, device: torch.device) -> Any:
        """Return the inputs of a batch on the last stage's device, of what `share` returned."""
        data = _value(*share)
        return self.objective.prepare(SampleBatch(data, size, epoch, start, start + size), device)

    def whole(self, lead: Any) -> Any:
        """Return what stands for the module in a validation; `lead` can be called, and set to train() and eval()."""
        return Whole(lead, f"{self.who}: score()")

    def _caller(self, answer: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return Caller(answer, f"{self.who}: loss()")

    def _words(self, value: Any, tensors: list[torch.Tensor]) -> Any:
        """Return a value as [its kind, what JSON can hold]; its tensors are added to `tensors`."""
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return ["tensor", len(tensors) - 1]
        kind = type(value)
        if kind in (tuple, list):
            return [kind.__name__, [self._words(one, tensors) for one in value]]
        if kind is dict and all(type(key) in PLAIN for key in value):
            return ["dict", [[key, self._words(one, tensors)] for key, one in value.items()]]
        if kind in PLAIN:
            return ["plain", value]
        raise ConfigError(
            f"{self.who}: a batch holds a {kind.__name__}, and what travels to the last stage are tensors, numbers and texts in "
            "tuples, lists and dicts. Let `collate` make those, or leave --stages out."
        )


def _value(words: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Return what `Divided.share` has put into words."""
    kind, held = words
    if kind == "tensor":
        return tensors[held]
    if kind == "dict":
        return {key: _value(one, tensors) for key, one in held}
    if kind == "plain":
        return held
    return {"tuple": tuple, "list": list}[kind](_value(one, tensors) for one in held)
