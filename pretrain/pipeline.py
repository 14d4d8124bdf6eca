"""The executor: turns a schedule's actions into a stage's forward and backward and the sends and receives between.

A single stage is a pipeline like any other. Shapes are not negotiated: every stage builds the same batch, so it knows
the shape of what it will receive. Shape suffixes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pretrain.criterion import Criterion
from pretrain.schedules import Action, Schedule, forward_turns
from pretrain.simulate import Result, neighbours, result
from pretrain.tally import Tally
from workbench.models.batch import Batch, hidden_shape
from workbench.models.build import BuiltStage
from workbench.models.decoder import DecoderStage, Output
from workbench.parallel.axis import Message
from workbench.parallel.gemm import WaitingProduct
from workbench.parallel.loss import accumulation_dtype
from workbench.parallel.mesh import Mesh
from workbench.parallel.pending import Work


@dataclass(frozen=True)
class _Held:
    """What a forward leaves for its backward: not its output, which only the next stage needs, but where that ends;
    None where nothing on the way to it is trained, so that there is no backward."""

    received: torch.Tensor | None
    end: GradientEdge | None
    sent: Work | None


class Pipeline:
    """One stage of a pipeline and the links to its neighbours. Hidden states travel in the stage's compute type.

    criterion: what `train` learns by; by default the summed loss of the model's labels.
    """

    def __init__(self, built: BuiltStage, mesh: Mesh, schedule: Schedule, criterion: Criterion | None = None) -> None:
        self.built, self.stage = built, built.module
        self.mesh, self.schedule, self.criterion = mesh, schedule, criterion or Criterion()
        self.tally = Tally()

    def train(self, batches: Sequence[Batch], scale: torch.Tensor) -> torch.Tensor:
        """The summed loss of `batches` where the network ends, zero elsewhere; adds its gradient times `scale` to the
        stage. What the criterion's judge says of them is then in `tally`.

        Communicates on the pipeline axis, and inside the stage on the tensor and data axes.
        """
        layout = self.mesh.layout
        assert not self.schedule.faults(layout.vpp) and self.schedule.placement == layout.placement, self.schedule
        batches = self.criterion.ready(self, batches)
        actions = self.schedule.actions(self.mesh.pp.rank, layout.pp, len(batches), layout.vpp)
        run = _Training(self, batches, scale, actions)
        compute = {"F": run.forward, "B": run.backward, "I": run.backward, "W": run.weights}
        for action in actions:
            compute[action.kind](action)
        run.links.finish()
        self.tally = run.tally
        return run.loss

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], output: Output, take: Callable[[Batch, torch.Tensor], None]) -> None:
        """Runs every batch forward and, where the network ends, hands each output to `take` as soon as it is there."""
        layout = self.mesh.layout
        actions = [Action("F", *turn) for turn in forward_turns(layout.pp, len(batches), layout.vpp)]
        links = _Links(self.mesh, self.stage, self.hidden_shapes(batches), actions)
        for action in actions:
            batch = batches[action.microbatch]
            found = self.stage(links.receive(action), batch, output, chunk=action.chunk)
            if self.stage.is_last(action.chunk):
                take(batch, found)
            else:
                links.send(action, found)
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
        self._stage, self._gemm = pipeline.stage, pipeline.built.gemm
        self._data_parallel, self._criterion = pipeline.built.data_parallel, pipeline.criterion
        self._mesh = pipeline.mesh
        # Every context rank makes the same loss of an output that is whole, so that each answers for a part of it.
        self._sharers = 1 if self._criterion.output == "loss" else pipeline.mesh.cp.size
        self._batches, self._scale = batches, scale.to(accumulation_dtype(self._stage.compute_dtype))
        self.links = _Links(pipeline.mesh, self._stage, pipeline.hidden_shapes(batches), actions)
        self._held: dict[tuple[int, int], _Held] = {}
        self._waiting: dict[tuple[int, int], list[WaitingProduct]] = {}
        self._last = actions[-1]
        # Then no backward of autograd is the one after which all gradients of this rank are there.
        self._reduces_apart = self._gemm.waiting is not None or pipeline.mesh.layout.vpp > 1
        # In float64, so that the reported sum does not depend on how the step was cut into microbatches.
        self.loss = torch.zeros((), dtype=torch.float64, device=pipeline.mesh.device)
        self.tally = Tally()

    def forward(self, action: Action) -> None:
        received, sent = self.links.receive(action), None
        if received is not None:
            received.requires_grad_()
        batch = replace(self._batches[action.microbatch], loss_scale=self._scale)
        found = self._stage(received, batch, self._criterion.output, chunk=action.chunk)
        if self._stage.is_last(action.chunk):
            if self._criterion.judge is not None:
                self.tally.put(self._criterion.judge.tally(batch, found.detach()))
            found = self._criterion.loss(batch, found, self._mesh) / self._sharers
            self.loss += found.detach()
            found = found.to(self._scale.dtype)
        else:
            sent = self.links.send(action, found.detach())
        end = get_gradient_edge(found) if found.requires_grad else None
        self._held[action.microbatch, action.chunk] = _Held(received, end, sent)

    def backward(self, action: Action) -> None:
        """The whole backward, or only the half that the stage before this one waits for."""
        at = (action.microbatch, action.chunk)
        held = self._held.pop(at)
        gradient = self.links.receive(action)
        if gradient is None:
            gradient = self._scale
        elif held.sent is not None:
            # Its gradient has come back, so the activation has arrived: this does not wait, it frees the buffer.
            self.links.release(held.sent)
        self._data_parallel.before_backward(last=action is self._last and not self._reduces_apart)
        if held.end is not None:
            torch.autograd.backward(held.end, gradient)
        if held.received is not None:
            assert held.received.grad is not None
            self.links.send(action, held.received.grad)
        if self._gemm.waiting is not None:
            self._waiting[at], self._gemm.waiting = self._gemm.waiting, []
        if action.kind == "B":
            self.weights(action)

    def weights(self, action: Action) -> None:
        """The gradients of weights that a backward has left to compute; each frees its activation."""
        products = self._waiting.pop((action.microbatch, action.chunk), [])
        while products:
            products.pop().add()
        if self._reduces_apart:
            self._data_parallel.after_backward(last=action is self._last)


class _Links:
    """Sends and receives of one pass, derived from its actions.

    On a CPU one receive is always posted ahead of the action that needs it. On a GPU a posted receive occupies the
    device until its message is there, and what waits for the device (the first call of a kernel, freed memory) would
    wait for a neighbour that may wait for this stage: there it is posted when it is needed. Sends never block: their
    buffers are kept until they are done. Between two chunks of this stage nothing is sent: the one hands its tensor to
    the other.
    """

    def __init__(
        self, mesh: Mesh, stage: DecoderStage, shapes: Sequence[tuple[int, int, int]], actions: Iterable[Action]
    ) -> None:
        self._mesh, self._stage, self._shapes = mesh, stage, shapes
        self._awaited = deque(action for action in actions if self._source(action) not in (None, mesh.pp.rank))
        self._posted: deque[tuple[Action, torch.Tensor, Work]] = deque()
        self._sending: list[tuple[Work, torch.Tensor]] = []
        self._handed: dict[Result, torch.Tensor] = {}
        self._ahead = posts_ahead(mesh.device)
        if self._ahead:
            self._post()

    def receive(self, action: Action) -> torch.Tensor | None:
        """What the neighbour made for `action`, None at the end of the network."""
        source = self._source(action)
        if source is None:
            return None
        if source == self._mesh.pp.rank:
            virtual = self._stage.virtual[action.chunk]
            kind, microbatch, _ = result(action, virtual)
            return self._handed.pop((kind, microbatch, neighbours(action, virtual)[0]))
        if not self._ahead:
            self._post()
        expected, buffer, work = self._posted.popleft()
        assert expected == action, f"{action} runs, but the next message is for {expected}"
        work.wait()
        if self._ahead:
            self._post()
        return buffer

    def send(self, action: Action, tensor: torch.Tensor) -> Work | None:
        """Starts to send the result of `action` to the stage that needs it."""
        virtual = self._stage.virtual[action.chunk]
        target = self._home(neighbours(action, virtual)[1])
        assert target is not None, f"{action} ends the network"
        if target == self._mesh.pp.rank:
            self._handed[result(action, virtual)] = tensor
            return None
        tensor = tensor.to(self._stage.compute_dtype).contiguous()
        work = self._mesh.pp.isend(tensor, target, _message(action))
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
        assert not (self._posted or self._awaited or self._handed), "messages were awaited that no action took"
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()

    def _source(self, action: Action) -> int | None:
        """The stage that makes what `action` receives, if it receives anything."""
        return None if action.kind == "W" else self._home(neighbours(action, self._stage.virtual[action.chunk])[0])

    def _home(self, virtual: int) -> int | None:
        """The stage of a virtual stage; None beyond either end of the network."""
        layout = self._mesh.layout
        return layout.home(virtual)[0] if 0 <= virtual < layout.num_virtual else None

    def _post(self) -> None:
        if self._awaited:
            action = self._awaited.popleft()
            source = self._source(action)
            assert source is not None
            shape, device = self._shapes[action.microbatch], self._mesh.device
            buffer = torch.empty(shape, dtype=self._stage.compute_dtype, device=device)
            self._posted.append((action, buffer, self._mesh.pp.irecv(buffer, source, _message(action))))


def posts_ahead(device: torch.device) -> bool:
    """Whether a stage on this device may post a receive before it has done what the message depends on."""
    return device.type == "cpu"


def _message(action: Action) -> Message:
    return "F" if action.kind == "F" else "B"
