# SPDX-License-Identifier: Apache-2.0
"""Compares the inputs that a step of trees alone makes with those that vLLM makes."""

from dataclasses import fields
from typing import Any

import torch


class WatchedInputs:
    """Of a runner, from now on: each such step is prepared twice.

    Attributes:
        steps: that made their own inputs.
        differing: names of what differed.
    """

    def __init__(self, runner: Any) -> None:
        self.steps = 0
        self.differing: list[str] = []
        self.runner = runner
        self.prepare = runner._prepare_inputs
        self.build = runner._build_attention_metadata
        runner._prepare_inputs = self.prepare_twice
        runner._build_attention_metadata = self.build_twice

    def compare(self, own: dict[str, Any], upstream: dict[str, Any]) -> None:
        for name, value in own.items():
            other = upstream[name]
            if isinstance(value, torch.Tensor):
                same = torch.equal(value, other)
            else:
                same = value == other
            if not same:
                self.differing.append(name)

    def buffers(self, rows: Any, total: int) -> dict[str, Any]:
        runner = self.runner
        n, table = runner.input_batch.num_reqs, runner.input_batch.block_table[0]
        picked = {
            "logits_indices": torch.arange(total)[rows],
            "input_ids": runner.input_ids.gpu[:total],
            "positions": runner.positions[:total],
            "slot_mapping": table.slot_mapping.gpu[:total],
            "block_table": table.block_table.gpu[:n],
            "query_start_loc": runner.query_start_loc.gpu,
            "seq_lens": runner.seq_lens,
            "optimistic_seq_lens_cpu": runner.optimistic_seq_lens_cpu,
            "discard_request_mask": runner.discard_request_mask.gpu[:n],
        }
        return {name: value.clone() for name, value in picked.items()}

    def dirty(self) -> None:
        runner = self.runner
        table = runner.input_batch.block_table[0]
        for buffer in (
            runner.input_ids.gpu, runner.positions, table.slot_mapping.gpu,
            runner.query_start_loc.gpu, runner.seq_lens,
            runner.optimistic_seq_lens_cpu,
        ):  # fmt: skip
            buffer.fill_(77)

    def prepare_twice(self, scheduler_output: Any, num_tokens: Any) -> Any:
        runner, total = self.runner, scheduler_output.total_num_scheduled_tokens
        if runner._lone_step() is None:
            return self.prepare(scheduler_output, num_tokens)
        self.steps += 1
        runner.feeds_alone = False
        rows, *_ = self.prepare(scheduler_output, num_tokens)
        upstream = self.buffers(rows, total)
        runner.feeds_alone = True
        self.dirty()
        prepared = self.prepare(scheduler_output, num_tokens)
        self.compare(self.buffers(prepared[0], total), upstream)
        return prepared

    def build_twice(self, *args: Any, **kwargs: Any) -> Any:
        runner = self.runner
        if runner._lone_step() is None:
            return self.build(*args, **kwargs)
        runner.feeds_alone = False
        metadata, _ = self.build(*args, **kwargs)
        upstream = dict(metadata)
        runner.feeds_alone = True
        metadata, common = self.build(*args, **kwargs)
        if metadata.keys() != upstream.keys():
            self.differing.append("layers")
        # Of the scheduler's, which is made of the others, some bytes mean nothing.
        skipped = {"trees", "scheduler_metadata"}
        for layer, own in metadata.items():
            names = [f.name for f in fields(own) if f.name not in skipped]
            mine = {name: getattr(own, name) for name in names}
            self.compare(mine, vars(upstream[layer]))
        return metadata, common
