"""A loss that two ranks compute, if the network between them is cut into stages: the first one and the last one.

    first stage    loss(module, inputs) up to its call of the module      -> what the network takes
    last stage     loss(module, inputs) with a module that returns what came out of the stages      -> the loss

So a user's loss runs on both, as it stands. What of it depends on more than the call of the module is found before the run
(runtime.divisible). The last stage has the batch from the first one, which reads it; of tensors that the loss does not read there, such
as what the network takes, it has the shape and the type alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from asgd_mpi.data.dataset import SampleBatch
from asgd_mpi.errors import ConfigError
from asgd_mpi.optim.objective import Objective

Share = tuple[Any, tuple[torch.Tensor, ...]]  # what JSON can hold, and tensors that it counts on
PLAIN = (str, int, float, bool, type(None))


class Caller:
    """Stand in for a network that is cut, in a loss or a score: it can be called with a tensor, and nothing else.

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
    """An objective whose loss is computed on two ranks. `who`: see Caller.

    unread: where in a batch tensors lie that the last stage does not read, such as "/0" or "/images" (see `places`).
    """

    def __init__(self, objective: Objective, who: str, unread: Collection[str] = ()):
        self.objective, self.who, self.unread = objective, who, frozenset(unread)

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

        try:
            return self.objective.loss(self._caller(give), inputs)
        except (RuntimeError, NotImplementedError) as error:
            if self.unread and "meta" in str(error):
                raise ConfigError(
                    f"{self.who}: loss() reads of this batch what it did not read of the first samples, {' or '.join(sorted(self.unread))}, "
                    "so the last stage has not got it. Let it read the same of every batch, or leave --stages out."
                ) from error
            raise

    def share(self, batch: Any) -> Share:
        """Return what the last stage has to know of a batch. Raises ConfigError for what cannot travel."""
        tensors: list[torch.Tensor] = []
        return self._words(batch.data, "", tensors), tuple(tensors)

    def places(self, data: Any) -> list[str]:
        """Return where the tensors of a batch lie. Raises ConfigError as `share` does."""
        found: list[str] = []
        self._words(data, "", [], found)
        return found

    def prepare(self, share: Share, size: int, epoch: int, start: int, device: torch.device) -> Any:
        """Return the inputs of a batch on the last stage's device, of what `share` returned."""
        data = _value(*share)
        return self.objective.prepare(SampleBatch(data, size, epoch, start, start + size), device)

    def whole(self, lead: Any) -> Any:
        """Return what stands for the module in a validation; `lead` can be called, and set to train() and eval()."""
        return Whole(lead, f"{self.who}: score()")

    def _caller(self, answer: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return Caller(answer, f"{self.who}: loss()")

    def _words(
        self, value: Any, place: str, tensors: list[torch.Tensor], places: list[str] | None = None
    ) -> Any:
        """Return a value as [its kind, what JSON can hold]; its tensors are added to `tensors`, where they lie to `places`."""

        def inner(key: Any, one: Any) -> Any:
            return self._words(one, f"{place}/{key}", tensors, places)

        kind = type(value)
        if isinstance(value, torch.Tensor):
            if places is not None:
                places.append(place)
            if place in self.unread:
                return ["shape", [list(value.shape), str(value.dtype).removeprefix("torch.")]]
            tensors.append(value)
            return ["tensor", len(tensors) - 1]
        if kind in (tuple, list):
            return [kind.__name__, [inner(number, one) for number, one in enumerate(value)]]
        if kind is dict and all(type(key) in PLAIN for key in value):
            return ["dict", [[key, inner(key, one)] for key, one in value.items()]]
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
    if kind == "shape":
        return torch.empty(held[0], dtype=getattr(torch, held[1]), device="meta")
    if kind == "dict":
        return {key: _value(one, tensors) for key, one in held}
    if kind == "plain":
        return held
    return {"tuple": tuple, "list": list}[kind](_value(one, tensors) for one in held)
