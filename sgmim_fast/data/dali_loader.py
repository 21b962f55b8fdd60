"""The loader built on NVIDIA DALI.

The same batches as ``torch_loader`` makes: same order, crops, flips and masks. On the CPU pixels are the same, too; on
a GPU they differ by the rounding of decoder and resizing. No state is carried from batch to batch, so a run resumes at
any step, as with the other loader.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sgmim_fast.config import PretrainConfig
from sgmim_fast.data.batches import Batch, Loader, draw_mask
from sgmim_fast.data.dali_batch import IN_WORK, Graph, Helpers, Preparation, Ready
from sgmim_fast.data.dali_decoding import DaliDecoder, import_dali, not_finite
from sgmim_fast.data.members import Pairs
from sgmim_fast.data.order import BEGIN, Place, SampleOrder
from sgmim_fast.data.substitution import Substitutes
from sgmim_fast.errors import UserError, first_line
from sgmim_fast.masking import mask_indices

FINISHED = 2
"""Batches that wait for the training process."""


class DaliLoader(Loader):
    """Endless iterator over one rank's micro-batches; see ``build_loader``.

    One thread of its own keeps the graph fed and takes finished batches out; others read and finish; DALI's decode.

    Args:
        device_id: GPU that decodes; None for the CPU.
        whole_graph: DALI resizes on the CPU, too, as it does on a GPU.
        pin_memory: finished batches of the CPU are page-locked.
    """

    def __init__(
        self,
        pairs: Pairs,
        config: PretrainConfig,
        order: SampleOrder,
        substitutes: Substitutes,
        *,
        rank: int,
        place: Place = BEGIN,
        device_id: int | None = None,
        whole_graph: bool = False,
        pin_memory: bool = False,
    ) -> None:
        import_dali()  # what is wrong is said now, not with the first batch
        super().__init__(order, substitutes)
        self._config, self._device_id = config, device_id
        self._prepare = Preparation(pairs, config)
        self._requests = order.micro_batches(rank, place)
        self._helpers = Helpers(max(1, config.data.workers))

        def build_graph() -> Graph:
            whole = whole_graph or device_id is not None
            kind = self._prepare.kind
            return Graph(config, kind, self._helpers, device_id=device_id, whole=whole, pin_memory=pin_memory)

        self._build_graph = build_graph
        self._graph: Graph | None = None
        self._in_work: deque[tuple[int, list[Ready]]] = deque()
        self._finished: deque[Future[Batch]] = deque()
        self._worker = ThreadPoolExecutor(1, "sgmim-dali", lambda: torch.set_num_threads(1))
        self._closed = False

    def __next__(self) -> Batch:
        if self._closed:
            raise ValueError("this loader is closed; build another one")
        while len(self._finished) <= FINISHED:
            self._finished.append(self._worker.submit(self._produce))
        try:
            batch = self._finished.popleft().result()
        except BaseException:
            self.close()
            raise
        if self._device_id is not None:
            for tensor in batch.values():
                if tensor.is_cuda:  # made on the worker's stream; keep its memory until this one is done with it
                    tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return batch

    def close(self) -> None:
        """End the threads and wait for them."""
        self._closed = True
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._helpers.close()
        self._finished.clear()
        self._in_work.clear()
        self._graph = None

    # -- on the worker thread

    def _produce(self) -> Batch:
        while len(self._in_work) < IN_WORK:
            epoch, indices = next(self._requests)
            self._in_work.append((epoch, self._read(epoch, indices.tolist())))
            if self._graph is not None:
                self._graph.schedule(self._in_work[-1][1])
        while True:
            if self._graph is None:
                self._graph = self._build_graph()
                self._graph.start(ready for _, ready in self._in_work)
            epoch, ready = self._in_work[0]
            try:
                tensors = self._graph.take(ready)
                bad = self._find_holes(ready, tensors)
            except RuntimeError as error:
                bad = self._find_undecodable(ready, error)
            if not bad:
                self._in_work.popleft()
                return self._batch(epoch, ready, tensors)
            for position, complaint in bad.items():
                ready[position] = self._substitute(epoch, ready[position].sample, complaint)
            self._graph = None  # all batches in work begin anew

    def _read(self, epoch: int, indices: Sequence[int]) -> list[Ready]:
        """Pairs of one batch, bad ones replaced."""

        def read(index: int) -> Ready | UserError:
            try:
                return self._prepare(epoch, index)
            except UserError as error:
                return error

        return [
            self._substitute(epoch, index, result) if isinstance(result, UserError) else result
            for index, result in zip(indices, self._helpers.map(read, indices), strict=True)
        ]

    def _substitute(self, epoch: int, index: int, error: UserError) -> Ready:
        return self.substitutes.replace(epoch, index, error, lambda candidate: self._prepare(epoch, candidate))

    def _find_undecodable(self, ready: Sequence[Ready], error: RuntimeError) -> dict[int, UserError]:
        """Positions in a batch that failed, by decoding its pairs one by one."""
        decoder = DaliDecoder(self._config.model.structure_channels)
        results = decoder.decode([(one.image, one.structure) for one in ready])
        found = {i: result for i, result in enumerate(results) if isinstance(result, UserError)}
        if not found:
            raise UserError(f"DALI failed on a batch whose files it can decode one by one: {first_line(error)}")
        return found

    def _find_holes(self, ready: Sequence[Ready], tensors: Sequence[torch.Tensor]) -> dict[int, UserError]:
        if self._prepare.kind != "floats":  # arrays have been looked at when they were read
            return {}
        finite = torch.isfinite(tensors[1]).flatten(1).all(1).tolist()
        names = [one.structure.name if one.structure is not None else "" for one in ready]
        return {i: not_finite(names[i]) for i, fine in enumerate(finite) if not fine}

    def _batch(self, epoch: int, ready: Sequence[Ready], tensors: Sequence[torch.Tensor]) -> Batch:
        batch = dict(zip(("image", "structure"), tensors, strict=False))
        batch["mask"] = torch.stack([draw_mask(self._config, epoch, one.sample) for one in ready])
        batch["index"] = torch.tensor([one.sample for one in ready])
        batch["masked"], batch["visible"] = mask_indices(batch["mask"])
        return batch
