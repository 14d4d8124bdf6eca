"""The executor: turns a schedule's actions into a stage's forward and backward and the sends and receives between.

A single stage is a pipeline like any other. Shapes are not negotiated: every stage builds the same batch, so it knows
the shape of what it will receive. Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from pretrain.schedules import Action, Schedule
from workbench.models.batch import Batch, hidden_shape
from workbench.models.build import BuiltStage
from workbench.models.decoder import Output
from workbench.parallel.mesh import Mesh, Work


@dataclass(frozen=True)
class _Held:
    """What a forward leaves for its backward."""

    received: torch.Tensor | None
    result: torch.Tensor
    sent: Work | None


class Pipeline:
    """One stage of a pipeline and the links to its neighbours. Hidden states travel in the stage's compute type."""

    def __init__(self, built: BuiltStage, mesh: Mesh, schedule: Schedule) -> None:
        self.stage, self.data_parallel = built.module, built.data_parallel
        self.mesh, self.schedule = mesh, schedule

    def train(self, batches: Sequence[Batch], scale: torch.Tensor) -> torch.Tensor:
        """The summed loss of `batches` on the last stage, zero elsewhere; adds its gradient times `scale` to the stage.

        Communicates on the pipeline axis, and inside the stage on the tensor and data axes.
        """
        actions = self.schedule.actions(self.mesh.pp.rank, self.mesh.pp.size, len(batches))
        run = _Training(self, batches, scale, actions)
        for action in actions:
            run.forward(action) if action.kind == "F" else run.backward(action)
        run.links.finish()
        return run.loss

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], output: Output, take: Callable[[Batch, torch.Tensor], None]) -> None:
        """Runs every batch forward and, on the last stage, hands each output to `take` as soon as it is there."""
        stage = self.stage
        actions = [Action("F", m) for m in range(len(batches))]
        links = _Links(self.mesh, stage.compute_dtype, self.hidden_shapes(batches), actions)
        for batch, action in zip(batches, actions, strict=True):
            result = stage(None if stage.is_first() else links.receive(action), batch, output)
            if stage.is_last():
                take(batch, result)
            else:
                links.send(action, result)
        links.finish()

    def hidden_shapes(self, batches: Sequence[Batch]) -> list[tuple[int, int, int]]:
        """[B, T, D] of the hidden states of each batch."""
        hidden = self.stage.model.hidden_size
        return [hidden_shape(batch, self.mesh.layout, hidden) for batch in batches]


class _Training:
    """The state of one pass of forwards and backwards."""

    def __init__(
        self, pipeline: Pipeline, batches: Sequence[Batch], scale: torch.Tensor, actions: Sequence[Action]
    ) -> None:
        self._stage, self._data_parallel = pipeline.stage, pipeline.data_parallel
        self._batches, self._scale = batches, scale
        self.links = _Links(pipeline.mesh, self._stage.compute_dtype, pipeline.hidden_shapes(batches), actions)
        self._held: dict[int, _Held] = {}
        self._last_backward = [action for action in actions if action.kind == "B"][-1]
        # In float64, so that the reported sum does not depend on how the step was cut into microbatches.
        self.loss = torch.zeros((), dtype=torch.float64, device=pipeline.mesh.device)

    def forward(self, action: Action) -> None:
        received = None
        if not self._stage.is_first():
            received = self.links.receive(action).requires_grad_()
        result = self._stage(received, self._batches[action.microbatch], "loss")
        sent = None
        if self._stage.is_last():
            self.loss += result.detach()
        else:
            sent = self.links.send(action, result.detach())
        self._held[action.microbatch] = _Held(received, result, sent)

    def backward(self, action: Action) -> None:
        held = self._held.pop(action.microbatch)
        if self._stage.is_last():
            gradient = self._scale.to(held.result.dtype)
        else:
            gradient = self.links.receive(action)
            if held.sent is not None:
                # Its gradient has come back, so the activation has arrived: this does not wait, it frees the buffer.
                self.links.release(held.sent)
        self._data_parallel.before_backward(last=action is self._last_backward)
        torch.autograd.backward(held.result, gradient)
        if held.received is not None:
            assert held.received.grad is not None
            self.links.send(action, held.received.grad)


class _Links:
    """Sends and receives of one pass, derived from its actions.

    One receive is always posted ahead of the action that needs it. Sends never block: their buffers are kept until
    they are done.
    """

    def __init__(
        self, mesh: Mesh, dtype: torch.dtype, shapes: Sequence[tuple[int, int, int]], actions: Iterable[Action]
    ) -> None:
        self._mesh, self._dtype, self._shapes = mesh, dtype, shapes
        self._awaited = deque(action for action in actions if self._source(action) is not None)
        self._posted: deque[tuple[Action, torch.Tensor, Work]] = deque()
        self._sending: list[tuple[Work, torch.Tensor]] = []
        self._post()

    def receive(self, action: Action) -> torch.Tensor:
        """What the neighbour sent for `action`; then posts the next receive."""
        expected, buffer, work = self._posted.popleft()
        assert expected == action, f"{action} runs, but the next message is for {expected}"
        work.wait()
        self._post()
        return buffer

    def send(self, action: Action, tensor: torch.Tensor) -> Work | None:
        """Starts to send the result of `action` to the stage that needs it."""
        target = self._mesh.pp.rank + (1 if action.kind == "F" else -1)
        tensor = tensor.to(self._dtype).contiguous()
        work = self._mesh.pp.isend(tensor, target, action.kind)
        self._sending = [(other, kept) for other, kept in self._sending if not other.is_completed()]
        self._sending.append((work, tensor))
        return work

    def release(self, work: Work) -> None:
        """Waits for one send and forgets its buffer."""
        for i, (other, _) in enumerate(self._sending):
            if other is work:
                work.wait()
                del self._sending[i]
                return

    def finish(self) -> None:
        """Returns when all that was sent has left and nothing is awaited."""
        assert not self._posted and not self._awaited, "messages were awaited that no action took"
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _source(self, action: Action) -> int | None:
        source = self._mesh.pp.rank - (1 if action.kind == "F" else -1)
        return source if 0 <= source < self._mesh.pp.size else None

    def _post(self) -> None:
        if self._awaited:
            action = self._awaited.popleft()
            source = self._source(action)
            assert source is not None
            buffer = torch.empty(self._shapes[action.microbatch], dtype=self._dtype, device=self._mesh.device)
            self._posted.append((action, buffer, self._mesh.pp.irecv(buffer, source, action.kind)))
