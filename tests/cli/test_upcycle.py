from pathlib import Path

import pytest

from slipstream.cli import main


def test_bad_input_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["upcycle", str(tmp_path / "nowhere"), "--output", str(tmp_path / "moe")])
    assert exit_.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: there is no folder or file")
    assert error.count("\n") == 1
    assert not any(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        main(["upcycle", str(tmp_path / "nowhere"), "--output", str(tmp_path / "moe"), "--debug"])
