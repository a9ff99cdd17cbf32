"""Make `adapters.zip`: adapters written by the real PEFT releases, and the logits those releases computed with them.

    for v in 0.3.0 ... 0.20.0; do pip install --no-deps --target releases/$v peft==$v; done
    python make.py releases            # runs every release in a process of its own

A release that needs names which today's transformers no longer has is given empty classes of those names; the code
that writes adapters does not use them.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).parent


def cases(peft, version: tuple[int, ...]) -> dict:
    lora = {"r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    known = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    variants = {
        "lora": {},
        "lora_bias_all": {"bias": "all"},
        "lora_bias_only": {"bias": "lora_only"},
        "lora_saved_head": {"modules_to_save": ["head"]},
        "lora_regex": {"target_modules": r".*layers\.1\.(q|down)_proj"},
        "lora_layers": {"layers_to_transform": [1]},
        "lora_embedding": {"target_modules": ["embed_tokens", "q_proj"]},
        "lora_patterns": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"layers.1.q_proj": 1}},
        "lora_rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "lora_b_bias": {"lora_bias": True},
        "lora_excluded": {"exclude_modules": ["layers.0.v_proj"]},
        "lora_tokens": {"trainable_token_indices": {"embed_tokens": [1, 5]}},
    }
    known = {f.name for f in dataclasses.fields(peft.LoraConfig)}
    found = {name: peft.LoraConfig(**{**lora, **more}) for name, more in variants.items() if set(more) <= known}
    schedule = {} if version < (0, 14) else {"total_step": 10}
    found["adalora"] = peft.AdaLoraConfig(
        init_r=3, target_r=2, lora_alpha=6, lora_dropout=0.1, target_modules=["q_proj", "v_proj"], **schedule
    )
    if version >= (0, 4):
        found["ia3"] = peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
    if hasattr(peft, "TrainableTokensConfig"):
        found["tokens"] = peft.TrainableTokensConfig(token_indices=[2, 7], target_modules=["embed_tokens"])
    return found


def make(folder: Path) -> None:
    """Write every case with the release that `import peft` finds."""
    import torch
    import transformers

    sys.path.insert(0, str(HERE))
    import model as base

    # names that older releases import and today's transformers no longer has; writing adapters does not use them
    lookup = type(transformers).__getattr__
    type(transformers).__getattr__ = lambda self, name: (
        type(name, (), {}) if name == "HybridCache" else lookup(self, name)
    )
    import peft
    from safetensors.torch import save_file

    version = tuple(int(part) for part in peft.__version__.split(".")[:2])
    expected = {}
    for name, config in cases(peft, version).items():
        model = peft.get_peft_model(base.Tiny(), config)
        trained = [(n, p) for n, p in sorted(model.named_parameters()) if p.requires_grad and "ranknum" not in n]
        start = 0
        with torch.no_grad():
            for key, parameter in trained:
                own = base.values(parameter.numel(), 500 + start).reshape(parameter.shape) * 0.3
                # magnitudes and rescaling vectors stay near what they start from
                parameter.copy_(parameter + 0.3 * own if "magnitude" in key or "ia3" in key else own)
                start += parameter.numel()
        model.eval()
        with torch.no_grad():
            expected[name] = model(base.inputs()).contiguous()
        options = {"save_embedding_layers": False} if version >= (0, 8) else {}
        model.save_pretrained(folder / name, **options)
        for extra in ("README.md",):
            (folder / name / extra).unlink(missing_ok=True)
    save_file(expected, folder / "logits.safetensors")
    (folder / "version").write_text(peft.__version__)


def main(releases: Path) -> None:
    with tempfile.TemporaryDirectory() as out:
        for release in sorted(releases.iterdir()):
            if not (release / "peft").is_dir():
                continue
            folder = Path(out) / release.name
            folder.mkdir()
            done = subprocess.run(
                [sys.executable, __file__, "--one", str(folder)],
                env={**os.environ, "PYTHONPATH": str(release), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
                capture_output=True, text=True,
            )  # fmt: skip
            last = done.stderr.strip().splitlines()[-1:] if done.returncode else []
            print(release.name, "failed" if done.returncode else "written", *last, flush=True)
        with zipfile.ZipFile(HERE / "adapters.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted(Path(out).rglob("*")):
                if path.is_file() and (Path(out) / path.relative_to(out).parts[0] / "version").exists():
                    info = zipfile.ZipInfo(str(path.relative_to(out)), date_time=(2020, 1, 1, 0, 0, 0))
                    archive.writestr(info, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        make(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))
