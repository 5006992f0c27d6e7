# SPDX-License-Identifier: Apache-2.0
"""An engine in a process of its own, stopped while others are measured.

Run as a program it is the child: it reads jobs from stdin, a JSON object a line,
and writes results to the file descriptor of its first argument.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

# Of pydantic's, whose first line says only how many there are, also what follows.
ERROR = re.compile(
    r"[\w.]+(?:Error|Exception)"
    r"(?:: \d+ validation error.*\n(?:\w.*\n)?.*|: .*|$)",
    re.MULTILINE,
)


def cause(log: str) -> str:
    """The last error that a log tells of, on one line; else its last line.

    vLLM ends with an error that only points to "the root cause above", and Python with
    warnings of what was not cleaned up.
    """
    errors = [e for e in ERROR.findall(log) if "root cause" not in e]
    lines = [line for line in log.splitlines() if line.strip()]
    return " ".join((errors or lines or ["it said nothing"])[-1].split())


class EngineProcess:
    """A vLLM engine; `run` wakes it for one job.

    An idle vLLM worker spins on its queue. On a small machine that would slow
    down whatever is measured beside it, so idle engines are stopped by signal.
    """

    def __init__(
        self, llm_options: dict[str, Any], log: Path, start_limit: float | None = None
    ) -> None:
        """
        Raises:
            RuntimeError: it died, or took longer than `start_limit` seconds; the
                cause is the message's last line.
        """
        read, write = os.pipe()
        self.log = log
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(write), json.dumps(llm_options)],
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=[write],
                text=True,
            )
        os.close(write)
        self.results = os.fdopen(read)
        if not select.select([self.results], [], [], start_limit)[0]:
            self.close()
            raise RuntimeError(f"the engine did not start in {start_limit:.0f} s")
        self.about = self._result()
        self._signal(signal.SIGSTOP)

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Generate; see `_generate` for the job and its result.

        Raises:
            RuntimeError: it died; the cause is the message's last line.
        """
        assert self.process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._death() from None
        result = self._result()
        self._signal(signal.SIGSTOP)
        return result

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)

    def _result(self) -> dict[str, Any]:
        line = self.results.readline()
        if not line:
            raise self._death()
        return json.loads(line)

    def _death(self) -> RuntimeError:
        # What it died of comes last in its log.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        log = self.log.read_text(errors="replace")
        return RuntimeError(f"the engine died:\n{log[-3000:]}\n{cause(log)}")

    def _signal(self, number: int) -> None:
        # Not the process group: workers may have sessions of their own.
        import psutil  # type: ignore[import-untyped]

        try:
            root = psutil.Process(self.process.pid)
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def _generate(llm: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Run all prompts of a job at once, as the engine's max_num_seqs allows.

    Args:
        llm: the engine.
        job: {"prompts": [str, or vLLM's own kinds of prompts as dictionaries],
            "params": [keyword arguments of SamplingParams, those of
            StructuredOutputsParams among them as a dictionary]}.

    Returns:
        seconds, and per prompt the tokens of each step as a list of lists and when
        they came, in seconds.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    engine = llm.llm_engine
    start = time.perf_counter()
    for i, (prompt, params) in enumerate(
        zip(job["prompts"], job["params"], strict=True)
    ):
        if grammar := params.get("structured_outputs"):
            params["structured_outputs"] = StructuredOutputsParams(**grammar)
        sampling = SamplingParams(output_kind=RequestOutputKind.DELTA, **params)
        engine.add_request(f"{start}-{i}", prompt, sampling)
    steps: list[list[list[int]]] = [[] for _ in job["prompts"]]
    times: list[list[float]] = [[] for _ in job["prompts"]]
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = list(output.outputs[0].token_ids)
            if tokens:
                number = int(output.request_id.rsplit("-", 1)[1])
                steps[number].append(tokens)
                times[number].append(time.perf_counter() - start)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "steps": steps, "times": times}


def peak_memory_mib() -> float:
    """Sum over this process and its children of the most memory each held."""
    import psutil

    me = psutil.Process()
    total = 0
    for process in (me, *me.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status")
        if status.exists():
            lines = status.read_text().splitlines()
            total += sum(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    return total / 1024


def main() -> None:
    import vllm
    from vllm import LLM

    with os.fdopen(int(sys.argv[1]), "w") as results:

        def reply(result: dict[str, Any]) -> None:
            print(json.dumps(result), file=results, flush=True)

        llm = LLM(**json.loads(sys.argv[2]))
        reply({"vllm": vllm.__version__})
        for line in sys.stdin:
            result = _generate(llm, json.loads(line))
            reply({**result, "peak_memory_mib": peak_memory_mib()})


if __name__ == "__main__":
    main()
