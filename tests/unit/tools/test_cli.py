# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trustme_init.errors import TrustRefusal
from trustme_tools.cli import completion, main
from trustme_tools.cli.verbs import Result, add_verb
from trustme_tools.errors import Exit, MissingToolError, ToolError, UsageError


def verbs(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, child in action.choices.items():
                yield from verbs(child, (*path, name))


def test_help_of_every_verb_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    paths = list(verbs(main.build_parser()))
    assert ("guestos", "build") in paths
    for path in paths:
        with pytest.raises(SystemExit) as stopped:
            main.main([*path, "--help"])
        assert stopped.value.code == 0, path
        text = capsys.readouterr().out
        assert text.startswith("usage: trustme"), path
        if len(path) > 1 or path in {("inspect",), ("completion",)}:
            assert "examples:" in text, path


def test_every_verb_has_json() -> None:
    parser = main.build_parser()
    for path in verbs(parser):
        node = parser
        for name in path:
            action = next(each for each in node._actions if isinstance(each, argparse._SubParsersAction))
            node = action.choices[name]
        if not any(isinstance(each, argparse._SubParsersAction) for each in node._actions):
            assert "--json" in node._option_string_actions, path


def test_help_loads_no_family_and_no_library() -> None:
    code = (
        "import sys\nfrom trustme_tools.cli.main import build_parser\nbuild_parser('').format_help()\n"
        "print(*sorted(name for name in sys.modules if name.startswith(('trustme_tools.', 'cryptography'))))"
    )
    source = str(Path(main.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": source}
    )
    assert done.stdout.split() == [
        "trustme_tools.cli",
        "trustme_tools.cli.main",
        "trustme_tools.cli.verbs",
        "trustme_tools.errors",
    ]


def run_handler(monkeypatch: pytest.MonkeyPatch, raised: BaseException | None, *arguments: str) -> int:
    def handler(_args: argparse.Namespace) -> Result:
        if raised is not None:
            raise raised
        return Result({"path": Path("/x")}, "fine \x1b[31m")

    def build(_wanted: str | None = None) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(prog="trustme")
        add_verb(parser.add_subparsers(), "try", handler, summary="try")
        return parser

    monkeypatch.setattr(main, "build_parser", build)
    return main.main(["try", *arguments])


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (ToolError("a", "b", code="c"), Exit.FAILED),
        (TrustRefusal("bad-signature", "a"), Exit.FAILED),
        (OSError(2, "No such file or directory", "/nowhere"), Exit.FAILED),
        (UsageError("a"), Exit.USAGE),
        (MissingToolError("mksquashfs", "squashfs-tools"), Exit.MISSING_TOOL),
        (KeyboardInterrupt(), Exit.INTERRUPTED),
    ],
)
def test_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: Exit
) -> None:
    assert run_handler(monkeypatch, raised, "--json") == code
    captured = capsys.readouterr()
    document: dict[str, Any] = json.loads(captured.out)
    assert (document["version"], document["command"]) == (1, "try")
    assert document["error"]["code"]
    assert {"cause", "evidence", "remedy"} <= set(document["error"])
    assert captured.err.startswith("trustme: ")


def test_remedy_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_handler(monkeypatch, MissingToolError("mksquashfs", "squashfs-tools"))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "remedy: install it: apt-get install squashfs-tools" in captured.err


def test_text_cannot_control_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_handler(monkeypatch, None) == 0
    assert capsys.readouterr().out == "fine ?[31m\n"


def test_json_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_handler(monkeypatch, None, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "version": 1,
        "command": "try",
        "result": {"path": "/x"},
    }


