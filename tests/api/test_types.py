"""What editors and type checkers know of the public names."""

import ast
import os
from pathlib import Path

import pytest
from processes import start

import peftfast

PACKAGE = Path(peftfast.__file__).parent

PROGRAM = """
import peftfast
from peftfast import AdaLoraConfig, LoraConfig, PeftModel
from torch import nn

config = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.1)
reveal_type(config.r)  # int
LoraConfig(rank=3)  # Unexpected keyword argument "rank"
reveal_type(AdaLoraConfig(init_r=3, total_step=5, r=8).total_step)  # int | None
reveal_type(peftfast.IA3Config(target_modules=["k"], feedforward_modules=[]))  # peftfast.methods.ia3.IA3Config
model = peftfast.patch(nn.Linear(1, 1), config)
reveal_type(model)  # peftfast.model.PeftModel
peftfast.get_peft_mode  # Module has no attribute "get_peft_mode"
model.set_adapter("a")
model.merge_and_unload()
reveal_type(PeftModel.from_pretrained(nn.Linear(1, 1), "folder"))  # peftfast.model.PeftModel
reveal_type(model.get_nb_trainable_parameters())  # tuple[int, int]
reveal_type(peftfast.get_peft_model_state_dict(model))  # dict[str, torch._tensor.Tensor]
"""


def test_the_stub_has_the_names_of_the_package():
    """`python tools/stub.py` writes it anew."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imports = [statement for statement in stub.body if isinstance(statement, ast.ImportFrom)]
    said = {alias.name: statement.module for statement in imports for alias in statement.names}
    named = {name: f"peftfast.{module}" for name, module in peftfast._WHERE.items()}
    assert said == {**named, **dict.fromkeys(peftfast._MODULES, "peftfast"), "__version__": "peftfast.version"}
    assert all(hasattr(peftfast, name) for name in said)


@pytest.mark.slow
def test_a_type_checker_knows_names_fields_and_results(tmp_path):
    pytest.importorskip("mypy")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    paths = os.pathsep.join(map(str, (PACKAGE.parent, PACKAGE.parent / "kernels")))
    command = ["-m", "mypy", "--follow-imports=silent", f"--cache-dir={tmp_path}/cache", program]
    run = start(command, tmp_path, MYPYPATH=paths)
    said = dict(line.split(":", 2)[1:] for line in run.stdout.splitlines() if line.startswith("program.py"))
    expected = {str(i): line.split("  # ")[1] for i, line in enumerate(PROGRAM.splitlines(), 1) if "  # " in line}
    assert said.keys() == expected.keys(), run.stdout + run.stderr
    for line, what in expected.items():
        assert what in said[line]
