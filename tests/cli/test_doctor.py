"""`doctor`, `completion` and `--version`: what a user asks before anything works, or when something does not."""

import subprocess
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

import diffperception
from diffperception import doctor
from diffperception.cli.main import COMMANDS, main
from diffperception.doctor import Need


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"diffperception {diffperception.__version__}\n"


def test_the_doctor_names_versions_devices_and_extras(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0  # everything needed is installed where tests run
    said = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in said
    assert "heif" in said
    assert "hypothesis" not in said  # for developers
    assert metadata.version("timm") in said


def test_what_is_missing_or_too_old_is_told_with_its_command(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["torch>=9999", "nosuchpackage<3,>=2", 'alsonone>=1; extra == "heif"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "missing or too old: torch, nosuchpackage\n" in said  # an extra is nobody's duty
    assert "pip install 'torch>=9999'" in said
    assert "pip install 'nosuchpackage<3,>=2'" in said
    assert "pip install 'alsonone>=1'" in said


def test_a_version_before_its_release_fits() -> None:
    assert Need(Requirement("torch>=2.8"), "", "2.9.0.dev20260101").fits
    assert not Need(Requirement("torch>=2.8"), "", "2.7.1").fits
    assert not Need(Requirement("torch>=2.8"), "", None).fits


@pytest.fixture(scope="module")
def completion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "diffperception"
    with path.open("w") as file, redirect_stdout(file):
        assert main(["completion", "bash"]) == 0
    return path


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["d"], {"doctor"}),
        (["train", "--data.batch"], {"--data.batch_size"}),
        (["train", "--fit.ba"], {"--fit.batch_size"}),  # of another task than detection
        (["predict", "--precision", ""], {"32", "bf16"}),
        (["predict", "--ti"], {"--tile"}),
        ([""], set(COMMANDS)),
    ],
)
def test_bash_completes_commands_options_and_choices(completion: Path, words: list[str], wanted: set[str]) -> None:
    script = f"""
source {completion}
COMP_WORDS=(diffperception "$@"); COMP_CWORD=$#
_shtab_diffperception
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    found = subprocess.run(["bash", "-c", script, "bash", *words], check=True, capture_output=True, text=True).stdout
    assert wanted <= set(found.split())
    if wanted != set(COMMANDS):
        assert set(found.split()) == wanted
