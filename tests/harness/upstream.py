# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of what lookahead takes from vLLM, by version.

    python -m tests.harness.upstream FOLDER...     record those of the vLLMs there

Taken are: every name imported from vLLM, every method that a subclass overrides, every
patched symbol, and `CALLED`. A fingerprint has the signature and a hash of the code
without comments and docstrings; a class's has the signatures of its methods. Nothing of
vLLM is imported, so that versions which cannot run here are read, too.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

RECORD = Path(__file__).with_name("upstream.json")
PACKAGE = Path(__file__).parents[2] / "vllm_lookahead"
GPU = "vllm.v1.worker.gpu"
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef
# What is reached through objects or at run time, where no import shows it.
CALLED = [
    *(
        f"{GPU}.model_runner:GPUModelRunner.{name}"
        for name in (
            "__init__",
            "_dummy_run",
            "_set_active_loras",
            "gather_batch_req_state",
            "postprocess_sampled",
            "profile_cudagraph_memory",
        )
    ),
    f"{GPU}.cudagraph_utils:prepare_inputs_to_capture",
    *(
        f"vllm.v1.attention.backends.{module}:{name}.{method}"
        for module, kind in (
            ("flash_attn", "FlashAttention"),
            ("flashinfer", "FlashInfer"),
            ("flex_attention", "FlexAttention"),
            ("triton_attn", "TritonAttention"),
        )
        for name, method in (
            (f"{kind}Impl", "__init__"),
            (f"{kind}Impl", "forward"),
            (f"{kind}Impl", "do_kv_cache_update"),
            (f"{kind}MetadataBuilder", "build"),
            (f"{kind}MetadataBuilder", "build_for_cudagraph_capture"),
            (f"{kind}MetadataBuilder", "get_cudagraph_support"),
        )
    ),
    "vllm.model_executor.layers.attention:Attention.forward",
    f"{GPU}.block_table:BlockTables.gather_block_tables",
    f"{GPU}.cudagraph_utils:ModelCudaGraphManager.capture",
    *(  # triton_kernels/noise.py is a copy of them
        f"{GPU}.sample.gumbel:{name}"
        for name in (
            "_log1p_neg_stable",
            "_murmur3_fmix32",
            "_murmur3_mix",
            "gumbel_noised_argmax",
            "murmur3_hash32",
            "murmur3_uniform32",
        )
    ),
    f"{GPU}.sample.sampler:Sampler.sample",
    f"{GPU}.sample.sampler:Sampler.get_logprobs_dims",
    f"{GPU}.spec_decode.adaptive_verification:"
    "AdaptiveVerificationManager.set_initial_cost_curves",
    f"{GPU}.spec_decode.utils:DraftTokensHandler.get_draft_tokens",
    f"{GPU}.spec_decode.utils:DraftTokensHandler.set_draft_tokens",
    f"{GPU}.structured_outputs:StructuredOutputsWorker.apply_grammar_bitmask",
    f"{GPU}.warmup:warmup_kernels",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots",
    *(  # which blocks a step gives out
        f"vllm.v1.core.sched.{name}"
        for name in (
            "output:NewRequestData.from_request",
            "scheduler:Scheduler._make_cached_request_data",
        )
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.__init__",
    "vllm.v1.engine.core:EngineCore.post_step",
    "vllm.v1.engine.core:EngineCore.step_with_batch_queue",
    "vllm.v1.structured_output:StructuredOutputManager._get_constraint_bounds",
    "vllm.v1.structured_output:StructuredOutputManager.grammar_bitmask",
    "vllm.v1.structured_output:StructuredOutputManager.validate_tokens",
    *(
        f"vllm.v1.structured_output.backend_{module}:{name}.{method}"
        for module, name in (
            ("guidance", "GuidanceGrammar"),
            ("xgrammar", "XgrammarGrammar"),
        )
        for method in ("accept_tokens", "is_terminated", "rollback", "validate_tokens")
    ),
    "vllm.v1.worker.gpu_model_runner:ExecuteModelState",
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
]


class Source:
    """The Python of one vLLM, in a folder that has the package `vllm`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = cache(lambda module: ast.parse("\n".join(self.lines(module))))

    def lines(self, module: str) -> list[str]:
        path = self.folder.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return file.read_text().split("\n")

    def find(self, symbol: str) -> tuple[str, ast.AST] | None:
        """The module and the definition of "module:Class.name", if there is one.

        A name that a module imports is looked for where it comes from, a method that a
        class inherits in the first base that has it.
        """
        module, _, path = symbol.partition(":")
        name, _, rest = path.partition(".")
        try:
            tree = self.tree(module)
        except FileNotFoundError:
            return None
        for node in ast.walk(tree):
            defined = getattr(node, "name", None)
            if isinstance(node, ast.Assign):
                targets = [t.id for t in node.targets if isinstance(t, ast.Name)]
                defined = name if name in targets else None
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                defined = node.target.id
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if alias.name == "*" or name == (alias.asname or alias.name):
                        original = name if alias.name == "*" else alias.name
                        start = f"{self._origin(module, node)}:{original}"
                        if found := self.find(f"{start}.{rest}" if rest else start):
                            return found
                continue
            if defined == name:
                if not rest:
                    return module, node
                return self._member(module, node, rest)
        if self.folder.joinpath(*module.split("."), f"{name}.py").exists():
            return module, ast.Module([], [])  # a module of its own
        return None

    def _origin(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        is_package = self.folder.joinpath(*module.split(".")).is_dir()
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *filter(None, [node.module])])

    def _member(
        self, module: str, owner: ast.AST, name: str
    ) -> tuple[str, ast.AST] | None:
        for node in getattr(owner, "body", []):
            if getattr(node, "name", None) == name:
                return module, node
        for base in getattr(owner, "bases", []):
            base_name = ast.unparse(base).split("[")[0]  # of a generic class
            found = self.find(f"{module}:{base_name}.{name}")
            if found:
                return found
        return None

    def version(self) -> str:
        text = (self.folder / "vllm" / "_version.py").read_text()
        line = next(x for x in text.splitlines() if x.startswith("__version__ ="))
        return ast.literal_eval(line.split("=")[-1].strip())


def fingerprint(node: ast.AST, lines: list[str]) -> list[str]:
    """The signature, or the kind of what has none, and a hash of the code.

    Args:
        node: a definition, as `Source.find` gives it.
        lines: of its module. They are hashed, for what Python makes of a tree depends
            on Python's version.
    """
    kind = type(node).__name__
    if isinstance(node, FUNCTION):
        kind = ast.unparse(node.args)
    wanted = _lines_of(node)
    for inner in ast.walk(node):
        body = getattr(inner, "body", None)
        if isinstance(body, list) and body and _is_text(body[0]):
            wanted -= _lines_of(body[0])
    if isinstance(node, ast.ClassDef):
        # Of a method what callers and subclasses see; its code is a symbol of its own.
        for method in node.body:
            if isinstance(method, FUNCTION):
                wanted -= set(range(method.body[0].lineno, method.end_lineno + 1))
    code = [lines[i - 1].split("  # ")[0].strip() for i in sorted(wanted)]
    text = "\n".join(line for line in code if line and not line.startswith("#"))
    return [kind, hashlib.sha256(text.encode()).hexdigest()[:12]]


def _lines_of(node: ast.AST) -> set[int]:
    """Numbers of a statement's lines, those of its decorators included."""
    if not hasattr(node, "lineno"):
        return set()
    above = [x.lineno for x in getattr(node, "decorator_list", [])]
    return set(range(min([node.lineno, *above]), node.end_lineno + 1))


def _is_text(statement: ast.AST) -> bool:
    value = getattr(statement, "value", None)
    return isinstance(statement, ast.Expr) and isinstance(value, ast.Constant)


def taken() -> list[str]:
    """Every symbol of vLLM that lookahead imports, overrides, patches or calls."""
    symbols = set(CALLED)
    for path in sorted(PACKAGE.rglob("*.py")):
        symbols.update(_imported_and_overridden(ast.parse(path.read_text())))
    for path in (PACKAGE / "engine" / "patches").glob("*.py"):
        patch = import_module(f"vllm_lookahead.engine.patches.{path.stem}")
        symbols.update(filter(None, [getattr(patch, "TARGET", None)]))
    return sorted(symbols)


def _imported_and_overridden(tree: ast.Module) -> Iterator[str]:
    names: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("vllm."):
            for alias in node.names:
                symbol = f"{node.module}:{alias.name}"
                names.setdefault(alias.asname or alias.name, []).append(symbol)
                yield symbol
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            for target in node.targets:  # Base = GPUModelRunner
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, []).extend(names.get(node.value.id, []))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
            for base in (symbol for b in bases for symbol in names.get(b, [])):
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        yield f"{base}.{method.name}"


def fingerprints(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The version in a folder, and the fingerprints of all that is taken from it.

    Left out are names that it does not have: a subclass's own, or another version's.
    """
    source = Source(folder)
    found = {symbol: source.find(symbol) for symbol in taken()}
    prints = {
        symbol: fingerprint(node, source.lines(module))
        for symbol, (module, node) in ((s, x) for s, x in found.items() if x)
    }
    return source.version(), prints


def moved(record: dict[str, list[str]], prints: dict[str, list[str]]) -> list[str]:
    """What differs, by symbol: gone, new, another signature, or other code."""
    seams = []
    for symbol in sorted(record.keys() | prints.keys()):
        before, now = record.get(symbol), prints.get(symbol)
        if before is None or now is None:
            seams.append(f"{symbol}: {'new' if now else 'gone'}")
        elif before[0] != now[0]:
            seams.append(f"{symbol}: ({before[0]}) became ({now[0]})")
        elif before != now:
            seams.append(f"{symbol}: its code changed")
    return seams


def main(folders: list[str]) -> None:
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for folder in folders:
        version, prints = fingerprints(Path(folder))
        record[version] = prints
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