def test_wrong_usage_exits_2() -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["pki", "create"])
    assert stopped.value.code == Exit.USAGE


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_well_formed(shell: str) -> None:
    script = completion.generate(main.build_parser(), shell)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert ("#compdef" in script) == (shell == "zsh")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("trustme gu", {"guestos"}),
        ("trustme guestos ", {"build", "collect", "finish", "sign", "verify", "show"}),
        ("trustme pki create --alg", {"--algorithm"}),
        ("trustme pki create dir --force --pass", {"--passphrase-fd"}),
        ("trustme completion z", {"zsh"}),
        ("trustme pki create --algorithm ", {"rsa4096", "rsapss4096", "p384"}),
        ("trustme inspect a", {"a file.img"}),
    ],
)
def test_completion_in_bash(tmp_path: Path, line: str, expected: set[str]) -> None:
    (tmp_path / "a file.img").touch()  # offered where a file may stand, and only there
    script = completion.generate(main.build_parser(), "bash")
    words = line.split(" ")
    array = " ".join(f"'{word}'" for word in words)
    query = f'COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _trustme; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(
        ["bash"], input=f"{script}\n{query}\n", capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert set(done.stdout.splitlines()) == expected


def test_what_the_kernel_refuses_has_path_and_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["inspect", str(tmp_path / "nothing")]) == Exit.FAILED
    assert main.main(["inspect", str(tmp_path)]) == Exit.FAILED
    shown = capsys.readouterr().err
    assert f"{tmp_path}/nothing: No such file or directory" in shown
    assert "remedy: name a file; this is a directory" in shown


@pytest.mark.parametrize(
    "arguments",
    [
        ["guestos", "verify", "os-1", "--anchor", "ca.cert"],
        ["guestos", "sign", "os-1.sig", "--pki", "pki"],
        ["guestos", "verify", "os-1.conf", "--anchor", "ca.cert", "--at", "yesterday"],
        ["uefi", "auth", "--pki", "pki", "--out", "out", "--timestamp", "9999-12-31T23:59:59-10:00"],
        ["run", "image", "--once", "--power-cut", "["],
        ["image", "build", "--out", "out", "--policy", "nothing"],
    ],
)
def test_wrong_arguments_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(arguments)
    assert stopped.value.code == Exit.USAGE
    assert "invalid _" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--policy", "core.start_timeout_s.x=1"], "bad-policy-key"),
        (["--policy", "a.b.c=1"], "bad-policy-key"),
        (["--epoch", "99999999999999"], "bad-epoch"),
        (["--epoch", "0"], "bad-epoch"),
    ],
)
def test_image_build_refuses_before_it_builds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], code: str
) -> None:
    place = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), "--json"]
    assert main.main(["image", "build", *place, *arguments]) == Exit.USAGE
    assert json.loads(capsys.readouterr().out)["error"]["code"] == code
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 2}'])
def test_a_bad_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    for name in ("trustme-base.img", "trustme-base.efi", "pki"):
        (tmp_path / name).touch()
    (tmp_path / "manifest.json").write_text(text)
    assert main.main(["run", str(tmp_path), "--once"]) == Exit.FAILED
    assert "remedy: build the image again" in capsys.readouterr().err


def test_inspect_says_what_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "program.efi"
    path.write_bytes(b"MZ" + bytes(2000))
    assert main.main(["inspect", str(path), "--json"]) == Exit.FAILED
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "unknown-file"


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [(">/dev/full", 1, "No space left on device"), (">&-", 0, ""), ("| head -c1", 0, "")],
)
def test_output_that_cannot_be_written(redirection: str, code: int, said: str) -> None:
    command = f"set -o pipefail; {sys.executable} -m trustme_tools completion bash {redirection}"
    source = str(Path(main.__file__).parents[2])
    environment = {"PYTHONPATH": source, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_a_terminal_without_the_characters(tmp_path: Path) -> None:
    path = tmp_path / "boot.json"
    path.write_text('{"version": 1, "stages": [{"name": "early", "ms": 1}]}')
    source = str(Path(main.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "trustme_tools", "inspect", str(path)],
        capture_output=True,
        check=True,
        env={"PYTHONPATH": source, "PYTHONIOENCODING": "ascii"},
    )
    assert b"????" in done.stdout


def test_image_build_deletes_nothing_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    for place in (tmp_path, tmp_path / "diary.txt"):
        assert main.main(["image", "build", "--out", str(place)]) == Exit.FAILED
        assert "not an image directory" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["dear diary"]
