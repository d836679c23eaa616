import subprocess
import sys

import pytest

from slipstream.cli import main


def test_help_is_quick_and_names_every_verb() -> None:
    code = (
        "import sys; from slipstream.cli import main\ntry: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    for command in (["-m", "slipstream.cli", "--help"], ["-c", code]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert all(verb in done.stdout for verb in ("finetune", "upcycle", "doctor", "--debug"))


def test_a_mistake_is_one_line_and_debug_shows_the_rest(tmp_path) -> None:
    mistaken = ["upcycle", str(tmp_path / "none"), "--output", str(tmp_path / "o")]
    done = subprocess.run([sys.executable, "-m", "slipstream.cli", *mistaken], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (1, 1), done.stderr
    assert done.stderr.startswith("error: ")
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        main([*mistaken, "--debug"])
